"""What is particular to a family of tasks: laws of its draws, and figures that were computed elsewhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from attnlab.tasks import group
from tests.tasks import laws


def rows(name, count=400, split="valid", **fields):
    task = laws.opened(name, **fields)
    return task, task.rows(split, range(count))


def test_mqar_queries_follow_their_law():
    """Of 24 slots the first key takes the first with 0.26, the mean slot of single draws is 5.4 (power 0.01)."""
    task, found = rows("mqar", 1000)
    share = np.arange(1, 25) ** -0.99
    share /= share.sum()
    assert abs(share[0] - 0.26) < 0.01 and abs((share * np.arange(24)).sum() - 5.4) < 1.1
    slot = [(np.flatnonzero(tokens[16:] == tokens[0])[0]) // 2 for tokens in found["tokens"]]
    counts = np.bincount(slot, minlength=24) / 1000
    assert (abs(counts - share) < 5 * np.sqrt(share * (1 - share) / 1000)).all()


def test_mqar_tells_the_newest_value():
    """What is shown again counts; halves of compound keys are shared."""
    task, found = rows("mqar", 50, updates=3, compound=2, length=96)
    for tokens, targets, weights in zip(found["tokens"], found["targets"], found["weights"]):
        pairs = tokens[: 3 * 11].reshape(11, 3)
        newest = {tuple(pair[:2]): pair[2] for pair in pairs}
        assert len(newest) == 8 and len({v for *_, v in pairs.tolist()}) == 11
        assert len({a for a, _ in newest}) < 8 and len({b for _, b in newest}) < 8
        for t in np.flatnonzero(weights):
            assert targets[t] == newest[tuple(tokens[t - 1 : t + 1])]


@pytest.mark.parametrize("name", ["S3", "A4", "Z5", "S4"])
def test_groups_are_groups(name):
    """Associative, id 0 is the identity, every element has one inverse; (f g)(i) = f(g(i))."""
    table = group.multiplication(name)
    n = len(table)
    a, b, c = (x.ravel() for x in np.indices((n, n, n)))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    np.testing.assert_array_equal(table[0], np.arange(n))
    assert all(sorted(row) == list(range(n)) for row in table.tolist())
    if name[0] != "Z":
        elements = group.permutations(name)
        assert elements == sorted(elements) and n == {"S3": 6, "A4": 12, "S4": 24}[name]
        for f, g in itertools.islice(itertools.product(range(n), repeat=2), 50):
            assert elements[table[f, g]] == tuple(elements[f][i] for i in elements[g])


def test_khop_has_as_many_undefined_answers_as_computed_elsewhere():
    """Of 4 letters at T = 100, over all positions: 4, 7, 10 and 13 % for k = 1 to 4."""
    for k, share in {1: 0.04, 4: 0.13}.items():
        task, found = rows("khop", hops=k, fewest_hops=k, score_from=0.0)
        assert abs((found["targets"][:, 1:] == task.config.vocab).mean() - share) < 0.015


def test_match3_is_balanced():
    """n 16: M is 196 and 0.52 of the positions match; a match has partners."""
    task, found = rows("match3", 1000)
    assert task.config.numbers == 196 and abs(found["targets"].mean() - 0.52) < 0.02


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_needles_begin_at_their_depth(depth):
    """At `round(depth (length - needle - question))`."""
    task, found = rows("needle", 20, depth=str(depth))
    c = task.config
    expected = round(depth * (c.length - c.block - c.question))
    assert {int(np.flatnonzero(tokens == 0)[0]) for tokens in found["tokens"]} == {expected}
    assert (c.block, c.question) == (6, 5) and found["weights"].sum(1).tolist() == [4] * 20


def test_held_out_fuzzy_keys_are_the_longest():
    """Training has keys of one to three ids, held-out rows of three."""
    lengths = {}
    for split in ("train", "test"):
        task, found = rows("mad_fuzzy_recall", 50, split)
        runs = []
        for tokens in found["tokens"]:
            is_key = (tokens >= 1) & (tokens <= 8)
            runs += [len(list(g)) for key, g in itertools.groupby(is_key[is_key.argmax() :].tolist()) if key]
        lengths[split] = set(runs)
    assert lengths == {"train": {1, 2, 3}, "test": {3}}


def test_training_on_all_tokens_tells_the_next_one():
    """`loss` = all: in training rows alone, and what is asked is asked as before."""
    (_, scored), (_, every) = rows("mqar", 20, "train"), rows("mqar", 20, "train", loss="all")
    asked = scored["weights"] > 0
    assert every["weights"][:, :-1].all()
    task = laws.opened("mqar", loss="all")
    told = np.isin(every["tokens"][:, 16:], range(1, 128))  # keys in slots are asked
    right = np.where(told, task.oracle(every)[:, 16:], np.roll(every["tokens"], -1, axis=1)[:, 16:])
    assert (
        (every["targets"][:, 16:] == right)[:, :-1].all()
        and told.sum() == asked.sum() == 160
        and task.rows("valid", range(5))["weights"].sum() == 40
    )


def test_pixels_permuted_are_the_same_pixels():
    """In one order for all rows; an image is mostly dark, and has strokes."""
    (_, plain), (_, mixed) = rows("pixels", 20, noise=0.0), rows("pixels", 20, noise=0.0, permuted=True)
    same = laws.opened("pixels", noise=0.0)._order()
    order = laws.opened("pixels", noise=0.0, permuted=True)._order()
    assert sorted(order) == sorted(same) and (order != same).any()
    for image in plain["tokens"]:
        assert (image == 0).mean() > 0.4 and image.max() >= 90
    assert mixed["tokens"].shape == plain["tokens"].shape


def test_periodic_facts_come_in_their_rhythm():
    """Two questions for a fact are its period apart, but for places that were taken."""
    task, found = rows("periodic_recall", 20)
    gaps = {16: [], 32: [], 64: []}
    for tokens, weights in zip(found["tokens"], found["weights"]):
        for j in range(4):
            at = np.flatnonzero((tokens == tokens[2 * j]) & (weights > 0))
            gaps[task.config.period(j)] += np.diff(at).tolist()
    for period, found_gaps in gaps.items():
        assert np.mean(np.array(found_gaps) == period) > 0.8 and abs(np.mean(found_gaps) - period) < 1


def objects(tokens, config):
    cells = tokens[config.rule : -1].reshape(-1, 2)
    return (cells[:, 0] != 4).sum()


def test_gcog_held_out_rows_are_of_another_law():
    """More distractors, combinations that training never has, longer rules."""
    task, new = rows("gcog", 40, "test", shift="distractors", heldout_distractors=(10, 12))
    old = task.rows("train", range(40))
    count = lambda found: [objects(tokens, task.config) for tokens in found["tokens"]]
    assert max(count(old)) < min(count(new))
    task = laws.opened("gcog", shift="systematic")
    rules = [{tuple(t[:3]) for t in task.rows(split, range(200))["tokens"].tolist()} for split in ("train", "test")]
    assert not rules[0] & rules[1] and min(map(len, rules)) > 20
    task, new = rows("gcog", 20, "test", shift="productive")
    ifs = lambda found: (found["tokens"] == 2).sum(1)
    assert set(ifs(new)) == {2} and set(ifs(task.rows("train", range(20)))) == {0}


def test_label_sets_of_held_out_rows():
    """A quarter each; training has none where labels are swapped or classes new."""
    task, new = rows("icl_classes", 400)
    share = np.bincount(task.slices(new)["set"][1], minlength=4) / 400
    assert (abs(share - 0.25) < 0.09).all()
    assert set(task.slices(task.rows("train", range(50)))["set"][1]) == {0}


def test_visual_questions_say_where_images_and_questions_lie():
    """The layout of rows, told anew from their ids: cells row by row, questions up to what opens the answer."""
    task, found = rows("visual_question", 20, images=3, symbols=16, length=80)
    c = task.config
    for tokens, targets, layout, node in zip(*(found[key] for key in ("tokens", "targets", "layout", "node"))):
        kind, span = layout[:, 0], layout[:, 5:]
        image = (tokens >= c.first_symbol) & (tokens < c.first_text)
        for at in np.flatnonzero(tokens == 0):  # a question's own symbol is no cell, nor is the answer
            image[at : at + 6] = False
            assert (kind[at : at + 5] == 3).all() and (span[at : at + 5] == [at, at + 5]).all() and kind[at + 5] == 4
            assert tokens[at + 4] == 1 and targets[at + 4] == tokens[at + 5]
        np.testing.assert_array_equal(kind == 2, image)
        np.testing.assert_array_equal(node > 0, image)
        first = np.flatnonzero(image)[::9]
        for number, start in enumerate(first.tolist()):
            own = slice(start, start + 9)
            assert layout[own].tolist() == [[2, *divmod(i, 3), 3, 3, start, start + 9] for i in range(9)]
            assert (node[own] == number + 1).all()
        for at in np.flatnonzero(tokens == 0):
            name, symbol, direction = tokens[at + 1 : at + 4].tolist()
            start = np.flatnonzero(tokens == name)[0] + 1
            y, x = divmod(tokens[start : start + 9].tolist().index(symbol), 3)
            y, x = {2: (y, x + 1), 3: (y, x - 1), 4: (y + 1, x), 5: (y - 1, x)}[direction]
            assert 0 <= y < 3 and 0 <= x < 3 and tokens[at + 5] == tokens[start + 3 * y + x]
        assert len(first) == 3 and (kind == 3).sum() == 10 and (kind == 4).sum() == 2
        assert (layout[kind == 1, 1:] == [-1, -1, 0, 0, 0, 0]).all() and (kind == 1).sum() == 80 - 27 - 12
