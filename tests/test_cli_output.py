"""Streams that cannot be written: no work is lost, one line says why, and the exit code is 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from attnlab import output
from tests import tiers
from tests.train import runs


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    home = tmp_path_factory.mktemp("output")
    os.environ["ATTNLAB_CACHE"] = str(home / "cache")
    return runs.write_config(home / "c.py", runs.corpus(home / "corpus"), train__steps=2, train__eval_every=0,
                             optimizer__warmup=7,
                             train__sample_tokens=0)  # fmt: skip


def shell(command, **environment):
    """Runs a line in which `attnlab` is the command line: exit code, stdout, stderr."""
    line = "unset PYTHONUNBUFFERED; " + command.replace("attnlab ", f"{sys.executable} -m attnlab ")
    done = subprocess.run(["bash", "-c", line], cwd=runs.ROOT, env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    return done.returncode, done.stdout, done.stderr


class Full:
    """A stream on a full disk."""

    def __init__(self, number=28):
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))

    flush = lambda self: self.write("")
    isatty = lambda self: False
    fileno = lambda self: os.open(os.devnull, os.O_WRONLY)


STREAMS = [(None, "stdout is closed"), (Full(), "No space left on device"), (Full(32), "")]


@pytest.mark.parametrize("stream, said, machine", [*((*case, []) for case in STREAMS), (*STREAMS[1], ["--json"])])
def test_results_that_cannot_be_written(attnlab, config, tmp_path, monkeypatch, stream, said, machine):
    """One line on stderr and 2, or 0 in silence where a pipe's reader left; what goes into files is there, whole."""
    monkeypatch.setattr(sys, "stdout", stream)
    tokenizer = tmp_path / f"{len(machine)}.json"
    for args in (["list"], ["list", "gated"], ["cost", "--config", config],
                 ["tokenizer", "train", "--config", config, "--vocab", 258, "--out", tokenizer]):  # fmt: skip
        code, _, err = attnlab(*args, *machine)
        assert code == (2 if said else 0) and len(err.splitlines()) == bool(said) and said in err, (args, err)
    assert tokenizer.stat().st_size and (not said or f"{tokenizer} is written" in err)


@pytest.mark.parametrize("stream, said", [*STREAMS, (Full(5), "Input/output error")])
def test_a_run_outlives_its_console(attnlab, config, tmp_path, monkeypatch, stream, said):
    """Training goes on to the end, in the workdir; then one line says that it could not be said."""
    monkeypatch.setattr(sys, "stdout", stream)
    run = tmp_path / "run"
    code, _, err = attnlab("train", "--config", config, "--workdir", run)
    assert code == (2 if said else 0) and said in err and len(err.splitlines()) == bool(said), err
    assert [line["step"] for line in runs.lines(run)] == [1, 2] and (run / "checkpoints" / "2").exists()
    log = (run / "log.txt").read_text()
    assert (
        "done: step 2" in log and log.count("optimizer.warmup = 7 is not below train.steps (2): the warm-up is 0") == 1
    )


def test_stderr_that_cannot_be_written(attnlab, monkeypatch):
    """What would be said is dropped; the exit code is what it would be."""
    for stream in (None, Full()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert attnlab("eval", "--workdir", "/no/such")[0] == 2
        assert attnlab("list", "gated", "--json")[0] == 0
        output.note("dropped")


@pytest.mark.parametrize("command, code, said", [
    ("attnlab list >&-", 2, "attnlab list: stdout is closed\n"),
    pytest.param("attnlab list --json > /dev/full", 2, "attnlab list: stdout cannot be written: No space left on "
                 "device\n", marks=tiers.exhaustive),
    ("attnlab --help > /dev/full", 2, "attnlab: stdout cannot be written: No space left on device\n"),
    ("attnlab list --length 0 2> /dev/full", 2, ""),
    ("attnlab --help | head -1; exit ${PIPESTATUS[0]}", 0, ""),
])  # fmt: skip
def test_real_streams(command, code, said):
    """Python adds nothing of its own at exit, neither text nor another exit code."""
    found, _, err = shell(command)
    assert (found, err) == (code, said)


def test_no_streams_at_all(config, tmp_path):
    """With all three closed no file takes the place of a stream: what is said does not go into it."""
    out = tmp_path / "t.json"
    assert shell(f"attnlab tokenizer train --config {config} --vocab 300 --out {out} <&- >&- 2>&-")[0] == 2
    assert json.loads(out.read_text())["model"]["vocab"]
    opened = "import sys, attnlab.output; attnlab.output.prepare(); sys.exit(open('/dev/zero').fileno())"
    assert shell(f'{sys.executable} -c "{opened}" <&- >&- 2>&-')[0] > 2


def test_ascii(config, tmp_path):
    """What stdout's encoding does not have is written as its escape."""
    out = tmp_path / "\u00e9\u6f22.json"
    code, printed, err = shell(f"attnlab tokenizer train --config {config} --vocab 258 --out {out}",
                               PYTHONIOENCODING="ascii")  # fmt: skip
    assert code == 0 and "\\xe9\\u6f22.json" in printed and out.exists(), err
