"""The configs and inputs that the contract battery tries on every registered mixer."""

from __future__ import annotations

import dataclasses
import functools
import unittest.mock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers import roles
from attnlab.mixers.attention import AttentionConfig
from attnlab.mixers.cross import CrossConfig
from attnlab.mixers.grouped import GroupedConfig
from attnlab.mixers.heads import HeadConfig, RotaryConfig
from tests import tiers
from tests.mixers import stated

WIDTH, LENGTH = 16, 11
CHUNK = 4  # of configs that leave it as it is by default: rows of LENGTH have a document that begins at an edge, two
# that cross one, and whole chunks between
EVERYDAY = "gated", "gated_deltanet", "lightning", "softmax"  # the mixers that `-m "not slow"` tries
# Knobs of what reads a context, tried in test_cross.py, and of what reads a fixed text or a table of embeddings, tried
# in test_ablated.py.
CROSS = {"source", "context_width", "rope_context", "text", "embedding_width"}
# Knobs that are refused, or change nothing in short rows, where others are not set, and these.
BESIDE = {
    "qk_epsilon": {"qk_norm": True},
    "rope_scaling": {"rope_base": 1e4},
    "impl": {"chunk": CHUNK},
    "gate_scale": {"forget": True},
    "layer": {"layers": 3, "value_residual": False},
    "lifetime_min": {"forget": "fixed"},
    "lifetime_max": {"forget": "fixed"},
}

# Row 0: two documents and padding behind. Row 1: padding in front, one document, which is cut by the padding's end.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [0, 0, 3, 3, 3, 3, 3, 3, 3, 3, 3]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0], [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
DOCUMENTS = [(0, 0, 4), (0, 4, 9), (1, 2, 11)]  # row, first, end
ALONE = (DOCUMENTS[:2], DOCUMENTS[2:])  # in batches of two rows that hold one each


@functools.cache
def configs(name: str) -> dict[str, tuple[Any, bool]]:
    """Every config to try, by a readable id, and whether it belongs to the everyday tests.

    The default, the other direction, all other values of all knobs, as many in one config as go together, and the
    combinations that the mixer names. Knobs inherited from another mixer's Config are tried there, those of all
    attention layers with softmax.
    """
    cls = mixers.get(name)
    own = {HeadConfig, RotaryConfig} | ({GroupedConfig, AttentionConfig, CrossConfig} if name == "softmax" else set())
    found, knobs = {"default": (cls.Config(), True)}, []
    for field in dataclasses.fields(cls.Config):
        inherited = set(cls.Config.__mro__[1:]) - own
        if field.name in CROSS or any(field.name in getattr(b, "__dataclass_fields__", ()) for b in inherited):
            continue
        for value in field.metadata["other"]:
            if field.name == "causal":
                found[f"causal={value}"] = (cls.Config(causal=value), False)
            elif field.name.split("_")[-1] != "impl":  # laws name implementations themselves
                knobs.append((field.name, value))
    for fields in [*_together(cls, knobs), *cls.variants]:
        found[",".join(f"{k}={v}" for k, v in fields.items())] = (cls.Config(**fields), False)
    return found


