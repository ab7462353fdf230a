"""The kernels of the neural memory, interpreted, against the op's definition in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnlab.errors import UserError
from attnlab.ops.dispatch import interpreted
from attnlab.ops.documents import document_index, positions_in_documents
from attnlab.ops.memory_frame import MemorySpec, initial_state
from attnlab.ops.neural_memory import NEURAL_MEMORY, neural_memory
from kernels_pallas import neural_memory as kernels
from kernels_pallas.neural_memory import call, cost, plan, tpu_backward, tpu_forward
from kernels_pallas.neural_memory.call import Call
from tests import tiers

d, f, C = 16, 24, 16
LINEAR = MemorySpec(C, False, (1.0,), read_after_write=False, grad_at="decayed")
DEEP = MemorySpec(C, True, (0.5, 0.05), epsilon=1e-3)
# Long documents whose chunks begin anywhere, short ones that share a group, ends in and at the edge of chunks.
LENGTHS = (37, 1, 2, 16, 5, 48, 3, 18), (20, 40, 15, 1, 1, 53)
SEGMENTS = np.stack([np.repeat(np.arange(len(n)), n) for n in LENGTHS])


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Rows of tests have several segments: groups begin in one and end in the next."""
    monkeypatch.setattr(call, "_SEGMENT", 64)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def data(length, heads, depth, batch=1, seed=0):
    """q, k, v, log_keep, log_eta, theta, and weights of the memory, float64."""
    rng = np.random.default_rng(seed)
    normal = lambda *s: rng.standard_normal(s)
    q, k, v = (normal(batch, length, heads, d) for _ in range(3))
    keep, eta = (-rng.exponential(scale, (batch, length, heads)) for scale in (0.05, 0.5))
    widths = [d, *[f] * (depth - 1), d]
    weights = tuple(normal(heads, i, o) * (i**-0.5 if n else 0.5) for n, (i, o) in enumerate(zip(widths, widths[1:])))
    return (unit(q), unit(k), v, keep, eta, rng.uniform(0, 0.1, keep.shape)), weights


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def memory(spec, documents, impl, weights, inputs, state=None):
    """y, and of the state what is ever read."""
    y, after = neural_memory(
        *inputs, initial_state(weights, 1, inputs[4] is not None), spec, documents_BT=documents, state=state, impl=impl
    )
    inside = after.position_B % spec.chunk != 0
    start = [jnp.where(inside[:, None, None, None], x, 0) for x in after.start]
    kept = jnp.where(inside[:, None], after.log_keep_BH, 0)
    return y, after.weights, after.momentum, start, kept


def with_gradients(fn):
    """Of a sum in which each number has a weight of its own."""
    waves = lambda x: jnp.sum(jnp.cos(jnp.arange(x.size).reshape(x.shape)) * x)
    scalar = lambda *args: (lambda out: (sum(map(waves, jax.tree.leaves(out))), out))(fn(*args))
    return jax.jit(
        lambda *args: jax.value_and_grad(scalar, tuple(range(len(args))), has_aux=True, allow_int=True)(*args)
    )


