"""Cross-entropy over a vocabulary that is never held whole.

Shapes: `N` rows, several axes among them, `D` width, `V` vocabulary. Where the vocabulary is split over devices each
computes what its columns say, and what they exchange is two numbers a row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.ops import cross_entropy_kernel
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.linear import project
from attnlab.parallel import partition
from attnlab.parallel.sequence_parallel import SequenceParallel

Statistics = tuple[jax.Array, jax.Array]  # log-partitions of rows, and logits of their targets, 0 where there is none


def cross_entropy(
    hidden_ND: jax.Array,
    kernel_DV: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    chunk: int = 8192,
    impl: str = "auto",
    *,
    cap: float | None = None,
) -> Statistics:
    """Negative log-likelihood and log-partition of `softmax(hidden @ kernel)`, a chunk of the vocabulary at a time.

    Logits, statistics and gradients' sums are fp32 (fp64 for fp64 inputs); the products take the inputs as they are.

    Args:
      hidden_ND: final hidden states; N is one axis, or two: sequences and their positions.
      kernel_DV: output projection.
      targets_N: int32, the right token; any value where the weight is 0.
      weights_N: weight of each position; positions of weight 0 give 0 and pass no gradient.
      chunk: columns of the vocabulary that a product makes, of our kernels the backward's on GPUs alone.
      impl: "auto" or a name in `CROSS_ENTROPY.table`.
      cap: of `capped`, on the logits.

    Returns:
      nll_N, weights * (lse - logit[target]), in nats, and lse_N, weights * log-sum-exp of the logits. `weights` and
      `targets` get no gradient.

    Raises:
      UserError: the implementation cannot serve.
    """
    used, weights = weights_N != 0, jax.lax.stop_gradient(weights_N)
    # Nothing of an unused row, not even NaN, reaches the kernel's gradient.
    hidden = jnp.where(used[..., None], hidden_ND, 0)
    rows = ("batch", "seq")[: targets_N.ndim]
    lse, right = CROSS_ENTROPY(
        hidden,
        kernel_DV,
        targets_N,
        axes=((*rows, None), (None, "vocab"), rows),
        out_axes=[rows, rows],
        impl=impl,
        chunk=chunk,
        cap=cap,
    )
    return jnp.where(used, weights * (lse - right), 0), jnp.where(used, weights * lse, 0)


@dataclasses.dataclass(frozen=True)
class CrossEntropySpec:
    """The static facts by which an implementation is chosen: of a device's rows, and its columns of the vocabulary."""

    rows: int
    width: int
    columns: int
    dtype: str
    chunk: int
    cap: float | None = None

    def __str__(self) -> str:
        cap = "" if self.cap is None else f" cap {self.cap}"
        return f"N{self.rows} D{self.width} V{self.columns} C{self.chunk} {self.dtype}{cap}"

    @classmethod
    def of(
        cls, exchange: SequenceParallel | None, hidden, kernel, targets, *, chunk: int, cap=None
    ) -> CrossEntropySpec:
        """Of the arrays of a device."""
        del exchange  # rows know nothing of each other
        return cls(math.prod(targets.shape), *kernel.shape, str(hidden.dtype), chunk, cap)


def vocabulary_chunks(vocab: int, chunk: int) -> list[tuple[int, int]]:
    """First and last column, the last excluded, of each chunk of a vocabulary."""
    return [(lo, min(lo + chunk, vocab)) for lo in range(0, vocab, chunk)]


def capped(logits: jax.Array, cap: float | None) -> jax.Array:
    """`cap tanh(logits / cap)`; without a cap the logits."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def vocabulary_logits(hidden: jax.Array, kernel: jax.Array, cap: float | None = None) -> jax.Array:
    """`hidden @ kernel`, capped, in fp32 or wider."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return capped(project(hidden, kernel.astype(hidden.dtype), dtype), cap)


