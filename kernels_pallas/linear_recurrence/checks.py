"""Arrays and blocks that a recurrence's kernels cannot take are refused, with what is allowed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.linear_recurrence.plan import JOINED, LANES, Sizes


def check_shape(kernel: str, name: str, x: jax.Array | None, *allowed: tuple[int, ...]) -> None:
    """Raises ValueError for an array of another shape; None is allowed."""
    if x is not None and x.shape not in allowed:
        expected = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{kernel}: {name} {x.shape}; expected {expected}")


def check_arrays(
    kernel: str,
    q: jax.Array,
    k: jax.Array,
    u: jax.Array,
    name: str,
    starts: jax.Array | None,
    state: jax.Array | None,
    width: int | None = None,
    shared: bool | None = None,
) -> tuple[int, int, int]:
    """B, T and H; raises ValueError for what does not fit. `name`: of the values `u`; `width`: of a state's keys;
    `shared`: whether all heads may have the same queries and keys; None: never, in this kernel."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"{kernel}: {what}")

    heads = {1, *u.shape[2:3]} if shared else {*u.shape[2:3]}
    need(
        q.ndim == u.ndim == 4 and q.shape == k.shape and u.shape[:2] == q.shape[:2] and q.shape[2] in heads,
        f"q {q.shape}, k {k.shape}, {name} {u.shape} do not fit; expected q, k [B, T, H, d]"
        f"{' or [B, T, 1, d]' * bool(shared)}, {name} [B, T, H, e]"
        f"{'; one query and key of all heads go without features and decays of channels' * (shared is not None)}",
    )
    need(min(*q.shape, u.shape[3]) > 0, f"q {q.shape}, k {k.shape}, {name} {u.shape}; no size may be 0")
    need(
        q.dtype == k.dtype == u.dtype and q.dtype in ("bfloat16", "float32"),
        f"q {q.dtype}, k {k.dtype}, {name} {u.dtype}; allowed: all bfloat16, or all float32",
    )
    (B, T, H, _), d = u.shape, q.shape[3]
    check_shape(kernel, "starts", starts, (B, T))
    check_shape(kernel, "state", state, (B, H, d if width is None else width, u.shape[3]))
    need(starts is None or starts.dtype.kind == "i", f"starts {getattr(starts, 'dtype', '')}; expected signed integers")
    need(state is None or state.dtype == jnp.float32, f"state {getattr(state, 'dtype', '')}; expected float32")
    return B, T, H


def check_sizes(kernel: str, sizes: Sizes, heads: int, width: int, value_width: int, *, joined: bool = False) -> None:
    """Raises ValueError for blocks that a call with so many heads of padded widths cannot take; `joined`: that joins
    blocks of a chunk two by two."""

    def need(ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{kernel}: {sizes} is not allowed; allowed: {allowed}")

    need(sizes.chunk >= 16 and sizes.chunk % 16 == 0, "chunk a multiple of 16")
    need(not joined or sizes.chunk in JOINED, f"chunk {', '.join(map(str, JOINED))}")
    need(sizes.chunks >= 1, "chunks 1 or more")
    for n in (sizes.forward_heads, sizes.backward_heads):
        whole = n * width % LANES == 0 == n * value_width % LANES
        need(n == heads or (1 <= n <= heads and whole), f"all {heads} heads, or so many that fill whole {LANES} lanes")
