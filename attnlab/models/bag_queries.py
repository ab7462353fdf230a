"""Pooling of bags by learned queries: the second form of ACMIL, attention of several heads in each branch.

Zhang et al. 2024, Attention-Challenging Multiple Instance Learning (ACMIL), arXiv:2311.07125; what the paper leaves
open is as in the authors' code. Axes: B bags, N instances, M branches, H heads, D features.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.heads import split_heads
from attnlab.mixers.parts import LayerNorm, Linear, dropped, param_dtype
from attnlab.mixers.roles import Role, drawn, normal
from attnlab.ops.bag_pooling import attention, some_of_the_strongest

if TYPE_CHECKING:
    from attnlab.models.bags import BagConfig

_DEVIATION = 1e-6  # of queries at first, and the epsilon of norms


class Projected(nnx.Module):
    """`LayerNorm(drop(o W + b))` of what heads pool of values `h V + c`: one vector of D numbers for each bag."""

    def __init__(self, config: BagConfig, *, rngs: nnx.Rngs):
        D, dtype = config.width, config.compute_dtype
        self.heads, self.rate = config.pool_heads, config.pool_dropout
        self.value = Linear(D, D, ("embed", "heads"), rngs=rngs, dtype=dtype, bias=True)
        self.out = Linear(D, D, ("heads", "embed"), rngs=rngs, dtype=dtype, bias=True)
        self.norm = LayerNorm(D, ("embed",), dtype=dtype, epsilon=_DEVIATION)

    def __call__(self, a_BHN: jax.Array, h_BND: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, D]; `key` turns dropout on."""
        v_BNHd = split_heads(self.value(h_BND), h_BND.shape[-1] // self.heads).astype(a_BHN.dtype)
        o_BHd = jnp.einsum("bhn,bnhd->bhd", a_BHN, v_BNHd, precision=jax.lax.Precision.HIGHEST)
        y = self.out(o_BHd.reshape(len(o_BHd), -1))
        return self.norm(dropped(y, self.rate, key))


class Branch(nnx.Module):
    """A learned query t, its logits `(t Q + b) . (h K + c) / sqrt(d)` for each head, and what is made of their
    attention."""

    def __init__(self, config: BagConfig, *, rngs: nnx.Rngs):
        D, dtype = config.width, config.compute_dtype
        self.heads = config.pool_heads
        self.token = drawn(rngs, normal, (D,), param_dtype(dtype), _DEVIATION, axes=("embed",), role=Role.TOKENS)
        self.query, self.key = (Linear(D, D, ("embed", "heads"), rngs=rngs, dtype=dtype, bias=True) for _ in range(2))
        self.projected = Projected(config, rngs=rngs)

    def logits(self, h_BND: jax.Array) -> jax.Array:
        """[B, H, N], fp32 or wider."""
        d = h_BND.shape[-1] // self.heads
        wide = param_dtype(self.token.dtype)
        q_Hd = self.query(self.token[...]).reshape(self.heads, d).astype(wide)
        k_BNHd = split_heads(self.key(h_BND), d).astype(wide)
        precise = jax.lax.Precision.HIGHEST
        return jnp.einsum("bnhd,hd->bhn", k_BNHd, q_Hd, precision=precise) / math.sqrt(d)


class QueryPooling(nnx.Module):
    """`h = ReLU(x W)`, a `Branch` for each of M queries with a classifier of what it projects; the bag's classifier
    reads values of its own, pooled by the branches' mean attention.

    Args:
      config: of the model.
      inputs: columns of x.
      rngs: stream `params`.
    """

    def __init__(self, config: BagConfig, inputs: int, *, rngs: nnx.Rngs):
        dtype, D = config.compute_dtype, config.width
        self.config = config
        self.features = Linear(inputs, D, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.branches = nnx.List([Branch(config, rngs=rngs) for _ in range(config.branches)])
        self.bag = Projected(config, rngs=rngs)
        args = dict(rngs=rngs, dtype=param_dtype(dtype), role=Role.OUTPUT, bias=True)
        self.classifiers = nnx.List([Linear(D, config.classes, ("mlp", None), **args) for _ in range(config.branches)])
        self.classifier = Linear(D, config.classes, ("mlp", None), **args)

    def __call__(
        self, x_BND: jax.Array, present_BN: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Logits of bags [B, classes] and of branches [B, M, classes], fp32 or wider, and attention [B, H, M, N]; `key`
        turns masking, of each head by itself, and dropout on."""
        c = self.config
        h = jax.nn.relu(self.features(x_BND))
        logits = jnp.stack([branch.logits(h) for branch in self.branches], axis=1)
        flat = logits.reshape(len(h), -1, h.shape[1])
        kept = jnp.broadcast_to(present_BN[:, None], flat.shape)
        masking, *dropping = [None] * (c.branches + 2) if key is None else jax.random.split(key, c.branches + 2)
        if masking is not None and c.masks:
            kept &= ~some_of_the_strongest(flat, present_BN, masking, c.mask_top, c.mask_share)
        a_BMHN = attention(flat, kept).reshape(logits.shape)
        each = zip(self.branches, self.classifiers, dropping, strict=False)
        branches = [classifier(b.projected(a_BMHN[:, m], h, k)) for m, (b, classifier, k) in enumerate(each)]
        bag = self.classifier(self.bag(jnp.mean(a_BMHN, axis=1), h, dropping[-1]))
        return bag, jnp.stack(branches, axis=1), jnp.moveaxis(a_BMHN, 2, 1)


def cost(config: BagConfig, inputs: int, length: int) -> tuple[int, float]:
    """Parameters, and FLOPs for each of `length` instances; what is made of queries alone, once a batch, is not
    counted."""
    D, M = config.width, config.branches
    heads = (M + 1) * config.classes
    parameters = inputs * D + M * (4 * (D * D + D) + 3 * D) + 2 * (D * D + D) + 2 * D + heads * (D + 1)
    by_instance = inputs * D + (2 * M + 1) * D * D + (2 * M + 1) * D
    return parameters, 2.0 * (by_instance + ((M + 1) * D * D + heads * D) / length)
