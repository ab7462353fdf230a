"""Agent attention's TPU kernels, interpreted: values and all gradients against the definition in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tuning
from kernels_pallas.agent_attention import Sizes, agent_attention, default_sizes
from kernels_pallas.agent_attention import plan as plan_lib
from tests import tiers
from tests.kernels_pallas.recurrences import B, assert_close, bytes_of_blocks, calls, documents_of, rounded, starts_of


def inputs(length, heads, m, d, e, state, own=False, spread=1.0, seed=0):
    """`spread`: of logits, by larger keys; `own`: agents of each sequence; one agent of one head saw nothing before."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    arrays = {"q": normal(B, length, heads, d), "k": spread * normal(B, length, heads, d)}
    arrays |= {"v": normal(B, length, heads, e), "agents": normal(*([B] if own else []), heads, m, d)}
    if state:
        arrays |= {"log": spread * normal(B, heads, m), "values": normal(B, heads, m, e)}
        arrays["log"][0, 0, 0], arrays["values"][0, 0, 0] = -np.inf, 0
    return arrays


def definition(q, k, v, agents, log=None, values=None, documents=None):
    """Both softmaxes written out; what was before is one more key of each agent."""
    T, scale = q.shape[1], q.shape[3] ** -0.5
    agents = jnp.broadcast_to(agents, (B, *agents.shape[-3:]))
    documents = jnp.zeros((B, T), int) if documents is None else jnp.asarray(documents)
    t = jnp.arange(T)
    seen = (documents[:, :, None] == documents[:, None]) & (t[:, None] >= t)
    s = jnp.einsum("bhmd,bjhd->bhmj", agents, k) * scale
    logits = jnp.where(seen[:, None, None], s[:, :, :, None], -jnp.inf)  # [B, H, m, T, T]
    first = jnp.full((*s.shape[:3], 1), -jnp.inf) if log is None else log[..., None]
    first = jnp.where(documents[:, None, None] == 0, first, -jnp.inf)[..., None]
    every = jnp.concatenate([first, logits], -1)
    high = jax.lax.stop_gradient(every.max(-1, keepdims=True))
    weights = jnp.where(every > -jnp.inf, jnp.exp(jnp.where(every > -jnp.inf, every - high, 0)), 0)
    total = weights.sum(-1)
    share = weights / total[..., None]
    averages = jnp.einsum("bhmtj,bjhe->bhmte", share[..., 1:], v)
    if values is not None:
        averages += share[..., :1] * values[..., None, :]
    read = jax.nn.softmax(jnp.einsum("bthd,bhmd->bhtm", q, agents) * scale, -1)
    o = jnp.einsum("bhtm,bhmte->bthe", read, averages)
    return o, (jnp.log(total[..., -1]) + high[..., -1, 0], averages[..., -1, :])


def kernel(q, k, v, agents, log=None, values=None, **options):
    state = None if log is None else (log, values)
    return agent_attention(q, k, v, agents, state=state, **options)


def results(fn, arrays):
    """o, the state after, and gradients by name, for one cotangent of all."""

    def loss(arrays):
        o, end = fn(**arrays)
        weigh = lambda y, by: jnp.sum(y.astype(end[0].dtype) * by(jnp.arange(y.size)).reshape(y.shape))
        return weigh(o, jnp.cos) + weigh(end[0], jnp.cos) + weigh(end[1], jnp.sin), (o, end)

    grads, (o, (log, values)) = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    found = {"o": o, "log_end": log, "values_end": values, **{f"d{name}": x for name, x in grads.items()}}
    return {name: np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for name, x in found.items()}


def exact(arrays, documents):
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(np.asarray(x, np.float32), jnp.float64) for name, x in arrays.items()}
        return results(functools.partial(definition, documents=documents), arrays)


def given(arrays, dtype):
    of_agents = {name: jnp.asarray(x, dtype) for name, x in arrays.items() if name == "agents"}
    return rounded(arrays, dtype) | of_agents


# T, H, m, d, e, documents, state, agents of each sequence, spread of logits, dtype, sizes; several blocks of several
# chunks where sizes are given. Logits that are spread by 60 are lost within a chunk but for its levels.
CASES = [
    (1, 3, 1, 16, 16, False, True, False, 1, "float32", None),
    (7, 2, 3, 5, 17, True, True, True, 1, "float32", None),
    (64, 1, 16, 64, 32, True, False, False, 3, "float32", Sizes(16, 2, 1, 1)),
    (130, 1, 33, 20, 130, True, True, False, 1, "bfloat16", Sizes(64, 1, 1, 1)),
    (130, 3, 5, 128, 128, True, True, True, 60, "float32", Sizes(64, 2, 2, 1)),
    (256, 1, 9, 16, 16, False, True, False, 100, "float32", Sizes(128, 1, 1, 1)),
    (256, 1, 16, 64, 64, True, False, False, 2, "bfloat16", None),
]


@tiers.parametrize("case", CASES, often=CASES[3:5], ids=lambda c: "-".join(str(x) for x in c[:10]))
def test_equals_the_definition(case):
    """Values and every gradient."""
    T, H, m, d, e, packed, state, own, spread, dtype, sizes = case
    arrays = given(inputs(T, H, m, d, e, state, own, spread), dtype)
    documents = documents_of(T) if packed else None
    starts = jnp.asarray(starts_of(documents)) if packed else None
    found = results(functools.partial(kernel, starts=starts, sizes=sizes, interpret=True), arrays)
    expected = exact(arrays, documents)
    tolerance = 3e-5 if dtype == "float32" else 0.03
    assert_close(found, expected, tolerance * max(1, spread / 10))


