"""Causal flow attention by our Pallas kernels (`kernels_pallas.flow_attention`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.ops import attention_flash, recurrence_kernel
from attnlab.ops.flow_causal import places_in_documents
from attnlab.ops.flow_definition import FlowOutput, FlowRule, FlowState, empty_state
from attnlab.parallel import partition
from kernels_pallas import tuning

LEAST = 128  # positions: of fewer most of a chunk is padding


def _kernels() -> Any:
    """Imported where they run: what has no kernels need not wait for Pallas, which takes longer than the rest here."""
    from kernels_pallas import flow_attention

    return flow_attention


def unsupported(spec: Any) -> str | None:
    """Why the kernels cannot serve a `FlowSpec`, or None."""
    clip, on_gpu = spec.rule.clip, partition.platform() == "gpu"
    widest = max(spec.width, spec.value_width)
    reasons = (
        (not spec.causal, "it is causal; causal=False is not"),
        (spec.rule.averages, "it keeps sums; form=averages is not"),
        (spec.rule.competition and (clip is None or clip > 50), f"it needs a clip of at most 50, not {clip}"),
        (spec.split, "its sums run over all positions of a row, which are split over devices"),
        (spec.dtype not in ("bfloat16", "float32"), f"it computes bfloat16 and float32, not {spec.dtype}"),
        (on_gpu and widest > 128, f"on GPUs widths of features and values are at most 128, not {widest}"),
    )
    reason = next((reason for fails, reason in reasons if fails), None)
    return attention_flash.unsupported_heads(spec.dtype, widest) if on_gpu and reason is None else reason


def worth(spec: Any) -> bool:
    """Whether "auto" takes it: not for the few positions of a step of a stream."""
    return spec.sinks >= LEAST


def kernel_flops(spec: Any) -> dict[str, float]:
    """FLOPs of one run of each kernel."""
    if partition.platform() == "gpu":
        shape = spec.batch, spec.sinks, spec.heads, spec.width, spec.value_width
        sweeps = recurrence_kernel.gpu_kernel_flops(*shape)  # the gradient has its backward
        sweeps = {name: flops for name, flops in sweeps.items() if "backward" in name}
        return _kernels().gpu_kernel_flops(*shape) | sweeps
    return _kernels().kernel_flops(spec.batch, spec.sinks, spec.heads, spec.width, spec.value_width)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    documents: jax.Array | None,
    state: FlowState | None,
    *,
    rule: FlowRule,
    causal: bool,
    chunk: int,
    interpret: bool = False,
) -> FlowOutput:
    """See `attnlab.ops.flow_attention.flow_attention`. Features are rounded to the dtype of values, as products are."""
    del causal, chunk
    q, k = q.astype(v.dtype), k.astype(v.dtype)
    kernels, B = _kernels(), q.shape[0]
    clip = 0.0 if rule.clip is None else rule.clip  # not used without competition
    of_kernels = kernels.Rule(rule.competition, rule.allocation, clip, rule.epsilon)
    with tuning.device_kind(partition.device_kind()):
        o, outgoing, sums = kernels.flow_attention(
            q, k, v, of_kernels,
            documents=documents, state=None if state is None else _given(state, kernels.Sums),
            platform=attention_flash.kernel_platform(), interpret=interpret,
        )  # fmt: skip
    here = places_in_documents(documents, q.shape[1])[0][:, -1]
    own = True if documents is None else documents[:, -1] == 0
    count = jnp.broadcast_to(here if state is None else here + own * state.count, (B,)).astype(jnp.int32)
    like = jax.eval_shape(lambda: empty_state(rule, B, *q.shape[2:], v.shape[3], jnp.float32))
    after = {name: x if getattr(like, name) is not None else None for name, x in sums._asdict().items()}
    return FlowOutput(o, FlowState(count=count, peak=None, **after), outgoing)


def _given(state: FlowState, sums_of: Any) -> tuple[jax.Array, Any]:
    """What the kernels take; sums that the rule needs not are 0."""
    zeros = {"sources": state.sources, "rivals": state.sources[..., 0], "pairs": state.pairs}
    found = {}
    for name in sums_of._fields:
        x = getattr(state, name)
        like = zeros.get(name, state.sources)
        found[name] = jnp.zeros(like.shape, jnp.float32) if x is None else x.astype(jnp.float32)
    return state.count, sums_of(**found)
