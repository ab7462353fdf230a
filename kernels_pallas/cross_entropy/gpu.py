"""Cross-entropy on Hopper: logits in tiles that never leave the chip, their gradient by chunks of the vocabulary.

A product forward, three backward: the logits of a chunk once more, and both gradients from their slopes, which are held
in the dtype of hidden. Of the forward a number a row is kept.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import hopper
from kernels_pallas.cross_entropy import gpu_tiles
from kernels_pallas.cross_entropy.gpu_tiles import COLUMNS, DEPTH, ROWS


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call.

    Attributes:
      columns: V, those of the vocabulary.
      chunk: columns whose slopes are held at a time, a multiple of `COLUMNS`.
      gradient: dtype of the embedding's gradient.
      interpret: as in the public function.
    """

    columns: int
    chunk: int
    gradient: str
    interpret: Any
    platform = "cuda"

    @classmethod
    def of(cls, columns: int, chunk: int, gradient: str, interpret: Any) -> Plan:
        """Chunks of about so many columns, all of one size."""
        tiles = -(-columns // COLUMNS)
        chunks = -(-tiles // max(chunk // COLUMNS, 1))
        return cls(columns, -(-tiles // chunks) * COLUMNS, gradient, interpret)

    @property
    def chunks(self) -> int:
        return -(-self.columns // self.chunk)

    @property
    def device(self) -> hopper.Device:
        return hopper.device_of(self.interpret)


def unsupported(dtype: str) -> str | None:
    """Why the kernels cannot serve hidden states of this type, or None."""
    return None if dtype == "bfloat16" else f"on GPUs it computes bfloat16, not {dtype}"


def padded(plan: Plan, hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Whole tiles of rows, width and chunks; rows behind the last have no target."""
    (N, D), width = hidden.shape, plan.chunks * plan.chunk
    rows, deep = (0, -N % ROWS), (0, -D % DEPTH)
    kernel = jnp.pad(kernel, (deep, (0, width - plan.columns)))
    return jnp.pad(hidden, (rows, deep)), kernel, jnp.pad(targets, rows, constant_values=-1)


def forward(plan: Plan, hidden: jax.Array, kernel: jax.Array, targets: jax.Array, *, save: bool) -> dict[str, Any]:
    """As `gradient` asks; of whole tiles."""
    del save  # what is kept is what is given
    lse, logit = gpu_tiles.value(plan.device, hidden, kernel, targets, plan.columns)
    return {"lse": lse, "logit": logit}


def backward(plan: Plan, hidden, kernel, targets, out: dict[str, Any], scale, slope) -> tuple[jax.Array, jax.Array]:
    """As `gradient` asks."""
    rows = {"targets": targets, "lse": out["lse"], "scale": scale, "slope": slope}
    product = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)

    def turn(sums: tuple[jax.Array, jax.Array], first: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        dhidden, dkernel = sums
        slopes = gpu_tiles.slopes(plan.device, hidden, kernel, first, plan.chunk, plan.columns, **rows)
        columns = lax.dynamic_slice_in_dim(kernel, first, plan.chunk, 1)
        own = product(hidden.T, slopes).astype(plan.gradient)
        return (dhidden + product(slopes, columns.T), lax.dynamic_update_slice_in_dim(dkernel, own, first, 1)), None

    # A loop, not its turns one by one: nothing of the next chunk is made before this one's slopes are gone.
    start = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(kernel.shape, plan.gradient)
    firsts = plan.chunk * jnp.arange(plan.chunks, dtype=jnp.int32)
    return lax.scan(turn, start, firsts)[0]
