"""Multi-token attention as one op: scores of neighbouring queries, keys and heads are joined before the softmax, and
weights after.

A block of rows has the rows before it that its convolutions reach: they are computed again, with their own scores.

Shapes: as in `attnlab.ops.attention`; `P` rows before the first, `Q` and `C` the spans of queries and keys.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops.blockwise import Span, take
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.masks import Mask
from attnlab.ops.row_blocks import by_key_heads, head_axes, over_row_blocks, softmax_of_seen, weighted


@dataclasses.dataclass(frozen=True)
class MultiTokenSpec:
    """The static facts by which an implementation is chosen."""

    batch: int
    rows: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    dtype: str

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.rows} S{self.keys} H{self.heads} K{self.kv_heads} d{self.width}"
        return f"{shape} {self.dtype}"

    @classmethod
    def of(cls, exchange: Any, q, k, *rest: Any, **options: Any) -> MultiTokenSpec:
        """Of the arrays of a device."""
        (B, T, H, d), (S, K) = q.shape, k.shape[1:3]
        return cls(B, T, S, H, K, d, str(q.dtype))


def definition(q, k, v, taps, logit_mix, after, mix, start, end, *, scale: float, whole: bool) -> jax.Array:
    """All rows at once; of whole rows, those before the first are none."""
    none = reach(taps, after) if whole else 0
    return _rows(q[:, none:], k, v, taps, logit_mix, after, mix, start, end, 0, scale, none=none).astype(q.dtype)


def in_blocks(q, k, v, taps, logit_mix, after, mix, start, end, *, scale: float, whole: bool) -> jax.Array:
    """Blocks of rows, each with the rows before it that it reads; formed again in the backward pass."""
    before = reach(taps, after)
    T, S = q.shape[1] - before, k.shape[1]

    def block(rows: Span, keys: Span) -> jax.Array:
        own = rows[0], before + rows[1]  # the first row of q stands `before` rows before row 0
        of_keys = (take(x, keys, 1) for x in (k, v))
        of_rows = (take(x, own, 1) for x in (start, end))
        o = _rows(take(q, own, 1), *of_keys, taps, logit_mix, after, mix, *of_rows, keys[0], scale)
        return o.astype(q.dtype)

    return over_row_blocks(block, T, S, Mask(causal=whole))


def reach(taps_HQC: jax.Array, after_HQC: jax.Array | None) -> int:
    """P, rows before a row that its convolutions read."""
    return taps_HQC.shape[1] - 1 + (0 if after_HQC is None else after_HQC.shape[1] - 1)


def _rows(
    q_BRHd, k_BLKd, v_BLKe, taps, logit_mix, after, mix, start_BR, end_BR, origin, scale: float, none: int = 0
) -> jax.Array:
    """o [B, R - P, H, e] of the rows behind the first P, over keys of which the first is key `origin`; bounds are of
    `none` rows more, before those of q."""
    key = origin + jnp.arange(k_BLKd.shape[1], dtype=jnp.int32)
    seen = ((key >= start_BR[..., None]) & (key < end_BR[..., None]))[:, None]
    scores = by_key_heads(q_BRHd, k_BLKd) * scale
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (none, 0), (0, 0)))
    B, K, G, R, L = scores.shape
    p = scores.reshape(B, K * G, R, L)
    rows = start_BR, end_BR
    p, rows, seen = _convolved(jnp.where(seen, p, 0), taps, *rows, seen)
    if logit_mix is not None:
        idle = max(none - taps.shape[1] + 1, 0)  # rows that there are not
        p = jnp.concatenate([p[:, :, :idle], _mixed(p[:, :, idle:], logit_mix)], axis=2)
    p = softmax_of_seen(p, seen)
    if after is not None:
        p, rows, seen = _convolved(p, after, *rows, seen)
        p = jnp.where(seen, p, 0)
    if mix is not None:
        p = _mixed(p, mix)
    return weighted(p.reshape(B, K, G, *p.shape[2:]), v_BLKe)


def _mixed(x_BHRL: jax.Array, mix_Ncc: jax.Array) -> jax.Array:
    """Head j of group n is the sum of `mix[n, i, j]` times its head i."""
    groups = x_BHRL.reshape(len(x_BHRL), mix_Ncc.shape[0], -1, *x_BHRL.shape[2:])
    mixed = jnp.einsum("bnirl,nij->bnjrl", groups, mix_Ncc.astype(x_BHRL.dtype), precision="highest")
    return mixed.reshape(x_BHRL.shape)


def _convolved(x_BHRL, taps_HQC, start_BR, end_BR, seen_B1RL):
    """Sums over neighbouring rows of the same document and neighbouring keys; and the rows' bounds, Q - 1 fewer.

    Of row i and key j it reads rows i - Q + 1 to i and keys j - C // 2 to j + C // 2. What rows do not see is 0 in x.
    """
    (_, Q, C), (R, L) = taps_HQC.shape, x_BHRL.shape[2:]
    taps = taps_HQC.astype(x_BHRL.dtype)
    own = lambda rows: rows[:, Q - 1 :]
    some = start_BR < end_BR
    near = []
    for a in range(Q):
        behind = lambda rows, a=a: rows[:, a : a + R - Q + 1]
        same = behind(some) & own(some) & (behind(start_BR) == own(start_BR))
        near.append(jnp.where(same[:, None, :, None], x_BHRL[:, :, a : a + R - Q + 1], 0))
    total = jnp.zeros_like(near[0])
    for b in range(C):
        part = sum(taps[:, a, b, None, None] * rows for a, rows in enumerate(near))
        shift = b - C // 2
        padded = jnp.pad(part, [(0, 0)] * 3 + [(max(-shift, 0), max(shift, 0))])
        total += padded[..., max(shift, 0) : max(shift, 0) + L]
    return total, (own(start_BR), own(end_BR)), seen_B1RL[:, :, Q - 1 :]


MULTI_TOKEN_ATTENTION = Op(
    "multi_token_attention",
    MultiTokenSpec.of,
    {"definition": Implementation(definition), "blocks": Implementation(in_blocks)},
    preference=("blocks",),
)


def multi_token_attention(
    q_BRHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    taps_HQC: jax.Array,
    after_HQC: jax.Array | None,
    mix_Ncc: jax.Array | None,
    start_BR: jax.Array,
    end_BR: jax.Array,
    *,
    whole: bool,
    logit_mix_Ncc: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Attention whose scores are convolved over neighbouring queries and keys:

        s_ij = sum_ab taps[a, b] (q_i' . k_j') / sqrt(d),    i' = i - Q + 1 + a,    j' = j - C // 2 + b

    with 0 for a pair of which i' does not see j'; then, where given, a mix of these of heads in groups of c; then a
    softmax over what row i sees; then, where given, the same convolution of the weights by `after`, 0 again where row i
    does not see key j, and a mix of the weights of heads, in groups of their own.

    q_BRHd: queries, P of them before the first whose output is wanted (`reach`), zeros where there is none.
    k_BSKd, v_BSKe: as in `attnlab.ops.attention`.
    taps_HQC, after_HQC: filters of each head; C is odd.
    mix_Ncc: of weights; head j of group n has `mix[n, i, j]` of head i.
    start_BR, end_BR: the keys that a row sees; rows of one document share their start, and only they are neighbours.
        What sees none gives exactly 0.
    whole: whether row P is key 0 and sees no later key, and so on: causal attention of whole rows.
    logit_mix_Ncc: as `mix_Ncc`, of convolved scores.
    impl: "auto" (blocks), "definition" (all rows at once).

    Returns o [B, R - P, H, e] in the dtype of q. Scores and weights are float32 (float64 for float64 inputs).
    Differentiable (reverse mode) in all but the bounds. Raises UserError for shapes that do not fit.

    Source: Golovneva et al. 2025, Multi-Token Attention, arXiv:2504.00927.
    """
    (_, R, H, d), K = q_BRHd.shape, k_BSKd.shape[2]
    filters = [x for x in (taps_HQC, after_HQC) if x is not None]
    if H % K or R <= reach(taps_HQC, after_HQC) or any(x.shape[0] != H or x.shape[2] % 2 == 0 for x in filters):
        raise UserError(
            f"multi_token_attention: q {q_BRHd.shape}, k {k_BSKd.shape}, filters {[x.shape for x in filters]}; "
            "expected H a multiple of K, filters [H, Q, C] of an odd C, and more rows than the filters reach back"
        )
    mixes = [x for x in (logit_mix_Ncc, mix_Ncc) if x is not None]
    if any(x.shape != (H // x.shape[1], *x.shape[1:2] * 2) or H % x.shape[1] for x in mixes):
        shapes = [x.shape for x in mixes]
        raise UserError(f"multi_token_attention: mixes {shapes}; expected [H / c, c, c], c a divisor of H = {H}")
    of_q, of_k = head_axes(H, K, math.lcm(*(x.shape[1] for x in mixes)))
    heads, keys, rows = ("batch", None, of_q, None), ("batch", None, of_k, None), ("batch", None)
    per_head = of_q, None, None
    return MULTI_TOKEN_ATTENTION(
        q_BRHd, k_BSKd, v_BSKe, taps_HQC, logit_mix_Ncc, after_HQC, mix_Ncc, start_BR, end_BR,
        axes=(heads, keys, keys, per_head, per_head, per_head, per_head, rows, rows), out_axes=[heads],
        impl=impl, scale=d**-0.5, whole=whole,
    )  # fmt: skip
