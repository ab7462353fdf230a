"""`attnlab lm-eval`: tasks of lm-evaluation-harness over a run. Those that need it are skipped where it is absent."""

from __future__ import annotations

import importlib.util
import json
import math
import types

import jax
import numpy as np
import pytest

from attnlab import cli
from attnlab.data.tokenizers import BytesTokenizer
from attnlab.evaluate import cloze, requests
from attnlab.evaluate.generate import Sampling, generate
from attnlab.evaluate.scorer import Scorer
from attnlab.interchange import evaluating
from attnlab.train import restore
from attnlab.train.program import Program
from tests.train import runs

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
OPTIONS = {"loss_chunk": 8192, "loss_impl": "auto"}
ANIMALS = ("horse", "cat")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a few steps, and beside it a folder of tasks over a local file."""
    path = tmp_path_factory.mktemp("lm_eval")
    source = runs.corpus(path / "text")
    config = runs.write_config(path / "config.py", source, train__steps=4, train__save_every=4, train__eval_every=4)
    assert cli.main(["train", "--config", config, "--workdir", str(path / "run")]) == 0
    rows = [{"q": f"A {a}", "choices": ["horse", "cat", "x"], "gold": i % 2} for i, a in enumerate(ANIMALS * 3)]
    data = path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    (path / "tasks").mkdir()
    shared = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    chosen = "output_type: multiple_choice\ndoc_to_text: '{{q}}:'\ndoc_to_target: gold\ndoc_to_choice: choices\n"
    (path / "tasks" / "pick.yaml").write_text(f"task: attnlab_pick\n{shared}{chosen}")
    written = "output_type: generate_until\ndoc_to_text: '{{q}}:'\ndoc_to_target: '{{choices[gold]}}'\n"
    drawn = "generation_kwargs:\n  until: ['\\n', 'xx']\n  max_gen_toks: 5\n  num_beams: 1\n"
    (path / "tasks" / "write.yaml").write_text(f"task: attnlab_write\n{shared}{written}{drawn}")
    return path / "run"


def test_without_the_harness_it_says_what_to_install(attnlab, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = attnlab("lm-eval", "--workdir", tmp_path, "--tasks", "heldout")
    assert code == 2 and err.strip() == (
        "attnlab lm-eval: lm-eval needs lm_eval, which is not installed; pip install 'attnlab[lm-eval]'"
    )


def test_a_mesh_gives_what_one_device_gives():
    """Rows, positions and heads over eight devices: log-likelihoods of all kinds, and flags. That generated texts are
    those of one device, tests/train/test_program.py holds."""
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 257, n), rng.integers(0, 257, m)) for n, m in ((3, 2), (20, 7), (40, 1), (9, 1))]
    pairs = [(a.astype(np.int32), b.astype(np.int32)) for a, b in pairs]
    answers = []
    for mesh in ({"data": 1}, {"data": 2, "context": 2, "tensor": 2}):
        config = runs.config("text:none", mesh=mesh, model__layers=1)
        program = Program.of(config)
        scorer = evaluating.scorer_of(program, jax.device_put(runs.drawn(program.model), program.shardings.params))
        answers.append((scorer.continuations(pairs), scorer.rolling([a for a, _ in pairs], 256)))
    (one, rolled), (many, rolled_too) = answers
    np.testing.assert_allclose([x for x, _ in one], [x for x, _ in many], rtol=1e-5)
    np.testing.assert_allclose(rolled, rolled_too, rtol=1e-5)
    assert [flag for _, flag in one] == [flag for _, flag in many]


@needs_harness
def test_all_kinds_of_requests(attnlab, workdir):
    """Figures of held-out text and of tasks over a local file, against the model's own log-likelihoods."""
    tasks = f"heldout,heldout_cloze,heldout_write,{workdir.parent / 'tasks'}"
    code, out, err = attnlab("lm-eval", "--workdir", workdir, "--tasks", tasks, "--json", "--checkpoint", "latest")
    assert code == 0, err
    said = json.loads(out)
    names = {"heldout", "heldout_cloze", "heldout_write", "attnlab_pick", "attnlab_write"}
    assert said["step"] == 4 and said["length"] == 32 and set(said["tasks"]) == names
    kept = json.loads((workdir / "eval" / "lm_eval-4.json").read_text())
    assert kept["tasks"]["heldout"]["metrics"] == said["tasks"]["heldout"]["metrics"]
    assert any("num_beams" in note for note in said["notes"])
    assert any("contexts were longer than 32 positions" in note for note in said["notes"])

    trained = restore.load(workdir, "latest")
    nats = log_likelihood(trained)
    texts = list(trained.data.heldout_texts())
    sums = [-nats(b"", text.encode()) for text in texts]
    sizes = [len(text.encode()) for text in texts]
    found = said["tasks"]["heldout"]["metrics"]["bits_per_byte"]
    np.testing.assert_allclose(found["value"], sum(sums) / sum(sizes) / math.log(2), rtol=1e-4)
    error = cloze.ratio_error(sums, sizes)
    assert found["stderr"] == (None if error is None else pytest.approx(error / math.log(2), rel=1e-3))

    lls = np.asarray([[nats(f"A {a}:".encode(), f" {c}".encode()) for c in ("horse", "cat", "x")] for a in ANIMALS])
    right = (lls.argmax(-1) == [0, 1]).mean()
    picked = said["tasks"]["attnlab_pick"]
    assert picked["metrics"]["acc"]["value"] == pytest.approx(right) and picked["samples"] == 6
    assert picked["output_type"] == "multiple_choice" and 0 <= picked["metrics"]["acc"]["stderr"] < 1
    asked = [passage for text in texts for passage in cloze.passages(text)]
    scored = said["tasks"]["heldout_cloze"]
    assert scored["samples"] == said["tasks"]["heldout_write"]["samples"] == len(asked) > 0
    want = [nats(*(ids.astype(np.uint8).tobytes() for ids in (c[1:], w))) for c, w in map(bounded, asked)]
    np.testing.assert_allclose(math.log(scored["metrics"]["perplexity"]["value"]), -np.mean(want), rtol=1e-3)


