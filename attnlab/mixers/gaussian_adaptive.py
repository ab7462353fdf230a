"""Gaussian adaptive attention: features, or positions, weighted by how near they are to places in their spread."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.errors import UnsupportedPattern
from attnlab.mixers.base import Capabilities, Mixer, MixerConfig, MixerOutput, State, knob, register
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.roles import Role, drawn, normal, param
from attnlab.mixers.sequence import Context, Sequence
from attnlab.ops.gaussian_weights import Slices, gaussian_weights

AXES = {
    "features": "each position by itself: heads are slices of its features",
    "positions": "each feature by itself, over all positions of a document: heads are slices of these; sees both ways",
}


@dataclasses.dataclass(frozen=True)
class GaussianAdaptiveConfig(MixerConfig):
    """Knobs of Gaussian adaptive attention."""

    axis: str = knob(
        "features",
        f"what is weighted; {'; '.join(f'{k}: {v}' for k, v in AXES.items())}",
        other=("positions",),
        choices=AXES,
    )
    heads: int = knob(4, "slices of the axis, each with Gaussians of its own", other=(2,), least=1)
    gaussians: int = knob(2, "Gaussians G whose product weighs", other=(3,), least=1)
    impl: str = knob(
        "auto",
        "auto (single), single: the one Gaussian that the product is, or definition: the product",
        other=("definition",),
        choices=("auto", "single", "definition"),
    )

    @property
    def causal(self) -> bool:
        """Whether a position sees only itself and those before: features alone."""
        return self.axis == "features"


@register("gaussian_adaptive")
class GaussianAdaptive(Mixer):
    """`y = x * m`, m along an axis the normalised product over g of `exp(-((x - mean - delta_g) / (std c_g))^2 / 2)`.

    mean and std are of the slice of the axis; m sums to 1 over it. There is no projection: the layer weighs what is
    there. With `axis=positions` a position's weight depends on the whole document.
    """

    Config = GaussianAdaptiveConfig
    capabilities = Capabilities(bidirectional=True, fixed_state=True)
    paper = (
        "Ioannides et al. 2024, Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across "
        "Multiple Modalities, arXiv:2401.11143"
    )
    extension = "log c is learned, not c; positions are sliced document by document, whose slices differ by one at most"
    implementations = ("definition", "single")
    counted = "single"
    variants = ({"axis": "positions", "gaussians": 3, "heads": 2},)

    def __init__(self, config: GaussianAdaptiveConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config, self.dtype = config, dtype
        if config.axis == "features":
            config_lib.require(width % config.heads == 0, "heads", config.heads, f"divisors of the width {width}")
        shape, wide = (config.heads, config.gaussians), param_dtype(dtype)
        self.offset = param(jnp.zeros(shape, wide), axes=("heads", "gaussians"), role=Role.BIAS)
        self.log_c = drawn(rngs, normal, shape, wide, 1.0, axes=("heads", "gaussians"), role=Role.SCALE)

    def __call__(self, x: jax.Array, seq: Sequence) -> MixerOutput:
        self.require(seq, causal=self.config.causal)
        return MixerOutput(self._weighted(x, seq.derived()))

    def init_state(
        self, batch: int, max_length: int, dtype: Any = jnp.float32, contexts: Mapping[str, Context] | None = None
    ) -> State:
        if not self.config.causal:
            raise UnsupportedPattern(f"mixer {self.name!r} with axis=positions does not stream")
        return ()

    def extend(self, x: jax.Array, seq: Sequence, state: State) -> MixerOutput:
        self.require(seq, causal=True)
        if not self.config.causal:
            raise UnsupportedPattern(f"mixer {self.name!r} with axis=positions does not stream")
        return MixerOutput(self._weighted(x, seq), state)

    def _weighted(self, x: jax.Array, seq: Sequence) -> jax.Array:
        c, (B, T, D) = self.config, x.shape
        rows = x.astype(param_dtype(self.dtype))
        if c.axis == "features":
            rows = rows.reshape(B * T, c.heads, D // c.heads)
            slices = None
        else:
            documents = jnp.zeros((B, T), jnp.int32) if seq.documents is None else seq.documents
            slices = Slices.of(documents, c.heads)
        m = gaussian_weights(rows, self.offset[...], jnp.exp(self.log_c[...]), slices, impl=c.impl)
        y = (rows * m).reshape(x.shape)
        if seq.padding is not None:
            y = jnp.where(seq.padding[..., None], 0, y)
        return y.astype(self.dtype)

    @classmethod
    def flops(cls, config: GaussianAdaptiveConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        """No matrix product."""
        return {"weights": 0.0}, None

    @classmethod
    def sequence_parallel_of(cls, config: GaussianAdaptiveConfig) -> str:
        return "each position is by itself" if config.causal else ""
