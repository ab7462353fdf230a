"""Weights along an axis by a product of Gaussians around its mean.

    m_i = prod_g exp(-((x_i - mean - delta_g) / (std c_g))^2 / 2) / sum over the axis

The product is one Gaussian: with z = (x - mean) / std, P = sum_g c_g^-2 and a = sum_g (delta_g / std) c_g^-2 / P it is
`softmax(-P (z - a)^2 / 2)`: more Gaussians add parameters, not functions.

Source: Ioannides et al. 2024, arXiv:2401.11143, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnlab.ops.documents import positions_in_documents

_EPSILON = 1e-8  # added to the variance


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slices:
    """Slices of positions, document by document.

    Attributes:
      of_BT: int32, which slice a position is of; below `(T + 1) heads`.
      head_BT: int32, which slice of its document that is.
    """

    of_BT: jax.Array
    head_BT: jax.Array

    @classmethod
    def of(cls, documents_BT: jax.Array, heads: int) -> Slices:
        """As equal as can be; documents are of `attnlab.ops.documents.document_index`, or one, 0."""
        T = documents_BT.shape[1]
        count = _total(documents_BT, T + 1)(jnp.ones((*documents_BT.shape, 1), jnp.int32))[..., 0]
        head = positions_in_documents(documents_BT, jnp.zeros_like(documents_BT[:, 0])) * heads // count
        return cls(documents_BT * heads + head, head)


def gaussian_weights(
    x: jax.Array, offset_HG: jax.Array, c_HG: jax.Array, slices: Slices | None, *, impl: str = "auto"
) -> jax.Array:
    """The weights m, of the shape of x; they sum to 1 over each slice.

    Args:
      x: [N, H, d], weighted along d; with `slices` [B, T, D], along T.
      offset_HG: delta, in units of x.
      c_HG: widths, relative to the standard deviation, above 0.
      slices: of positions, or None.
      impl: "auto" or "single", the one Gaussian; "definition", the product, as a sum of logarithms.
    """
    if slices is None:
        total = lambda y: y.sum(-1, keepdims=True)
        highest = lambda y: y.max(-1, keepdims=True)
        of_head = lambda p: p[None, :, None]  # [1, H, 1, G]
    else:
        segments = (x.shape[1] + 1) * len(c_HG)
        total = _total(slices.of_BT, segments)
        highest = _over(jax.ops.segment_max, slices.of_BT, segments)
        of_head = lambda p: p[slices.head_BT][:, :, None]  # [B, T, 1, G]
    offset, c = of_head(offset_HG), of_head(c_HG)
    count = total(jnp.ones_like(x))
    centred = x - total(x) / count
    deviation = jnp.sqrt(total(centred * centred) / count + _EPSILON)
    if impl == "definition":
        places = (centred[..., None] - offset) / (deviation[..., None] * c)
        logits = -0.5 * (places * places).sum(-1)
    else:
        precision = (c**-2).sum(-1)
        place = (offset * c**-2).sum(-1) / precision  # in units of x
        z = (centred - place) / deviation
        logits = -0.5 * precision * z * z
    weights = jnp.exp(logits - jax.lax.stop_gradient(highest(logits)))
    return weights / total(weights)


def _total(of_BT: jax.Array, segments: int) -> Callable[[jax.Array], jax.Array]:
    return _over(jax.ops.segment_sum, of_BT, segments)


def _over(reduce: Callable[..., jax.Array], of_BT: jax.Array, segments: int) -> Callable[[jax.Array], jax.Array]:
    """From [B, T, D] to what its slice amounts to at each position."""
    return lambda y: jax.vmap(lambda rows, of: reduce(rows, of, segments)[of])(y, of_BT)
