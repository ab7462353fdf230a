"""HGRN2: a gated linear RNN with a matrix for its state, whose key is what its gate forgets."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import RMSNorm, param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, flops_per_token, linear_recurrence


@dataclasses.dataclass(frozen=True)
class HGRN2Config(HeadConfig):
    """Knobs of HGRN2; `head_width` is e, that of a head's inputs (values)."""

    key_width: int | None = knob(
        None, "width d of a head's gates and output gates, the expansion of its state; none: e", other=(3,), least=1
    )
    lower_bound: float = knob(
        0.0,
        "b, below which no decay falls, where it is a constant",
        other=(0.9,),
        least=0,
        below=1,
    )
    bound_layers: int | None = knob(
        None, "layers of this kind, with as many and as wide keys, in the stack, L: each learns its own b for every "
        "channel, 0 in the first, growing from layer to layer; none: b is lower_bound", other=(3,), least=2,
    )  # fmt: skip
    chunk: int = knob(64, "positions computed as one product; changes only speed and memory", other=(4,), least=1)
    impl: str = impl_knob(LINEAR_RECURRENCE)

    def __post_init__(self) -> None:
        super().__post_init__()
        constant = self.bound_layers is None or self.lower_bound == 0
        config_lib.require(constant, "lower_bound", self.lower_bound, "0 where bound_layers is set")

    def key_dim(self, width: int) -> int:
        """d in a model of the given width."""
        return self.key_width or self.head_dim(width)


@register("hgrn2")
class HGRN2(HeadMixer):
    """`S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T`, `o_t = S_t^T q_t` per head; `RMSNorm(o) W_o` over all heads.

    `f_t = b + (1 - b) sigmoid(x W_f)`, a number for each channel of a head; `q_t = silu(x W_q)`, `i_t = x W_i`. Each
    row of the memory is a running average of inputs. With `bound_layers` b of the first layer of a stack is 0, and
    `b + (1 - b) s` of every later one, b that of the layer before and s of the layer's own channels; at first b of
    layer l is l / L. By itself a layer is the second of its stack.
    """

    Config = HGRN2Config
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "the state is passed on as a sum"
    paper = "Qin et al. 2024, HGRN2: Gated Linear RNNs with State Expansion, arXiv:2404.07904"
    extension = (
        "lower_bound as a constant of the layer, by default 0; bound_layers: the paper's bounds, of shares of what is "
        "left to 1, where the paper has them as sums of a softmax over layers"
    )
    implementations = LINEAR_RECURRENCE.table
    counted = "chunked"
    variants = ({"heads": 2, "head_width": 6, "key_width": 3, "lower_bound": 0.5, "chunk": 3},)

    def __init__(self, config: HGRN2Config, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        self.key_dim = config.key_dim(width)
        keys, values = config.heads * self.key_dim, config.heads * self.head_dim
        make = Projections(config, width, rngs=rngs, dtype=dtype)
        self.q, self.forget, self.v = make.qkv(keys), make.qkv(keys), make.qkv(values)
        if config.bound_layers:
            self.bound = param(jnp.zeros((keys,), param_dtype(dtype)), axes=("heads",), role=Role.BIAS)
        self.norm = RMSNorm(values, ("heads",), dtype=dtype)
        self.out = make.out(values)

    def heads(self, x: jax.Array, seq: Sequence, carried: jax.Array | None = None) -> MixerOutput:
        """As in the contract; `carried` is the memory [B, H, d, e]."""
        c = self.config
        q, v = split_heads(jax.nn.silu(self.q(x)), self.key_dim), split_heads(self.v(x), self.head_dim)
        b, shared = self._bound(seq)
        log_decay, k = self.gates(split_heads(self.forget(x), self.key_dim), b)
        o, memory = linear_recurrence(
            q, k, v, log_decay=log_decay, documents_BT=seq.documents, state_BHde=carried, chunk=c.chunk, impl=c.impl
        )
        return MixerOutput(self.norm(o.reshape(*o.shape[:2], -1)).reshape(o.shape), memory, shared=shared)

    def gates(self, logits: jax.Array, b: jax.Array | float = 0.0) -> tuple[jax.Array, jax.Array]:
        """log f and 1 - f, in fp32 (fp64); neither is a difference of what is nearly equal."""
        z = logits.astype(param_dtype(self.dtype))
        k = (1 - b) * jax.nn.sigmoid(-z)
        if isinstance(b, float):
            return jax.nn.log_sigmoid(z) if b == 0 else jnp.log(b + (1 - b) * jax.nn.sigmoid(z)), k
        least = jnp.log(jnp.maximum(b, jnp.finfo(z.dtype).tiny))
        return jnp.logaddexp(least, jnp.log1p(-b) + jax.nn.log_sigmoid(z)), k

    def init_shared(self, batch: int, length: int) -> dict[str, jax.Array]:
        if not self.config.bound_layers:
            return {}
        bound, layers = self._names()
        wide = jnp.zeros((self.config.heads * self.key_dim,), param_dtype(self.dtype))
        return {bound: wide, layers: jnp.int32(0)}

    def require_stack(self, layers: int) -> None:
        config_lib.require(
            self.config.bound_layers == layers, "bound_layers", self.config.bound_layers,
            f"{layers}, the layers of this kind in the stack, or none",
        )  # fmt: skip

    def _names(self) -> tuple[str, str]:
        """Of bounds and the number of layers so far, among layers whose bounds go on from each other's."""
        of = f"hgrn2_{self.config.heads}_{self.key_dim}_{self.config.bound_layers}"
        return f"{of}_bound", f"{of}_layers"

    def _bound(self, seq: Sequence) -> tuple[jax.Array | float, dict[str, jax.Array]]:
        """b, a number or [H, d], and what later layers find of it."""
        c, (bound, layers) = self.config, self._names()
        if not c.bound_layers:
            return c.lower_bound, {}
        stacked = bound in (seq.shared or {})
        number = seq.shared[layers] if stacked else jnp.int32(1)
        left = jnp.maximum(c.bound_layers - number + 1, 2).astype(self.bound.dtype)
        b = jax.nn.sigmoid(self.bound[...] - jnp.log(left - 1))  # 1 / left at first
        if stacked:
            before = seq.shared[bound]
            b = jnp.where(number == 0, 0, before + (1 - before) * b)
        return b.reshape(c.heads, -1), {bound: b, layers: number + 1} if stacked else {}

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> jax.Array:
        return jnp.zeros((batch, self.config.heads, self.key_dim, self.head_dim), param_dtype(self.dtype))

    @classmethod
    def flops(cls, config: HGRN2Config, width: int, length: int) -> tuple[dict[str, float], float | None]:
        H, d, e = config.heads, config.key_dim(width), config.head_dim(width)
        return {
            "projections": 4.0 * width * H * (d + e),
            "recurrence": H * flops_per_token(length, config.chunk, d, e, channels=True),
        }, None
