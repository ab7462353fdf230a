"""Generation against the full forward, and sampling against its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import memory, mixers
from attnlab.errors import ConfigError, UserError
from attnlab.evaluate import generate as generate_lib
from attnlab.evaluate.generate import Sampling, sample
from attnlab.models.lm import LanguageModelConfig
from attnlab.models.transformer import mixer_table
from attnlab.train.state import Model
from tests import tiers
from tests.train import runs

PROMPTS = [np.array([7], np.int32), np.arange(1, 12, dtype=np.int32), np.array([3, 1, 4], np.int32)]


@pytest.fixture(scope="module")
def trained():
    nodes = {"A": {"name": "softmax", "heads": 2, "window": 5}, "B": {"name": "gated", "heads": 2}}
    config = LanguageModelConfig(vocab=19, width=16, layers=2, mixers=mixer_table(nodes, "m"), pattern="AB")
    model = Model.of(config)
    return model, runs.drawn(model)


def as_it_is(fn):
    """On one device; as with a mesh, what was compiled is kept."""
    return fn


def generate(*args):
    return generate_lib.generate(*args, as_it_is)


def test_greedy_is_the_argmax_of_the_full_forward(trained):
    """Prompts of different lengths in one batch: each goes on as by running the whole sequence again at every token."""
    model, params = trained
    out = generate(model.merge, params, PROMPTS, Sampling(tokens=9, temperature=0)).tokens

    @jax.jit
    def forward(tokens):
        lm = model.merge(params)
        return lm.logits(lm.hidden(tokens, mixers.Sequence.whole(*tokens.shape)).y)

    for prompt, new in zip(PROMPTS, out):
        whole = np.concatenate([prompt, new])
        logits = np.asarray(forward(np.pad(whole, (0, 20 - len(whole)))[None]))[0]
        np.testing.assert_array_equal(np.argmax(logits, -1)[len(prompt) - 1 : len(whole) - 1], new)


@tiers.exhaustive
def test_a_batch_is_its_prompts_alone(trained):
    """The first prompt's sample does not depend on the others; tests/evaluate/test_scorer.py has that of batches."""
    model, params = trained
    sampling = Sampling(tokens=12, temperature=1.0, seed=4)
    alone, together = (generate(model.merge, params, p, sampling).tokens[0] for p in (PROMPTS[:1], PROMPTS))
    np.testing.assert_array_equal(alone, together)


def test_samples_are_of_their_seed(trained):
    """One seed draws the same again, another one others."""
    model, params = trained
    sampling = Sampling(tokens=12, temperature=1.0, seed=4)
    together = generate(model.merge, params, PROMPTS, sampling).tokens
    again = generate(model.merge, params, PROMPTS, sampling).tokens
    other = generate(model.merge, params, PROMPTS, Sampling(tokens=12, temperature=1.0, seed=5)).tokens
    assert all(np.array_equal(a, b) for a, b in zip(together, again))
    assert not all(np.array_equal(a, b) for a, b in zip(together, other))


def test_stop_token_ends_its_row_only(trained):
    """A row ends with its first stop token; the others go on."""
    model, params = trained
    free = generate(model.merge, params, PROMPTS, Sampling(tokens=12, temperature=1.0)).tokens
    stop = int(free[0][3])
    stopped = generate(model.merge, params, PROMPTS, Sampling(tokens=12, temperature=1.0, stop=stop)).tokens
    for a, b in zip(free, stopped):
        where = np.flatnonzero(a == stop)
        expected = a[: where[0] + 1] if len(where) else a
        np.testing.assert_array_equal(b, expected)


def draws(logits, sampling, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.asarray(np.broadcast_to(np.asarray(logits, np.float32), (count, len(logits))))
    return np.bincount(np.asarray(sample(rows, keys, sampling)), minlength=len(logits)) / count


LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2]))


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"temperature": 0.5}, np.array([0.01, 0.16, 0.0025, 0.0625, 0.04]) / 0.275),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"top_k": 100}, [0.1, 0.4, 0.05, 0.25, 0.2]),
    ],
)
def test_sampling_frequencies(fields, expected):
    """Frequencies are those of the truncated, tempered distribution; what is cut off is never drawn."""
    found = draws(LOGITS, Sampling(tokens=1, **{"temperature": 1.0, **fields}))
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert not np.any(found[np.asarray(expected) == 0])


@pytest.mark.parametrize(
    "fields",
    [
        *[{"temperature": t} for t in (1e-3, 1e-30, 1e-37, 1e-38, 1e-46, 5e-324)],
        *[{"temperature": t, "top_p": 0.9} for t in (1e-37, 1e-40)],
        *[{"temperature": 1.0, "top_p": p} for p in (1e-9, 1e-46, 5e-324)],
        {"temperature": 1e300, "top_k": 1},
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_limits_of_sampling_are_the_likeliest_token(fields, dtype):
    """Whatever temperature or top_p becomes in the device's numbers, the draw is the likeliest, far from 0 too."""
    logits = (np.random.default_rng(0).normal(size=(4, 50)) * 8 + 1000).astype(dtype)
    logits[:, 7] = 1e4
    keys = jax.random.split(jax.random.key(0), 4)
    assert sample(jnp.asarray(logits), keys, Sampling(**fields)).tolist() == [7] * 4


def test_huge_temperatures_are_uniform():
    """Nothing becomes NaN, and what a model excludes stays excluded."""
    for temperature in (1e30, 1e38, 1e300):
        found = draws([0.0, 5.0, -np.inf, -5.0], Sampling(temperature=temperature))
        np.testing.assert_allclose(found, [1 / 3, 1 / 3, 0, 1 / 3], atol=0.03)


def test_more_memory_than_there_is(trained, monkeypatch):
    """Samples that the machine cannot hold are refused before they are tried."""
    monkeypatch.setattr(memory.os, "sysconf", lambda _: 2000)  # 2000 pages of 2000 bytes
    with pytest.raises(UserError, match="(?s)3 samples of up to 100032 tokens need .* 0.0 GB\nlower tokens or"):
        generate(trained[0].merge, trained[1], PROMPTS, Sampling(tokens=100_000))


@pytest.mark.parametrize(
    "fields",
    [{"tokens": 0}, {"temperature": -1.0}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_k": -1}, {"seed": -1}],
)
def test_impossible_sampling(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Sampling(**fields)
