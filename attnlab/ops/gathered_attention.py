"""Softmax attention of some of the (query, head) pairs: the others cost nothing and are 0.

Every token wants at most `active` of the E heads it may choose from. A head's queries are gathered into blocks of R
rows; the blocks of all heads share one table, whose length follows from `active` alone, so that no choice overflows it
and no token is dropped.

Shapes: as in `attnlab.ops.attention`; E heads to choose from, M key heads among them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import UserError
from attnlab.ops import gathered_kernel, gathered_xla
from attnlab.ops.attention import attention
from attnlab.ops.attention import definition as attention_definition
from attnlab.ops.attention_frame import axes_of, plain_masks, zigzags
from attnlab.ops.cached_attention import cached_attention
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.gathered_rows import GatheredSpec
from attnlab.ops.head_subsets import interleaved, take_heads
from attnlab.ops.masks import Mask
from attnlab.parallel import sequence_parallel
from attnlab.parallel.sequence_parallel import SequenceParallel


def definition(
    q_BTHd, k_BSKd, v_BSKe, mask: Mask, wanted_BTE, sinks_H=None, *, chosen, active, scale, soft_cap
) -> jax.Array:
    """All pairs, those that are not wanted set to 0."""
    del active
    o = attention_definition(q_BTHd, k_BSKd, v_BSKe, mask, sinks_H, scale=scale, soft_cap=soft_cap)
    return jnp.where(wanted_BTE[..., None], take_heads(o, chosen), 0)


def _over_devices(
    implementation: Implementation, exchange: SequenceParallel, q, k, v, mask: Mask, wanted, sinks, *, keys, **options
) -> jax.Array:
    """Any implementation on a device's queries, in zig-zag order where that is fair, against all keys."""
    T = q.shape[1]
    if k.shape[1] != keys:
        k, v = exchange.all_gather(k), exchange.all_gather(v)
    order = exchange.zigzag if zigzags(mask, T) else lambda x, undo=False: x
    bounds = mask.bounds(T, keys, first=exchange.index() * T)
    own = Mask(*(None if x is None else order(x) for x in bounds))
    return order(implementation.run(order(q), k, v, own, order(wanted), sinks, **options), undo=True)


GATHERED_ATTENTION = Op(
    "gathered_attention",
    GatheredSpec.of,
    {
        "definition": Implementation(definition, plain_masks()),
        "xla": Implementation(gathered_xla.attention, plain_masks()),
        "routed": Implementation(
            gathered_kernel.attention,
            plain_masks(gathered_kernel.unsupported_rows),
            worth=gathered_kernel.worth,
            platforms=("tpu",),
            interpretable=True,
            kernel_flops=gathered_kernel.kernel_flops,
        ),
        "routed_xla": Implementation(
            gathered_kernel.attention_by_xla,
            plain_masks(gathered_kernel.unsupported),
            worth=gathered_kernel.worth,
            platforms=("tpu", "gpu"),
            interpretable=True,
            kernel_flops=gathered_kernel.kernel_flops,
        ),
    },
    preference=("routed", "routed_xla", "xla"),
    split=_over_devices,
)


def chosen_attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    wanted_BTE: jax.Array,
    *,
    chosen: tuple[int, ...],
    active: int,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks_H: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """`attnlab.ops.attention.attention` of the heads `chosen` where wanted, 0 elsewhere: o_BTEe.

    Args: as of `gathered_attention`; `impl`: "auto", or a name in `GATHERED_ATTENTION.table`.
    """
    seq = "seq" if sequence_parallel.splits(q_BTHd.shape[1]) else None
    k_seq = "seq" if sequence_parallel.splits(k_BSKd.shape[1]) else None
    rows, keys = ("batch", seq, None, None), ("batch", k_seq, None, None)
    of_mask = axes_of(mask, seq, lambda h: None)
    return GATHERED_ATTENTION(
        q_BTHd, k_BSKd, v_BSKe, mask, wanted_BTE, sinks_H,
        axes=(rows, keys, keys, of_mask, rows[:3], (None,)), out_axes=[rows], impl=impl,
        facts={"keys": k_BSKd.shape[1]},
        chosen=chosen, active=active, scale=q_BTHd.shape[3] ** -0.5 if scale is None else float(scale),
        soft_cap=soft_cap,
    )  # fmt: skip


