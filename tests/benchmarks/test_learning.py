"""What `benchmarks.learning` judges of runs that are over."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from attnlab.train import restore
from benchmarks import learning
from tests.train import runs


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Two runs of other lengths; their workdirs."""
    path = tmp_path_factory.mktemp("learning")
    source, found = runs.corpus(path / "text"), []
    for steps in (4, 5):
        found.append(path / str(steps))
        train = {"steps": steps, "log_every": 1, "eval_every": steps, "eval_batches": learning.HELDOUT_BATCHES}
        fields = {f"train__{k}": v for k, v in (train | {"sample_tokens": 0, "save_every": 0}).items()}
        runs.run(runs.config(source, **fields), found[-1])
    return found


def told(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["learning", "--json", "--runs", *map(str, args)])
    return learning.main(), json.loads(capsys.readouterr().out)


def test_a_run_is_judged_by_what_it_logged_and_by_its_checkpoint(kept, monkeypatch, capsys):
    """Its held-out loss, against a bigram model of the tokens of its steps; a stream gives what the whole gives."""
    code, result = told(monkeypatch, capsys, kept[0])
    (row,) = result["rows"]
    logged = [json.loads(line) for line in (kept[0] / "metrics.jsonl").read_text().splitlines()]
    assert row["heldout_loss"] == pytest.approx(next(x["heldout_loss"] for x in logged[::-1] if "heldout_loss" in x))
    assert row["first_loss"] == next(x["loss"] for x in logged if "loss" in x)
    assert (row["mixer"], row["dtype"], row["skipped_steps"], result["steps"]) == ("softmax", "float32", 0, 4)
    assert 0 < row["decode_difference"] < 1e-5
    assert row["passed"] == (row["heldout_loss"] < result["bigram_loss"]) and code == int(not row["passed"])
    assert 0 < result["bigram_loss"] < np.log(260)


def test_a_stream_that_decodes_something_else_does_not_pass(kept, monkeypatch):
    """As little as one position off by one."""
    trained = restore.load(kept[0], "latest")
    model, original = trained.program.model, type(trained.program.model).merge

    def merge(self, params):
        merged = original(self, params)
        extend = merged.extend
        merged.extend = lambda periods, tokens, seq, state: extend(periods, tokens + (seq.positions == 20), seq, state)
        return merged

    monkeypatch.setattr(type(model), "merge", merge)
    off, scale = learning.decode_difference(trained)
    assert off / scale > 1e-3


def test_runs_on_other_steps_are_refused(kept, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="5 has other data or steps than .*4; allowed: runs on the same ones"):
        told(monkeypatch, capsys, *kept)
