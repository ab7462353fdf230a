"""The command line as people use it: right commands do what they say, wrong ones say what to change."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys

import jax
import pytest

from attnlab import arguments, cli, memory, output
from attnlab.train import workdir as workdir_lib
from tests import tiers
from tests.flags import environment
from tests.train import runs

LM = str(runs.ROOT / "configs" / "lm.py")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file of a small model on a small corpus."""
    os.environ["ATTNLAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    home = tmp_path_factory.mktemp("configs")
    return runs.write_config(home / "c.py", runs.corpus(home / "corpus"), train__steps=4, train__eval_every=2)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The workdir of a finished run; tests leave it as it is."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    assert cli.main(["train", "--config", config, "--workdir", str(path)]) == 0
    return path


_lowered: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: _lowered.append(event) if "jaxpr_to_mlir" in event else None
)


@pytest.fixture
def refused(attnlab):
    """Runs a command that must be refused with 2 and one to three lines on stderr, before any compilation."""

    def call(*args, parts=()):
        _lowered.clear()
        code, out, err = attnlab(*args)
        assert len(_lowered) <= 1  # a constant of an abstract evaluation
        assert code == 2, (code, out, err)
        assert out == "" and 1 <= len(err.splitlines()) <= 3 and "Traceback" not in err, (out, err)
        for part in parts:
            assert part in err, err

    return call


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, parts",
    [
        (["trian"], ["'trian'", "train"]),
        (["tokenizer"], ["ACTION", "attnlab tokenizer --help"]),
        (["tokenizer", "make"], ["'make'", "apply"]),
        (["train"], ["--config", "--workdir", "attnlab train --help"]),
        (["train", "--config", LM], ["--workdir"]),
        (["train", "--config", LM, "--wrkdir", "x"], ["'--wrkdir'", "did you mean '--workdir'"]),
        (["train", "--conf", LM, "--workdir", "x"], ["'--conf'", "did you mean '--config'"]),
        (["train", "--config", LM, "--workdir="], ["--workdir", "path"]),
        (["train", "--config", LM, "--workdir", "x", "--train.steps=3"], ["--train.steps=3", "--config.any.field=v"]),
        (["train", "--config", LM, "--workdir", "x", "--json"], ["'--json'"]),
        (["train", "--config", LM, "--workdir", "x", "--config.train.steps"], ["--config.train.steps", "field=value"]),
        (["train", "--config", LM, "--workdir", "x", "stray"], ["'stray'"]),
        (["list", "--config.train.steps=3"], ["--config.train.steps=3"]),
        (["list", "gatd"], ["'gatd'", "did you mean 'gated'", "softmax"]),
        (["list", "--jsn"], ["did you mean '--json'"]),
        (["list", "--length", "0"], ["--length: '0'", "from 1"]),
        (["list", "--width", "6"], ["width = 6", "heads"]),
        (["list", "--parameters"], ["--parameters is of one mixer", "attnlab list MIXER --parameters"]),
        (["list", "gatd", "--parameters"], ["did you mean 'gated'"]),
        (["list", "gated", "--parameters", "--width", "0"], ["--width: '0'", "from 1"]),
        (["cost", "--config", LM, "--length", "0"], ["--length: '0'", "from 1"]),
        (["cost", "--config", LM, "--length", "x"], ["--length", "'x'"]),
        (["cost", "--config", f"{LM}:mixer=sofmax"], ["did you mean 'softmax'"]),
        (["eval", "--workdir", "/no/such"], ["workdir /no/such holds no run", "train one"]),
        (["eval", "--workdir", LM], [LM, "is a file"]),
        (["generate", "--workdir", "/no/such", "--prompt", "a"], ["holds no run"]),
        (["generate", "--workdir", "x", "--prompt", "a", "--prompt-file", "b"], ["not allowed with"]),
    ],
)  # fmt: skip
def test_bad_commands(refused, tmp_path, monkeypatch, args, parts):
    """A wrong command says what is wrong in it, and makes nothing."""
    monkeypatch.chdir(tmp_path)
    refused(*args, parts=parts)
    assert not list(tmp_path.iterdir())