def close(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            b = np.asarray(b)
            np.testing.assert_allclose(np.asarray(a, b.dtype), b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


def defined(fn, *args):
    """In float64, by the definition."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, fn("definition")(*cast(args, jnp.float64)))


def of_kernels(fn, *args):
    with interpreted():
        return fn("pallas")(*cast(args, jnp.float32))


def inside_a_chunk(weights, batch):
    """States in the middle of a chunk, whose first weights are others."""
    state = initial_state(tuple(map(jnp.asarray, weights)), batch, True)
    shifted = lambda layers, by: tuple(w + by for w in layers)
    return dataclasses.replace(
        state,
        weights=shifted(state.weights, 0.1), momentum=shifted(state.momentum, 0.05), start=shifted(state.start, -0.2),
        log_keep_BH=state.log_keep_BH - 0.1, position_B=jnp.arange(21, 21 + 11 * batch, 11, dtype=jnp.int32),
    )  # fmt: skip


def test_packed_rows_with_states_and_all_gradients():
    """Values, states and every gradient of two heads a step, rows that begin inside a chunk, W_{t-1} read, gradients at
    decayed weights; documents and chunks end anywhere."""
    inputs, weights = data(130, 2, 1, batch=2)
    documents = jnp.asarray(SEGMENTS, jnp.int32)  # the first document is the state's
    with jax.enable_x64(True):
        state = jax.tree.map(np.asarray, inside_a_chunk(weights, 2))
    make = lambda impl: with_gradients(functools.partial(memory, LINEAR, documents, impl))
    args = weights, inputs, state
    close(of_kernels(make, *args), defined(make, *args), 2e-5)


def test_networks_and_all_gradients():
    """As above for two layers and their norm, from the documents' beginning."""
    inputs, weights = data(130, 1, 2)
    documents = document_index(jnp.asarray(SEGMENTS[:1], jnp.int32))
    make = lambda impl: with_gradients(functools.partial(memory, DEEP, documents, impl))
    close(of_kernels(make, weights, inputs), defined(make, weights, inputs), 2e-5)


@tiers.parametrize("length", [1, 7, 64, 256], often=[7])
def test_lengths(length):
    """Rows of one document, without forgetting and momentum where they are short; three heads, an odd number."""
    inputs, weights = data(length, 3, 1)
    q, k, v, keep, eta, theta = inputs
    inputs = (q, k, v, None, None, theta) if length < 64 else inputs
    spec = dataclasses.replace(LINEAR, residual_norm=length == 64, read_after_write=True)
    make = lambda impl: jax.jit(functools.partial(memory, spec, None, impl))
    close(of_kernels(make, weights, inputs), defined(make, weights, inputs), 1e-5)


@tiers.exhaustive
def test_groups_change_rounding_alone():
    """Any number of chunks at once, in any number of segments, gives the same; bfloat16 errs as its rounding does."""
    inputs, weights = data(150, 1, 2)
    args, weights = cast(inputs, jnp.float32), cast(weights, jnp.float32)
    start = initial_state(weights, 1, True)

    def run(group, *dtypes):
        qkv = args[:3]
        for dtype in dtypes:
            qkv = [x.astype(dtype) for x in qkv]
        y, *state = kernels.neural_memory(
            *qkv, *args[3:], weights=start.weights, momentum=start.momentum, chunk=C, residual_norm=True,
            rates=DEEP.rates, epsilon=DEEP.epsilon, group=group, interpret=True,
        )  # fmt: skip
        return y.astype(jnp.float32), *state[:2]

    two, three, rounded, rough = run(2), run(3), run(2, jnp.bfloat16, jnp.float32), run(2, jnp.bfloat16)
    close(three, two, 2e-5)
    error = lambda a, b: jnp.sqrt(jnp.mean((a[0] - b[0]) ** 2) / jnp.mean(b[0] ** 2))
    assert 1e-4 < error(rough, rounded) < 2 * error(rounded, two)


@tiers.exhaustive
def test_pieces_are_the_whole():
    """Any cutting of packed rows with the state handed on gives the outputs and the end of the whole."""
    inputs, weights = data(130, 1, 1, batch=2)
    inputs, weights = cast(inputs, jnp.float32), cast(weights, jnp.float32)
    start = initial_state(weights, 1, True)
    run = jax.jit(lambda *a: neural_memory(*a[:6], start, LINEAR, documents_BT=a[6], state=a[7], impl="pallas"))
    with interpreted():
        blank = initial_state(weights, 2, True)
        whole, end = run(*inputs, document_index(jnp.asarray(SEGMENTS)), blank)
        state, before, parts = blank, None, []
        for first, n in ((0, 65), (65, 65)):
            piece = slice(first, first + n)
            documents = document_index(jnp.asarray(SEGMENTS[:, piece]), before)
            y, state = run(*(x[:, piece] for x in inputs), documents, state)
            parts.append(y)
            before = jnp.asarray(SEGMENTS[:, piece][:, -1])
    close(jnp.concatenate(parts, axis=1), whole, 5e-6)
    close((state.weights, state.momentum), (end.weights, end.momentum), 5e-6)


def test_no_races(capfd):
    """Under the simulation of a TPU, whose memory is NaN before it is written and behind rows that end inside a block:
    no race, and bitwise what plain XLA operations give; forward and backward, over several segments of two cores."""
    inputs, weights = data(70, 2, 1, batch=1)
    args, weights = cast(inputs, jnp.float32), cast(weights, jnp.float32)
    start, positions = (
        initial_state(weights, 1, True),
        positions_in_documents(document_index(jnp.asarray(SEGMENTS[1:, :70]))),
    )

    def run(interpret):
        def loss(weights, args):
            y, *states = kernels.neural_memory(
                *args, weights=weights, momentum=start.momentum, chunk=C, residual_norm=True, rates=(1.0,),
                positions=positions, group=2, interpret=interpret,
            )  # fmt: skip
            return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.sin(x)) for s in states[:2] for x in s), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(start.weights, args)

    simulated = run(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    jax.block_until_ready(simulated)
    close(simulated, run(True), 1e-6)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_groups_of_random_packings(rows):
    """Every position from the first on is in one group, within its bounds; groups begin with chunks, and are of one
    document or of several short ones, whole; a last chunk that is not complete is a group; the bound holds."""
    rng, C, T, B = np.random.default_rng(rows), 16, 150, 16

    @jax.jit
    def grouped(documents, seen, first):
        position = positions_in_documents(documents, seen)
        found = plan.groups(position, first, C, rows)
        return position, found, plan.by_segment(found[0], 64, 3, of_ends=True)

    for share in (0.01, 0.1, 0.5, 1.0):
        documents = np.cumsum(rng.random((B, T)) < share, axis=1).astype(np.int32)
        seen, own = rng.integers(0, 40, B), np.sum(documents == 0, axis=1)
        first = np.where((seen % C > 0) & (own > 0), np.minimum(C - seen % C, own), 0).astype(np.int32)
        position, found, ends = jax.device_get(grouped(documents, seen.astype(np.int32), first))
        for b in range(B):
            starts, position_T, document = found[0][b], position[b], documents[b]
            assert starts[0] == first[b] and starts[-1] == T
            assert np.all(np.diff(starts) >= 0) and np.all(np.diff(starts) <= rows)
            real = [(s, e, kind) for s, e, kind in zip(starts, starts[1:], found[1][b]) if s < e]
            assert ends[b].tolist() == [sum(e - 1 < edge for _, e, _ in real) for edge in (0, 64, 128, 192)]
            for s, e, kind in real:
                short = np.sum(document == document[s]) <= plan.shortest(C, rows)
                assert position_T[s] % C == 0
                assert kind == (plan.CONTINUES if position_T[s] else plan.SEVERAL if short else plan.BEGINS)
                complete = e == T or document[e] != document[e - 1]
                if kind == plan.SEVERAL:
                    assert position_T[s:e].max() < C and complete
                else:
                    assert document[s] == document[e - 1] and (complete or (e - s) % C == 0)
            rest = (position_T[-1] + 1) % C
            if rest and real and real[-1][2] != plan.SEVERAL:
                assert T - real[-1][0] == rest


def test_declared_bytes_are_those_of_the_blocks(monkeypatch):
    """What the compiler is told is what the block specs and copies move, within 5 %."""
    asked = []
    monkeypatch.setattr(
        tpu_forward.pl, "pallas_call", lambda *a, **k: asked.append(k) or (lambda *args: _blank(k, args))
    )
    call = Call("v6e", 2, 4096, 8, (128, 512, 128), "bfloat16", 16, True, (1.0, 1.0), 0.0, True, False, 4, 512, False)

    def _blank(options, args):
        asked[-1]["args"] = args
        return [jnp.zeros(s.shape, s.dtype) for s in options["out_shape"]]

    def run(q, gates, starts, kinds, firsts, *states):
        groups, states = (starts, kinds, firsts), list(zip(states[::2], states[1::2]))
        tpu_forward.run(call, q, q, q, gates, groups, states[0], (), heads=8, save=True)
        return tpu_backward.run(call, q, q, q, q, gates, groups, states[0], states[1], states[2], states[2], heads=4)

    of = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    layers = lambda *rows: [of(*rows, 8, *s) for s in call.shapes()]
    N = plan.bound(4096, 16, 64)
    scalars = [of(2, 1, n, dtype=jnp.int32) for n in (N + 1, N, 9)]
    jax.eval_shape(
        run, of(2, 4096, 1024, dtype=jnp.bfloat16), of(2, 1, 4096, 25), *scalars, *layers(1), *layers(2, 8), *layers(2)
    )
    for options in asked:
        moved = 0
        arrays = [*options["args"], *options["out_shape"]]
        for spec, x in zip([*options["in_specs"], *options["out_specs"]], arrays, strict=True):
            if spec.block_shape is not None and len(spec.block_shape) > 2 and spec.memory_space is None:
                moved += int(np.prod(options["grid"])) * int(np.prod(spec.block_shape)) * x.dtype.itemsize
            elif spec.block_shape is None:  # copied whole, once; initial states once for every row
                rows = 2 if x.shape[0] == 1 else 1
                moved += rows * x.size * x.dtype.itemsize
        assert abs(options["cost_estimate"].bytes_accessed / moved - 1) < 0.05, options["name"]


def test_what_is_not_served_is_said():
    """By `impl=pallas`, naming the value and what is allowed; `auto` takes another."""
    inputs, weights = data(40, 1, 2)
    run = lambda impl, **options: neural_memory(
        *cast(inputs, jnp.float32), initial_state(cast(weights, jnp.float32), 1, True),
        dataclasses.replace(DEEP, **options), impl=impl,
    )  # fmt: skip
    for options, said in (({"chunk": 3}, "chunk=3; allowed: multiples of 16"), ({"activation": "gelu"}, "gelu_tanh")):
        with interpreted(), pytest.raises(UserError, match=said):
            jax.eval_shape(lambda: run("pallas", **options))
        jax.eval_shape(lambda: run("auto", **options))
    assert "needs" in kernels.does_not_fit((1024, 8192, 1024), 16, "float32", 4096)
    assert NEURAL_MEMORY.table["pallas"].platforms == ("tpu", "gpu")
    with pytest.raises(ValueError, match="chunk=8; allowed: multiples of 16"):
        q = jnp.zeros((1, 16, 1, d))
        gate, w = q[..., 0], (jnp.zeros((1, 1, d, d)),)
        kernels.neural_memory(
            q, q, q, gate, gate, gate, weights=w, momentum=w, chunk=8, residual_norm=False, rates=(1.0,)
        )


def test_flops_are_declared():
    """By the kernels' names, the backward four times the forward."""
    flops = kernels.kernel_flops(2, 64, 2, (d, f, d), "bfloat16", C)
    assert set(flops) == {tpu_forward.NAME, tpu_backward.NAME}
    assert flops[tpu_backward.NAME] == 4 * flops[tpu_forward.NAME] > 0
    assert cost.forward_flops is not None