def run_simply(arrays, sizes=None, starts=None):
    return jax.jit(functools.partial(kernel, starts=starts, sizes=sizes, interpret=True))(**arrays)


@tiers.exhaustive
def test_chunks_blocks_and_pieces_change_nothing():
    """Any sizes give the same, but for rounding; and so do two pieces, the second from the state after the first, where
    a document goes on over the cut."""
    arrays, cut = given(inputs(96, 1, 3, 16, 17, True), "float32"), 50
    documents = documents_of(96)
    starts = jnp.asarray(starts_of(documents))
    whole = run_simply(arrays, Sizes(128, 1, 1, 1), starts)
    first, second = (
        {n: x[:, at] if n in "qkv" else x for n, x in arrays.items()} for at in (slice(cut), slice(cut, 96))
    )
    index = documents[:, cut:] - documents[:, cut - 1 : cut]
    o, (log, values) = run_simply(first, Sizes(16, 3, 1, 1), starts[:, :cut])
    rest, end = run_simply({**second, "log": log, "values": values}, Sizes(32, 1, 1, 1), jnp.asarray(starts_of(index)))
    for a, b in zip(jax.tree.leaves((jnp.concatenate([o, rest], 1), end)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@tiers.exhaustive
@pytest.mark.parametrize("packed, heads, width, T", [(False, 1, 16, 40), (True, 3, 128, 24)])
def test_no_races(packed, heads, width, T, capfd):
    """Forward and backward on a simulated TPU whose two cores share heads, with NaN in what was never written and
    behind the ends of arrays, of positions and of heads: the same as interpreted as XLA operations."""
    arrays = given(inputs(T, heads, 3, width, width, packed, spread=60 if packed else 1), "float32")
    starts = jnp.asarray(starts_of(documents_of(T))) if packed else None
    sizes = Sizes(16, 1, 2, 2) if packed else None
    run = functools.partial(kernel, starts=starts, sizes=sizes)
    simulate = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    simulated, plain = (results(functools.partial(run, interpret=x), arrays) for x in (simulate, True))
    assert_close(simulated, plain, 2e-6)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_declared_bytes_are_those_of_the_blocks():
    """Within 5 %, which inputs, outputs and saved states make up: q, k, v, o, and again with gradients."""
    T, H, m, w = 1024, 16, 16, 128
    arrays = given(inputs(T, H, m, w, w, False), "bfloat16")
    starts = jnp.asarray(starts_of(documents_of(T)))
    loss = lambda arrays: jnp.sum(kernel(**arrays, starts=starts)[0].astype(jnp.float32))
    found = calls(jax.grad(loss), arrays)
    assert set(found) == {"agent_attention_forward", "agent_attention_backward"}
    size = default_sizes(arrays["q"], arrays["v"], m, tuning.kind())
    states = B * T // (size.chunk * size.chunks) * H * m * w * 4
    for params, rows in zip(found.values(), (4, 7)):
        declared = params["cost_estimate"].bytes_accessed
        assert declared == pytest.approx(bytes_of_blocks(params), rel=0.05)
        assert declared == pytest.approx(rows * B * T * H * w * 2 + states, rel=0.05)


def test_sizes():
    """Groups of heads for any count that fit into fast memory; averages that no chip holds have none."""
    of = lambda T, H, w: jax.ShapeDtypeStruct((1, T, H, w), jnp.bfloat16)
    assert default_sizes(of(7, 8, 128), of(7, 8, 128), 16, "v6e").chunk == 16
    assert default_sizes(of(4096, 1, 1024), of(4096, 1, 1024), 65536, "v6e") is None
    for kind in tuning.KINDS.values():
        for m, d, e, H in ((16, 128, 128, 16), (49, 128, 256, 7), (256, 256, 512, 8)):
            s, rows = default_sizes(of(4096, H, d), of(4096, H, e), m, kind), plan_lib.padded_agents(m)
            for n, needed in ((s.forward_heads, plan_lib.forward_bytes), (s.backward_heads, plan_lib.backward_bytes)):
                assert needed(rows, n, s.chunk, s.chunks, d, e, 2) <= tuning.vmem_limit(kind)


@pytest.mark.parametrize("change, says", [
    ({"k": (1, 9, 2, 7)}, "do not fit"), ({"agents": (3, 4, 8)}, r"agents \(3, 4, 8\); expected \[2, 4, 8\] or"),
    ({"agents": (2, 0, 8)}, "one or more"), ({"of_agents": "bfloat16"}, "in float32"), ({"starts": (1, 8)}, "starts"),
    ({"log": (1, 2, 5)}, r"state\[0\]"), ({"values": (1, 2, 4, 9)}, r"state\[1\]"),
    ({"of_state": "bfloat16"}, "expected float32"), ({"sizes": Sizes(256, 1, 2, 2)}, "chunk 128 or less"),
    ({"dtype": "float16"}, "bfloat16, or all flo"), ({"sizes": Sizes(16, 1, 1, 2)}, "all 2 heads, or so m"),
])  # fmt: skip
def test_refusals(change, says):
    """Each names the value and what is allowed."""
    wide = (1, 9, 2, 8)
    shapes = {"q": wide, "k": wide, "v": wide, "agents": (2, 4, 8), "log": (1, 2, 4), "values": (1, 2, 4, 8)} | change
    dtype, of_state = shapes.pop("dtype", "float32"), shapes.pop("of_state", "float32")
    kinds = {"agents": shapes.pop("of_agents", dtype), "log": of_state, "values": of_state, "starts": "int32"}
    args = {n: jnp.zeros(x, kinds.get(n, dtype)) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=says):
        kernel(**args, interpret=True)
