"""Every op with inputs to hold its implementations to the definition by, kernels included."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import UserError
from attnlab.ops import Mask, mask_from_segments
from attnlab.ops.agent import AGENT_ATTENTION, CAUSAL_AGENT_ATTENTION, causal_agent_attention, pooled_agent_attention
from attnlab.ops.attention import ATTENTION, ATTENTION_WITH_LSE, attention, attention_with_lse
from attnlab.ops.attention_gated import GATED_ATTENTION, gated_attention
from attnlab.ops.cached_attention import CACHED_ATTENTION, cached_attention
from attnlab.ops.cross_entropy import CROSS_ENTROPY, cross_entropy
from attnlab.ops.delta_rule import DELTA_RULE, delta_rule
from attnlab.ops.dispatch import Op, interpreted
from attnlab.ops.documents import document_index
from attnlab.ops.dplr import DPLR, dplr
from attnlab.ops.dynamic_mask_attention import DYNAMIC_MASK_ATTENTION, dynamic_mask_attention
from attnlab.ops.flow_attention import FLOW_ATTENTION, flow_attention
from attnlab.ops.flow_definition import FlowRule
from attnlab.ops.gathered_attention import GATHERED_ATTENTION, chosen_attention
from attnlab.ops.kl_divergence import KL_DIVERGENCE, kl_divergence
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, linear_recurrence
from attnlab.ops.local_linear import LOCAL_LINEAR, local_linear
from attnlab.ops.log_linear import LOG_LINEAR, log_linear
from attnlab.ops.memory_frame import MemorySpec, initial_state
from attnlab.ops.mesa import MESA, mesa
from attnlab.ops.multi_token_attention import MULTI_TOKEN_ATTENTION, multi_token_attention
from attnlab.ops.neural_memory import NEURAL_MEMORY, neural_memory
from attnlab.ops.parallax import PARALLAX, parallax
from attnlab.ops.path_attention import PATH_ATTENTION, path_attention
from attnlab.ops.rope import ROPE, rope
from attnlab.ops.segmented_ema import SEGMENTED_EMA, segmented_ema
from attnlab.ops.stick_breaking import STICK_BREAKING, stick_breaking
from attnlab.ops.taylor_attention import TAYLOR_ATTENTION, taylor_attention
from attnlab.ops.tensor_attention import TENSOR_ATTENTION, tensor_attention
from attnlab.ops.ttt_linear import TTT_LINEAR, Affine, Learned, ttt_linear
from attnlab.ops.value_decay import VALUE_DECAY, value_decay

SHORT, LONG = (2, 11, 2, 4), (1, 256, 2, 64)  # B, T, H, d; the long one is for kernels


def arrays(count: int, shape: tuple[int, ...], seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(count)]


def segments(shape: tuple[int, ...]) -> jax.Array:
    """Two documents, padding behind."""
    B, T = shape[:2]
    return jnp.broadcast_to(jnp.asarray([1] * (T // 3) + [2] * (T - T // 3 - 2) + [0] * 2), (B, T))


def _attention(shape: tuple[int, ...], impl: str, op: Callable = attention) -> tuple[Callable, list[jax.Array]]:
    mask = mask_from_segments(segments(shape), shape[1], causal=True)
    return lambda q, k, v: op(q, k, v, mask, impl=impl), arrays(3, shape)


def _gated(impl: str) -> tuple[Callable, list[jax.Array]]:
    mask = mask_from_segments(segments(LONG), LONG[1], causal=True)
    return lambda q, k, v, g: gated_attention(q, k, v, mask, g, impl=impl), arrays(4, LONG)


def _with_lse(*args: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    o, lse = attention_with_lse(*args, **options)
    return o, jnp.maximum(lse, -100.0)  # whatever says that a row sees nothing


def _cached(queries: int, impl: str) -> tuple[Callable, list[jax.Array]]:
    q, k, v = *arrays(1, (2, queries, 4, 6)), *arrays(2, (4, 9, 6), seed=1)
    mask = Mask(jnp.full((2, queries), 2), jnp.full((2, queries), 7))
    return lambda q, k, v: cached_attention(q, k, v, mask, impl=impl), [q, k, v]


def _gathered(impl: str) -> tuple[Callable, list[jax.Array]]:
    """A head that nobody wants, one that most want, and documents."""
    q, k, v = arrays(1, (2, 75, 6, 16))[0], *arrays(2, (2, 75, 3, 16), seed=1)
    mask = mask_from_segments(segments(q.shape), 75, causal=True)
    scores = arrays(1, (2, 75, 4), seed=2)[0] + jnp.asarray([0.0, 3.0, -1e6, 1.0])
    wanted = scores >= jnp.sort(scores, -1)[..., -2:-1]
    wanted &= (segments(q.shape) > 0)[..., None]
    sinks = jnp.linspace(-1.0, 1.0, 6)
    options = {"chosen": (1, 2, 4, 5), "active": 2, "soft_cap": 3.0, "impl": impl}
    return lambda q, k, v, s: chosen_attention(q, k, v, mask, wanted, sinks_H=s, **options), [q, k, v, sinks]


def _memory(chunk: int, impl: str) -> tuple[Callable, list[jax.Array]]:
    q, k, v = (x / 2 for x in arrays(3, SHORT))
    gates = [-jnp.abs(x[..., 0]) / 4 for x in arrays(3, SHORT, seed=1)]
    initial = initial_state(tuple(arrays(1, (2, 4, 4), seed=2)), 1, True)
    spec = MemorySpec(chunk, False, (1.0,))
    return lambda *a: neural_memory(*a[:5], -a[5] / 4, initial, spec, impl=impl), [q, k, v, *gates]


def _delta(impl: str) -> tuple[Callable, list[jax.Array]]:
    q, k, v = (x / 2 for x in arrays(3, SHORT))
    decay, beta = (jax.nn.sigmoid(x[..., 0]) for x in arrays(2, SHORT, seed=1))
    return lambda *a: delta_rule(*a, chunk=4, impl=impl), [q, k, v, -decay, beta]


def _levels_corrected(impl: str) -> tuple[Callable, list[jax.Array]]:
    _, (q, k, v, decay, beta) = _delta("auto")
    run = lambda q, k, v, decay, beta, w: log_linear(q, k, v, decay, w, beta_BTH=beta, chunk=4, impl=impl)
    return run, [q, k, v, decay, beta, *arrays(1, SHORT, seed=2)]


def _dplr(impl: str) -> tuple[Callable, list[jax.Array]]:
    run = lambda r, k, v, g, a, b: dplr(r, k, v, -jnp.abs(g), a / 4, b / 4, chunk=4, impl=impl)
    return run, arrays(6, SHORT)


def _cross_entropy(impl: str) -> tuple[Callable, list[jax.Array]]:
    """An odd vocabulary, rows that do not count, whose targets are nowhere, and weights."""
    hidden, kernel = arrays(1, (2, 11, 16))[0], arrays(1, (16, 29), seed=1)[0]
    targets = jnp.arange(22, dtype=jnp.int32).reshape(2, 11) * 7 % 29
    weights = (jnp.arange(22.0) % 4 / 2).reshape(2, 11)
    targets = jnp.where(weights == 0, -5, targets)
    return lambda h, w: cross_entropy(h, w, targets, weights, 8, impl), [hidden, kernel]


def _kl(impl: str) -> tuple[Callable, list[jax.Array]]:
    """An odd vocabulary, rows that do not count, a wider teacher, capped logits."""
    hidden, kernel = arrays(1, (2, 11, 16))[0], arrays(1, (16, 29), seed=1)[0]
    teacher = arrays(1, (2, 11, 24), seed=2)[0], arrays(1, (24, 29), seed=3)[0]
    weights = (jnp.arange(22.0) % 4 / 2).reshape(2, 11)
    run = lambda h, w: kl_divergence(h, w, *teacher, weights, 2.0, 8, impl, cap=3.0, teacher_cap=5.0)
    return run, [hidden, kernel]


def _flow(causal: bool, impl: str) -> tuple[Callable, list[jax.Array]]:
    features = [jax.nn.sigmoid(x) for x in arrays(3, SHORT)]
    run = lambda *a: flow_attention(*a, FlowRule(), causal=causal, chunk=4, impl=impl).o
    return run, features


def _agents(refreshed: bool, impl: str) -> tuple[Callable, list[jax.Array]]:
    inputs = [*arrays(3, SHORT), *arrays(1, (2, 2, 4), seed=1)]
    run = lambda *a: causal_agent_attention(*a, refreshed=refreshed, chunk=4, impl=impl)[0]
    return run, inputs


def _rope(impl: str) -> tuple[Callable, list[jax.Array]]:
    """A part of the channels turned, behind the norm."""
    positions = jnp.asarray([[3, 4, 5, 0, 1, 2, 3, 4, 0], list(range(9))])
    run = lambda x, scale: rope(x, positions, 50.0, 64, scale_d=scale, impl=impl)
    return run, [*arrays(1, (2, 9, 2, 128)), *arrays(1, (128,), seed=1)]


def _tensor(impl: str) -> tuple[Callable, list[jax.Array]]:
    """Documents in a window, in several tiles of rows."""
    mask = mask_from_segments(segments(SHORT), SHORT[1], causal=True, window=4)
    B, T, H, d = SHORT
    run = lambda q, k, v: tensor_attention(q, k, v, mask, reach=4, chunk=3, impl=impl)
    return run, [*arrays(1, SHORT), *arrays(2, (B, T, H, 2 * d), seed=1)]


def _causal(op: Callable, count: int, impl: str, **options: Any) -> tuple[Callable, list[jax.Array]]:
    """Documents, padding behind."""
    mask = mask_from_segments(segments(SHORT), SHORT[1], causal=True)
    return lambda *a: op(*a, mask, impl=impl, **options), arrays(count, SHORT)


def _path(gate: bool, impl: str) -> tuple[Callable, list[jax.Array]]:
    def run(q, k, v, w, b, *args, **options):
        *gates, mask = args
        left = jnp.cumsum(-jnp.abs(gates[0][..., 0]), axis=1) if gates else None
        beta = jax.nn.sigmoid(b[..., 0])
        return path_attention(q, k, v, w / 2, beta, mask, left_BTH=left, chunk=4, **options)

    return _causal(run, 5 + gate, impl)


def _dynamic_mask(impl: str) -> tuple[Callable, list[jax.Array]]:
    documents = document_index(segments(SHORT))
    run = lambda q, k, v, b: dynamic_mask_attention(q, k, v, b[..., 0], documents, keep=3, chunk=4, impl=impl)[0]
    return run, arrays(4, SHORT)


def _mesa(impl: str) -> tuple[Callable, list[jax.Array]]:
    run = lambda q, k, v, g, b, ridge: mesa(
        q, k / 2, v, -jnp.abs(g[..., 0]), jax.nn.sigmoid(b[..., 0]), 1 + ridge**2, iterations=60, chunk=4, impl=impl
    )[0]
    return run, [*arrays(5, SHORT), *arrays(1, SHORT[2:], seed=1)]


def _ttt(impl: str) -> tuple[Callable, list[jax.Array]]:
    H, d = SHORT[2:]
    first, (bias, gain, shift) = arrays(1, (H, d, d), seed=1)[0], arrays(3, (H, d), seed=2)
    learned = Learned(Affine(first, bias), gain, shift, jnp.linspace(1.0, 0.3, 4))
    run = lambda q, k, v, rate: ttt_linear(q, k, v, jax.nn.sigmoid(rate[..., 0]) / 8, learned, impl=impl)[0]
    return run, arrays(4, SHORT)


def _multi_token(impl: str) -> tuple[Callable, list[jax.Array]]:
    """Filters over two queries and three keys, and mixes of all heads, before and after the softmax."""
    B, T, H, d = SHORT
    behind = jnp.arange(1, T + 1, dtype=jnp.int32)
    end = jnp.broadcast_to(jnp.concatenate([jnp.zeros(2, jnp.int32), behind]), (B, T + 2))
    rows = lambda q: jnp.pad(q, ((0, 0), (2, 0), (0, 0), (0, 0)))
    run = lambda q, k, v, taps, after, mix, logit_mix: multi_token_attention(
        rows(q), k, v, taps, after, mix, jnp.zeros_like(end), end, whole=True, logit_mix_Ncc=logit_mix, impl=impl
    )
    return run, [*arrays(3, SHORT), *arrays(2, (H, 2, 3), seed=1), *arrays(2, (1, H, H), seed=2)]


# Per op: cases by name, each `impl` to a function and its arrays.
CASES: dict[str, tuple[Op, dict[str, Callable[[str], tuple[Callable, list[jax.Array]]]]]] = {
    "attention": (ATTENTION, {n: functools.partial(_attention, s) for n, s in (("short", SHORT), ("long", LONG))}),
    "gated_attention": (GATED_ATTENTION, {"long": _gated}),
    "attention_with_lse": (ATTENTION_WITH_LSE, {"short": lambda impl: _attention(SHORT, impl, _with_lse)}),
    "cached_attention": (CACHED_ATTENTION, {f"{n}": functools.partial(_cached, n) for n in (1, 3)}),
    "gathered_attention": (GATHERED_ATTENTION, {"short": _gathered}),
    "local_linear": (
        LOCAL_LINEAR,
        {"short": lambda impl: (lambda *a: local_linear(*a, Mask(causal=True), 0.5, impl=impl)[0], arrays(3, SHORT))},
    ),
    "parallax": (
        PARALLAX,
        {"short": lambda impl: (lambda *a: parallax(*a, Mask(causal=True), impl=impl), arrays(4, SHORT))},
    ),
    "linear_recurrence": (
        LINEAR_RECURRENCE,
        {
            "short": lambda impl: (lambda *a: linear_recurrence(*a, chunk=4, impl=impl), arrays(3, SHORT)),
            "channels": lambda impl: (
                lambda q, k, u, g: linear_recurrence(q, k, u, log_decay=-jnp.abs(g), chunk=4, impl=impl),
                arrays(4, SHORT),
            ),
        },
    ),
    "log_linear": (
        LOG_LINEAR,
        {
            "short": lambda impl: (
                lambda q, k, u, w: log_linear(q, k, u, -jnp.abs(u[..., 0]), w, chunk=4, impl=impl),
                arrays(4, SHORT),
            ),
            "corrected": _levels_corrected,
        },
    ),
    "rope": (ROPE, {"norm": _rope}),
    "cross_entropy": (CROSS_ENTROPY, {"short": _cross_entropy}),
    "kl_divergence": (KL_DIVERGENCE, {"short": _kl}),
    "dynamic_mask_attention": (DYNAMIC_MASK_ATTENTION, {"short": _dynamic_mask}),
    "mesa": (MESA, {"short": _mesa}),
    "multi_token_attention": (MULTI_TOKEN_ATTENTION, {"short": _multi_token}),
    "path_attention": (
        PATH_ATTENTION,
        {n: functools.partial(_path, gate) for n, gate in (("short", False), ("gate", True))},
    ),
    "stick_breaking": (STICK_BREAKING, {"short": functools.partial(_causal, stick_breaking, 3)}),
    "taylor_attention": (TAYLOR_ATTENTION, {"short": functools.partial(_causal, taylor_attention, 3)}),
    "ttt_linear": (TTT_LINEAR, {"short": _ttt}),
    "delta_rule": (DELTA_RULE, {"short": _delta}),
    "dplr": (DPLR, {"short": _dplr}),
    "flow_attention": (FLOW_ATTENTION, {f"causal={c}": functools.partial(_flow, c) for c in (True, False)}),
    "neural_memory": (NEURAL_MEMORY, {f"chunk {C}": functools.partial(_memory, C) for C in (4, 16)}),
    "causal_agent_attention": (
        CAUSAL_AGENT_ATTENTION,
        {f"refreshed={r}": functools.partial(_agents, r) for r in (False, True)},
    ),
    "agent_attention": (
        AGENT_ATTENTION,
        {
            "short": lambda impl: (lambda *a: pooled_agent_attention(*a, agents=3, impl=impl), arrays(3, SHORT)),
            "packed": lambda impl: (
                lambda *a: pooled_agent_attention(*a, segments(SHORT), agents=3, impl=impl),
                arrays(3, SHORT),
            ),
        },
    ),
    "segmented_ema": (
        SEGMENTED_EMA,
        {
            "short": lambda impl: (
                lambda d, x, h: segmented_ema(jax.nn.sigmoid(d), x, h, impl=impl),
                [*arrays(1, (2, 11, 3)), *arrays(1, (2, 11, 2, 3)), *arrays(1, (2, 2, 3))],
            )
        },
    ),
    "tensor_attention": (TENSOR_ATTENTION, {"short": _tensor}),
    "value_decay": (
        VALUE_DECAY,
        {
            "short": lambda impl: (
                lambda q, k, u, g: value_decay(q, k, u, -jnp.abs(g), chunk=4, impl=impl),
                arrays(4, SHORT),
            )
        },
    ),
}


def names(op: Op) -> list[str]:
    """All implementations but the definition, and what only another machine can run: a library's kernel."""
    ways = op.table.items()
    return [n for n, way in ways if n != "definition" and (way.platforms is None or way.interpretable)]


def held_to_the_definition(op: str, impl: str) -> None:
    """Values and gradients of `impl`, forced and if need be interpreted, in every case that it serves: one at least."""
    table, served = CASES[op][0].table, 0
    assert impl in table
    for case, make in CASES[op][1].items():
        with interpreted():
            if not _serves(make, impl):
                continue
            served += 1
            found = _both(make, impl)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(_defined(op, case)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    assert served, f"no case of {op} serves {impl}: add one to CASES"


def _both(make: Callable, impl: str) -> Any:
    """Values and gradients."""
    run, inputs = make(impl)
    scalar = lambda inputs: (lambda y: (sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(y)), y))(run(*inputs))
    return jax.jit(jax.value_and_grad(scalar, has_aux=True))(inputs)


@functools.cache
def _defined(op: str, case: str) -> Any:
    return _both(CASES[op][1][case], "definition")


def _serves(make: Callable, impl: str) -> bool:
    run, inputs = make(impl)
    try:
        jax.eval_shape(run, *inputs)
    except UserError as error:
        if "cannot serve" not in str(error):
            raise
        return False
    return True
