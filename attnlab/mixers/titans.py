"""Titans: a network per head that learns the sequence by gradient descent as it reads it, alone or with attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections
from attnlab.mixers.parts import RMSNorm
from attnlab.mixers.sequence import Sequence
from attnlab.mixers.titans_attention import Attention
from attnlab.mixers.titans_memory import Memory, memory_flops
from attnlab.mixers.titans_segments import MEMORY_AS_CONTEXT, SegmentedMemory, SegmentState, segment_flops
from attnlab.ops.keys_values import RollingCache
from attnlab.ops.masks import mean_visible_keys
from attnlab.ops.memory_frame import ACTIVATIONS, MemoryState
from attnlab.ops.neural_memory import NEURAL_MEMORY, neural_memory

VARIANTS = {
    "lmm": "the memory alone",
    "mal": "attention over what the memory gives",
    "mag": "attention, gated by the memory",
    "mac": "attention over segments and what the memory holds of those before",
}


@dataclasses.dataclass(frozen=True)
class TitansConfig(HeadConfig):
    """Knobs of Titans; heads are those of the memory and of attention."""

    even = True

    variant: str = knob("mag", "; ".join(f"{k}: {v}" for k, v in VARIANTS.items()), other=("lmm",), choices=VARIANTS)
    depth: int = knob(2, "layers of the memory, 1 (a matrix) to 4", other=(1,))
    expansion: int = knob(4, "width of the memory's hidden layers, in head widths", other=(2,), least=1)
    residual_norm: bool | None = knob(None, "memory is k + LN(net(k)); none: from depth 2 on", other=(False,))
    activation: str = knob(
        "gelu_tanh", "between the memory's layers: gelu_tanh; gelu: exact, by erf", other=("gelu",), choices=ACTIVATIONS
    )
    norm_scale: bool = knob(
        False, "scale 1 + g of the memory's norm; g, 0 at first, is one more of its weights", other=(True,)
    )
    norm_epsilon: float = knob(1e-6, "added to the variance in the memory's norm", other=(1e-5,), above=0, below=1)
    chunk: int = knob(16, "positions whose gradients are taken at the same weights", other=(3,), least=1)
    momentum: bool = knob(True, "whether steps add up, decaying by eta", other=(False,))
    forgetting: bool = knob(True, "whether weights decay, by 1 - alpha", other=(False,))
    grad_at: str = knob(
        "prev",
        "prev: gradients at the chunk's first weights; decayed: at what is left of them",
        other=("decayed",),
        choices=("prev", "decayed"),
    )
    read_after_write: bool = knob(True, "whether a position reads the weights that have learned it", other=(False,))
    stability: str = knob(
        "bound",
        "bound: theta is divided so that a chunk's steps add up to theta_max at most; none",
        other=("none",),
        choices=("bound", "none"),
    )
    theta_max: float = knob(1.0, "largest step size theta", other=(0.5,), above=0)
    conv: int = knob(4, "width of the causal convolution of the memory's q, k, v; 0: none", other=(0,))
    persistent: int = knob(0, "learned keys and values that every query sees (mal, mag, mac)", other=(3,), least=0)
    window: int = knob(
        256, "mal, mag: keys that a query sees; mac: positions of a segment, a multiple of chunk", other=(3,), least=1
    )
    rope_base: float | None = knob(
        10_000.0, "base of attention's rotary embedding; none: no positions", other=(None,), above=1
    )
    impl: str = impl_knob(NEURAL_MEMORY, doc="implementation of the memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        need(1 <= self.depth <= 4, "depth", self.depth, "1 to 4")
        need(self.normed or not self.norm_scale, "norm_scale", self.norm_scale, "false without the norm")
        need(self.forgetting or self.grad_at == "prev", "grad_at", self.grad_at, "prev without forgetting")
        need(self.conv == 0 or self.conv >= 2, "conv", self.conv, "0, or 2 or more")
        need(self.variant != "lmm" or self.persistent == 0, "persistent", self.persistent, "0 in lmm: nothing attends")
        if self.variant == "mac":
            names = MEMORY_AS_CONTEXT.names()
            need(self.impl in names, "impl", self.impl, f"{', '.join(names)} in mac")
            need(self.window % self.chunk == 0, "window", self.window, f"multiples of chunk ({self.chunk}) in mac")

    @property
    def normed(self) -> bool:
        """Whether the memory has a norm."""
        return self.depth > 1 if self.residual_norm is None else self.residual_norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TitansState:
    """A stream's state; its size does not depend on the length.

    Attributes:
      memory: of the memory; in mac with the segment's keys, values and reader.
      tail: [B, J, 3 H d], the last inputs of the memory's convolution; None in mac, where `memory` has them.
      cache: the newest window - 1 keys and values of attention (mal, mag).
    """

    memory: MemoryState | SegmentState
    tail: jax.Array | None = None
    cache: RollingCache | None = None


@register("titans")
class Titans(HeadMixer):
    """Neural memory (`attnlab.ops.neural_memory`) in the four places of the paper's section 4.

    Memory: q, k, v are projected, convolved, passed through SiLU; q and k have length 1. Heads' outputs o by variant:
    lmm: `o = RMSNorm(m) * sigmoid(x W)`. mal: the same, projected to the width, then window attention on it.
    mag: window attention y and memory m of x, `o = RMSNorm(y) * sigmoid(RMSNorm(m))`. mac: see `titans_segments`; o as
    in mag.
    """

    Config = TitansConfig
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "the memory is handed on from device to device, row by row"
    paper = "Behrouz et al. 2025, Titans: Learning to Memorize at Test Time, arXiv:2501.00663"
    extension = (
        "grad_at=decayed; stability=bound: theta is multiplied by (1 - eta) / chunk, and each layer's step by "
        "1 / (depth * inputs of a hidden layer); one memory per head with gates per head and position; gates are "
        "sigmoids; initial weights are learned; o = RMSNorm(y) * sigmoid(RMSNorm(m)); persistent tokens are keys and "
        "values of attention and are not written to the memory; mac is strictly causal: r_j is seen from j on, outputs "
        "read the memory of their own position, and r has key and value projections of its own"
    )
    implementations = NEURAL_MEMORY.table
    counted = "chunked"
    variants = (
        {"variant": "mal", "depth": 1, "window": 4, "chunk": 4, "persistent": 2},
        {"variant": "mac", "depth": 1, "window": 4, "chunk": 2, "persistent": 2},
        {
            "variant": "lmm",
            "depth": 1,
            "chunk": 4,
            "grad_at": "decayed",
            "read_after_write": False,
            "residual_norm": True,
            "norm_scale": True,
        },
    )

    def __init__(self, config: TitansConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        d, variant = self.head_dim, config.variant
        make, total = Projections(config, width, rngs=rngs, dtype=dtype), config.heads * d
        if variant == "mac":
            self.mixed = SegmentedMemory(config, width, d, rngs=rngs, dtype=dtype)
        else:
            self.memory = Memory(config, width, ("embed", "heads"), d, rngs=rngs, dtype=dtype)
        if variant in ("mal", "mag"):
            self.attention = Attention(config, width, d, rngs=rngs, dtype=dtype)
        self.memory_norm = RMSNorm(d, ("head",), dtype=dtype)
        if variant in ("lmm", "mal"):
            self.gate = make(total)
        else:
            self.attention_norm = RMSNorm(d, ("head",), dtype=dtype)
        if variant == "mal":
            self.between = make.out(total)
        self.out = make.out(total)

    def heads(self, x: jax.Array, seq: Sequence, carried: TitansState | None = None) -> MixerOutput:
        if self.config.variant == "mac":
            before = self.mixed.init_state(x.shape[0], self.dtype) if carried is None else carried.memory
            y, m, memory = self.mixed(x, seq, before)
            return MixerOutput(self._gated(y, m), TitansState(memory))

        m, memory, tail = self._memory(x, seq, carried)
        if self.config.variant == "lmm":
            return MixerOutput(self._gated_by_input(m, x), TitansState(memory, tail))
        read = x
        if self.config.variant == "mal":
            read = self.between(self._gated_by_input(m, x).reshape(*x.shape[:2], -1))
        y, cache = self.attention(read, seq, None if carried is None else carried.cache)
        o = self._gated(y, m) if self.config.variant == "mag" else y
        return MixerOutput(o, TitansState(memory, tail, cache))

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> TitansState:
        if self.config.variant == "mac":
            return TitansState(self.mixed.init_state(batch, dtype))
        cache = None if self.config.variant == "lmm" else self.attention.cache(batch, dtype)
        return TitansState(self.memory.blank(batch), self.memory.tail(batch, dtype), cache)

    @classmethod
    def flops(cls, config: TitansConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d, heads = config.head_dim(width), config.heads
        total, gates = heads * d, heads * (1 + config.momentum + config.forgetting)
        flops = {"memory": memory_flops(config, d, length)}
        if config.variant == "mac":
            chunk = min(config.chunk, length)
            padded = -(-length // chunk) * chunk / length
            widths = [d, *[config.expansion * d] * (config.depth - 1), d]
            flops["projections"] = 2.0 * total * (5 * width + padded * (5 * total + gates))
            flops["retrieval"] = padded * 2.0 * heads * sum(a * b for a, b in zip(widths[:-1], widths[1:]))
            flops["segments"] = segment_flops(config, d, length)
            return flops, None
        projections = {"lmm": 5, "mag": 7, "mal": 9}[config.variant] * total
        flops["projections"] = 2.0 * width * (projections + gates)
        if config.variant == "lmm":
            return flops, None
        span = mean_visible_keys(length, True, config.window)
        flops["attention"] = 4.0 * heads * (d + (config.persistent > 0)) * span
        flops["persistent"] = 4.0 * heads * d * config.persistent
        return flops, span

    # Inside.

    def _memory(
        self, x: jax.Array, seq: Sequence, state: TitansState | None
    ) -> tuple[jax.Array, MemoryState, jax.Array | None]:
        """m [B, T, H, d], and the state and the convolution's tail after."""
        inputs, tail = self.memory.inputs(x, seq.documents, None if state is None else state.tail, seq.padding)
        qkv, gates = [y.astype(self.dtype) for y in inputs[:3]], inputs[3:]
        m, memory = neural_memory(
            *qkv,
            *gates,
            self.memory.initial(),
            self.memory.spec,
            documents_BT=seq.documents,
            state=None if state is None else state.memory,
            impl=self.config.impl,
        )
        return m.astype(self.dtype), memory, tail

    def _gated(self, y: jax.Array, m: jax.Array) -> jax.Array:
        gate = jax.nn.sigmoid(self.memory_norm(m))
        return (self.attention_norm(y) * gate).astype(self.dtype)

    def _gated_by_input(self, m: jax.Array, x: jax.Array) -> jax.Array:
        return self.memory_norm(m) * jax.nn.sigmoid(self.gate(x).reshape(m.shape))
