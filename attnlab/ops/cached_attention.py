"""Softmax attention of queries appended to a cache, whose layout lets a single query read it without a copy."""

import functools

import jax
import jax.numpy as jnp

from attnlab.ops import attention_tiles, attention_xla, cached_flash
from attnlab.ops.attention import definition
from attnlab.ops.attention_frame import AttentionSpec, attend, check_shapes, over_devices, plain_masks
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.masks import Mask


def one_query(
    q_B1Hd, k_BKSd, v_BKSe, mask: Mask, sinks_H=None, key_bias_BSh=None, query_bias_B1h=None,
    *, scale: float, soft_cap: float | None,
) -> jax.Array:  # fmt: skip
    """All scores of a single query at once, from the cache as it lies."""
    q_BHd = q_B1Hd[:, 0]
    B, H, d = q_BHd.shape
    k_NSd, v_NSe = (x.reshape(-1, *x.shape[2:]) for x in (k_BKSd, v_BKSe))
    N, S, _ = k_NSd.shape
    dtype = jnp.promote_types(q_BHd.dtype, jnp.float32)
    # The axis of the G heads that share a key head is left out where G = 1: a product without it is faster on CPU.
    group, g = ((), "") if H * B == N else ((H * B // N,), "g")
    scores = jnp.einsum(f"n{g}d,nsd->n{g}s", q_BHd.reshape(N, *group, d), k_NSd, preferred_element_type=dtype) * scale
    scores = scores.reshape(B, H, S)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    of_query_heads = lambda x: x if x.shape[1] in (1, H) else jnp.repeat(x, H // x.shape[1], axis=1)
    for bias in (key_bias_BSh, query_bias_B1h):
        if bias is not None:
            scores += of_query_heads(bias.swapaxes(1, 2)).astype(dtype)
    visible = of_query_heads(mask.visible(1, S)[:, :, 0])
    highest = jnp.where(visible, scores, jnp.finfo(dtype).min).max(-1, keepdims=True)
    if sinks_H is not None:
        sinks_H1 = sinks_H.astype(dtype)[:, None]
        highest = jnp.maximum(highest, sinks_H1)
    highest = jax.lax.stop_gradient(highest)
    # Hidden scores are replaced before exp too: exp of a hidden large one would be inf, and its gradient NaN.
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - highest, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    if sinks_H is not None:
        total += jnp.exp(sinks_H1 - highest)
    weights = (weights / jnp.where(total > 0, total, 1)).astype(v_NSe.dtype).reshape(N, *group, S)
    o = jnp.einsum(f"n{g}s,nse->n{g}e", weights, v_NSe, preferred_element_type=dtype)
    return o.reshape(B, 1, H, -1).astype(q_BHd.dtype)


def _by_position(run, q_BTHd, k_BKSd, v_BKSe, *rest, **options):
    return run(q_BTHd, k_BKSd.swapaxes(1, 2), v_BKSe.swapaxes(1, 2), *rest, **options)


def _several(spec: AttentionSpec) -> str | None:
    return None if spec.queries == 1 else f"it takes one query, not {spec.queries}"


CACHED_ATTENTION = Op(
    "cached_attention",
    AttentionSpec.of,
    {
        "definition": Implementation(functools.partial(_by_position, definition)),
        "xla": Implementation(functools.partial(_by_position, attention_xla.attention), plain_masks()),
        "tiles": Implementation(
            functools.partial(_by_position, attention_tiles.attention), worth=attention_tiles.worth
        ),
        "one_query": Implementation(one_query, _several),
        "decode": Implementation(
            cached_flash.attention, plain_masks(cached_flash.unsupported), platforms=("tpu",), interpretable=True
        ),
    },
    preference=("one_query", "xla", "tiles"),
    split=over_devices,
)


def cached_attention(
    q_BTHd: jax.Array,
    k_NSd: jax.Array,
    v_NSe: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks_H: jax.Array | None = None,
    key_bias_BSh: jax.Array | None = None,
    query_bias_BTh: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """`attnlab.ops.attention` over keys and values laid out as a cache: head `k` of sequence `b` is row `b * K + k`.

    See there for the arguments, the result o_BTHe, and what is raised. `impl` is "auto" or a name in
    `CACHED_ATTENTION.table`: a choice of its own, as one query over many keys is another job than whole sequences.
    """
    B, d = q_BTHd.shape[0], q_BTHd.shape[-1]
    keys = tuple(x.reshape(B, -1, *x.shape[1:]) for x in (k_NSd, v_NSe))
    by_position = (jax.eval_shape(lambda x: x.swapaxes(1, 2), x) for x in keys)
    biases = key_bias_BSh, query_bias_BTh
    check_shapes(q_BTHd, *by_position, mask, soft_cap, sinks_H, *biases)
    scale = d**-0.5 if scale is None else float(scale)
    options = {"scale": scale, "soft_cap": soft_cap, "impl": impl, "key_axis": 2}
    return attend(CACHED_ATTENTION, (q_BTHd,), keys, mask, (sinks_H,), biases, **options)