def test_no_command_prints_the_help(attnlab):
    """`attnlab` alone shows the verbs and examples, and is no success."""
    code, out, err = attnlab()
    assert code == 2 and not out and "examples:" in err and "generate" in err


@pytest.mark.parametrize(
    "verb", ["", "train", "eval", "generate", "list", "cost", "ablate", "compile", "tokenizer", "tokenizer apply"]
)
def test_help_of_every_verb(attnlab, verb):
    """Every option is explained; verbs that read a config explain overrides."""
    verb = verb.split()
    code, out, _ = attnlab(*verb, "--help")
    assert code == 0
    if verb and verb != ["list"] and verb != ["tokenizer"]:
        assert "--config.train.steps=200" in out
    parser = arguments.build()
    for name in verb:
        parser = next(a for a in parser._actions if a.choices and name in a.choices).choices[name]
    assert all(action.help for action in parser._actions if action.dest not in ("verb", "action", "name"))


@pytest.mark.parametrize(
    "overrides, parts",
    [
        ("model.vocab=10", ["model.vocab = 10", "data.tokenizer = 'bytes'", "257 or more"]),
        ("data.source=text:/no/such/*.py", ["data.source", "/no/such/*.py"]),
        ("data.tokenizer=/no/such.json", ["/no/such.json", "'bytes'"]),
        ("data.heldout=0", ["data.heldout"]),
        ("data.batch=64000", ["64000", "data.batch"]),
        ("mesh.data=3", ["mesh.data = 3", "multiples of 3"]),
        ("mesh.data=16", ["mesh.data = 16", "at most 8"]),
        ("mesh.data=-1 mesh.fsdp=3", ["mesh.fsdp = 3", "a divisor of 8"]),
        ("data.batch=4 mesh.data=8", ["multiples of 8"]),
        ("train.accumulate=4 mesh.data=8", ["train.accumulate = 2 sequences", "multiples of 8"]),
        ("mesh.tensor=8 mesh.fsdp=1 model.mlp_width=12", ["mesh.tensor = 8", "divisors of"]),
        ("model.width=1e6", ["MB free", "train.keep"]),
    ],
)
def test_what_only_the_start_of_a_run_can_tell(refused, config, tmp_path, overrides, parts):
    """Data, devices and disk are checked before anything is compiled, and no workdir is left behind."""
    path = tmp_path / "a" / "b"
    refused("train", "--config", config, "--workdir", path, *(f"--config.{o}" for o in overrides.split()), parts=parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["file", "below"])
def test_workdir_that_is_a_file(refused, config, tmp_path, where):
    """A file in the place of the workdir, or of a directory above, is named and kept."""
    file = tmp_path / "file"
    file.write_text("keep me")
    path = file if where == "file" else file / "a" / "b"
    refused("train", "--config", config, "--workdir", path, parts=[f"{file} is a file"])
    assert file.read_text() == "keep me"


def test_workdir_with_a_name_too_long(refused, config, tmp_path):
    """What the filesystem refuses is said in its words."""
    refused("train", "--config", config, "--workdir", tmp_path / ("a" * 300), parts=["File name too long"])