def definition(hidden, kernel, targets, *, chunk: int, cap: float | None = None) -> Statistics:
    """All logits at once; `chunk` plays no part."""
    del chunk
    logits = vocabulary_logits(hidden, kernel, cap)
    here = jnp.arange(kernel.shape[1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1), jnp.sum(jnp.where(here, logits, 0), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked(hidden, kernel, targets, chunk: int, cap: float | None) -> Statistics:
    return _chunked_forward(hidden, kernel, targets, chunk, cap)[0]


def _chunked_forward(hidden, kernel, targets, chunk, cap):
    n, dtype = hidden.shape[:-1], jnp.promote_types(hidden.dtype, jnp.float32)
    peak = jnp.full(n, -jnp.inf, dtype)
    total = jnp.zeros(n, dtype)
    right = jnp.zeros(n, dtype)
    for lo, hi in vocabulary_chunks(kernel.shape[1], chunk):
        logits = vocabulary_logits(hidden, kernel[:, lo:hi], cap)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
        total = total * jnp.exp(peak - new_peak) + jnp.sum(jnp.exp(logits - new_peak[..., None]), axis=-1)
        peak = new_peak
        here = jnp.arange(lo, hi) == targets[..., None]
        right = right + jnp.sum(jnp.where(here, logits, 0), axis=-1)
    lse = peak + jnp.log(total)
    return (lse, right), (hidden, kernel, targets, lse)


def _chunked_backward(chunk, cap, residuals, cotangents):
    hidden, kernel, targets, lse = residuals
    d_lse, d_right = cotangents
    d_hidden = jnp.zeros(hidden.shape, lse.dtype)
    d_kernel, rows = [], tuple(range(hidden.ndim - 1))
    for lo, hi in vocabulary_chunks(kernel.shape[1], chunk):
        columns = kernel[:, lo:hi]
        logits = vocabulary_logits(hidden, columns, cap)
        here = jnp.arange(lo, hi) == targets[..., None]
        d_logits = d_lse[..., None] * jnp.exp(logits - lse[..., None]) + jnp.where(here, d_right[..., None], 0)
        if cap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / cap))
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = d_hidden + jnp.matmul(d_logits, columns.astype(hidden.dtype).T, preferred_element_type=lse.dtype)
        d_kernel.append(jnp.tensordot(hidden, d_logits, (rows, rows), preferred_element_type=lse.dtype))
    d_kernel = d_kernel[0] if len(d_kernel) == 1 else jnp.concatenate(d_kernel, axis=1)
    return d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def chunked(hidden, kernel, targets, *, chunk: int, cap: float | None = None) -> Statistics:
    """A chunk of columns at a time, forward and backward; rows are one axis."""
    rows = hidden.shape[:-1]
    lse, right = _chunked(hidden.reshape(-1, hidden.shape[-1]), kernel, targets.reshape(-1), chunk, cap)
    return lse.reshape(rows), right.reshape(rows)


def log_partition(lse: jax.Array, split: partition.Split) -> jax.Array:
    """Of all columns of the vocabulary, from that of a device's own."""
    peak = jax.lax.pmax(jax.lax.stop_gradient(lse), split.names)
    return peak + jnp.log(jax.lax.psum(jnp.exp(lse - peak), split.names))


def _of_all_columns(run: Callable[..., Statistics]) -> Callable[..., Statistics]:
    """`run` on a device's columns of the vocabulary, and what all devices' columns together say."""

    @functools.wraps(run)
    def whole(hidden, kernel, targets, **options: Any) -> Statistics:
        split = partition.here("vocab")
        if split is None:
            return run(hidden, kernel, targets, **options)
        lse, right = run(hidden, kernel, targets - jax.lax.axis_index(split.names) * kernel.shape[1], **options)
        return log_partition(lse, split), jax.lax.psum(right, split.names)

    return whole


CROSS_ENTROPY = Op(
    "cross_entropy",
    CrossEntropySpec.of,
    {
        "definition": Implementation(_of_all_columns(definition)),
        "chunked": Implementation(_of_all_columns(chunked)),
        "pallas": Implementation(
            _of_all_columns(cross_entropy_kernel.run),
            cross_entropy_kernel.unsupported,
            cross_entropy_kernel.worth,
            platforms=("tpu", "gpu"),
            interpretable=True,
            kernel_flops=cross_entropy_kernel.kernel_flops,
        ),
    },
    preference=("pallas", "chunked"),
    split=lambda chosen, exchange, *arrays, **options: chosen.run(*arrays, **options),
)


def likeliest(hidden_ND: jax.Array, kernel_DV: jax.Array, chunk: int = 8192) -> jax.Array:
    """int32 [N], the column of the largest logit of `hidden @ kernel`, the first of equal ones; arguments as above."""
    best = jnp.full(hidden_ND.shape[:-1], -jnp.inf, jnp.promote_types(hidden_ND.dtype, jnp.float32))
    column = jnp.zeros(best.shape, jnp.int32)
    for lo, hi in vocabulary_chunks(kernel_DV.shape[1], chunk):
        logits = vocabulary_logits(hidden_ND, kernel_DV[:, lo:hi])
        highest = jnp.max(logits, axis=-1)
        column = jnp.where(highest > best, lo + jnp.argmax(logits, axis=-1).astype(jnp.int32), column)
        best = jnp.maximum(best, highest)
    return column
