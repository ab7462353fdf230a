"""Memory as context (MAC): attention within segments that reads the memory, and a memory that learns what it gives.

For a segment of a document, with P the persistent rows and M the memory at the segment's beginning:

    r_j = M(query_j)      y_i = attention of i to P, and to r_j and x_j for j <= i in its segment      m_i = M_i(y_i)

where M_i has learned y up to i. The paper writes the segment as one block, [P | r | x] -> y -> M; read so, position i
would see r_j of later j, and its output a memory that has learned them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.roles import Fused
from attnlab.mixers.sequence import Sequence
from attnlab.mixers.titans_attention import Attention
from attnlab.mixers.titans_memory import Memory
from attnlab.ops.causal_conv import causal_conv
from attnlab.ops.chunk_steps import ChunkStep, choose_rows, scan_aligned, scan_chunk_steps
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.documents import positions_in_documents
from attnlab.ops.memory_frame import Layers, MemoryState, chunk_step, forward
from attnlab.ops.neural_memory import definition_step
from attnlab.ops.norm import unit
from attnlab.parallel import sequence_parallel
from attnlab.parallel.sequence_parallel import SequenceParallel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegmentState:
    """What a segment's next positions need.

    Attributes:
      memory: the memory now.
      reader: its weights at the segment's beginning.
      tail: [B, J, 3 H d], the memory's convolution.
      keys, values: [B, window, 2, H, d], of the segment's positions so far and of what each read.
    """

    memory: MemoryState
    reader: Layers
    tail: jax.Array
    keys: jax.Array
    values: jax.Array


class SegmentedMemory(nnx.Module):
    """Attention and memory of the variant `mac`."""

    def __init__(self, config: Any, width: int, head_dim: int, *, rngs: nnx.Rngs, dtype: Any):
        self.config, self.head_dim, self.dtype = config, head_dim, dtype
        total = config.heads * head_dim
        self.attention = Attention(config, width, head_dim, rngs=rngs, dtype=dtype)
        self.memory = Memory(config, total, ("heads", "memory"), head_dim, rngs=rngs, dtype=dtype)
        options = {"rngs": rngs, "dtype": dtype, "bias": config.bias != "none"}
        self.query = Linear(width, total, ("embed", "heads"), **options)
        kv = Fused((("k", total), ("v", total)))
        self.retrieved = Linear(total, kv.width, ("heads", "memory"), fused=kv, **options)

    def init_state(self, batch: int, dtype: Any) -> SegmentState:
        """Before the first position."""
        memory = self.memory.blank(batch)
        empty = jnp.zeros((batch, self.config.window, 2, self.config.heads, self.head_dim), dtype)
        return SegmentState(memory, memory.weights, self.memory.tail(batch, dtype), empty, empty)

    def __call__(self, x: jax.Array, seq: Sequence, state: SegmentState) -> tuple[jax.Array, jax.Array, SegmentState]:
        """y and m [B, T, H, d], and the state after."""
        q, k, v = self.attention.positioned(x, seq.positions)
        wide = param_dtype(self.dtype)
        query = unit(jax.nn.silu(self.query(x).astype(wide)).reshape(q.shape))
        padding = jnp.zeros(x.shape[:2], bool) if seq.padding is None else seq.padding
        inputs = (q, k, v, query, seq.positions, padding)
        graphdef, params = nnx.split(self)
        leaves, kind = jax.tree.flatten(params)
        arrays = (tuple(leaves), state, inputs, seq.documents)
        options = {"build": lambda leaves: nnx.merge(graphdef, jax.tree.unflatten(kind, leaves))}
        if not sequence_parallel.splits(x.shape[1]):
            # Heads are read all together, and so cannot be split here; XLA splits what is between.
            spec = SegmentSpec.of(None, *arrays, **options)
            return MEMORY_AS_CONTEXT.choose(spec, self.config.impl).run(*arrays, **options)
        whole = lambda x: (None,) * x.ndim
        of_rows = lambda x: ("batch", *whole(x)[1:])
        of_positions = lambda x: ("batch", "seq", *whole(x)[2:])
        axes = (tuple(map(whole, leaves)), jax.tree.map(of_rows, state), tuple(map(of_positions, inputs)))
        out_axes = [*map(of_positions, inputs[:2]), *map(of_rows, jax.tree.leaves(state))]
        axes = (*axes, ("batch", "seq"))
        return MEMORY_AS_CONTEXT(*arrays, axes=axes, out_axes=out_axes, impl=self.config.impl, **options)

    def scan(
        self, step: Callable, chunk: int, state: SegmentState, inputs: tuple, documents: jax.Array | None
    ) -> tuple[SegmentState, tuple[jax.Array, jax.Array]]:
        """The state after all positions, y and m; up to `chunk` positions are written at once, by `step`."""
        body = lambda state, inputs, slots: self._chunk_step(step, state, inputs, slots)
        if documents is None:
            return scan_aligned(body, state, inputs, chunk)
        position_BT = positions_in_documents(documents, state.memory.position_B)
        return scan_chunk_steps(body, state, inputs, chunk, documents, position_BT)

    def _chunk_step(
        self, step: Callable, state: SegmentState, inputs: tuple, slots: ChunkStep
    ) -> tuple[SegmentState, Any]:
        q, k, v, query, positions, padding = inputs
        first_B = slots.position_BC[:, 0] % self.config.window
        initial = self.memory.initial()
        reader = choose_rows(first_B == 0, state.memory.weights, state.reader)
        reader = choose_rows(slots.fresh_B, initial.weights, reader)

        read = forward(self.memory.spec, reader, query.swapaxes(1, 2)).swapaxes(1, 2)
        k_read, v_read = jnp.split(self.retrieved(read.reshape(*read.shape[:2], -1)), 2, axis=-1)
        k_read = self.attention.rotated(k_read.reshape(k.shape), positions)
        keys = jnp.stack([k, k_read], axis=2).astype(state.keys.dtype)
        values = jnp.stack([v, v_read.reshape(v.shape)], axis=2).astype(state.values.dtype)
        y = self._attend(q, keys, values, state, jnp.where(slots.fresh_B, 0, first_B), slots)

        flat = y.reshape(*y.shape[:2], -1)
        projected = self.memory.qkv(flat)
        convolved, tail = self._convolved(projected, state.tail, slots)
        written = self.memory.gated(flat, convolved, padding)
        memory, m = step(self.memory.spec, initial, state.memory, written, slots)
        keys, values = self._kept(keys, state.keys, slots), self._kept(values, state.values, slots)
        after = SegmentState(memory, reader, tail, keys, values)
        return choose_rows(slots.taken_B, after, state), (y, m.astype(y.dtype))

    def _attend(
        self,
        q: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        state: SegmentState,
        before_B: jax.Array,
        slots: ChunkStep,
    ) -> jax.Array:
        """y [B, C, H, d]: one softmax over persistent rows, the segment before the chunk step and the step itself."""
        wide, B, room = param_dtype(q.dtype), q.shape[0], state.keys.shape[1]
        old = jnp.arange(room) < before_B[:, None]
        seen = jnp.concatenate([jnp.broadcast_to(old[:, None], (B, q.shape[1], room)), slots.seen()], axis=-1)
        seen = jnp.repeat(seen, 2, axis=-1)
        rows = lambda a, b: jnp.concatenate([a, b], axis=1).reshape(B, -1, *q.shape[2:]).astype(wide)
        keys, values = rows(state.keys, keys), rows(state.values, values)
        if self.config.persistent:
            prefix = [jnp.broadcast_to(p, (B, *p.shape)).astype(wide) for p in self.attention.persistent[...]]
            keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(prefix, (keys, values)))
            seen = jnp.pad(seen, ((0, 0), (0, 0), (self.config.persistent, 0)), constant_values=True)
        logits = jnp.einsum("bchd,bshd->bhcs", q.astype(wide), keys) * self.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(seen[:, None], logits, jnp.finfo(wide).min), axis=-1)
        return jnp.einsum("bhcs,bshd->bchd", weights, values).astype(q.dtype)

    def _convolved(self, projected: jax.Array, tail: jax.Array, slots: ChunkStep) -> tuple[jax.Array, jax.Array]:
        if not self.config.conv:
            return projected, tail
        documents = slots.documents_BC - slots.documents_BC[:, :1] + slots.fresh_B[:, None]  # 0: that of the tail
        convolved, _ = causal_conv(projected, self.memory.kernel[...], documents, tail)
        J = tail.shape[1]
        index = slots.last_B[:, None] + 1 + jnp.arange(J)
        pick = lambda a: jax.vmap(lambda row, i: row[i])(a, index)
        own = pick(jnp.pad(documents, ((0, 0), (J, 0)))) == jnp.take_along_axis(documents, slots.last_B[:, None], 1)
        inputs = jnp.concatenate([tail.astype(projected.dtype), projected], axis=1)
        return convolved, jnp.where(own[..., None], pick(inputs), 0).astype(tail.dtype)

    def _kept(self, new: jax.Array, old: jax.Array, slots: ChunkStep) -> jax.Array:
        """The segment's rows after the chunk step; those that are not of it are never seen."""
        last = slots.last_B[:, None]
        at_last = lambda a: jnp.take_along_axis(a, last, axis=1)
        slot = jnp.arange(old.shape[1]) - at_last(slots.position_BC) % self.config.window + last
        inside = (slot >= 0) & (slot <= last)
        slot = jnp.clip(slot, 0, new.shape[1] - 1)
        inside &= jnp.take_along_axis(slots.documents_BC, slot, axis=1) == at_last(slots.documents_BC)
        picked = jax.vmap(lambda rows, i: rows[i])(new, slot)
        return jnp.where(inside[..., None, None, None], picked, old)


