"""Softmax attention by our Pallas kernels (`kernels_pallas.flash_attention`): any mask of intervals, any length."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.ops import attention_pattern, attention_splash, attention_tiles
from attnlab.ops.attention_frame import NO_KEYS, AttentionSpec
from attnlab.ops.masks import Mask, mean_visible_keys
from attnlab.parallel import partition
from kernels_pallas import tuning

_HOPPER = re.compile(r"NVIDIA (GH200|H\d)")
_LANES = 128  # below so many queries or keys most of a tile is padding


def _kernels() -> Any:
    """Imported where they run: what has no kernels need not wait for Pallas, which takes longer than the rest here."""
    from kernels_pallas import flash_attention

    return flash_attention


def unsupported(spec: AttentionSpec) -> str | None:
    """Why the kernels cannot serve, or None."""
    if spec.key_bias not in (0, 1, spec.kv_heads):
        return f"it has biases of key heads, not of {spec.key_bias} query heads over {spec.kv_heads} key heads"
    if spec.query_bias and spec.sinks:
        return "a bias of queries beside sinks"
    if spec.pattern:
        if reason := attention_pattern.unsupported(spec, kernel_platform()):
            return reason
    return unsupported_heads(spec.dtype, max(spec.width, spec.value_width))


def unsupported_heads(dtype: str, width: int) -> str | None:
    """Why the kernels cannot serve heads of this type, so wide, or None."""
    if partition.platform() == "gpu":
        widest = _kernels().GPU_WIDEST
        reasons = (
            (dtype != "bfloat16", f"on GPUs it computes bfloat16, not {dtype}"),
            (width > widest, f"on GPUs head widths are at most {widest}"),
        )
        return next((reason for fails, reason in reasons if fails), None) or not_hopper()
    return None if dtype in ("bfloat16", "float32") else f"it computes bfloat16 and float32, not {dtype}"


def not_hopper() -> str | None:
    """Why no kernel of ours runs on the GPUs, or None."""
    kind = partition.device_kind()
    return None if _HOPPER.search(kind) else f"its kernels are for Hopper, not {kind}"


def kernel_platform() -> str:
    """Whose kernels run: "cuda" on GPUs, else "tpu"."""
    return "cuda" if partition.platform() == "gpu" else "tpu"


def worth(spec: AttentionSpec) -> bool:
    """Whether "auto" takes it: not for less than a tile, nor where splash serves and is recorded to be as fast.

    On GPUs, where the kernels have been neither run nor timed, only for masks that are more than an interval: for those
    there is else XLA's form by tiles, which is not made for GPUs.
    """
    if min(spec.queries, spec.keys) < _LANES:
        return False
    if partition.platform() == "gpu":
        return spec.pattern > 0
    return attention_splash.unsupported(spec) is not None or faster_than_splash(partition.device_kind())


@functools.cache
def faster_than_splash(kind: str) -> bool:
    """By the schedules recorded for a kind of TPU: cycles of a causal forward and backward over 4096 positions."""
    recorded = tuning.table(tuning.KINDS.get(kind, kind), "schedule").get("kernels", {})
    cycles = lambda *names: sum(recorded[name]["causal_cycles"]["4096"] for name in names)
    if not recorded:
        return False
    flash = cycles("flash forward, causal", "flash backward, causal")
    return flash < cycles(*(f"splash {part}, causal, tile 512" for part in ("fwd", "dq", "dkv")))


def kernel_flops(spec: AttentionSpec) -> dict[str, float]:
    """FLOPs of one run of each kernel; pairs that the static mask hides are not counted, those that documents or a
    pattern hide are.

    The forward has two products a tile, the backward five: three over the width of keys, two over that of values.
    """
    pairs, kind = pair_flops(spec), "masked" if spec.pattern else "flash"
    if partition.platform() == "gpu":
        widths = _kernels().gpu_kernel_widths(spec.width, spec.value_width)
        return {name.replace("flash", kind): pairs * width for name, width in widths.items()}
    with tuning.device_kind(partition.device_kind()):
        runs = _kernels().tpu_kernel_runs(*arrays(spec))
    runs = {name.replace("flash", kind): n for name, n in runs.items()}
    widths = {
        f"{kind}_forward": spec.width + spec.value_width,
        f"{kind}_backward": 3 * spec.width + 2 * spec.value_width,
    }
    return {name: pairs * width / runs[name] for name, width in widths.items()}


def pair_flops(spec: AttentionSpec) -> float:
    """FLOPs of a product of width 1 over all pairs that the static mask lets see each other."""
    seen = mean_visible_keys(spec.keys, spec.causal, spec.window)
    return 2.0 * spec.batch * spec.heads * spec.queries * seen


def arrays(spec: AttentionSpec) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Queries, keys and values."""
    of = lambda length, heads, width: jax.ShapeDtypeStruct((spec.batch, length, heads, width), spec.dtype)
    return (
        of(spec.queries, spec.heads, spec.width),
        of(spec.keys, spec.kv_heads, spec.width),
        of(spec.keys, spec.kv_heads, spec.value_width),
    )


