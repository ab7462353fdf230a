"""Random streams: pinned bits, and the laws of what is made of them."""

from __future__ import annotations

import itertools

import numpy as np

from attnlab.tasks.streams import Stream, stream_key
from attnlab.tasks.tokens import buckets, other_than, place


def test_streams_are_pinned():
    """The bits behind every example: were they to change, finished runs could not be repeated."""
    stream = Stream({"a": 1}, 7)
    drawn = np.concatenate([stream.uniform(3), stream.normal(2, 2).ravel()])
    assert drawn[:3].tolist() == [0.9699047191488347, 0.5941278291847308, 0.8563348592005878]
    assert abs(drawn).max() < 6


def test_normal_is_normal():
    """Mean, variance and kurtosis of 40,000 numbers."""
    x = Stream("normal", 0).normal(40_000)
    np.testing.assert_allclose([x.mean(), x.var(), (x**4).mean()], [0, 1, 3], atol=0.15)


def test_streams_of_other_indices_never_meet():
    """Nor does it matter whether the key was made before."""
    identity = {"a": 1}
    drawn = [Stream(identity, index).uniform(1000) for index in range(5)]
    assert len(set(np.concatenate(drawn))) == 5000
    np.testing.assert_array_equal(Stream(stream_key(identity), 3).uniform(1000), drawn[3])


def close_to(counts, shares):
    """Within five standard errors of each share."""
    total, shares = sum(counts), np.asarray(shares)
    assert (abs(np.asarray(counts) / total - shares) <= 5 * np.sqrt(shares * (1 - shares) / total)).all()


def test_draws_are_uniform():
    """Integers, orders and choices of different ones."""
    stream = Stream("uniform", 0)
    close_to(np.bincount(stream.integers(7, 20_000), minlength=7), np.full(7, 1 / 7))
    orders = list(itertools.permutations(range(3)))
    for draw in (lambda: stream.permutation(3), lambda: stream.distinct(3, 3)):
        found = [orders.index(tuple(draw().tolist())) for _ in range(3000)]
        close_to(np.bincount(found, minlength=6), np.full(6, 1 / 6))
    assert all(len(set(stream.distinct(5, 9).tolist())) == 5 for _ in range(100))
    close_to(np.bincount([other_than(stream, 4, 3, 4) - 3 for _ in range(3000)], minlength=4), [1 / 3, 0, 1 / 3, 1 / 3])


def test_weighted_draws_are_successive():
    """The first by the weights, the second by those that are left."""
    w = np.array([0.5, 0.3, 0.2])
    stream, pairs = Stream("weighted", 0), list(itertools.permutations(range(3), 2))
    found = [pairs.index(tuple(stream.weighted(np.log(w), 2).tolist())) for _ in range(6000)]
    close_to(np.bincount(found, minlength=6), [w[i] * w[j] / (1 - w[i]) for i, j in pairs])


def test_blocks_are_placed_alike_everywhere():
    """Two blocks of 2 and 3 in 8 positions: the ten ways to do it are as likely."""
    stream = Stream("place", 0)
    found = [tuple(place(stream, [2, 3], 8).tolist()) for _ in range(4000)]
    ways = [(a, b) for a in range(9) for b in range(a + 2, 6)]
    close_to([found.count(way) for way in ways], np.full(10, 0.1))


def test_buckets_double():
    labels, index = buckets(np.array([-1, 0, 1, 2, 3, 7, 8, 9]), 8)
    assert labels == ["0", "1", "2-3", "4-7", "8"] and index.tolist() == [-1, 0, 1, 2, 2, 3, 4, -1]
    labels, index = buckets(np.array([0, 1, 6, 10]), 10, least=1)
    assert labels == ["1", "2-3", "4-7", "8-10"] and index.tolist() == [-1, 0, 2, 3]