@dataclasses.dataclass(frozen=True)
class SegmentSpec:
    """The static facts by which an implementation is chosen."""

    batch: int
    positions: int
    heads: int
    width: int
    dtype: str
    packed: bool

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.positions} H{self.heads} d{self.width} {self.dtype}"
        return f"{shape} packed" if self.packed else shape

    @classmethod
    def of(cls, exchange: SequenceParallel | None, leaves, state, inputs, documents, *, build: Callable) -> SegmentSpec:
        """Of the arrays of a device; where positions are split over several, of one row at a time."""
        (B, *rest), alone = inputs[0].shape, exchange is None
        return cls(B if alone else 1, *rest, str(inputs[0].dtype), documents is not None or not alone)


def definition(leaves, state, inputs, documents, *, build: Callable):
    """One position after another."""

    def step(spec, initial, memory, written, slots: ChunkStep):
        one = jax.tree.map(lambda a: a[:, 0], written)
        memory, m = definition_step(spec, initial, memory, one, slots.fresh_B)
        return memory, m[:, None]

    state, (y, m) = build(leaves).scan(step, 1, state, inputs, documents)
    return y, m, state


def chunked(leaves, state, inputs, documents, *, build: Callable):
    """Chunk by chunk."""
    module = build(leaves)
    state, (y, m) = module.scan(chunk_step, module.config.chunk, state, inputs, documents)
    return y, m, state


def _over_devices(
    chosen: Implementation, exchange: SequenceParallel, leaves, state, inputs, documents, *, build: Callable
):
    """The state is handed over from device to device."""
    documents = jnp.ones(inputs[0].shape[:2], jnp.int32) if documents is None else documents

    def step(state, x):
        y, m, state = chosen.run(leaves, state, *x, build=build)
        return state, (y, m)

    state, (y, m) = exchange.hand_over(step, state, (inputs, exchange.local_documents(documents)))
    return y, m, state


MEMORY_AS_CONTEXT = Op(
    "memory_as_context",
    SegmentSpec.of,
    {"definition": Implementation(definition), "chunked": Implementation(chunked)},
    preference=("chunked",),
    split=_over_devices,
)


def segment_flops(config: Any, head_dim: int, length: int) -> float:
    """Matrix-product FLOPs per position of reading the memory and of attention, in whole chunks, all pairs counted."""
    chunk = min(config.chunk, length)
    padded = -(-length // chunk) * chunk / length
    keys = config.persistent + 2 * (config.window + chunk)
    return padded * 4.0 * config.heads * head_dim * keys