def _together(cls: type[mixers.Mixer], knobs: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """The knobs' values in few configs. What turns something off stands apart from what it would hide; what none of
    them allows stands with what it needs."""
    groups: list[dict[str, Any]] = []
    for name, value in knobs:
        for fields in groups:
            if name not in fields and bool(value) == bool(next(iter(fields.values()))):
                try:
                    config = cls.Config(**fields, **{name: value})
                    getattr(config, "head_dim", int)(WIDTH)  # which refuses what does not divide the width
                except ConfigError:
                    continue
                fields[name] = value
                break
        else:
            groups.append({name: value} | (BESIDE.get(name, {}) if _refused(cls, {name: value}) else {}))
    return groups


def _refused(cls: type[mixers.Mixer], fields: dict[str, Any]) -> bool:
    try:
        cls.Config(**fields)
    except ConfigError:
        return True
    return False


def of_knobs(config: Any) -> bool:
    """Whether the config is other values of knobs, the direction apart: not the default nor a named combination."""
    cls = mixers.get(config.node_name)
    named = [cls.Config(), in_chunks(cls.Config()), *(cls.Config(**fields) for fields in cls.variants)]
    return config not in named and config.causal == named[0].causal


def in_chunks(config: Any) -> Any:
    """The config with its chunk set to `CHUNK`, where it has chunks: rows of LENGTH cross their edges."""
    return dataclasses.replace(config, chunk=CHUNK) if hasattr(config, "chunk") else config


def parameters(
    knobs: bool = True, combinations: bool = True, turned: bool = False, chunks: bool = False, often: Any = None
) -> list[Any]:
    """pytest parameters `config` for all mixers: each mixer's default, and the others, which are exhaustive.

    Args:
      knobs: whether other values of knobs are tried, too, or only the default, the combinations that the mixer names,
        and the other direction.
      combinations: whether these combinations are tried.
      turned: whether every run tries one of the others, too: the first with as many knobs turned as go together.
      chunks: whether the default and the other direction are tried in chunks that the short rows cross.
      often: mixers whose configs are tried as often as told above, those of others being exhaustive; none: all.
    """
    found = []
    for name in mixers.names():
        tried = configs(name)
        first = next((label for label, (config, _) in tried.items() if of_knobs(config)), None)
        for label, (config, everyday) in tried.items():
            if knobs or everyday or (not of_knobs(config) and (combinations or label.startswith("causal="))):
                kept = (everyday or (turned and label == first)) and (often is None or name in often)
                marks = [] if kept else [tiers.exhaustive]
                marks += [] if name in EVERYDAY else [pytest.mark.slow]
                if chunks and (everyday or label.startswith("causal=")):
                    config = in_chunks(config)
                found.append(pytest.param(config, id=f"{name}-{label}", marks=marks))
    return found


def drawn_by_numpy() -> Any:
    """In this context parameters that begin as normal or uniform numbers are NumPy's: jax compiles for each shape."""
    return unittest.mock.patch.object(roles.Draw, "__call__", _draw)


def _draw(draw: roles.Draw, key: jax.Array) -> Any:
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    if draw.make is roles.normal:
        shape, dtype, deviation = draw.args
        return jnp.asarray(deviation * rng.standard_normal(shape), dtype)
    if draw.make is jax.random.uniform:
        shape, dtype, low, high = draw.args
        return jnp.asarray(rng.uniform(low, high, shape), dtype)
    return draw.make(key, *draw.args)


@functools.lru_cache(maxsize=32)
def _values(config: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """float32 parameters off their initial values, so that none is neutral, and other variables as they begin; drawn
    once for all laws and dtypes."""
    # Modules are made inside of what is traced, too.
    with jax.ensure_compile_time_eval(), drawn_by_numpy():
        _, params, rest = nnx.split(mixers.build(config, width=WIDTH, rngs=nnx.Rngs(0)), nnx.Param, ...)
    rng, of = np.random.default_rng(1), lambda state: [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return [leaf + 0.3 * rng.standard_normal(leaf.shape) for leaf in of(params)], of(rest)


def module(config: Any, dtype: Any) -> mixers.Mixer:
    """The mixer with every parameter moved off its initial value."""
    graphdef, *states = nnx.split(blank(config, dtype), nnx.Param, ...)
    filled = []
    for state, values in zip(states, _values(config), strict=True):
        leaves, treedef = jax.tree.flatten(state)
        typed = [jnp.asarray(value.astype(leaf.dtype)) for value, leaf in zip(values, leaves, strict=True)]
        filled.append(jax.tree.unflatten(treedef, typed))
    return nnx.merge(graphdef, *filled)


def inputs(dtype: Any, seed: int = 0, behind: int = 0) -> tuple[jax.Array, mixers.Sequence]:
    """x [2, LENGTH + behind, WIDTH] and the packed sequence, with so much more padding behind."""
    x = np.random.default_rng(seed).standard_normal((2, LENGTH, WIDTH))
    more = lambda a: np.pad(a, [(0, 0), (0, behind)] + [(0, 0)] * (a.ndim - 2))
    return jnp.asarray(more(x), dtype), mixers.Sequence(jnp.asarray(more(POSITIONS)), jnp.asarray(more(SEGMENTS)))


def moved(a: jax.Array, documents: list[tuple[int, int, int]]) -> jax.Array:
    """Each document of a [B, T, ...] at the beginning of a row of its own, 0 elsewhere; of the same shape."""
    a = np.asarray(a)  # every operation of jax on another shape is compiled
    rows = np.zeros_like(a)
    for i, (row, first, end) in enumerate(documents):
        rows[i, : end - first] = a[row, first:end]
    return jnp.asarray(rows)


def alone(
    x: jax.Array, seq: mixers.Sequence, documents: list[tuple[int, int, int]]
) -> tuple[jax.Array, mixers.Sequence]:
    """Each document in a row of its own, with padding behind: a batch of the same shape."""
    return moved(x, documents), mixers.Sequence(*(moved(a, documents) for a in (seq.positions, seq.segments)))


def split(module: mixers.Mixer) -> tuple[Any, Any]:
    """graphdef and parameters."""
    return nnx.split(module, nnx.Param)


def default_chunk(config: Any) -> int:
    """Positions that the layer computes together: its knob, or the rows of a block of the ops that it calls."""
    return config.chunk if hasattr(config, "chunk") else stated.of(config.node_name, "BLOCK", 256)


def long_inputs(config: Any, dtype: Any) -> tuple[jax.Array, mixers.Sequence, list[tuple[int, int, int]]]:
    """x [3, T, WIDTH] with T = 2 chunks and 4, the packed sequence, and its documents (row, first, end).

    Row 0: a document that begins exactly at a chunk's edge. Row 1: one that begins inside a chunk and crosses its edge.
    Row 2: one document.
    """
    chunk = default_chunk(config)
    T = 2 * (chunk + 2)
    documents = [(0, 0, chunk), (0, chunk, T), (1, 0, chunk // 2), (1, chunk // 2, T), (2, 0, T)]
    segments, positions = np.zeros((3, T), np.int32), np.zeros((3, T), np.int32)
    for index, (row, first, end) in enumerate(documents):
        segments[row, first:end], positions[row, first:end] = index + 1, np.arange(end - first)
    x = np.random.default_rng(3).standard_normal((3, T, WIDTH))
    return jnp.asarray(x, dtype), mixers.Sequence(jnp.asarray(positions), jnp.asarray(segments)), documents


def blank(config: Any, dtype: Any) -> mixers.Mixer:
    """The mixer with shapes in place of arrays: for what is traced and never run."""
    graphdef, state = _shapes(config, jnp.dtype(dtype), jax.config.jax_enable_x64)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))


@functools.lru_cache(maxsize=8)
def _shapes(config: Any, dtype: Any, wide: bool) -> tuple[Any, Any]:
    """Of `blank`, made once for all laws of a config."""
    return nnx.split(nnx.eval_shape(lambda: mixers.build(config, width=WIDTH, rngs=nnx.Rngs(0), dtype=dtype)))


@functools.partial(jax.jit, static_argnums=0)
def call(graphdef: Any, params: Any, x: jax.Array, seq: mixers.Sequence) -> jax.Array:
    """y of whole rows; one program for all tests of a config."""
    return nnx.merge(graphdef, params)(x, seq).y


def output(module: mixers.Mixer, x: Any, seq: mixers.Sequence | None = None) -> np.ndarray:
    """y of whole rows, by default of one document each."""
    seq = mixers.Sequence.whole(*x.shape[:2]) if seq is None else seq
    return np.asarray(call(*split(module), jnp.asarray(x), seq))


@jax.jit
def placed(stream: mixers.Stream, seq: mixers.Sequence) -> tuple[mixers.Sequence, mixers.Stream]:
    return stream.extend(seq)


def first(x: jax.Array, seq: mixers.Sequence, n: int) -> tuple[mixers.Sequence, jax.Array]:
    """The first n positions, placed at the beginning of a stream, and their rows of x."""
    piece = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[:, :n]), seq)
    return placed(mixers.Stream.start(len(x)), piece)[0], jnp.asarray(np.asarray(x)[:, :n])


def streamed(extend: Any, state: Any, x: jax.Array, seq: mixers.Sequence, cuts: Any) -> tuple[np.ndarray, Any]:
    """y of `extend(x, seq, state)` over pieces of so many positions each, and the state after them."""
    stream, parts, first, x = mixers.Stream.start(len(x)), [], 0, np.asarray(x)
    given = [None if a is None else np.asarray(a) for a in (seq.positions, seq.segments)]
    for n in cuts:
        piece = slice(first, first + n)
        of_piece = (None if a is None else jnp.asarray(a[:, piece]) for a in given)
        part, stream = placed(stream, dataclasses.replace(seq, **dict(zip(("positions", "segments"), of_piece))))
        out = extend(jnp.asarray(x[:, piece]), part, state)
        parts.append(np.asarray(out.y))
        state, first = out.state, first + n
    return np.concatenate(parts, axis=1), state
