"""Softmax attention as one op: its definition, and the table of implementations."""

import jax
import jax.numpy as jnp

from attnlab.ops import attention_cudnn, attention_flash, attention_splash, attention_tiles, attention_xla
from attnlab.ops.attention_frame import NO_KEYS, AttentionSpec, attend, check_shapes, over_devices, plain_masks
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.masks import Mask


def definition(
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
) -> jax.Array:
    """The formula, with all T x S scores. Statistics in float32, or float64 for float64 inputs."""
    return definition_with_lse(
        q_BTHd, k_BSKd, v_BSKe, mask, sinks_H, key_bias_BSh, query_bias_BTh, scale=scale, soft_cap=soft_cap
    )[0]


def definition_with_lse(
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
) -> tuple[jax.Array, jax.Array]:
    """`definition`, and the log-sum-exp of `attention_with_lse`."""
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    B, T, H, _ = q_BTHd.shape
    S, K = k_BSKd.shape[1:3]
    q, k, v = (x.astype(dtype) for x in (q_BTHd, k_BSKd, v_BSKe))
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    for bias, shape in ((key_bias_BSh, (1, S)), (query_bias_BTh, (T, 1))):
        if bias is not None:
            bias = _of_query_heads(bias.swapaxes(1, 2), H).astype(dtype)
            logits += bias.reshape(*bias.shape[:2], *shape)
    visible = _of_query_heads(mask.visible(T, S), H)
    highest = jnp.where(visible, logits, jnp.finfo(dtype).min).max(-1, keepdims=True)
    if sinks_H is not None:
        sinks = sinks_H.astype(dtype)[:, None, None]
        highest = jnp.maximum(highest, sinks)
    highest = jax.lax.stop_gradient(highest)
    # Hidden logits are replaced before exp too: exp of a hidden large one would be inf, and its gradient NaN.
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, logits - highest, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    if sinks_H is not None:
        total += jnp.exp(sinks - highest)
    some = total > 0
    total = jnp.where(some, total, 1)
    lse = jnp.where(some, highest + jnp.log(total), NO_KEYS)[..., 0]
    o = jnp.einsum("bhts,bshe->bthe", weights / total, v, precision="highest").astype(q_BTHd.dtype)
    return o, lse.swapaxes(1, 2)


