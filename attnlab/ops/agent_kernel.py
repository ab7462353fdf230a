"""Causal agent attention by our TPU kernel (`kernels_pallas.agent_attention`): one pass, the averages on chip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from attnlab.ops import agent_causal
from attnlab.ops.agent_causal import Averages
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
    if "refreshed" in spec.features:
        return "agents that are made anew begin with a pass over all keys so far, which its one sweep does not have"
    if spec.dtype not in ("bfloat16", "float32"):
        return f"it computes bfloat16 and float32, not {spec.dtype}"
    if _kernels().default_sizes(*_arrays(spec), spec.agents, device_kind()) is None:
        return f"averages of {spec.agents} agents of width {spec.width} do not fit into fast memory"
    return None


def worth(spec: AgentSpec) -> bool:
    """Whether "auto" takes it: not for less than a chunk."""
    return spec.positions >= _CHUNK


def kernel_flops(spec: AgentSpec) -> dict[str, float]:
    """FLOPs of one run of each kernel."""
    return _kernels().kernel_flops(*_arrays(spec), spec.agents, device_kind())


def run(q, k, v, agents_Hmd, documents, before, *, refreshed: bool, chunk: int, interpret: bool = False):
    """See `attnlab.ops.agent.causal_agent_attention`; `interpret` runs it as plain XLA, on any platform.

    Products are of numbers in the dtype of q, logits, sums and averages float32; the output carries the checkpoint name
    "attention_o". The chunk is the kernel's own.
    """
    del refreshed, chunk
    o, after = _fixed(q, k, v, agents_Hmd[None], documents, None, before, interpret=interpret)
    return o, None if before is None else after


def over_devices(
    exchange: SequenceParallel, q, k, v, agents_Hmd, documents, before, *, refreshed, chunk, interpret: bool = False
):
    """`run` where positions are split: each device's sweep begins with what those before it found."""
    del refreshed, chunk, before
    fixed = lambda *arrays: _fixed(*arrays, interpret=interpret)
    return agent_causal.over_devices(exchange, fixed, q, k, v, agents_Hmd[None], documents, None)[0], None


def _fixed(q, k, v, agents_BHmd, documents, valid, before: Averages | None, *, interpret: bool):
    """As `agent_causal.fixed_agent_attention` of keys that are all valid."""
    del valid
    with tuning.device_kind(partition.device_kind()):
        o, after = _kernels().agent_attention(
            q, k.astype(q.dtype), v.astype(q.dtype),
            (agents_BHmd[0] if agents_BHmd.shape[0] == 1 else agents_BHmd).astype(q.dtype),
            starts=None if documents is None else first_positions(documents),
            state=None if before is None else _logarithms(before), interpret=interpret,
        )  # fmt: skip
    return o, _averages(*after)


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


def _arrays(spec: AgentSpec) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Queries and values."""
    of = lambda width: jax.ShapeDtypeStruct((spec.batch, spec.positions, spec.heads, width), spec.dtype)
    return of(spec.width), of(spec.value_width)
