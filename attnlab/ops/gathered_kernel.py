"""Gathered attention by our kernels (`kernels_pallas.routed_attention`): any mask of intervals, any length."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops import attention_flash
from attnlab.ops import gathered_rows as rows_lib
from attnlab.ops.attention_frame import NO_KEYS
from attnlab.ops.gathered_rows import GatheredSpec, Heads, Segments, Table
from attnlab.ops.head_subsets import spread, take_heads
from attnlab.ops.masks import Mask, mean_visible_keys
from attnlab.parallel import partition
from kernels_pallas import tuning

_LANES = 128  # below so many queries or keys most of a tile is padding
# Bundles scheduled on v6e (docs/kernels.md). Of the kernels, for a wanted pair in both directions: queries, bounds and
# gradients to rows, outputs and gradients back; tiles are some 10 % more rows. Of XLA, to gather a row, and to scatter.
_MOVED, _GATHERED, _SCATTERED = 17.0, 9.6, 6.7
_DIGITS = 3  # of a bound, in base 256: integers that bfloat16 has


def _kernels() -> Any:
    """Imported where they run: what has no kernels need not wait for Pallas, which takes longer than the rest here."""
    from kernels_pallas import routed_attention

    return routed_attention


def unsupported(spec: GatheredSpec) -> str | None:
    """Why the kernel cannot serve, or None."""
    return attention_flash.unsupported_heads(spec.dtype, _widest(spec))


def _widest(spec: GatheredSpec) -> int:
    return max(spec.width, spec.value_width)


def unsupported_rows(spec: GatheredSpec) -> str | None:
    """Why the kernel cannot serve with rows that kernels move, or None."""
    if reason := unsupported(spec):
        return reason
    queries, width = spec.queries * spec.heads.sharing, _widest(spec)
    with tuning.device_kind(partition.device_kind()):
        most = _kernels().most_elements(width, jnp.dtype(spec.dtype).itemsize)
    if queries <= most:
        return None
    return (
        f"the {queries} queries of a key head must stand in fast memory, where at most {most} of width {width} do; "
        "routed_xla has no such limit"
    )


def worth(spec: GatheredSpec) -> bool:
    """Whether "auto" takes it: not for less than a tile.

    On GPUs, too, where nothing is timed: there rows are gathered for those alone who ask for it (`pays`).
    """
    return min(spec.queries, spec.keys) >= _LANES


def pays(
    heads: int, active: int, length: int, *, causal: bool, window: int | None, width: int, sharing: int = 1
) -> bool:
    """Whether a TPU saves more by leaving out heads than it spends on moving rows, by the schedules recorded.

    Not where nothing is recorded.

    Args:
      heads, active: E, and most of them that a position wants.
      length: positions.
      causal, window: of the mask.
      width: of a head.
      sharing: how many heads share a key head.
    """
    kind = partition.device_kind()
    recorded = tuning.table(tuning.KINDS.get(kind, kind), "schedule").get("kernels", {})
    if not recorded:
        return False
    long = 16384
    cycles = sum(recorded[f"flash {part}, causal"]["causal_cycles"][str(long)] for part in ("forward", "backward"))
    pair = cycles / (long * (long + 1) / 2) * width / 128
    with tuning.device_kind(kind):
        moved = _MOVED * active
        if length * sharing > _kernels().most_elements(width, 2):
            moved = _GATHERED * (4 * active + 2 * heads) + _SCATTERED * heads
    return moved < (heads - active) * mean_visible_keys(length, causal, window) * pair


def kernel_flops(spec: GatheredSpec) -> dict[str, float]:
    """FLOPs of one run of each kernel, every position wanting as many heads as it may; pairs as for attention."""
    seen = mean_visible_keys(spec.keys, spec.causal, spec.window)
    pairs = 2.0 * spec.batch * spec.active * spec.queries * seen
    if partition.platform() == "gpu":
        widths = _kernels().gpu_kernel_widths(spec.width, spec.value_width)
        return {name: pairs * width for name, width in widths.items()}
    of = lambda *shape: jax.ShapeDtypeStruct((spec.batch, *shape), spec.dtype)
    with tuning.device_kind(partition.device_kind()):
        segments = _segments(spec.heads, spec.queries, spec.active, _widest(spec))
        rows, K = segments.I * segments.R, len(spec.heads.key_heads)
        arrays = of(rows, spec.width), of(spec.keys, K, spec.width), of(spec.keys, K, spec.value_width)
        runs = _kernels().kernel_runs(*arrays, segments.R)
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
    by_kernels: bool = True,
) -> jax.Array:
    """See `attnlab.ops.gathered_attention.chosen_attention`; `interpret` runs the TPU's as plain XLA, anywhere.

    `by_kernels`: whether kernels move rows, too, which there are for TPU alone, or XLA does.

    Scores and statistics are float32, products bfloat16 for bfloat16 inputs. Backward recomputes the scores from the
    rows' outputs and log-sum-exp, which carry the checkpoint names "attention_o" and "attention_lse".
    """
    (B, T, H, _), (S, K) = q_BTHd.shape, k_BSKd.shape[1:3]
    heads = Heads.of(chosen, H, K)
    moved = _ByKernels if by_kernels else _ByXLA
    with tuning.device_kind(partition.device_kind()):
        segments = _segments(heads, T, active, max(q_BTHd.shape[3], v_BSKe.shape[3]))
        table = rows_lib.make_table(heads, wanted_BTE, [segments])
        rows = moved(heads, table, wanted_BTE, segments.R, interpret)
        bounds = zip(mask.bounds(T, S), (0, S))
        starts, ends = (jnp.broadcast_to(jnp.int32(full) if x is None else x, (B, T)) for x, full in bounds)
        o_Bre, lse_Br = _kernels().routed_attention(
            rows.queries(q_BTHd), k_BSKd, v_BSKe, *rows.bounds(starts, ends),
            jnp.asarray(heads.key_heads, jnp.int32)[table.group_Bi],
            soft_cap=soft_cap, scale=scale, platform=attention_flash.kernel_platform(), interpret=interpret,
        )  # fmt: skip
        o_BTEe = rows.back(o_Bre)
        if sinks_H is None:
            return o_BTEe
        # A sink is one more key, of value 0, behind the others.
        lse_BTE = rows.back(jnp.maximum(lse_Br, NO_KEYS)[..., None])[..., 0]
    share = jax.nn.sigmoid(lse_BTE - sinks_H.astype(lse_BTE.dtype)[np.asarray(chosen)])
    return (o_BTEe * share[..., None]).astype(o_BTEe.dtype)


attention_by_xla = functools.partial(attention, by_kernels=False)


def _segments(heads: Heads, length: int, active: int, width: int) -> Segments:
    """All positions together, in tiles of the kernel."""
    sizes = tuning.kind(), length * active, len(heads.key_heads), width
    tile = _kernels().row_tile(*sizes, platform=attention_flash.kernel_platform())
    return Segments(0, 1, length, heads.most_blocks(length, active, tile), tile)


# To rows and back: each is the other's transpose, so that both directions gather and none scatters.


@dataclasses.dataclass(frozen=True)
class _Rows:
    """How queries, bounds and outputs are moved. `tile`: rows of a tile."""

    heads: Heads
    table: Table
    wanted_BTE: jax.Array
    tile: int
    interpret: bool


class _ByKernels(_Rows):
    """As products with zeros and ones, where a head's elements stand in fast memory."""

    def _where(self) -> dict[str, Any]:
        return {"platform": attention_flash.kernel_platform(), "interpret": self.interpret}

    def _members(self) -> list[int]:
        """All heads that read the key heads."""
        return [m * self.heads.sharing + g for m in self.heads.key_heads for g in range(self.heads.sharing)]

    def _place(self) -> jax.Array:
        """The row of each position and head, [B, M, T * group], or -1."""
        row = jnp.where(self.wanted_BTE, self.table.row_BTE + 1, 0)[..., None]
        row = take_heads(spread(row, self.heads.chosen, self.heads.count), self._members())
        return self._by_key_head(row)[..., 0] - 1

    def _by_key_head(self, x_BTHe: jax.Array) -> jax.Array:
        (B, T, _, e), G = x_BTHe.shape, self.heads.sharing
        return x_BTHe.reshape(B, T, -1, G, e).swapaxes(1, 2).reshape(B, -1, T * G, e)

    def _packed(self, x_BMLe: jax.Array) -> jax.Array:
        place = self._place()
        x_BMLe = jnp.where(place[..., None] >= 0, x_BMLe, 0)  # 0 times what is not finite is not 0
        return _kernels().pack_rows(x_BMLe, place, self.table.group_Bi, self.tile, **self._where())

    def queries(self, q_BTHd: jax.Array) -> jax.Array:
        """[B, r, d]."""
        return self._packed(self._by_key_head(take_heads(q_BTHd, self._members())))

    def bounds(self, starts_BT: jax.Array, ends_BT: jax.Array) -> list[jax.Array]:
        """Both [B, r], 0 of empty rows."""
        digits = [(x >> 8 * n) & 255 for x in (starts_BT, ends_BT) for n in range(_DIGITS)]
        digits = jnp.pad(jnp.stack(digits, -1), ((0, 0), (0, 0), (0, 16 - len(digits)))).astype(jnp.bfloat16)
        shape = (*digits.shape[:2], len(self._members()), 16)
        rows = self._packed(self._by_key_head(jnp.broadcast_to(digits[:, :, None], shape))).astype(jnp.int32)
        return [sum(rows[..., first + n] << 8 * n for n in range(_DIGITS)) for first in (0, _DIGITS)]

    def back(self, x_Bre: jax.Array) -> jax.Array:
        """[B, T, E, e], 0 where not wanted."""
        (B, T, _), e = self.wanted_BTE.shape, x_Bre.shape[2]
        x = _kernels().unpack_rows(x_Bre, self._place(), self.table.group_Bi, self.tile, **self._where())
        x = x.reshape(B, -1, T, self.heads.sharing, e).swapaxes(1, 2).reshape(B, T, -1, e)
        members = self._members()
        return take_heads(x, [members.index(h) for h in self.heads.chosen])


class _ByXLA(_Rows):
    """Gathered row by row, whatever the length."""

    def queries(self, q_BTHd: jax.Array) -> jax.Array:
        """As `_ByKernels`."""
        return _packed(self.heads, q_BTHd, self.table, self.wanted_BTE)

    def bounds(self, starts_BT: jax.Array, ends_BT: jax.Array) -> list[jax.Array]:
        """As `_ByKernels`."""
        return [rows_lib.of_tokens(x, self.heads, self.table) for x in (starts_BT, ends_BT)]

    def back(self, x_Bre: jax.Array) -> jax.Array:
        """As `_ByKernels`."""
        return _unpacked(self.heads, x_Bre, self.table, self.wanted_BTE)


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