def gathered_attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    wanted_BTE: jax.Array,
    *,
    chosen: tuple[int, ...],
    active: int,
    impl: str = "auto",
    gather_impl: str = "auto",
    sinks_H: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """`attnlab.ops.attention.attention` for all heads but `chosen`, and for these where wanted; 0 elsewhere.

    Args:
      q_BTHd, k_BSKd, v_BSKe, mask, sinks_H: as there.
      wanted_BTE: bool, for each position which of the heads `chosen` it wants.
      chosen: heads, ascending.
      active: most heads that a position wants; that more are wanted is not noticed and gives wrong results.
      impl: of the attention of the other heads.
      gather_impl: of that of the heads to choose from: "auto", or a name in `GATHERED_ATTENTION.table`.
      options: scale and soft_cap, as there.

    Returns o_BTHe. Differentiable in q, k, v and sinks.
    """
    always = tuple(h for h in range(q_BTHd.shape[2]) if h not in chosen)
    parts = {}
    if always:
        q, k, v, sinks = subset(q_BTHd, k_BSKd, v_BSKe, sinks_H, always)
        parts["always"] = attention(q, k, v, mask, sinks_H=sinks, impl=impl, **options)
    if chosen:
        parts["chosen"] = chosen_attention(
            q_BTHd, k_BSKd, v_BSKe, mask, wanted_BTE,
            chosen=chosen, active=active, sinks_H=sinks_H, impl=gather_impl, **options,
        )  # fmt: skip
    if len(parts) == 1:
        return next(iter(parts.values()))
    return interleaved(parts["always"], parts["chosen"], always, chosen)


def subset(q_BTHd, k_BSKd, v_BSKe, sinks_H, heads: tuple[int, ...]):
    """Queries, keys, values and sinks of some heads, ascending; key heads stay shared where the groups stay even."""
    H, K = q_BTHd.shape[2], k_BSKd.shape[2]
    key_heads = [h * K // H for h in heads]
    distinct = sorted(set(key_heads))
    even = len({key_heads.count(m) for m in distinct}) == 1
    kept = distinct if even else key_heads
    sinks = None if sinks_H is None else sinks_H[np.asarray(heads)]
    return take_heads(q_BTHd, heads), take_heads(k_BSKd, kept), take_heads(v_BSKe, kept), sinks


# One query and a cache.


def selected_cached_attention(
    q_BTHd: jax.Array,
    k_NSd: jax.Array,
    v_NSe: jax.Array,
    mask: Mask,
    wanted_BK: jax.Array,
    *,
    reads: int,
    soft_cap: float | None = None,
    impl: str = "auto",
) -> jax.Array:
    """`cached_attention` of one query that reads `reads` key heads of each sequence; the others' outputs are 0.

    Args:
      q_BTHd: T = 1.
      k_NSd, v_NSe, mask, soft_cap, impl: as in `cached_attention`.
      wanted_BK: bool, the key heads to read, at most `reads`.
    """
    if mask.heads() > 1:
        raise UserError("selected attention: a mask of each head is not allowed; allowed: one for all heads")
    B, _, H, d = q_BTHd.shape
    K, e = wanted_BK.shape[1], v_NSe.shape[2]
    _, read_Br = jax.lax.top_k(wanted_BK.astype(jnp.int32), reads)
    row = (jnp.arange(B)[:, None] * K + read_Br).reshape(-1)
    q = jnp.take_along_axis(q_BTHd.reshape(B, K, H // K, d), read_Br[:, :, None, None], axis=1)
    o = cached_attention(q.reshape(B, 1, -1, d), k_NSd[row], v_NSe[row], mask, soft_cap=soft_cap, impl=impl)
    o = o.reshape(B, reads, H // K, e)
    return jnp.zeros((B, K, H // K, e), o.dtype).at[jnp.arange(B)[:, None], read_Br].set(o).reshape(B, 1, H, e)
