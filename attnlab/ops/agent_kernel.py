"""Causal agent attention by our kernels (`kernels_pallas.agent_attention`): one pass, the averages on chip."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnlab.ops import agent_causal, attention_flash
from attnlab.ops.agent_causal import Averages
from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.masks import Mask
from attnlab.ops.recurrence_kernel import device_kind, first_positions
from attnlab.parallel import partition
from attnlab.parallel.sequence_parallel import SequenceParallel
from kernels_pallas import tuning

if TYPE_CHECKING:
    from attnlab.ops.agent import AgentSpec

_CHUNK = 64  # below so many positions most of a chunk is padding


def _kernels() -> Any:
    """Imported where they run: what has no kernels need not wait for Pallas, which takes longer than the rest here."""
    from kernels_pallas import agent_attention

    return agent_attention


def unsupported(spec: AgentSpec) -> str | None:
    """Why the kernel cannot serve, or None."""
    on_gpu = partition.platform() == "gpu"
    if on_gpu and (reason := _unsupported_on_gpus(spec)):
        return reason
    if spec.dtype not in ("bfloat16", "float32"):
        return f"it computes bfloat16 and float32, not {spec.dtype}"
    if _anew(spec) and (spec.packed or "stream" in spec.features):
        where = "packed documents" if spec.packed else "a stream"
        return f"its sweeps begin where agents are made anew, which in {where} may be anywhere; allowed: whole rows"
    if not on_gpu and _kernels().default_sizes(*_arrays(spec), spec.agents, device_kind()) is None:
        return f"averages of {spec.agents} agents of width {spec.width} do not fit into fast memory"
    return None


def _unsupported_on_gpus(spec: AgentSpec) -> str | None:
    reason = attention_flash.unsupported_heads(spec.dtype, max(spec.width, spec.value_width))
    return reason or _kernels().gpu_unsupported(spec.dtype, spec.width, spec.value_width, spec.agents)


def worth(spec: AgentSpec) -> bool:
    """Whether "auto" takes it: not for less than a chunk, nor where attention at the refreshes does not pay."""
    if _anew(spec):
        return min(spec.positions, spec.chunk) >= _CHUNK and attention_flash.worth(_refreshes(spec))
    return spec.positions >= _CHUNK


def kernel_flops(spec: AgentSpec) -> dict[str, float]:
    """FLOPs of one run of each kernel."""
    q, v = _arrays(spec)
    if partition.platform() == "gpu":
        flops = _kernels().gpu_kernel_flops(*q.shape, v.shape[3])
    else:
        flops = _kernels().kernel_flops(q, v, spec.agents, device_kind())
    if _anew(spec) and spec.positions > spec.chunk:
        flops |= attention_flash.kernel_flops(_refreshes(spec))
    return flops


def run(q, k, v, agents_Hmd, documents, before, *, refreshed: bool, chunk: int, interpret: bool = False):
    """See `attnlab.ops.agent.causal_agent_attention`; `interpret` runs it as plain XLA, on any platform.

    Products are of numbers in the dtype of q, logits, sums and averages float32; the output carries the checkpoint name
    "attention_o". For agents that do not change the chunk is the kernel's own.
    """
    if refreshed:
        return _refreshed(q, k, v, agents_Hmd, chunk, interpret), None
    o, after = _fixed(q, k, v, agents_Hmd[None], documents, None, before, interpret=interpret)
    return o, None if before is None else after


def over_devices(
    exchange: SequenceParallel, q, k, v, agents_Hmd, documents, before, *, refreshed, chunk, interpret: bool = False
):
    """`run` where positions are split: each device's sweep begins with what those before it found; agents that are made
    anew see all keys, which are gathered."""
    del before
    if refreshed:
        return exchange.own(_refreshed(*map(exchange.all_gather, (q, k, v)), agents_Hmd, chunk, interpret)), None
    fixed = functools.partial(_fixed, interpret=interpret)
    return agent_causal.over_devices(exchange, fixed, q, k, v, agents_Hmd[None], documents, None)[0], None


def _refreshed(q, k, v, first_Hmd, chunk: int, interpret: bool) -> jax.Array:
    """See `attnlab.ops.agent_refreshed.refreshed_agent_attention`, of one document a row.

    At all refreshes at once agents attend to the keys before them, by our flash kernel; every chunk is then a sweep of
    its own, from what they found.
    """
    (B, T, H, d), m, e = q.shape, first_Hmd.shape[1], v.shape[3]
    n, wide = (T - 1) // chunk, jnp.float32
    agents = jnp.broadcast_to(first_Hmd.astype(q.dtype), (B, 1, H, m, d))
    log, values = jnp.full((B, 1, H, m), -jnp.inf, wide), jnp.zeros((B, 1, H, m, e), wide)
    if n:
        made = q[:, : n * chunk].reshape(B, n, m, chunk // m, H, d).astype(wide).mean(3).astype(q.dtype)
        ends = chunk * (1 + jnp.arange(n * m, dtype=jnp.int32) // m)
        options = {"scale": d**-0.5, "soft_cap": None, "interpret": interpret}
        asked, seen = made.reshape(B, n * m, H, d), Mask(k_end=ends[None])
        means, lse = attention_flash.attention_with_lse(asked, k.astype(q.dtype), v.astype(q.dtype), seen, **options)
        of_heads = lambda x: jnp.swapaxes(x.reshape(B, n, m, H, *x.shape[3:]), 2, 3)
        after = lambda x, found: jnp.concatenate([x, of_heads(found).astype(x.dtype)], axis=1)
        agents, log, values = after(agents, asked), after(log, lse), after(values, means)
    rows = lambda x: jnp.pad(x, ((0, 0), (0, (n + 1) * chunk - T), (0, 0), (0, 0))).reshape(B * (n + 1), chunk, H, -1)
    fold = lambda x: x.reshape(B * (n + 1), *x.shape[2:])
    arrays = rows(q), rows(k.astype(q.dtype)), rows(v.astype(q.dtype)), fold(agents)
    o, _ = _sweep(*arrays, None, _averages(fold(log), fold(values)), interpret=interpret)
    return o.reshape(B, (n + 1) * chunk, H, e)[:, :T]


def _fixed(q, k, v, agents_BHmd, documents, valid, before: Averages | None, *, interpret: bool):
    """As `agent_causal.fixed_agent_attention` of keys that are all valid."""
    del valid
    k, v, agents = (x.astype(q.dtype) for x in (k, v, agents_BHmd))
    return _sweep(q, k, v, agents, documents, before, interpret=interpret)


def _sweep(q, k, v, agents_BHmd, documents, before: Averages | None, *, interpret: bool) -> tuple[jax.Array, Averages]:
    """By the kernels of this platform, in one dtype."""
    if partition.platform() == "gpu":
        return _on_gpus(q, k, v, agents_BHmd, documents, before)
    with tuning.device_kind(partition.device_kind()):
        o, after = _kernels().agent_attention(
            q, k, v, _shared(agents_BHmd), starts=None if documents is None else first_positions(documents),
            state=None if before is None else _logarithms(before), interpret=interpret,
        )  # fmt: skip
    return o, _averages(*after)


@jax.custom_vjp
def _on_gpus(q, k, v, agents_BHmd, documents, before: Averages | None) -> tuple[jax.Array, Averages]:
    """By the kernels for GPUs, and by XLA's form, gradient and all, where logits are so far apart that the kernels'
    output is not exact."""
    (o, after), exact = _by_kernel(documents, q, k, v, agents_BHmd, before)
    by_xla = lambda: _by_xla(documents, q, k, v, agents_BHmd, before)[0]
    return jax.lax.cond(jnp.all(exact), lambda: o, by_xla), after


def _by_kernel(
    documents, q, k, v, agents_BHmd, before: Averages | None
) -> tuple[tuple[jax.Array, Averages], jax.Array]:
    """As `_on_gpus`, and which heads are exact."""
    with tuning.device_kind(partition.device_kind()):
        o, after, exact = _kernels().gpu_agent_attention(
            q, k, v, _shared(agents_BHmd), starts=None if documents is None else first_positions(documents),
            state=None if before is None else _logarithms(before),
        )  # fmt: skip
    return (o, _averages(*after)), exact


def _by_xla(documents, q, k, v, agents_BHmd, before: Averages | None) -> tuple[jax.Array, Averages]:
    o, after = agent_causal.fixed_agent_attention(q, k, v, agents_BHmd, documents, before)
    return o, _averages(*_logarithms(after))


def _gradient_forward(q, k, v, agents_BHmd, documents, before) -> tuple[tuple[jax.Array, Averages], Any]:
    arrays = q, k, v, agents_BHmd, before
    (o, after), pull, exact = jax.vjp(functools.partial(_by_kernel, documents), *arrays, has_aux=True)
    exact = jnp.all(exact)
    o = jax.lax.cond(exact, lambda: o, lambda: _by_xla(documents, *arrays)[0])
    return (checkpoint_name(o, "attention_o"), after), (documents, arrays, pull, exact)


def _gradient_backward(residuals: Any, cotangents: Any) -> Any:
    documents, arrays, pull, exact = residuals
    by_xla = lambda: jax.vjp(functools.partial(_by_xla, documents), *arrays)[1](cotangents)
    *found, before = jax.lax.cond(exact, lambda: pull(cotangents), by_xla)
    return *found, None, before


_on_gpus.defvjp(_gradient_forward, _gradient_backward)


def _shared(agents_BHmd: jax.Array) -> jax.Array:
    """Without the axis of sequences where they have the same."""
    return agents_BHmd[0] if agents_BHmd.shape[0] == 1 else agents_BHmd


def _logarithms(averages: Averages) -> tuple[jax.Array, jax.Array]:
    """What the kernel takes: one number of the sum of weights, and values over it."""
    some = averages.total_BHm > 0
    total = jnp.where(some, averages.total_BHm, 1)
    log = jnp.where(some, averages.highest_BHm + jnp.log(total), -jnp.inf)
    return log.astype(jnp.float32), (averages.values_BHme / total[..., None]).astype(jnp.float32)


def _averages(log: jax.Array, values: jax.Array) -> Averages:
    """The opposite: a sum of weights of 1, through which its logarithm's gradient goes."""
    some = log > -jnp.inf
    log = jnp.where(some, log, 0)
    highest = jax.lax.stop_gradient(log)
    total = jnp.where(some, jnp.exp(log - highest), 0)
    return Averages(jnp.where(some, highest, agent_causal.LOWEST), total, values * total[..., None])


def _anew(spec: AgentSpec) -> bool:
    return "refreshed" in spec.features


def _refreshes(spec: AgentSpec) -> AttentionSpec:
    """Attention of all agents that are made anew over the keys before them."""
    queries = max((spec.positions - 1) // spec.chunk, 1) * spec.agents
    return AttentionSpec(
        spec.batch, queries, spec.positions, spec.heads, spec.heads, spec.width, spec.value_width, spec.dtype,
        causal=False, window=None, intervals=True, soft_cap=False, sinks=False,
    )  # fmt: skip


def _arrays(spec: AgentSpec) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Queries and values; of agents that are made anew a row for each chunk."""
    batch, positions = spec.batch, spec.positions
    if _anew(spec):
        batch, positions = batch * -(-positions // spec.chunk), spec.chunk
    of = lambda width: jax.ShapeDtypeStruct((batch, positions, spec.heads, width), spec.dtype)
    return of(spec.width), of(spec.value_width)