def _of_query_heads(x: jax.Array, H: int) -> jax.Array:
    """[B, h, ...] of 1 head, key heads or query heads, as [B, 1 or H, ...]."""
    return x if x.shape[1] in (1, H) else jnp.repeat(x, H // x.shape[1], axis=1)


ATTENTION = Op(
    "attention",
    AttentionSpec.of,
    {
        "definition": Implementation(definition),
        "xla": Implementation(attention_xla.attention, plain_masks()),
        "flash": Implementation(
            attention_flash.attention,
            attention_flash.unsupported,
            worth=attention_flash.worth,
            platforms=("tpu", "gpu"),
            interpretable=True,
            kernel_flops=attention_flash.kernel_flops,
        ),
        "splash": Implementation(
            attention_splash.attention,
            plain_masks(attention_splash.unsupported),
            platforms=("tpu",),
            interpretable=True,
            split=attention_splash.over_devices,
            kernel_flops=attention_splash.kernel_flops,
        ),
        "cudnn": Implementation(
            attention_cudnn.attention,
            plain_masks(attention_cudnn.unsupported),
            platforms=("gpu",),
            kernel_flops=attention_cudnn.kernel_flops,
        ),
        "tiles": Implementation(attention_tiles.attention, worth=attention_tiles.worth),
    },
    preference=("flash", "splash", "cudnn", "xla", "tiles"),
    split=over_devices,
)
ATTENTION_WITH_LSE = Op(
    "attention_with_lse",
    AttentionSpec.of,
    {
        "definition": Implementation(definition_with_lse),
        "xla": Implementation(attention_xla.attention_with_lse, plain_masks()),
        "flash": Implementation(
            attention_flash.attention_with_lse,
            attention_flash.unsupported,
            worth=attention_flash.worth,
            platforms=("tpu", "gpu"),
            interpretable=True,
            kernel_flops=attention_flash.kernel_flops,
        ),
        "tiles": Implementation(attention_tiles.attention_with_lse, worth=attention_tiles.worth),
    },
    preference=("flash", "xla", "tiles"),
    split=over_devices,
)


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks_H: jax.Array | None = None,
    key_bias_BSh: jax.Array | None = None,
    query_bias_BTh: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Softmax attention, `o[t] = sum_s p[t, s] v[s]` with `p = softmax_s(scale * q[t] . k[s])` over the
    visible keys.

    q_BTHd: queries. k_BSKd, v_BSKe: keys and values, the width `e` of a value head free. `H % K == 0`:
        query head `h` reads key head `h // (H / K)` (K = H multi-head, K = 1 multi-query, between them
        grouped-query; Ainslie et al. 2023, arXiv:2305.13245).
    mask: which keys each row sees (`attnlab.ops.Mask`). A row that sees none gives exactly 0, with zero
        gradients.
    scale: default `d ** -0.5`.
    soft_cap: logits become `soft_cap * tanh(logits / soft_cap)` before masking (Gemma 2, arXiv:2408.00118).
    sinks_H: one learned logit per query head that adds to the softmax denominator only (gpt-oss,
        arXiv:2508.10925).
    key_bias_BSh, query_bias_BTh: float32, added to the logits after the soft-cap, of 1, K or H heads; B may be 1. A
        constant of a row changes its softmax only beside sinks.
    impl: "auto", or a name in `ATTENTION.table`; `attnlab.ops.recording` tells what "auto" picked.

    Returns o_BTHe in the dtype of q. Scores and softmax statistics are float32 (float64 for float64 inputs).
    Differentiable (reverse mode) in q, k, v, sinks and biases. Changing any position after t leaves o[:, :t + 1]
    bitwise the same under a causal mask. Raises UserError for shapes that do not fit, an unknown `impl`, or
    one that cannot serve.
    """
    check_shapes(q_BTHd, k_BSKd, v_BSKe, mask, soft_cap, sinks_H, key_bias_BSh, query_bias_BTh)
    scale = q_BTHd.shape[-1] ** -0.5 if scale is None else float(scale)
    options = {"scale": scale, "soft_cap": soft_cap, "impl": impl}
    biases = key_bias_BSh, query_bias_BTh
    return attend(ATTENTION, (q_BTHd,), (k_BSKd, v_BSKe), mask, (sinks_H,), biases, **options)


def attention_with_lse(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks_H: jax.Array | None = None,
    key_bias_BSh: jax.Array | None = None,
    query_bias_BTh: jax.Array | None = None,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`attention`, and what is needed to merge it with attention over other keys; see there for the arguments.

    Returns o_BTHe, and lse_BTH, the natural logarithm of the softmax denominator `sum_s exp(logit[t, s])` (with the
    sinks), float32 (float64 for float64 inputs). Differentiable in both. A row that sees no key has o = 0 and an lse
    below -1e19, finite. Of two disjoint sets of keys the second has the weight `sigmoid(lse_2 - lse_1)`.
    """
    check_shapes(q_BTHd, k_BSKd, v_BSKe, mask, soft_cap, sinks_H, key_bias_BSh, query_bias_BTh)
    scale = q_BTHd.shape[-1] ** -0.5 if scale is None else float(scale)
    options = {"scale": scale, "soft_cap": soft_cap, "impl": impl, "ranks": (4, 3)}
    biases = key_bias_BSh, query_bias_BTh
    return attend(ATTENTION_WITH_LSE, (q_BTHd,), (k_BSKd, v_BSKe), mask, (sinks_H,), biases, **options)
