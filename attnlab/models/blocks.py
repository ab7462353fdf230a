"""Blocks of a stack: residual sublayers around mixers, and the MLP."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import mixers
from attnlab.mixers.parts import Linear, dropped, param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.parallel import partition

if TYPE_CHECKING:
    from attnlab.models.transformer import StackConfig

# What the gate of a block's MLP goes through (Shazeer 2020, GLU Variants Improve Transformer: SwiGLU, GEGLU).
GLUS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class GLU(nnx.Module):
    """`(act(x W_gate) * x W_up) W_down` (Shazeer 2020, GLU Variants Improve Transformer, eq. 6); act is `mlp_gate`."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs, dtype: Any):
        width, hidden = config.width, config.hidden
        make = functools.partial(Linear, rngs=rngs, dtype=dtype, bias=config.mlp_bias)
        self.gate, self.up = (make(width, hidden, ("embed", "mlp")) for _ in range(2))
        self.down = make(hidden, width, ("mlp", "embed"))
        self.act = GLUS[config.mlp_gate]

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.act(self.gate(x)) * self.up(x)
        return self.down(partition.constrain(hidden, "batch", "seq", "mlp"))


class Sublayer(nnx.Module):
    """`x + gate * norm_after(branch(norm(x)))`, the branch a mixer or an MLP; `norm_after` where the config has it.

    With a gate, tanh of a learned scalar, the sublayer is the identity at first (Alayrac et al. 2022, Flamingo,
    arXiv:2204.14198, section 2.2).
    """

    def __init__(
        self, config: StackConfig, branch: Callable[..., nnx.Module], *, gated: bool, rngs: nnx.Rngs, place: int = 0
    ):
        """`place`: of a mixer, its number in its block."""
        self.place = place
        dtype = config.compute_dtype
        self.norm = config.make_norm()
        self.branch = branch(rngs=rngs, dtype=dtype)
        self.norm_after = config.make_norm() if config.norm_after else None
        self.dropout = config.dropout
        if gated:
            self.gate = param(jnp.zeros((), param_dtype(dtype)), axes=(), role=Role.SCALE)

    @property
    def mixes(self) -> bool:
        """Whether the branch is a mixer."""
        return isinstance(self.branch, mixers.Mixer)

    def __call__(
        self, x: jax.Array, seq: mixers.Sequence, state: Any = None, key: jax.Array | None = None
    ) -> mixers.MixerOutput:
        """x [B, T, D]; with a state the positions are the next ones of a stream."""
        out = self.added(x, seq, state, key)
        return dataclasses.replace(out, y=x + out.y)

    def added(
        self, x: jax.Array, seq: mixers.Sequence, state: Any = None, key: jax.Array | None = None
    ) -> mixers.MixerOutput:
        """What it adds to the stream; arguments as above."""
        h = self.norm(x)
        if not self.mixes:
            out = mixers.MixerOutput(self.branch(h))
        else:
            side = self._side(h, seq)
            seq = dataclasses.replace(seq, side=side, sides=None)
            out = self.branch(h, seq) if state is None else self.branch.extend(h, seq, state)
        y = out.y if self.norm_after is None else self.norm_after(out.y)
        if hasattr(self, "gate"):
            y = (jnp.tanh(self.gate[...]) * y).astype(y.dtype)
        side = side if self.mixes and seq.second else None
        return dataclasses.replace(out, y=dropped(y, self.dropout, key), side=side)

    def _side(self, h: jax.Array, seq: mixers.Sequence) -> jax.Array | None:
        """What the mixer reads of the second stream; where that is what is mixed, it is what the layer reads."""
        if not self.branch.config.second_stream:
            return None
        if seq.second:
            return h
        return None if seq.sides is None else seq.sides[self.place]


class Block(nnx.Module):
    """Sublayers one after the other: the mixers of a block of the pattern, then an MLP if the config has one."""

    def __init__(self, config: StackConfig, letters: str, *, rngs: nnx.Rngs):
        make = functools.partial(Sublayer, config, rngs=rngs)
        mixer = lambda letter: functools.partial(mixers.build, config.mixers[letter], width=config.width)
        sublayers = [make(mixer(x), gated=x in config.gated, place=i) for i, x in enumerate(letters)]
        # The MLP belongs to what is gated where nothing else is in the block.
        if config.hidden:
            mlp = functools.partial(GLU, config)
            sublayers.append(make(mlp, gated=set(letters) <= set(config.gated)))
        self.sublayers = nnx.List(sublayers)

    def __call__(
        self, x: jax.Array, seq: mixers.Sequence, states: list[Any] | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, list[mixers.MixerOutput]]:
        """x after the block, and what its mixers returned; `states` are theirs, for the next positions of a stream."""
        x = partition.constrain(x, "batch", "seq", None)
        keys = [None] * len(self.sublayers) if key is None else jax.random.split(key, len(self.sublayers))
        outs: list[mixers.MixerOutput] = []
        for sublayer, k in zip(self.sublayers, keys, strict=True):
            state = states[len(outs)] if states is not None and sublayer.mixes else None
            out = sublayer(x, seq, state, k)
            x = out.y
            outs += [out] if sublayer.mixes else []
        return partition.constrain(x, "batch", "seq", None), outs
