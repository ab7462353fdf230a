"""Tensor (third-order, Kronecker) attention as one op: its definition, and the choice of implementation."""

from functools import partial

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops import tensor_attention_xla
from attnlab.ops.attention_frame import AttentionSpec, attend, check_shapes, over_devices, plain_masks
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.masks import Mask

MOST_KEYS = 256  # that a query may see: it reads all pairs of them


def definition(
    q_BTHd: jax.Array, k_BSHc: jax.Array, v_BSHc: jax.Array, mask: Mask, *, scale: float, reach: int, chunk: int
) -> jax.Array:
    """The formula, with every pair of keys written out. In float32, or float64 for float64 inputs."""
    del reach, chunk
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    T, S = q_BTHd.shape[1], k_BSHc.shape[1]
    einsum = partial(jnp.einsum, precision="highest")
    q, k, v = (x.astype(dtype) for x in (q_BTHd, k_BSHc, v_BSHc))
    (k1, k2), (v1, v2) = (jnp.split(x, 2, axis=-1) for x in (k, v))
    logits = einsum("btjhd,blhd->bthjl", q[:, :, None] * k1[:, None], k2) * scale
    sees = mask.visible(T, S)[:, 0, :, None]
    visible = sees[..., :, None] & sees[..., None, :]  # a pair, where both of it are
    highest = jnp.where(visible, logits, jnp.finfo(dtype).min).max((-2, -1), keepdims=True)
    p = jnp.where(visible, jnp.exp(jnp.where(visible, logits - jax.lax.stop_gradient(highest), 0)), 0)
    total = p.sum((-2, -1), keepdims=True)
    inner = einsum("bthjl,blhe->bthje", p / jnp.where(total > 0, total, 1), v2)
    return (inner * v1.swapaxes(1, 2)[:, None]).sum(3).astype(q_BTHd.dtype)


TENSOR_ATTENTION = Op(
    "tensor_attention",
    AttentionSpec.of,
    {
        "definition": Implementation(definition, plain_masks()),
        "chunked": Implementation(tensor_attention_xla.tensor_attention, plain_masks()),
    },
    preference=("chunked",),
    split=over_devices,
)


def tensor_attention(
    q_BTHd: jax.Array,
    k_BSHc: jax.Array,
    v_BSHc: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    reach: int | None = None,
    chunk: int = 32,
    impl: str = "auto",
) -> jax.Array:
    """Attention of a query to pairs of keys: one softmax over all pairs (j, l) of the keys that it sees,

        s_t,jl = scale sum_c q_tc k1_jc k2_lc        o_t = sum_jl softmax_jl(s_t) v1_j * v2_l

    (* elementwise), which is ordinary attention to S^2 keys k1_j * k2_l. With n visible keys a query costs
    2 n^2 (d + e) FLOPs a head: a sequence's cost is cubic in its length, or quadratic in a window.

    q_BTHd: queries.
    k_BSHc, v_BSHc: of each head both keys side by side, [k1, k2] of width 2 d, and both values, [v1, v2] of width 2 e.
    mask: which keys each row sees; of a pair it sees both or none. A row that sees none gives exactly 0, with zero
        gradients.
    scale: default 1 / d, as in the paper.
    reach: the most keys that any row sees, where less than S is known: rows are then to stand in the order of their
        keys, as those of a window do.
    chunk: rows computed together, changes only speed and memory.
    impl: "auto" (chunked: tiles of rows and j against all l, with running softmax statistics), "definition".

    Returns o_BTHe in the dtype of q. Scores and softmax statistics are float32 (float64 for float64 inputs).
    Differentiable (reverse mode) in q, k and v. Raises UserError for what does not fit, and for more than `MOST_KEYS`
    keys a row.

    Source: Alman and Song 2023, How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to
    Kronecker Computation, arXiv:2310.04064; the same form is 2-simplicial attention (Clift et al. 2019,
    arXiv:1909.00668; Roy et al. 2025, arXiv:2507.02754, with scale 1 / sqrt(d) and windows). Masks are ours.
    """
    B, T, H, d = q_BTHd.shape
    S = k_BSHc.shape[1]
    if k_BSHc.shape[3] != 2 * d or v_BSHc.shape[3] % 2 or k_BSHc.shape[2] != H:
        raise UserError(
            f"tensor_attention: q {q_BTHd.shape}, k {k_BSHc.shape}, v {v_BSHc.shape} do not fit; "
            "expected q [B, T, H, d], k [B, S, H, 2 d], v [B, S, H, 2 e]"
        )
    check_shapes(q_BTHd, jax.ShapeDtypeStruct((B, S, H, d), k_BSHc.dtype), v_BSHc, mask, None, None)
    reach = S if reach is None else min(reach, S)
    if reach > MOST_KEYS:
        raise UserError(
            f"tensor_attention: {reach} keys a query, {reach**2} pairs; allowed: up to {MOST_KEYS} keys "
            "(shorter rows, or a window)"
        )
    if chunk < 1:
        raise UserError(f"tensor_attention: chunk={chunk} is not allowed; allowed: 1 or more")
    scale = 1 / d if scale is None else float(scale)
    options = {"scale": scale, "reach": reach, "chunk": chunk}
    return attend(TENSOR_ATTENTION, (q_BTHd,), (k_BSHc, v_BSHc), mask, impl=impl, **options)
