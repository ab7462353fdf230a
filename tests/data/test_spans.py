"""Rows of ids with the places of images, questions and answers."""

from __future__ import annotations

import gzip
import itertools
import json
import math

import jax
import numpy as np
import pytest

from attnlab import config as config_lib
from attnlab import data as data_lib
from attnlab import masks
from attnlab.data.spans import read
from attnlab.errors import ConfigError, UserError
from attnlab.masks.layouts import LayoutMask
from attnlab.mixers.sequence import Sequence
from attnlab.ops.layout import Layout
from attnlab.train.config import RunConfig
from attnlab.train.program import Program
from tests import tiers
from tests.train import runs

ROW = {
    "ids": [7, 30, 31, 32, 33, 8, 12, 9, 44, 3],
    "images": [[1, 2, 2]],
    "questions": [[6, 8]],
    "answers": [[8, 10]],
    "boxes": [[5, 0.5, 2, 1.5, 4], [9, 1, 1, 1, 1]],
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
    counted = {"answers": [0, 0, 0, 0, 0, 0, 0, 1, 1], "text": [0, 0, 0, 0, 0, 0, 0, 1, 1], "all": [1] * 9}
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
        assert row["boxes"].tolist() == [*[[0] * 4] * 5, [0.5, 2, 1.5, 4], *[[0] * 4] * 6]
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


def reached(visible, layers):
    """Which positions can know which after so many layers with residual streams."""
    once = visible | np.eye(len(visible), dtype=bool)
    return np.linalg.matrix_power(once.astype(np.float64), layers) > 0


KNOWN_EARLY = {
    "two turns": [("image", 2, 2), ("question", 2), ("answer", 2), ("image", 1, 2), ("question", 2), ("answer", 2)],
    "an answer between": [("question", 3), ("image", 2, 2), ("answer", 3), ("question", 2), ("answer", 2)],
    "caption": [("text", 1), ("image", 2, 2), ("answer", 3), ("text", 1), ("question", 2), ("answer", 2)],
    "text around": [("image", 1, 2), ("text", 2), ("image", 1, 1), ("text", 1), ("question", 2), ("text", 1),
                    ("question", 1), ("answer", 1), ("text", 2), ("image", 1, 2), ("text", 2)],
}  # fmt: skip


@pytest.mark.parametrize("parts", KNOWN_EARLY.values(), ids=KNOWN_EARLY)
def test_what_counts_is_not_known_early(tmp_path, parts):
    """Through any number of layers of any mask that reads images, no position reaches a target that counts."""
    row, n = {"images": [], "questions": [], "answers": []}, 0
    for kind, *size in parts:
        if kind != "text":
            row[kind + "s"].append([n, *size] if kind == "image" else [n, n + size[0]])
        n += math.prod(size)
    task = {loss: opened(tmp_path / "rows.jsonl", [dict(row, ids=[1] * n)] * 9, loss=loss, heldout=0.3, length=n - 1)
            for loss in ("answers", "text")}  # fmt: skip
    batch = {loss: next(iter(of.heldout(batches=1))) for loss, of in task.items()}
    layout = Layout.of_columns(batch["text"]["layout"][:1])
    assert batch["answers"]["weights"][0].sum() == sum(end - first for first, end in row["answers"])
    seq = Sequence(np.arange(n - 1, dtype=np.int32)[None], layout=layout)
    images = [node for node in masks.names() if issubclass(masks.get(node), LayoutMask)]
    assert "modality_mutual" in images
    for node in (*({"name": name} for name in images), {"name": "modality_mutual", "begin": "image"}):
        visible = masks.build(node).mask(seq, causal=True).visible(n - 1, n - 1)[0, 0]
        for loss, layers in itertools.product(batch, (1, 2, 3, n)):
            known = np.pad(reached(visible, layers), ((0, 0), (0, 1)))
            for t in np.flatnonzero(batch[loss]["weights"][0]):
                assert not known[: t + 1, t + 1 :].any(), (node, loss, layers, t)


def test_text_between_an_image_and_its_question_does_not_count(tmp_path):
    """Elsewhere it does: before images, behind a question, and where an answer comes first."""
    row = {
        "ids": list(range(16)),
        "images": [[1, 1, 2], [9, 1, 1]],
        "questions": [[4, 6], [12, 13]],
        "answers": [[7, 8], [11, 12]],
    }
    (batch,) = opened(tmp_path / "rows.jsonl", [row] * 9, loss="text", heldout=0.3, length=15).heldout(batches=1)
    assert batch["targets"][0][batch["weights"][0] > 0].tolist() == [6, 7, 8, 10, 11, 13, 14, 15]


def test_digest_is_of_rows_and_of_what_says_which_are_held_out(tmp_path):
    """Compressed or in another directory they are the same rows; under another name others of them are held out, which
    a run that goes on refuses."""
    made = {}
    for name in ("a/rows.jsonl", "b/rows.jsonl", "b/renamed.jsonl", "b/rows.jsonl.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as out:
            out.write("".join(json.dumps(row) + "\n" for row in many()))
        node = {"name": "spans", "source": str(path), "ids": 50, "length": 12, "batch": 2, "heldout": 0.2}
        made[name] = data_lib.open_data(data_lib.config_from_node(node, "data"))
    first = made.pop("a/rows.jsonl")
    loader, held = first.training(seed=0), [b["tokens"] for b in first.heldout()]
    for name, other in made.items():
        same = name == "b/rows.jsonl"
        assert (other.training(seed=0).summary()["digest"] == loader.summary()["digest"]) == same
        ours = [b["tokens"] for b in other.heldout()]
        assert (len(ours) == len(held) and all(map(np.array_equal, ours, held))) == same
        if same:
            other.training(seed=0).set_state(loader.get_state())
        else:
            with pytest.raises(UserError, match="the rows of data.source"):
                other.training(seed=0).set_state(loader.get_state())
    rows = [read(task.config) for task in (first, made["b/rows.jsonl.gz"])]
    np.testing.assert_array_equal(rows[0].ids, rows[1].ids)
    assert rows[0].spans == rows[1].spans


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
        (dict(ROW, boxes=[[10, 1, 1, 1, 1]]), r"'boxes' has \[10, .*allowed: \[id, x, y, width, height\]"),
        (dict(ROW, boxes=[[1, 0, 0, 0, 1]]), "'boxes' has .*sides above 0"),
        (dict(ROW, boxes=[[1, 0, 0, 1, 1]] * 2), "'boxes' has .*one for an id"),
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


def run_config(tmp_path):
    """Of a run with a mask that reads where images lie."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in many()))
    tree = {
        "data": {"name": "spans", "source": str(path), "ids": 50, "length": 12, "batch": 4, "heldout": 0.2},
        "model": {"vocab": 50, "width": 16, "layers": 1, "mlp_width": 0,
                  "mixers": {"M": {"name": "softmax", "heads": 2, "mask": "modality_mutual"}}},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "warmup": 2},
        "train": {"steps": 4, "log_every": 2, "eval_every": 4, "save_every": 4},
        "mesh": {"data": 1},
    }  # fmt: skip
    return config_lib.build(RunConfig, tree)


def test_a_mask_reads_them(tmp_path):
    """A model with such a mask takes the batches: its evaluation can be traced on the arrays that there are."""
    program = Program(run_config(tmp_path))
    rows = next(iter(data_lib.open_data(program.config.data).heldout(batches=1)))
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in rows.items()}
    assert shapes.keys() == program.config.data.batch_spec().keys()
    assert jax.eval_shape(program.eval_step, program.shapes.params, shapes)


@tiers.exhaustive
def test_a_run_with_a_mask_that_reads_them(tmp_path):
    """Trains and evaluates; the digest of its rows is known to what follows."""
    printed = runs.run(run_config(tmp_path), tmp_path / "run")
    assert "40 rows" in printed and "held-out accuracy" in printed and "(chance 0." in printed
    assert "heldout_accuracy" in runs.lines(tmp_path / "run")[-1]
