"""Gathered attention by our TPU kernel (`kernels_pallas.routed_attention`): any mask of intervals, any length."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops import gathered_rows as rows_lib
from attnlab.ops.attention_frame import NO_KEYS
from attnlab.ops.gathered_rows import GatheredSpec, Heads, Segments, Table
from attnlab.ops.head_subsets import spread
from attnlab.ops.masks import Mask, mean_visible_keys
from attnlab.parallel import partition
from kernels_pallas import routed_attention as kernels
from kernels_pallas import tuning

_LANES = 128  # below so many queries or keys most of a tile is padding
# Bundles that XLA schedules on v6e (jax 0.10.2, libtpu 0.0.42) to gather a row of 128, or an element, and to scatter an
# element (`kernels.md`).
_GATHERED, _SCATTERED = 9.6, 6.7


def unsupported(spec: GatheredSpec) -> str | None:
    """Why the kernel cannot serve, or None."""
    known = spec.dtype in ("bfloat16", "float32")
    return None if known else f"it computes bfloat16 and float32, not {spec.dtype}"


def worth(spec: GatheredSpec) -> bool:
    """Whether "auto" takes it: not for less than a tile."""
    return min(spec.queries, spec.keys) >= _LANES


def pays(heads: int, active: int, length: int, *, causal: bool, window: int | None, width: int) -> bool:
    """Whether a TPU saves more by leaving out heads than it spends on moving rows, by the schedules recorded.

    Rows are moved to the kernel and back forward (queries, both bounds, outputs) and backward (gradients of both), and
    one scatter makes their table. Not where nothing is recorded.

    Args:
      heads, active: E, and most of them that a position wants.
      length: positions.
      causal, window: of the mask.
      width: of a head.
    """
    kind = partition.device_kind()
    recorded = tuning.table(tuning.KINDS.get(kind, kind), "schedule").get("kernels", {})
    if not recorded:
        return False
    long = 16384
    cycles = sum(recorded[f"flash {part}, causal"]["causal_cycles"][str(long)] for part in ("forward", "backward"))
    pair = cycles / (long * (long + 1) / 2) * width / 128
    moved = _GATHERED * (4 * active + 2 * heads) + _SCATTERED * heads
    return moved < (heads - active) * mean_visible_keys(length, causal, window) * pair


def kernel_flops(spec: GatheredSpec) -> dict[str, float]:
    """FLOPs of one run of each kernel, every position wanting as many heads as it may; pairs as for attention."""
    seen = mean_visible_keys(spec.keys, spec.causal, spec.window)
    pairs = 2.0 * spec.batch * spec.active * spec.queries * seen
    of = lambda *shape: jax.ShapeDtypeStruct((spec.batch, *shape), spec.dtype)
    segments = _segments(spec.heads, spec.queries, spec.active)
    rows, K = segments.I * segments.R, len(spec.heads.key_heads)
    arrays = of(rows, spec.width), of(spec.keys, K, spec.width), of(spec.keys, K, spec.value_width)
    with tuning.device_kind(partition.device_kind()):
        runs = kernels.kernel_runs(*arrays, segments.R)
    widths = {
        "routed_forward": spec.width + spec.value_width,
        "routed_backward": 3 * spec.width + 2 * spec.value_width,
    }
    return {name: pairs * width / runs[name] for name, width in widths.items()}


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    wanted_BTE: jax.Array,
    sinks_H: jax.Array | None = None,
    *,
    chosen: tuple[int, ...],
    active: int,
    scale: float,
    soft_cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """See `attnlab.ops.gathered_attention.chosen_attention`; `interpret` runs the kernel as plain XLA, anywhere.

    Scores and statistics are float32, products bfloat16 for bfloat16 inputs. Backward recomputes the scores from the
    rows' outputs and log-sum-exp, which carry the checkpoint names "attention_o" and "attention_lse".
    """
    (B, T, H, _), (S, K) = q_BTHd.shape, k_BSKd.shape[1:3]
    heads = Heads.of(chosen, H, K)
    with tuning.device_kind(partition.device_kind()):
        table = rows_lib.make_table(heads, wanted_BTE, [_segments(heads, T, active)])
        bounds = zip(mask.bounds(T, S), (0, S))
        starts, ends = (jnp.broadcast_to(jnp.int32(full) if x is None else x, (B, T)) for x, full in bounds)
        starts, ends = (rows_lib.of_tokens(x, heads, table) for x in (starts, ends))
        o_Bre, lse_Br = kernels.routed_attention(
            _packed(heads, q_BTHd, table, wanted_BTE), k_BSKd, v_BSKe, starts, ends,
            jnp.asarray(heads.key_heads, jnp.int32)[table.group_Bi],
            soft_cap=soft_cap, scale=scale, interpret=interpret,
        )  # fmt: skip
    o_BTEe = _unpacked(heads, o_Bre, table, wanted_BTE)
    if sinks_H is None:
        return o_BTEe
    # A sink is one more key, of value 0, behind the others.
    lse_BTE = _unpacked(heads, jnp.maximum(lse_Br, NO_KEYS)[..., None], table, wanted_BTE)[..., 0]
    share = jax.nn.sigmoid(lse_BTE - sinks_H.astype(lse_BTE.dtype)[np.asarray(chosen)])
    return (o_BTEe * share[..., None]).astype(o_BTEe.dtype)


def _segments(heads: Heads, length: int, active: int) -> Segments:
    """All positions together, in tiles of the kernel."""
    tile = kernels.row_tile(tuning.kind(), length * active, len(heads.key_heads))
    return Segments(0, 1, length, heads.most_blocks(length, active, tile), tile)


# To rows and back: each is the other's transpose, so that both directions gather and none scatters.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(heads: Heads, q_BTHd: jax.Array, table: Table, wanted_BTE: jax.Array) -> jax.Array:
    """Each row's query, [B, r, d]; anything where the row is empty."""
    return rows_lib.of_rows(q_BTHd, table)


def _packed_forward(heads: Heads, q_BTHd, table: Table, wanted_BTE):
    return rows_lib.of_rows(q_BTHd, table), (table, wanted_BTE)


def _packed_backward(heads: Heads, residuals, dq_Brd):
    return spread(rows_lib.of_pairs(dq_Brd, *residuals), heads.chosen, heads.count), None, None


_packed.defvjp(_packed_forward, _packed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpacked(heads: Heads, x_Bre: jax.Array, table: Table, wanted_BTE: jax.Array) -> jax.Array:
    """What each wanted pair's row holds, [B, T, E, e], 0 for the others."""
    return rows_lib.of_pairs(x_Bre, table, wanted_BTE)


def _unpacked_forward(heads: Heads, x_Bre, table: Table, wanted_BTE):
    return rows_lib.of_pairs(x_Bre, table, wanted_BTE), table


def _unpacked_backward(heads: Heads, table: Table, do_BTEe):
    of_rows = rows_lib.of_chosen_rows(do_BTEe, heads, table)
    return jnp.where(table.pair_Br[..., None] < 0, 0, of_rows), None, None


_unpacked.defvjp(_unpacked_forward, _unpacked_backward)
