"""Rows of ids with the places of images, questions and answers."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from attnlab import config as config_lib
from attnlab import data as data_lib
from attnlab.errors import ConfigError, UserError
from attnlab.train.config import RunConfig
from tests.train import runs

ROW = {
    "ids": [7, 30, 31, 32, 33, 8, 12, 9, 44, 3],
    "images": [[1, 2, 2]],
    "questions": [[6, 8]],
    "answers": [[8, 10]],
}


def opened(path, rows=(ROW,), **fields):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    node = {"name": "spans", "source": str(path), "ids": 50, "length": 12, "batch": 2, **fields}
    return data_lib.open_data(data_lib.config_from_node(node, "data"))


def many(count=40):
    """Rows that differ, some of text alone."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        row = dict(ROW, ids=[*rng.integers(0, 50, 10).tolist()])
        made.append({"ids": row["ids"][:5]} if i % 5 == 0 else row)
    return made


def test_a_row_by_hand(tmp_path):
    """Inputs are all ids but the last, which an answer's span then ends before; what counts is by targets."""
    counted = {"answers": [0, 0, 0, 0, 0, 0, 0, 1, 1], "text": [0, 0, 0, 0, 1, 0, 0, 1, 1], "all": [1] * 9}
    for loss, weights in counted.items():
        task = opened(tmp_path / "rows.jsonl", [ROW] * 9, loss=loss, heldout=0.3)
        (batch,) = task.heldout(batches=1)
        row = {name: array[0] for name, array in batch.items()}
        assert {name: (x.shape, str(x.dtype)) for name, x in row.items()} == {
            name: (field.shape, field.dtype) for name, field in task.batch_spec().items()
        }
        assert row["tokens"].tolist() == [*ROW["ids"][:9], 0, 0, 0]
        assert row["targets"].tolist() == [*ROW["ids"][1:], 0, 0, 0]
        assert row["segments"].tolist() == [1] * 9 + [0] * 3 and row["positions"][:9].tolist() == list(range(9))
        assert row["weights"].tolist() == [*weights, 0, 0, 0]
        assert row["node"].tolist() == [0, 1, 1, 1, 1] + [0] * 7
        text, image = [1, -1, -1, 0, 0, 0, 0], lambda y, x: [2, y, x, 2, 2, 1, 5]
        question = [3, -1, -1, 0, 0, 6, 8]
        expected = [text, image(0, 0), image(0, 1), image(1, 0), image(1, 1), text, question, question]
        assert row["layout"].tolist() == [*expected, [4, -1, -1, 0, 0, 0, 0], *[[0] * 7] * 3]


def test_a_row_that_ends_with_an_image(tmp_path):
    """Its last cell is a target alone: no span reaches beyond what is read."""
    task = opened(
        tmp_path / "rows.jsonl", [{"ids": [1, 2, 3, 4, 5], "images": [[1, 2, 2]]}] * 9, heldout=0.3, loss="text"
    )
    (batch,) = task.heldout(batches=1)
    assert batch["layout"][0, 1:4].tolist() == [[2, y, x, 2, 2, 1, 4] for y, x in ((0, 0), (0, 1), (1, 0))]
    assert not batch["layout"][0, 4:].any() and not batch["weights"].any()


def test_splits_and_batches(tmp_path):
    """Held-out rows are no training rows; the batch at a step is the same whoever reads it; an epoch has every row."""
    task = opened(tmp_path / "rows.jsonl", many(), heldout=0.2)
    rows = lambda batches: {b["tokens"][i].tobytes() for b in batches for i in range(2) if b["segments"][i].any()}
    loader = task.training(seed=1)
    train_rows = loader.summary()["train_rows"]
    epoch = [next(loader) for _ in range(-(-train_rows // 2))]
    held = list(task.heldout())
    assert len(rows(held)) == loader.summary()["heldout_rows"] == 40 - train_rows > 2
    assert not rows(held) & rows(epoch) and len(rows(epoch)) >= train_rows - 1
    again = task.training(seed=1)
    again.set_state({**loader.get_state(), "step": 3})
    np.testing.assert_array_equal(next(again)["tokens"], epoch[3]["tokens"])
    half = task.training(seed=1, rows=[1])
    np.testing.assert_array_equal(next(half)["layout"], epoch[0]["layout"][1:])
    with pytest.raises(UserError, match="data.loss was answers and is all"):
        opened(tmp_path / "rows.jsonl", many(), heldout=0.2, loss="all").training(seed=1).set_state(loader.get_state())
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in held])
    assert task.heldout().facts()["chance"]["accuracy"] == np.bincount(targets).max() / len(targets)


def test_compressed_files_are_the_same_rows(tmp_path):
    task = opened(tmp_path / "rows.jsonl", many())
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as out:
        out.write((tmp_path / "rows.jsonl").read_text())
    other = data_lib.open_data(
        data_lib.config_from_node({"name": "spans", "source": str(tmp_path / "*.gz"), "ids": 50, "length": 12}, "data")
    )
    assert task.training(seed=0).summary()["digest"] == other.training(seed=0).summary()["digest"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"ids": [1, 50]}, "line 1: 'ids' must be .* below data.ids = 50"),
        ({"ids": [1]}, "2 or more integers"),
        ({"ids": list(range(14))}, "14 ids; data.length = 12 has room for 13"),
        (dict(ROW, images=[[1, 2]]), r"'images' has \[1, 2\]; allowed: \[first, rows, columns\]"),
        (dict(ROW, images=[[1, 2, 3]]), r"'questions' has \[6, 8\]; allowed: .* in no other span"),
        (dict(ROW, answers=[[9, 11]]), r"'answers' has \[9, 11\]"),
        (dict(ROW, picture=[]), "unknown key 'picture'; allowed: ids, images"),
        ([1, 2], "a JSON list; each line must be one object with 'ids'"),
    ],
    ids=str,
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "rows.jsonl", [row]).training(seed=0)


def test_too_little_is_refused(tmp_path):
    with pytest.raises(UserError, match="0 row.*less than one batch|no row in 1 file"):
        opened(tmp_path / "rows.jsonl", []).training(seed=0)
    with pytest.raises(UserError, match="nothing is held out; data.heldout = 0.05 of 1 row"):
        opened(tmp_path / "rows.jsonl").heldout()
    with pytest.raises(UserError, match="no id of the held-out rows counts"):
        opened(tmp_path / "rows.jsonl", [{"ids": [1, 2, 3]}] * 9).heldout().facts()
    with pytest.raises(ConfigError, match="data.source = ''"):
        data_lib.config_from_node({"name": "spans"}, "data")


def test_a_run_with_a_mask_that_reads_them(tmp_path):
    """Trains and evaluates; the digest of its rows is known to what follows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in many()))
    tree = {
        "data": {"name": "spans", "source": str(path), "ids": 50, "length": 12, "batch": 4, "heldout": 0.2},
        "model": {"vocab": 50, "width": 16, "layers": 1,
                  "mixers": {"M": {"name": "softmax", "heads": 2, "mask": "modality_mutual"}}},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "warmup": 2},
        "train": {"steps": 4, "log_every": 2, "eval_every": 4, "save_every": 4},
        "mesh": {"data": 1},
    }  # fmt: skip
    printed = runs.run(config_lib.build(RunConfig, tree), tmp_path / "run")
    assert "40 rows" in printed and "held-out accuracy" in printed and "(chance 0." in printed
    assert "heldout_accuracy" in runs.lines(tmp_path / "run")[-1]
