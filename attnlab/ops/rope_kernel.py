"""RoPE and the norm before it by our TPU kernels (`kernels_pallas.rotary`): one pass over queries or keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from attnlab.ops.recurrence_kernel import device_kind
from attnlab.parallel import partition
from kernels_pallas import tuning

if TYPE_CHECKING:
    from attnlab.ops.rope import RopeSpec, Turning

_ROWS = 128  # positions; of fewer there is little to move


def _kernels() -> Any:
    """Imported where they run: what has no kernels need not wait for Pallas, which takes longer than the rest here."""
    from kernels_pallas import rotary

    return rotary


def unsupported(spec: RopeSpec) -> str | None:
    """Why the kernels cannot serve, or None."""
    return _kernels().unsupported(spec.dtype, spec.heads, spec.width, device_kind())


def worth(spec: RopeSpec) -> bool:
    """Whether "auto" takes it."""
    return spec.positions >= _ROWS


def run(
    x: jax.Array,
    positions: jax.Array,
    scale: jax.Array | None,
    *,
    turning: Turning,
    epsilon: float,
    interpret: bool = False,
) -> jax.Array:
    """See `attnlab.ops.rope.rope`; `interpret` runs it as plain XLA, on any platform. It rounds once."""
    cos, sin = turning.cosines_and_sines(jnp.broadcast_to(positions, x.shape[:2]), jnp.float32)
    with tuning.device_kind(partition.device_kind()):
        return _kernels().rotary(x, cos, sin, scale=scale, epsilon=epsilon, interpret=interpret)