def bounded(asked):
    return requests.boundary(BytesTokenizer(), asked[0], f" {asked[1]}")


def log_likelihood(trained):
    """Of bytes after bytes, a row at a time, by the model's losses alone."""
    model, length = trained.program.model, trained.config.data.length

    @jax.jit
    def losses(params, batch):
        return model.merge(params).token_losses(batch)[0]

    def nats(context, text):
        ids = np.asarray([256, *context, *text], np.int32)
        total, done = 0.0, len(ids) - len(text)
        while done < len(ids):
            end = min(done + length, len(ids))
            row = requests.Row(ids[max(0, end - length - 1) : end], end - done)
            total -= float(losses(trained.params, requests.arrays([row], length, 1)).sum())
            done = end
        return total

    return nats


@needs_harness
def test_one_task_into_a_file_of_its_own(attnlab, workdir, tmp_path):
    """A YAML file by its path, its first documents, with an example before each; the file must be new."""
    before = (workdir / "eval" / "lm_eval-4.json").read_text() if (workdir / "eval").is_dir() else None
    task, out = workdir.parent / "tasks" / "pick.yaml", tmp_path / "found.json"
    args = ["lm-eval", "--workdir", workdir, "--tasks", task, "--limit", "2", "--out", out, "--fewshot", "1"]
    code, text, err = attnlab(*args)
    assert code == 0, err
    assert "attnlab_pick" in text and f"wrote {out}" in text
    entry = json.loads(out.read_text())["tasks"]["attnlab_pick"]
    assert (entry["samples"], entry["limit"], entry["fewshot"]) == (2, 2, 1)
    if before is not None:
        assert (workdir / "eval" / "lm_eval-4.json").read_text() == before
    code, _, err = attnlab(*args)
    assert code == 2 and "exists" in err


@needs_harness
def test_texts_end_at_their_stops(workdir):
    """Requests of several settings at once, in the order asked: each the greedy text before its own stop string."""
    from attnlab.interchange.harness import Adapter

    trained = restore.load(workdir, "latest")
    merge, params, tokenizer = trained.program.model.merge, trained.params, BytesTokenizer()
    said: list[str] = []
    adapter = Adapter(Scorer(merge, params, 32, 8, OPTIONS), tokenizer, 0, said.append)
    ask = lambda text, **given: types.SimpleNamespace(args=(text, {"max_gen_toks": 9, **given}))
    prompts = ["def f", "x", "return"]
    sampling = Sampling(9, temperature=0, stop=256, vocab=257)
    ids = generate(merge, params, [requests.started(tokenizer, p) for p in prompts], sampling).tokens
    whole = [tokenizer.decode(row) for row in ids]
    assert all(len(text) > 3 for text in whole)
    stop = whole[1][2:4]  # two tokens
    asked = [ask(prompts[0]), ask(prompts[1], until=[stop], strange=1), ask(prompts[2]), ask(prompts[1], strange=2)]
    found = adapter.generate_until(asked)
    assert found == [whole[0], whole[1].partition(stop)[0], whole[2], whole[1]]
    assert said == ["keys of generation that change nothing here: strange"]


@needs_harness
def test_what_cannot_be_run_is_said(attnlab, workdir, tmp_path):
    call = lambda tasks, *more: attnlab("lm-eval", "--workdir", workdir, "--tasks", tasks, *more)
    (tmp_path / "empty").mkdir()
    for tasks, words in (
        (tmp_path / "no.yaml", "no such file or folder"),
        (tmp_path / "empty", "the folder has no task"),
        (workdir.parent / "tasks" / "write.yaml", "max_gen_toks = 5 is not possible; allowed: 1 to 3"),
    ):
        code, _, err = call(tasks, "--config.data.length=4")
        assert code == 2 and words in err, err
    bad = tmp_path / "bad.yaml"
    bad.write_text("task: attnlab_bad\ndataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere.json}}\n")
    code, _, err = call(bad)
    assert code == 2 and "a task cannot be loaded" in err


@needs_harness
def test_windows_are_the_harness_s_own():
    """The same inputs and predictions as its `get_rolling_token_windows` gives."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for count in (1, 7, 8, 9, 16, 29):
        ids = list(range(1, count + 1))
        own = [
            (row.ids[:-1][: len(row.ids) - row.scored].tolist(), row.ids[-row.scored :].tolist())
            for row in requests.windows(np.asarray(ids), 0, 8)
        ]
        theirs = map(make_disjoint_window, get_rolling_token_windows(ids, 0, 8, 1))
        assert own == [(list(context), list(predicted)) for context, predicted in theirs]
