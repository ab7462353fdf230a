"""Rotary position embedding, and the norm of heads that may stand before it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.ops import rope_kernel
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.norm import rms_norm
from attnlab.ops.rope_scaling import Scaling
from attnlab.parallel import partition


@dataclasses.dataclass(frozen=True)
class Turning:
    """What positions are made into.

    Attributes:
      base: longest wavelength / 2 pi, in positions.
      width: channels that are turned.
      scaling: other frequencies than the base's, and a factor on what is turned; None: none.
    """

    base: float
    width: int
    scaling: Scaling | None = None

    def frequencies(self, dtype: Any) -> tuple[jax.Array, float]:
        """Angles a position, of pairs [width / 2]; and the factor."""
        if self.scaling is None:
            return self.base ** (-jnp.arange(0, self.width, 2, dtype=dtype) / self.width), 1.0
        frequencies, factor = self.scaling.of(self.base, self.width)
        return jnp.asarray(frequencies, dtype), factor

    def cosines_and_sines(self, positions: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Of the pairs of each position, [..., width / 2], times the factor."""
        frequencies, factor = self.frequencies(dtype)
        angle = positions[..., None].astype(dtype) * frequencies
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return (cos, sin) if factor == 1 else (factor * cos, factor * sin)


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """The static facts by which an implementation is chosen, of the arrays of a device."""

    batch: int
    positions: int
    heads: int
    width: int
    dtype: str
    turned: int
    norm: bool

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.positions} H{self.heads} d{self.width}"
        return " ".join([shape, self.dtype, f"turned={self.turned}", *(["norm"] if self.norm else [])])

    @classmethod
    def of(cls, exchange: Any, x, positions, scale, *, turning: Turning, epsilon: float) -> RopeSpec:
        """Of the arrays of a device."""
        return cls(*x.shape, str(x.dtype), turning.width, scale is not None)


def definition(x, positions, scale, *, turning: Turning, epsilon: float) -> jax.Array:
    """Pairs as complex numbers, times `exp(i angle)`; rounded once."""
    dtype, width = jnp.promote_types(x.dtype, jnp.float32), turning.width
    y = x.astype(dtype)
    if scale is not None:
        y = rms_norm(y, scale, epsilon)
    frequencies, factor = turning.frequencies(dtype)
    angle = positions[..., None, None].astype(dtype) * frequencies
    a, b, rest = jnp.split(y, [width // 2, width], axis=-1)
    turned = factor * (a + 1j * b) * jnp.exp(1j * angle)
    return jnp.concatenate([turned.real, turned.imag, rest], axis=-1).astype(x.dtype)


def xla(x, positions, scale, *, turning: Turning, epsilon: float) -> jax.Array:
    """Halves exchanged; the norm's output is rounded before."""
    if scale is not None:
        x = rms_norm(x, scale, epsilon)
    both = turning.cosines_and_sines(positions, jnp.promote_types(x.dtype, jnp.float32))
    cos, sin = (jnp.concatenate([y, y], axis=-1)[:, :, None] for y in both)
    width = turning.width
    turned = _rotate(x[..., :width], cos, sin)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], axis=-1)


# Pairs are exchanged in the input's own type: XLA for TPU would else keep, and lay out anew, wide copies of q and k.
# Its transpose would add two rounded halves; the rotation back rounds once.
@jax.custom_vjp
def _rotate(x, cos, sin):
    a, b = jnp.split(x, 2, axis=-1)
    exchanged = jnp.concatenate([-b, a], axis=-1)
    return (x.astype(cos.dtype) * cos + exchanged.astype(cos.dtype) * sin).astype(x.dtype)


_rotate.defvjp(
    lambda x, cos, sin: (_rotate(x, cos, sin), (cos, sin)), lambda r, g: (_rotate(g, r[0], -r[1]), None, None)
)


ROPE = Op(
    "rope",
    RopeSpec.of,
    {
        "definition": Implementation(definition),
        "xla": Implementation(xla),
        "pallas": Implementation(
            rope_kernel.run, rope_kernel.unsupported, rope_kernel.worth, platforms=("tpu",), interpretable=True
        ),
    },
    preference=("pallas", "xla"),
    split=lambda chosen, exchange, *arrays, **options: chosen.run(*arrays, **options),  # each position by itself
)


def rope(
    x_BTHd: jax.Array,
    positions_BT: jax.Array,
    base: float = 10_000.0,
    width: int | None = None,
    scaling: Scaling | None = None,
    *,
    scale_d: jax.Array | None = None,
    epsilon: float = 1e-6,
    impl: str = "auto",
) -> jax.Array:
    """Rotates the pairs (i, i + r/2) of every head's first r channels by the angle position * base^(-2i/r).

    Args:
      x_BTHd: queries or keys.
      positions_BT: position of each token in its document.
      base: longest wavelength / 2 pi, in positions.
      width: r, even; the channels behind stay as they are. None: d, as is what is above.
      scaling: other frequencies than these, and a factor on what is rotated.
      scale_d: of the norm that heads go through before (`attnlab.ops.norm.rms_norm`); None: none.
      epsilon: of the norm.
      impl: "auto", or a name in `ROPE.table`.

    Returns:
      An array like `x_BTHd`; angles and the rotation are computed in fp32 (fp64 for fp64 inputs).

    Source: Su et al. 2021, RoFormer, eq. 15 and 34, in the half-split order of pairs of GPT-NeoX, whose code also has
      r below d.
    """
    turning = Turning(base, min(width or x_BTHd.shape[-1], x_BTHd.shape[-1]), scaling)
    options = {"turning": turning, "epsilon": epsilon}
    if (
        impl == "auto" and partition.platform() != "tpu"
    ):  # no kernel to choose: XLA may lay it over the mesh as it likes
        return xla(x_BTHd, positions_BT, scale_d, **options)
    rows = ("batch", "seq", "heads", None)
    return ROPE(x_BTHd, positions_BT, scale_d, axes=(rows, rows[:2], (None,)), out_axes=rows, impl=impl, **options)