def test_full_disk(refused, config, tmp_path, monkeypatch):
    """Too little space for the checkpoints is said before the run, in figures."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(workdir_lib.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    parts = ["0.0 MB free", "need", "train.keep"]
    refused("train", "--config", config, "--workdir", tmp_path / "run", parts=parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, reason", [("ro", "Read-only file system"), ("full", "No space left on device")])
def test_mounted_workdir(refused, config, tmp_path, kind, reason):
    """On a read-only or a full filesystem nothing is left behind."""
    mount = tmp_path / "mount"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k" + (",ro" if kind == "ro" else ""), "tmpfs", str(mount)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not possible here")
    try:
        if kind == "full":
            with pytest.raises(OSError), (mount / "fill").open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
        refused("train", "--config", config, "--workdir", mount / "run", parts=[str(mount), reason])
        assert [p.name for p in mount.iterdir()] == (["fill"] if kind == "full" else [])
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("error", [OSError(28, "x"), ValueError("RESOURCE_EXHAUSTED: ... [os_error_code='28']")])
def test_disk_that_fills_up_in_a_run(tmp_path, error):
    """A full disk is said as such whichever library met it, even behind another exception."""
    with pytest.raises(workdir_lib.UserError, match="No space left on device; the last complete checkpoint is kept"):
        with workdir_lib.hold(tmp_path):
            try:
                raise error
            finally:
                raise RuntimeError("while closing")
    with pytest.raises(RuntimeError, match="something else"), workdir_lib.hold(tmp_path):
        raise RuntimeError("something else")


def test_two_runs_in_one_workdir(refused, config, tmp_path):
    """The second is refused, names the first, and takes nothing away from it."""
    with workdir_lib.hold(tmp_path / "run"):
        refused("train", "--config", config, "--workdir", tmp_path / "run", parts=[f"process {os.getpid()}", "in use"])
        assert (tmp_path / "run" / "lock").exists()


@pytest.mark.parametrize("text", [b"{", b"[]", b"", b"\xff", b'{"config": 3}', b"{}"])
def test_damaged_config_json(refused, config, tmp_path, text):
    """A workdir whose config.json is damaged is not trained in, evaluated or written over."""
    (tmp_path / "config.json").write_bytes(text)
    for args in (["train", "--config", config], ["eval"], ["generate", "--prompt", "a"]):
        refused(*args, "--workdir", tmp_path, parts=["config.json is damaged"])
    assert (tmp_path / "config.json").read_bytes() == text


def snapshot(path):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*") if p.is_file() and p.name != "lock"}


@pytest.mark.parametrize(
    "args, parts",
    [
        (["--config.optimizer.learning_rate=0.5"], ["optimizer.learning_rate: 0.01 -> 0.5", "change=continue"]),
        (["--config.model.mixers.M=gated"], ["model.mixers.M.name: 'softmax' -> 'gated'", "more"]),
        (["--config.train.steps=9", "--config.model.width=32", "--config.train.on_config_change=continue"],
         ["do not fit", "float32[260, 16]", "float32[260, 32]"]),
        (["--config.train.steps=9", "--config.optimizer=lion", "--config.train.on_config_change=continue"],
         ["do not fit", "opt_state", "not there"]),
    ],
)  # fmt: skip
def test_workdir_of_another_config(refused, finished, config, args, parts):
    """What changed is named; a run is never continued with arrays that do not fit, and its checkpoints stay."""
    before = snapshot(finished)
    refused("train", "--config", config, "--workdir", finished, *args, parts=parts)
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    "args, parts",
    [
        (["--temperature", "-1"], ["--temperature: '-1'", "0 or more"]),
        (["--temperature", "nan"], ["--temperature", "'nan'"]),
        (["--top-p", "0"], ["--top-p: '0'", "above 0"]),
        (["--top-k", "-1"], ["--top-k: '-1'", "from 0"]),
        (["--tokens", "0"], ["--tokens: '0'", "from 1 to 1073741824"]),
        (["--tokens", "3000000000"], ["--tokens: '3000000000'", "to 1073741824"]),
        (["--samples", "0"], ["--samples: '0'"]),
        (["--seed", "-1"], ["--seed: '-1'", "from 0 to 2147483647"]),
        (["--stop", "abc"], ["stop = 'abc' is 3 tokens", "eod, none"]),
        (["--stop", ""], ["stop = '' is 0 tokens"]),
        (["--checkpoint", "3"], ["checkpoint '3'", "best, latest, "]),
        (["--checkpoint", "²"], ["checkpoint '²'", "best, latest, "]),
        (["--config.model.width=32"], ["do not fit", "float32[260, 32]"]),
        (["--config.data.tokenizer=/no/such.json"], ["/no/such.json"]),
        (["--config.mesh.data=16"], ["mesh.data = 16", "at most 8"]),
    ],
)
def test_bad_generate(refused, finished, args, parts):
    """Impossible sampling, checkpoints and overrides are refused by the option's name before anything is compiled."""
    refused("generate", "--workdir", finished, "--prompt", "a", *args, parts=parts)


