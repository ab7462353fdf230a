"""What tests of recurrences' kernels share: documents, gradients by name, and the bytes that blocks move."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.mixers import precision

B = 2


def documents_of(length):
    """Document 0 goes on from before the first row. Documents begin inside chunks of 16, 32 and 128 and at their edges,
    a document of one position among them, and with the last position."""
    begins = ([16, 17, 40, 128, length - 1], [0, 32, 64, 65, 200])
    index = np.zeros((B, length), np.int32)
    for b in range(B):
        for n, t in enumerate(t for t in begins[b] if 0 <= t < length):
            index[b, t:] = n + 1
    return index


def starts_of(documents):
    first = np.diff(documents, axis=1, prepend=0) != 0
    return np.maximum.accumulate(np.where(first, np.arange(documents.shape[1]), -1), axis=1)


def results(fn, arrays, starts=None, documents=None, **options):
    """o, the state after, and gradients by name, for one cotangent of both.

    fn: a function of the arrays and options, and of starts or documents where they are given; programs of the same
    options and shapes are one.
    """
    rest = {n: jnp.asarray(x) for n, x in (("starts", starts), ("documents", documents)) if x is not None}
    grads, (o, end) = _program(fn, tuple(options.items()))(arrays, rest)
    found = {"o": o, "end": end, **{f"d{name}": x for name, x in grads.items()}}
    return {name: np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for name, x in found.items()}


@functools.lru_cache
def _program(fn, options):
    def loss(arrays, rest):
        o, end = fn(**arrays, **rest, **dict(options))
        weigh = lambda y, by: jnp.sum(y.astype(end.dtype) * by(jnp.arange(y.size)).reshape(y.shape).astype(end.dtype))
        return weigh(o, jnp.cos) + weigh(end, jnp.sin), (o, end)

    return jax.jit(jax.grad(loss, has_aux=True))


def rounded(arrays, dtype):
    """Arrays that are multiplied are of a dtype, the others float32."""
    return {name: jnp.asarray(x, dtype if name in "qkuv" else jnp.float32) for name, x in arrays.items()}


def assert_close(found, expected, tolerance):
    for name, value in expected.items():
        assert found[name].shape == value.shape
        scale = max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(found[name], value, atol=tolerance * scale, rtol=0, err_msg=name)


def assert_causal(fn, arrays, by, at=37, **rest):
    """What comes from position `at` on, here its size times `by`, changes nothing before, to the last bit."""
    changed = {n: x if n == "state" else x.at[:, at:].set(by * jnp.abs(x[:, at:])) for n, x in arrays.items()}
    before, after = (results(fn, x, **rest)["o"] for x in (arrays, changed))
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert np.any(before[:, at:] != after[:, at:])


def assert_refused(fn, says, *, dtype="bfloat16", width=8, **options):
    """Before anything is compiled, for queries and keys of a width and values of 8."""
    of = lambda w: jax.ShapeDtypeStruct((1, 9, 2, w), dtype)
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(functools.partial(fn, **options), of(width), of(width), of(8))


def calls(fn, *args):
    """Parameters of the kernels that a function calls, by name, and what is below each grid."""
    found = precision.equations(jax.make_jaxpr(fn)(*args).jaxpr)
    return {eqn.params["name"]: eqn.params for eqn in found if eqn.primitive.name == "pallas_call"}


def bytes_of_blocks(params):
    """What a kernel moves: a block is fetched when its place changes from one step of the grid to the next."""
    mapping, total = params["grid_mapping"], 0
    for block in mapping.block_mappings:
        array, shape = block.array_aval, block.block_shape
        if "smem" in str(block.transformed_block_aval).lower():
            continue
        sizes = (n if isinstance(n, int) else getattr(n, "block_size", 1) for n in shape)  # 1: an axis left out
        size = math.prod(sizes) * array.dtype.itemsize
        index = block.index_map_jaxpr
        # Behind the grid's indices come scalars in fast memory, which no place depends on here.
        rest = [None] * (len(index.jaxpr.invars) - len(mapping.grid))
        place = lambda at: tuple(int(i) for i in jax.core.eval_jaxpr(index.jaxpr, index.consts, *at, *rest))
        places = [place(at) for at in np.ndindex(*mapping.grid)]
        total += size * sum(a != b for a, b in zip([None, *places], places))
    return total
