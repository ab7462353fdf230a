"""Local linear attention as one op: its definition, and the choice of implementation."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops import local_linear_kernel, local_linear_xla
from attnlab.ops.attention_frame import attend, check_shapes, over_devices, plain_masks
from attnlab.ops.conjugate_gradient import Solver
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.local_linear_kernel import LocalLinearSpec
from attnlab.ops.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solves:
    """How the rows' systems were solved; rows that see nothing have 0 of both. Without gradients.

    Attributes:
      residual_BTH: `|A x - (q - mean key)| / |q - mean key|`.
      iterations_BTH: iterations of the solver that changed x; 0 for a direct solve.
    """

    residual_BTH: jax.Array
    iterations_BTH: jax.Array


def definition(
    q_BTHd: jax.Array,
    ridge_BTH: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float,
    solver: Solver,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The formula, with every d x d matrix formed and factored. In float32, or float64 for float64 inputs."""
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    T, H, d = q_BTHd.shape[1:]
    S, K = k_BSKd.shape[1:3]
    einsum = partial(jnp.einsum, precision="highest")
    q, k, v, ridge = (x.astype(dtype) for x in (q_BTHd, k_BSKd, v_BSKe, ridge_BTH))
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    visible = mask.visible(T, S)[:, 0, ..., None]
    logits = einsum("bthd,bshd->btsh", q, k) * scale
    highest = jax.lax.stop_gradient(jnp.where(visible, logits, jnp.finfo(dtype).min).max(2, keepdims=True))
    p = jnp.where(visible, jnp.exp(jnp.where(visible, logits - highest, 0)), 0)
    total = p.sum(2, keepdims=True)
    p /= jnp.where(total > 0, total, 1)

    mean = einsum("btsh,bshd->bthd", p, k)
    offset = jnp.where(total[:, :, 0, :, None] > 0, q - mean, 0)
    around = k[:, None] - mean[:, :, None]  # [B, T, S, H, d]
    moments = einsum("btsh,btshd,btshf->bthdf", p, around, around)
    if solver.blocks > 1:
        block = jnp.arange(d) // (d // solver.blocks)
        moments = jnp.where(block[:, None] == block, moments, 0)
    A = moments + ridge[..., None, None] * jnp.eye(d, dtype=dtype)
    x = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(A), offset[..., None])[..., 0]
    weights = p * (1 + einsum("btshd,bthd->btsh", around, x))
    o = einsum("btsh,bshe->bthe", weights, v).astype(q_BTHd.dtype)
    length = jnp.linalg.norm(offset, axis=-1)
    residual = jnp.linalg.norm(einsum("bthdf,bthf->bthd", A, x) - offset, axis=-1) / jnp.where(length > 0, length, 1)
    return o, residual, jnp.zeros_like(residual)


LOCAL_LINEAR = Op(
    "local_linear",
    LocalLinearSpec.of,
    {
        "definition": Implementation(definition, plain_masks()),
        "cg": Implementation(partial(local_linear_xla.local_linear, early_exit=True), plain_masks()),
        "cg_fixed": Implementation(partial(local_linear_xla.local_linear, early_exit=False), plain_masks()),
        "pallas": Implementation(
            local_linear_kernel.local_linear,
            plain_masks(local_linear_kernel.unsupported),
            worth=local_linear_kernel.worth,
            platforms=("tpu", "gpu"),
            interpretable=True,
            kernel_flops=local_linear_kernel.kernel_flops,
        ),
    },
    preference=("pallas", "cg"),
    split=over_devices,
)


def local_linear(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    ridge: jax.Array | float,
    *,
    scale: float | None = None,
    iterations: int = 16,
    max_iterations: int | None = None,
    tolerance: float | None = None,
    blocks: int = 1,
    impl: str = "auto",
) -> tuple[jax.Array, Solves]:
    """Local linear attention: the value at q of the affine map that fits the values best around q.

    Over the visible keys, with p = softmax(scale * q . k) as weights, it is the intercept b of

        min over b, W of  1/2 sum_s p_s |v_s - b - W (k_s - q)|^2 + ridge / 2 |W|^2

    which is, with m = sum p k and A = sum p (k - m)(k - m)^T + ridge,

        o = sum_s a_s v_s,   a_s = p_s (1 + (k_s - m) . A^-1 (q - m)),   sum_s a_s = 1

    softmax attention and a correction for q not standing at the mean of the keys it sees. Queries and keys must
    live in one space.

    q_BTHd, k_BSKd, v_BSKe, mask, scale: as in `attnlab.ops.attention`. A row that sees no key gives exactly 0, with
        zero gradients.
    ridge: above 0; a scalar, [H], or [B, T, H]. Relative to weights of sum 1, as in the authors' code, so that adding
        a number to a row's logits changes nothing.
    iterations, max_iterations, tolerance: of conjugate gradients (`attnlab.ops.conjugate_gradient`); gradients are
        those of the exact solution, wrong by about the residual. `definition` reads none of them.
    blocks: A keeps second moments of channels in one block alone: of so many equal blocks of neighbouring channels.
    impl: "auto" (pallas on TPU and Hopper, else cg); "definition"; "cg": rows of a tile go on until all of them have a
        residual of `tolerance`, for at most `max_iterations` (None: `iterations`); "cg_fixed": always `iterations`;
        "pallas": as cg, by our kernels.

    Returns o_BTHe in the dtype of q, and how the systems were solved. Weights and the solver are float32 (float64 for
    float64 inputs). Differentiable (reverse mode) in q, k, v and ridge. Raises UserError for what does not fit.

    Source: Zuo et al. 2025, Local Linear Attention, arXiv:2510.01450, with the sums centred at the mean key (ours),
    which needs no guarded division and loses less to rounding.
    """
    check_shapes(q_BTHd, k_BSKd, v_BSKe, mask, None, None)
    B, T, H, d = q_BTHd.shape
    ridge = jnp.asarray(ridge, jnp.promote_types(q_BTHd.dtype, jnp.float32))
    if ridge.shape not in ((), (H,), (B, T, H)):
        raise UserError(f"local_linear: ridge {ridge.shape}, expected a scalar, [{H}] or [{B}, {T}, {H}]")
    if iterations < 1:
        raise UserError(f"local_linear: iterations={iterations} is not allowed; allowed: 1 or more")
    max_iterations = iterations if max_iterations is None else max_iterations
    if max_iterations < iterations:
        raise UserError(f"local_linear: max_iterations={max_iterations} is not allowed; allowed: {iterations} or more")
    if blocks < 1 or d % blocks:
        raise UserError(f"local_linear: blocks={blocks} is not allowed; allowed: divisors of the width {d}")
    scale = d**-0.5 if scale is None else float(scale)
    queries = (q_BTHd, jnp.broadcast_to(ridge, (B, T, H)))
    options = {"scale": scale, "solver": Solver(iterations, max_iterations, tolerance, blocks)}
    o, *facts = attend(LOCAL_LINEAR, queries, (k_BSKd, v_BSKe), mask, ranks=(4, 3, 3), impl=impl, **options)
    return o, Solves(*jax.lax.stop_gradient(facts))
