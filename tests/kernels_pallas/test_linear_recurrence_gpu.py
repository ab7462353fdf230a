"""The linear recurrence's kernel for Hopper with no GPU: interpreted against the definition in float64, and lowered."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import use_abstract_mesh

from kernels_pallas import hopper
from kernels_pallas.linear_recurrence import linear_recurrence
from kernels_pallas.linear_recurrence.gpu import Blocks
from tests import tiers
from tests.kernels_pallas.recurrences import assert_close, assert_refused, documents_of, results, rounded, starts_of
from tests.kernels_pallas.test_flash_gpu import H100, needs_interpreter
from tests.kernels_pallas.test_linear_recurrence import exact, inputs

on_hopper = functools.partial(linear_recurrence, platform="cuda")
# T, H, d, e, decay, documents, state, blocks.
CASES = [
    (130, 1, 24, 65, "data", True, True, Blocks(1, 2, 64)),
    pytest.param((200, 2, 70, 128, "constant", True, True, None), marks=tiers.exhaustive),
    pytest.param((256, 1, 64, 64, "data", False, False, None), marks=tiers.exhaustive),
    pytest.param((7, 2, 130, 16, "none", True, True, Blocks(1, 1, 32)), marks=tiers.exhaustive),
]


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x) for x in c[:7]))
def test_equals_the_definition(case):
    """Values and every gradient: documents inside chunks and at their edges, more chunks than the ring has places, odd
    lengths and widths, a state in and out, a column behind the values. Tensor cores read bfloat16."""
    T, H, d, e, decay, packed, state, blocks = case
    arrays = rounded(inputs(T, H, d, e, decay, state), "bfloat16")
    documents = documents_of(T) if packed else None
    starts = jnp.asarray(starts_of(documents)) if packed else None
    found = results(functools.partial(on_hopper, starts=starts, sizes=blocks, interpret=True), arrays)
    expected = exact({name: np.asarray(x.astype(jnp.float32)) for name, x in arrays.items()}, documents)
    assert_close(found, expected, 0.008)


@needs_interpreter
def test_parts_composed_are_the_whole():
    """The second from the state after the first is one pass, a document going on over the cut; and nothing that is read
    or written is in no order."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    arrays = rounded(inputs(140, 1, 64, 64, "data", True), "bfloat16")
    documents, cut = documents_of(140), 70
    run = jax.jit(functools.partial(on_hopper, interpret=plgpu.InterpretGPUParams(detect_races=True)))
    whole = run(**arrays, starts=jnp.asarray(starts_of(documents)))
    state, parts = arrays["state"], []
    for piece in (slice(0, cut), slice(cut, 140)):
        index = documents[:, piece] - (documents[:, cut - 1 : cut] if piece.start else 0)
        own = {name: x[:, piece] for name, x in arrays.items() if name != "state"}
        o, state = run(**own, state=state, starts=jnp.asarray(starts_of(index)))
        parts.append(o.astype(jnp.float32))
    assert not gpu_callbacks.get_races().races_found
    parts = np.concatenate(parts, 1)
    np.testing.assert_allclose(parts, whole[0].astype(jnp.float32), atol=0.008 * np.abs(parts).max())
    np.testing.assert_allclose(state, whole[1], atol=0.004 * np.abs(state).max())


def test_nothing_is_saved(monkeypatch):
    """One block of threads has all columns of a head, so that its arrays are read once; a kernel writes what it is for,
    and no state for another."""
    launches, kernel = [], hopper.Device.kernel

    def counted(self, name, body, **options):
        launches.append((name, options["grid"], [x for x in options["out_type"] if x is not None]))
        return kernel(self, name, body, **options)

    monkeypatch.setattr(hopper.Device, "kernel", counted)
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    arrays = {"q": of(2, 256, 3, 128), "k": of(2, 256, 3, 128), "u": of(2, 256, 3, 128)}
    jax.eval_shape(jax.grad(lambda a: on_hopper(**a)[0].astype(jnp.float32).sum()), arrays)
    assert [name.removeprefix("linear_recurrence_") for name, *_ in launches] == [
        "forward", "backward_queries", "backward_keys", "backward_values"]  # fmt: skip
    assert {grid for _, grid, _ in launches} == {(1, 3, 2)}
    # Of the gradients' sweeps each writes one gradient: no states [B, N, H, d, e] in either direction.
    assert [[x.shape for x in out] for _, _, out in launches] == [
        [(2, 256, 3, 128), (2, 3, 128, 128)], *[[(2, 256, 3, 128)]] * 3]  # fmt: skip


@tiers.exhaustive
def test_lowers_for_a_gpu():
    """In this jax, under jit, a scan and rematerialisation; a constant decay that has no gradient is not asked for."""
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    arrays = {"q": of(1, 200, 2, 64), "k": of(1, 200, 2, 64), "u": of(1, 200, 2, 64)}

    def loss(arrays):
        @jax.checkpoint
        def layer(u, _):
            o, end = on_hopper(arrays["q"], arrays["k"], u, log_decay=jnp.asarray([-0.1, -1.0]))
            return o + end.sum().astype(o.dtype), None

        return jax.lax.scan(layer, arrays["u"], None, length=2)[0].astype(jnp.float32).sum()

    with use_abstract_mesh(H100):
        text = jax.jit(jax.grad(loss)).trace(arrays).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    found = set(re.findall(r"\blinear_recurrence_(?:forward|backward)\w*", text))
    assert "mosaic_gpu" in text
    names = "forward", "backward_queries", "backward_keys", "backward_values"
    assert found == {f"linear_recurrence_{name}" for name in names}


@pytest.mark.parametrize("change, says", [
    ({"dtype": "float32"}, "on GPUs it computes bfloat16, not float32"),
    ({"width": 264}, "at most 256, not 264 and 8"),
    ({"sizes": 3}, "sizes=3; allowed: None or"),
    ({"sizes": Blocks()}, "for 8 columns, filled up to 64; allowed: those whose"),
    ({"platform": "rocm"}, "'rocm'; allowed: tpu, cuda"),
])  # fmt: skip
def test_refusals(change, says):
    """Said before anything is compiled, with what is allowed."""
    assert_refused(linear_recurrence, f"linear_recurrence.*{says}", **{"platform": "cuda"} | change)
