"""The laws that every registered task is held to; a task is tried by being registered."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from attnlab import tasks
from attnlab.errors import ConfigError
from attnlab.tasks.streams import Stream
from tests import tiers
from tests.tasks import laws

MANY, SOME, FEW = 1000, 400, 20


def one(rows, i):
    return {name: array[i] for name, array in rows.items()}


def require_solved(task, rows, corrupted=20):
    """The oracle knows every answer from the inputs; with what an answer hangs on replaced, it gives another."""
    scored = rows["weights"] > 0
    assert scored.any(1).all(), "a row asks nothing"
    answers = task.oracle(rows)
    wrong = np.flatnonzero(((answers != rows["targets"]) & scored).any(1))
    assert not len(wrong), f"the oracle is wrong in rows {wrong[:5]}"
    for i in range(corrupted):
        changed = task.corrupt(one(rows, i), Stream("corrupt", i))
        again = task.oracle({name: np.asarray(array)[None] for name, array in changed.items()})[0]
        assert (again != answers[i])[scored[i]].any(), f"the answer of row {i} hangs on nothing"


@pytest.mark.parametrize("count", [SOME, pytest.param(MANY, marks=tiers.exhaustive)])
@pytest.mark.parametrize("name", laws.TOKENS)
def test_the_oracle_is_right_and_guessing_is_chance(name, count):
    """On many examples: accuracy 1, and that of guessing within three standard errors (by rows) of what is stated."""
    task, rows = laws.examples(name, count)
    require_solved(task, rows)
    chance, guessed = task.chance()["accuracy"], task.guessed(rows)
    assert abs(guessed - chance) < 3 * np.sqrt(chance * (1 - chance) / count), (guessed, chance)
    assert 0.7 < guessed / chance < 1.4, (guessed, chance)  # where there are many answers, three errors are wide
    assert task.references() == {"chance_accuracy": chance, "oracle_accuracy": 1.0}


@pytest.mark.parametrize("name", sorted(set(laws.NAMES) - set(laws.TOKENS)))
def test_the_best_predictor_is_best(name):
    """Of tasks of vectors: Bayes has the least error, nothing the most; with other examples it predicts otherwise."""
    task, rows = laws.examples(name, 200)
    assert (rows["weights"].sum(1) > 0).all()
    error = lambda y: float((((y - rows["targets"]) ** 2).sum(-1) * rows["weights"]).mean())
    errors = {who: error(predicted) for who, predicted in task.baselines(rows).items()}
    assert errors["bayes"] == min(errors.values()) < 0.5 * errors["zero"] and errors["zero"] == max(errors.values())
    few = {name: array[:5] for name, array in rows.items()}
    changed = [task.corrupt(one(few, i), Stream("corrupt", i)) for i in range(5)]
    again = task.baselines({name: np.stack([row[name] for row in changed]) for name in few})["bayes"]
    assert (abs(again - task.baselines(few)["bayes"]).max((1, 2)) > 0.1).all()


def drawn_otherwise(task, plain, split):
    """Whether two tasks make different examples of the same random numbers; a seed draws others."""
    if task.config.seed != plain.config.seed:
        a, b = task.rows(split, range(FEW)), plain.rows(split, range(FEW))
        return all((a[key] != b[key]).any() for key in ("tokens", "inputs") if key in a)
    draw = lambda task, i: task.filled(task.example(Stream("the same", i), split), split)
    for a, b in ((draw(task, i), draw(plain, i)) for i in range(FEW)):
        if any(k not in b or a[k].shape != b[k].shape or (np.asarray(a[k]) != b[k]).any() for k in a):
            return True
    return False


@pytest.mark.parametrize("name, fields", laws.CASES, ids=laws.IDS)
def test_every_field_turns(name, fields):
    """It changes what is made of the same random numbers; its oracle solves it still; ids stay below what is stated."""
    task = laws.opened(name, **fields)
    without = next(other for mine, other in laws.turned(name).values() if mine == fields)
    try:
        plain = laws.opened(name, **without)
    except ConfigError:  # the fields go together only
        plain = laws.opened(name)
    assert any(drawn_otherwise(task, plain, split) for split in ("train", "valid"))
    a = task.rows("valid", range(FEW))
    for key, field in task.config.batch_spec().items():
        assert a[key].shape == (FEW, *field.shape) and str(a[key].dtype) == field.dtype
        assert field.ids is None or (0 <= a[key].min() and a[key].max() < field.ids), key
    if name in laws.TOKENS:
        require_solved(task, task.rows("valid", range(FEW)), corrupted=3)


def test_every_field_is_tried():
    """And every task says what it tests and where it is from."""
    for name in laws.NAMES:
        cls = tasks.get(name)
        tried = {key for fields, _ in laws.turned(name).values() for key in fields} | laws.SHARED
        assert {f.name for f in dataclasses.fields(cls.Config)} <= tried, name
        assert (
            cls.title and cls.source and cls.__doc__ and all(f.metadata["doc"] for f in dataclasses.fields(cls.Config))
        )


@pytest.mark.parametrize("name", laws.NAMES)
def test_examples_are_pinned(name):
    """Three examples of each split are those that another process made and that finished runs have seen.

    A change of the stream is a new `version`: then `python -m tests.tasks.laws`.
    """
    assert json.loads(laws.GOLDEN.read_text())[name] == laws.digest(name)


@pytest.mark.parametrize("name", laws.NAMES)
def test_an_example_depends_on_its_index_alone(name):
    """Not on its batch; training, held-out and test examples share none, nor do two seeds."""
    task, rows = laws.examples(name, SOME if name in laws.TOKENS else 200)
    alone = task.rows("valid", [7])
    assert all((alone[key][0] == rows[key][7]).all() for key in rows)
    inputs = [key for key in rows if key in ("tokens", "inputs", "context")]
    seen = lambda rows: {b"".join(rows[key][i].tobytes() for key in inputs) for i in range(len(rows["weights"]))}
    others = [task.rows(split, range(100)) for split in ("train", "test")]
    others.append(laws.opened(name, seed=1).rows("valid", range(100)))
    sets = [seen(rows), *map(seen, others)]
    if task.config.different() < 1e9:  # other seeds draw of the same few
        sets = sets[:-1]
    assert sum(map(len, sets)) == len(set().union(*sets))


@pytest.mark.parametrize("name", laws.NAMES)
def test_longer_examples_are_one_field(name):
    """Up to 16 times the length: the same ids, of the same meaning to the oracle; where there are none, it is said."""
    task = laws.opened(name)
    assert task.config.longer(1) == task.config
    for multiple in (2, 4, 16):
        try:
            config = task.config.longer(multiple)
        except ConfigError as error:
            assert name == "gcog" or (name == "pixels" and multiple == 2), error
            continue
        assert 0.9 * multiple * task.config.length <= config.length <= multiple * task.config.length
        assert config.fitting() == task.config.fitting()
        if multiple == 16 and name in laws.TOKENS and name != "khop":  # a search, whose time grows with the square
            longer = tasks.get(name)(config)
            require_solved(longer, longer.rows("test", range(4)), corrupted=0)


@pytest.mark.parametrize("name", laws.TOKENS)
def test_slices_share_the_answers_out(name):
    """Every answer is in one slice of each name, and which slices there are depends on the config alone."""
    task, rows = laws.examples(name, SOME)
    facts, marks = task.facts(lambda: iter(())), task.marks(rows)
    few = {key: array[:3] for key, array in rows.items()}
    for part in (rows, few):
        assert [labels for labels, _ in task.slices(part).values()] == [l for l, _ in task.slices(rows).values()]
    if not marks:
        assert facts["slices"] == []
        return
    assert marks["slices"].shape[-1] == len(facts["slices"]) == len(set(facts["slices"]))
    names = len(task.slices(rows))
    assert (marks["slices"].sum(-1)[rows["weights"] > 0] == names).all()
    found = marks["slices"][rows["weights"] > 0].any(0)
    assert found.mean() > 0.5, "most slices are empty"


def test_few_different_examples_are_shared_out_by_content():
    """Parities of 8 bits: every one of the 256 rows is in one split; too few are refused."""
    task = laws.opened("group", group="Z2", length=8)
    sets = [{row.tobytes() for row in task.rows(split, range(150))["tokens"]} for split in ("train", "valid", "test")]
    assert sum(map(len, sets)) == len(set().union(*sets)) > 150 and min(map(len, sets)) > 40
    with pytest.raises(ConfigError, match="at most 2 different examples .* too few to hold any out for"):
        for split in ("train", "valid", "test"):
            laws.opened("group", group="Z2", length=1).rows(split, [0])


def test_finite_training_data_comes_again():
    """The batches are those of the first `train_examples` examples, in order, round and round."""
    task = laws.opened("mqar", train_examples=12, batch=8)
    batches = [next(loader)["tokens"] for loader in [task.training(seed=0)] for _ in range(3)]
    rows = task.rows("train", range(12))["tokens"]
    np.testing.assert_array_equal(np.concatenate(batches), np.concatenate([rows, rows]))


IMPOSSIBLE = [
    ("mqar", {"pairs": 40}), ("mqar", {"vocab": 7}), ("mqar", {"filler": "x"}), ("needle", {"depth": "deep"}),
    ("needle", {"queries": 2}), ("group", {"group": "S9"}), ("group", {"generators": "adjacent", "group": "Z2"}),
    ("copy", {"length": 8}), ("match3", {"distinct": True, "order": 2}), ("gcog", {"depths": (2,)}),
    ("gcog", {"distractors": (5, 2)}), ("listops", {"least": 118}), ("icl_classes", {"burst": 3}),
    ("periodic_recall", {"periods": (3,)}), ("induction", {"length": 7, "form": "repeat"}),
    ("mad_recall", {"noise": 0.2}), ("frequent_words", {"told": 20}), ("khop", {"fewest_hops": 5}),
    ("test_time_regression", {"segments": 9}), ("pixels", {"side": 7}), ("mqar", {"split": "train"}),
]  # fmt: skip


@pytest.mark.parametrize("name, fields", IMPOSSIBLE, ids=str)
def test_impossible_fields(name, fields):
    """Refused by their key, with what is allowed."""
    with pytest.raises(ConfigError, match=r"^data\.\w+ = .*allowed: "):
        laws.opened(name, **fields)
