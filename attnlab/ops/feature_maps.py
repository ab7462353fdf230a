"""Feature maps of linear attention: what its kernels read instead of queries and keys."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Pairs(NamedTuple):
    """Features as products: feature i of x [..., f] is scale[i] y[first[i]] y[second[i]], y = [x, 1]."""

    first: np.ndarray
    second: np.ndarray
    scale: np.ndarray


@dataclasses.dataclass(frozen=True)
class Taylor:
    """Features of x [..., f] whose products are `phi(x) . phi(y) = 1 + z + z^2 / 2`, `z = x . y / sqrt(f)`.

    Of Arora et al. 2024 (arXiv:2402.18668, section 4.1) they are `[1, x / f^(1/4), vec(x x^T) / sqrt(2 f)]`.

    Attributes:
      width: f.
      symmetric: whether each product x_i x_j, i != j, is there once, times sqrt(2), else twice. Those of one distance r
        between i and j on the circle lie together, r = 0 .. f / 2; where r is half of f, they are half as many.
    """

    width: int
    symmetric: bool = True

    @property
    def count(self) -> int:
        """Features."""
        f = self.width
        return 1 + f + (f * (f + 1) // 2 if self.symmetric else f * f)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., count], in the dtype of x."""
        f = self.width
        parts = [jnp.ones_like(x[..., :1]), x * f**-0.25]
        if not self.symmetric:
            products = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], f * f)
            return jnp.concatenate([*parts, products * (2 * f) ** -0.5], axis=-1)
        circle = jnp.concatenate([x, x], axis=-1)
        parts.append(x * x * (2 * f) ** -0.5)
        for r in range(1, f // 2 + 1):
            pairs = self._at(r)
            parts.append(x[..., :pairs] * circle[..., r : r + pairs] * f**-0.5)
        return jnp.concatenate(parts, axis=-1)

    @functools.cached_property
    def pairs(self) -> Pairs:
        """The same features by channels."""
        f, own = self.width, np.arange(self.width)
        parts = [([f], [f], 1.0), (own, [f] * f, f**-0.25)]
        if self.symmetric:
            parts.append((own, own, (2 * f) ** -0.5))
            parts += [(own[: self._at(r)], (own[: self._at(r)] + r) % f, f**-0.5) for r in range(1, f // 2 + 1)]
        else:
            parts.append((np.repeat(own, f), np.tile(own, f), (2 * f) ** -0.5))
        joined = lambda n: np.concatenate([part[n] for part in parts]).astype(int)
        return Pairs(joined(0), joined(1), np.concatenate([np.full(len(p[0]), p[2]) for p in parts]))

    def _at(self, r: int) -> int:
        """Pairs at a distance on the circle."""
        return self.width // 2 if 2 * r == self.width else self.width