def own_keys_seen(mask: Mask, queries: int, keys: int) -> bool:
    """Whether it is known that each row sees its own key, and so every key is seen."""
    return (mask.causal or mask.window is not None) and not mask.dynamic() and queries == keys


def attention(q, k, v, mask: Mask, sinks=None, key_bias=None, query_bias=None, **options) -> jax.Array:
    """See `attnlab.ops.attention.attention`; options as for `attention_with_lse`."""
    return attention_with_lse(q, k, v, mask, sinks, key_bias, query_bias, **options)[0]


def gated_attention(
    q_BTHd: jax.Array, gate_BTHe: jax.Array, k_BSKd: jax.Array, v_BSKe: jax.Array, mask: Mask, sinks_H=None, **options
) -> jax.Array:
    """See `attnlab.ops.attention_gated.gated_attention`; options as for `attention_with_lse`."""
    return attention_with_lse(q_BTHd, k_BSKd, v_BSKe, mask, sinks_H, gate_BTHe=gate_BTHe, **options)[0]


def attention_with_lse(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    sinks_H: jax.Array | None = None,
    key_bias_BSh: jax.Array | None = None,
    query_bias_BTh: jax.Array | None = None,
    *,
    scale: float,
    soft_cap: float | None,
    gate_BTHe: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attnlab.ops.attention.attention_with_lse`; `interpret` runs the TPU's as plain XLA, on any platform.

    Scores and statistics are float32, products bfloat16 for bfloat16 inputs, for which the TPU's round the scaled
    queries once more. Backward recomputes the scores from the output and the log-sum-exp, which carry the checkpoint
    names "attention_o" and "attention_lse". A bias of queries changes the log-sum-exp alone, where there are no sinks.
    """
    (B, T, H, _), S = q_BTHd.shape, k_BSKd.shape[1]
    platform, key_bias = kernel_platform(), None
    if key_bias_BSh is not None:
        wide = jnp.broadcast_to(key_bias_BSh.astype(jnp.float32), (B, S, key_bias_BSh.shape[2])).swapaxes(1, 2)
        key_bias = wide[:, 0] if wide.shape[1] == 1 else wide

    def run(**masked: Any) -> tuple[jax.Array, jax.Array]:
        with tuning.device_kind(partition.device_kind()):
            o, lse = _kernels().flash_attention(
                q_BTHd, k_BSKd, v_BSKe, sinks=sinks_H, gate=gate_BTHe, key_bias=key_bias, soft_cap=soft_cap,
                scale=scale, platform=platform, interpret=interpret, **masked,
            )  # fmt: skip
        return o, jnp.maximum(lse, NO_KEYS)

    def by_tiles() -> tuple[jax.Array, jax.Array]:
        options = {"scale": scale, "soft_cap": soft_cap}
        o, lse = attention_tiles.attention_with_lse(
            q_BTHd, k_BSKd, v_BSKe, mask, sinks_H, key_bias_BSh, None, **options
        )
        if gate_BTHe is not None:
            o = (o.astype(jnp.float32) * jax.nn.sigmoid(gate_BTHe.astype(jnp.float32))).astype(o.dtype)
        return o, lse.astype(jnp.float32)

    if mask.plain():
        starts, ends = mask.bounds(T, S)
        o, lse = run(starts=starts, ends=ends, keys_seen=own_keys_seen(mask, T, S))
    else:
        pattern, exact = attention_pattern.pattern_of(mask, T, S, platform)
        o, lse = attention_pattern.where_exact(exact, lambda: run(pattern=pattern), by_tiles)
    if query_bias_BTh is None:
        return o, lse
    bias = query_bias_BTh.astype(lse.dtype)
    bias = jnp.repeat(bias, H // bias.shape[2], 2) if bias.shape[2] > 1 else bias
    return o, jnp.where(lse > NO_KEYS / 10, lse + bias, lse)  # a row that sees nothing has no bias
