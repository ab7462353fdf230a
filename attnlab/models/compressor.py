"""A causal stack that must say all it read from the state at its end: the bottleneck of MAD's compression task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import batch as batch_lib
from attnlab import mixers
from attnlab.mixers.parts import Linear
from attnlab.models.cost import ModelCost
from attnlab.models.lm import LanguageModel, LanguageModelConfig
from attnlab.models.objective import register


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressorConfig(LanguageModelConfig):
    """A causal encoder and a decoder of one vector and a position."""

    @property
    def described(self) -> str:
        return "a causal encoder"


@register("compressor")
class Compressor(LanguageModel):
    """The state at the row's last position plus sines of t, through an MLP of two GELU layers, gives token t.

    Poli et al. 2024 (MAD, arXiv:2403.17844): norm, linear, GELU, norm, linear, GELU, norm, then the output projection.
    """

    Config = CompressorConfig
    decodes = False

    def __init__(self, config: CompressorConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        dtype, D = config.compute_dtype, config.width
        self.norms = nnx.List([config.make_norm(), config.make_norm()])
        self.layers = nnx.List([Linear(D, D, ("embed", "mlp"), rngs=rngs, dtype=dtype) for _ in range(2)])

    @classmethod
    def batch_spec(cls, config: CompressorConfig, length: int) -> Mapping[str, Any]:
        spec = dict(super().batch_spec(config, length))
        spec["targets"] = dataclasses.replace(spec["targets"], about=batch_lib.OWN)
        return spec | {"weights": dataclasses.replace(spec["weights"], optional=False)}

    @classmethod
    def cost(cls, config: CompressorConfig, length: int) -> ModelCost:
        cost, D = super().cost(config, length), config.width
        flops = cost.flops | {"decoder": 4.0 * D * D}
        parameters = cost.parameters + 2 * D * D + 2 * config.norm_parameters
        return dataclasses.replace(cost, parameters=parameters, flops=flops)

    def encoded(self, x: jax.Array, seq: mixers.Sequence, key: jax.Array | None) -> mixers.MixerOutput:
        out = self.transformer(x, seq, key)
        last_B = jnp.max(jnp.where(seq.segments > 0, jnp.arange(x.shape[1]), 0), axis=1)
        state_BD = jnp.take_along_axis(out.y, last_B[:, None, None], axis=1)
        y = state_BD + sines(x.shape[1], self.config.width).astype(x.dtype)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = jax.nn.gelu(layer(norm(y)))
        return mixers.MixerOutput(self.norm(y), losses=out.losses, metrics=out.metrics)


def sines(length: int, width: int) -> jax.Array:
    """[T, D], sin and cos of t at geometric wavelengths (Vaswani et al. 2017, section 3.5)."""
    half = (width + 1) // 2
    angle = jnp.arange(length)[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[:, :width]
