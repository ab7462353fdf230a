"""Softmax attention as one op: its definition, and the choice of implementation."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops import attention_splash, attention_xla, context
from attnlab.ops.dispatch import Implementation, choose
from attnlab.ops.masks import Mask
from attnlab.parallel import partition


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static facts by which an implementation is chosen. Lengths and widths as in `attention`."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: str
    causal: bool
    window: int | None
    intervals: bool
    soft_cap: bool
    sinks: bool
    documents: bool = False
    parts: int = 1  # devices over which the queries are split

    def __str__(self) -> str:
        width = str(self.width) if self.width == self.value_width else f"{self.width}/{self.value_width}"
        features = [name for name in ("causal", "intervals", "documents", "soft_cap", "sinks") if getattr(self, name)]
        if self.window is not None:
            features.append(f"window={self.window}")
        if self.parts > 1:
            features.append(f"parts={self.parts}")
        shape = f"B{self.batch} T{self.queries} S{self.keys} H{self.heads} K{self.kv_heads} d{width}"
        return " ".join([shape, self.dtype, *features])


def definition(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """The formula, with all T x S scores. Statistics in float32, or float64 for float64 inputs."""
    return definition_with_lse(q_BTHd, k_BSKd, v_BSKe, mask, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H)[0]


def definition_with_lse(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None,
    sinks_H: jax.Array | None,
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
    visible = mask.visible(T, S)[:, None]
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
    lse = jnp.where(some, highest + jnp.log(total), _LOWEST)[..., 0]
    o = jnp.einsum("bhts,bshe->bthe", weights / total, v, precision="highest").astype(q_BTHd.dtype)
    return o, lse.swapaxes(1, 2)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "definition": Implementation(definition),
    "xla": Implementation(attention_xla.attention),
}
KERNELS: dict[str, Implementation] = {  # of one platform
    "splash": Implementation(attention_splash.attention, attention_splash.unsupported, attention_splash.on_parts),
}
LSE_IMPLEMENTATIONS: dict[str, Implementation] = {
    "definition": Implementation(definition_with_lse),
    "xla": Implementation(attention_xla.attention_with_lse),
}
_PREFERENCE = (*KERNELS, "xla")
_LOWEST = -1e20  # the log-sum-exp of no keys, finite so that differences are


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks_H: jax.Array | None = None,
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
    impl: "auto", or a name in `IMPLEMENTATIONS` or `KERNELS`; `attnlab.ops.choices()` tells what "auto" picked.

    Returns o_BTHe in the dtype of q. Scores and softmax statistics are float32 (float64 for float64 inputs).
    Differentiable (reverse mode) in q, k, v and sinks. Changing any position after t leaves o[:, :t + 1]
    bitwise the same under a causal mask. Raises UserError for shapes that do not fit, an unknown `impl`, or
    one that cannot serve.
    """
    options = {"scale": scale, "soft_cap": soft_cap, "sinks_H": sinks_H}
    return _run("attention", {**IMPLEMENTATIONS, **KERNELS}, impl, q_BTHd, k_BSKd, v_BSKe, mask, **options)


def attention_with_lse(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks_H: jax.Array | None = None,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`attention`, and what is needed to merge it with attention over other keys; see there for the arguments.

    Returns o_BTHe, and lse_BTH, the natural logarithm of the softmax denominator `sum_s exp(logit[t, s])` (with the
    sinks), float32 (float64 for float64 inputs). Differentiable in both. A row that sees no key has o = 0 and an lse
    below -1e19, finite. Of two disjoint sets of keys the second has the weight `sigmoid(lse_2 - lse_1)`.
    """
    options = {"scale": scale, "soft_cap": soft_cap, "sinks_H": sinks_H}
    return _run("attention_with_lse", LSE_IMPLEMENTATIONS, impl, q_BTHd, k_BSKd, v_BSKe, mask, **options)


def _run(op: str, implementations, impl: str, q_BTHd, k_BSKd, v_BSKe, mask: Mask, *, scale, soft_cap, sinks_H):
    _check_shapes(q_BTHd, k_BSKd, v_BSKe, mask, soft_cap, sinks_H)
    B, T, H, d = q_BTHd.shape
    S, K, e = v_BSKe.shape[1:]
    split = context.split(T)
    spec = AttentionSpec(
        B, T, S, H, K, d, e, str(q_BTHd.dtype), mask.causal, mask.window, mask.dynamic(),
        soft_cap is not None, sinks_H is not None, mask.documents, partition.ways("seq") if split else 1,
    )  # fmt: skip
    preference = [name for name in _PREFERENCE if name in implementations]
    chosen = choose(op, impl, implementations, spec, preference)
    scale = d**-0.5 if scale is None else float(scale)
    both = implementations is LSE_IMPLEMENTATIONS
    keys, kernel = (k_BSKd, v_BSKe), chosen.run
    static = split and chosen.on_parts is not None
    if static:
        kernel = chosen.on_parts
        if mask.dynamic():
            keys = (*keys, jnp.broadcast_to(mask.k_start, (B, T)))

    def run(queries, keys, sinks, part):
        out = kernel(*queries, *keys, part, scale=scale, soft_cap=soft_cap, sinks_H=sinks)
        return out if both else (out,)

    ranks = (4, 3) if both else (4,)
    out = context.attend(run, (q_BTHd,), keys, sinks_H, mask, static=static, ranks=ranks)
    return out if both else out[0]


def _check_shapes(q, k, v, mask: Mask, soft_cap, sinks) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise UserError(f"attention: q {q.shape}, k {k.shape}, v {v.shape}; each must be [batch, length, heads, width]")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UserError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit; "
            "expected q [B, T, H, d], k [B, S, K, d], v [B, S, K, e]"
        )
    if q.shape[2] % k.shape[2]:
        raise UserError(f"attention: {q.shape[2]} query heads over {k.shape[2]} kv heads; H must be a multiple of K")
    if not (q.dtype == k.dtype == v.dtype):
        raise UserError(f"attention: q {q.dtype}, k {k.dtype}, v {v.dtype}; all three must have one dtype")
    for name, bound in (("k_start", mask.k_start), ("k_end", mask.k_end)):
        if bound is not None and bound.shape not in ((1, q.shape[1]), q.shape[:2]):
            raise UserError(f"attention: mask {name} {bound.shape}, expected {q.shape[:2]} or 1 row")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise UserError(f"attention: sinks {sinks.shape}, expected [{q.shape[2]}], one per query head")
    if soft_cap is not None and not soft_cap > 0:
        raise UserError(f"attention: soft_cap={soft_cap} is not allowed; allowed: None or a number > 0")