def test_bad_prompts(refused, finished, tmp_path, monkeypatch):
    """Missing, binary and wrongly encoded prompts."""
    (tmp_path / "binary").write_bytes(b"ab\xff")
    generate = ["generate", "--workdir", finished]
    refused(*generate, "--prompt-file", tmp_path / "none", parts=["none", "No such file"])
    refused(*generate, "--prompt-file", tmp_path, parts=["Is a directory"])
    refused(*generate, "--prompt-file", tmp_path / "binary", parts=["binary is not UTF-8", "position 2"])
    refused(*generate, "--prompt", "a\udcff", parts=["--prompt is not UTF-8"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    refused(*generate, parts=["stdin is not UTF-8"])


@pytest.mark.parametrize("batches", ["0", "-1", "x"])
def test_bad_batches(refused, finished, batches):
    """--batches is a count."""
    refused("eval", "--workdir", finished, "--batches", batches, parts=["--batches", batches])


def test_what_memory_cannot_hold(refused, finished, config, tmp_path, monkeypatch):
    """On a CPU a batch or a model that the machine cannot hold is refused: the kernel would end the process."""
    monkeypatch.setattr(memory.os, "sysconf", lambda _: 1000)  # a thousand pages of a thousand bytes
    parts = ["GB of memory", "lower", "data.length"]
    refused("eval", "--workdir", finished, "--config.data.length=100000", "--config.data.batch=1", parts=parts)
    refused("train", "--config", config, "--workdir", tmp_path / "run", "--config.model.width=256", parts=parts)
    assert not list(tmp_path.iterdir())


def test_a_run_without_checkpoints(refused, finished, tmp_path):
    """A run that saved nothing yet, and a checkpoint that is an empty directory."""
    shutil.copy(finished / "config.json", tmp_path)
    refused("eval", "--workdir", tmp_path, parts=["no checkpoint yet"])
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    refused("eval", "--workdir", tmp_path, parts=["none of the checkpoints 4", "is whole"])


# --- what works -------------------------------------------------------------------------------------------------------


def no_constants(name):
    raise AssertionError(f"{name} is not JSON")


def test_json_is_all_of_stdout(attnlab, finished, config):
    """Every verb with --json prints one object that a strict parser reads."""
    _lowered.clear()
    found = {}
    for args in (
        ["list"], ["list", "gated"], ["list", "gated", "--parameters"],
        ["cost", "--config", config], ["eval", "--workdir", finished, "--batches", "1"],
        ["generate", "--workdir", finished, "--prompt", "def f", "--tokens", "3"],
    ):  # fmt: skip
        code, out, err = attnlab(*args, "--json")
        assert code == 0, err
        found[args[0], len(args)] = json.loads(out, parse_constant=no_constants)
    assert {row["name"] for row in found["list", 1]} >= {"softmax", "gated"}
    assert found["list", 2]["name"] == "gated"
    assert {row["path"]: row["role"] for row in found["list", 3]["parameters"]}["gate.linear.kernel"] == "matrix"
    assert found["cost", 3]["length"] == 32 and found["eval", 5]["step"] in (2, 4)
    assert len(found["generate", 7]["samples"][0]["tokens"]) <= 3
    assert _lowered  # what `refused` listens to does tell of compilations


def test_json_has_no_nan(capsys):
    """What is not finite is null."""
    output.write_json({"a": [float("nan"), float("inf"), 1.5], "b": {"c": float("-inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "b": {"c": None}}


def test_generate_several_and_stdin(attnlab, finished, monkeypatch):
    """Several prompts with several samples; the same from stdin; an empty prompt starts a document."""
    args = ["generate", "--workdir", finished, "--tokens", "3"]
    code, out, _ = attnlab(*args, "--prompt", "ab", "--prompt", "c", "--samples", "2")
    assert code == 0 and [f"--- sample {i} of 4 ---" in out for i in range(1, 5)] == [True] * 4
    printed = {}
    for text in ("ab", ""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        code, printed[text], _ = attnlab(*args)
        assert code == 0 and printed[text].startswith(text)
    assert attnlab(*args, "--prompt", "ab")[1] == printed["ab"]


def test_tables_are_whole_in_a_pipe(attnlab):
    """A row is a line with all its text, and nothing in it is taken for markup."""
    code, out, _ = attnlab("list")
    assert code == 0 and any("arXiv:1706.03762" in line and line.startswith("softmax ") for line in out.splitlines())
    output.write_table("t", ["a"], [["x [B, T] [bold]"]])
    code, out, _ = attnlab("list", "softmax")
    assert code == 0 and out.startswith("t\na\nx [B, T] [bold]\n")
    code, out, _ = attnlab("list", "softmax", "--parameters", "--width", "64")
    assert code == 0 and "width 64; the last column is with optimizer=muon" in out.splitlines()[0]
    assert any(line.split() == ["q.kernel", "64", "x", "64", "embed,", "heads", "matrix", "-", "yes", "muon"]
               for line in out.splitlines())  # fmt: skip


def test_override_after_a_space(attnlab, config):
    """`--config.key value` is `--config.key=value`."""
    lengths = [
        json.loads(attnlab("cost", "--config", config, "--json", *override)[1])["length"]
        for override in (["--config.data.length", "24"], ["--config.data.length=24"])
    ]
    assert lengths == [24, 24]


def test_a_finished_run_is_left_alone(attnlab, finished, config):
    """The same command again, by the file or by the run's config.json, says that it is complete."""
    before = snapshot(finished)
    for spec in (config, finished / "config.json"):
        code, out, _ = attnlab("train", "--config", spec, "--workdir", finished)
        assert code == 0 and "complete: step 4 of 4" in out
    assert snapshot(finished) == before


def test_from_text_to_a_model_on_subwords(attnlab, refused, config, tmp_path):
    """Train a tokenizer, tokenise with it, train on the shards; a vocabulary beyond the model's is refused."""
    tokenizer, shards = tmp_path / "bpe.json", tmp_path / "shards"
    code, out, err = attnlab("tokenizer", "train", "--config", config, "--out", tokenizer, "--vocab", "260", "--json")
    assert code == 0 and json.loads(out)["vocab_size"] == 260, err
    use = f"--config.data.tokenizer={tokenizer}"
    code, out, err = attnlab("tokenizer", "apply", "--config", config, use, "--out", shards, "--shards", "2", "--json")
    assert code == 0 and json.loads(out)["documents"] == 40, err
    args = ["train", "--config", config, "--workdir", tmp_path / "run", use,
            f"--config.data.source=array_record:{shards}/*.array_record", "--config.train.sample_tokens=0"]  # fmt: skip
    refused(*args, "--config.model.vocab=258", parts=["model.vocab = 258", "260 or more"])
    code, out, err = attnlab(*args, "--config.train.eval_every=0")
    assert code == 0 and "step 4/4" in out, err
    refused("tokenizer", "train", "--config", config, "--out", tokenizer, "--vocab", "3", parts=["3", "257"])
    refused("tokenizer", "apply", "--config", config, "--out", tmp_path / "s", "--shards", "0", parts=["0"])
    refused("tokenizer", "apply", "--config", config, "--out", f"{config}/x", parts=["x"])


def test_out_of_memory_is_said_in_two_lines(attnlab, monkeypatch):
    """What XLA raises when memory runs out ends with 1 and what to lower; other errors keep their traceback."""

    def fails(message):
        def verb(*_):
            raise RuntimeError(message)

        monkeypatch.setitem(cli._VERBS, "list", verb)

    fails("header\nRESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nmore")
    code, _, err = attnlab("list")
    assert code == 1 and "allocating 5 bytes" in err and "data.batch" in err and len(err.splitlines()) == 2
    fails("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        attnlab("list")


def test_help_and_errors_come_without_jax(tmp_path):
    """What needs no model loads no jax; the reader of a pipe may leave early."""
    code = "import sys; from attnlab import cli; cli.main([]); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True).returncode == 0
    command = [sys.executable, "-m", "attnlab", "list", "gated"]
    process = subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 0


@tiers.exhaustive
@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_output(config, tmp_path):
    """`attnlab train | head -1` trains to the end."""
    command = [sys.executable, "-m", "attnlab", "train", "--config", config, "--workdir", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=runs.ROOT, env=environment(), **pipes)
    process.stdout.readline()
    process.stdout.close()
    err = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, err
    assert [line["step"] for line in runs.lines(tmp_path / "run")] == [1, 2, 3, 4]
