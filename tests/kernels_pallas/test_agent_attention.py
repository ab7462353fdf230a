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
    (_, T, H, d), scale = q.shape, q.shape[3] ** -0.5
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
    (64, 4, 16, 64, 32, True, False, False, 3, "float32", Sizes(16, 2, 4, 4)),
    (130, 2, 20, 24, 65, True, True, False, 1, "float32", Sizes(64, 1, 2, 2)),
    (130, 3, 5, 64, 64, True, True, True, 60, "float32", Sizes(32, 2, 2, 3)),
    (130, 1, 33, 130, 33, True, True, False, 1, "bfloat16", Sizes(64, 2, 1, 1)),
    (256, 1, 9, 64, 64, False, True, False, 100, "float32", Sizes(128, 1, 1, 1)),
    (256, 2, 16, 64, 64, True, False, False, 2, "bfloat16", None),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x) for x in c[:10]))
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
