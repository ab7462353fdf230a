"""Divergence of one model's next-token distribution from another's, over a vocabulary that is never held whole.

Shapes: `N` rows, several axes among them, `D` and `E` widths of student and teacher, `V` vocabulary. Where the
vocabulary is split over devices each computes what its columns say, and what they exchange is three numbers a row.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from attnlab.ops.cross_entropy import log_partition, vocabulary_chunks, vocabulary_logits
from attnlab.ops.dispatch import Implementation, Op
from attnlab.parallel import partition
from attnlab.parallel.sequence_parallel import SequenceParallel

# Log-partitions of the teacher and of the student, and the mean under the teacher of what their logits differ by.
Statistics = tuple[jax.Array, jax.Array, jax.Array]


def kl_divergence(
    hidden_ND: jax.Array,
    kernel_DV: jax.Array,
    teacher_hidden_NE: jax.Array,
    teacher_kernel_EV: jax.Array,
    weights_N: jax.Array,
    temperature: float = 1.0,
    chunk: int = 8192,
    impl: str = "auto",
    *,
    cap: float | None = None,
    teacher_cap: float | None = None,
) -> jax.Array:
    """KL(p || q) of p = softmax(teacher's logits / T) and q = softmax(student's logits / T), by the rows' weights.

    Its gradient with respect to the student's logits is (q - p) / T, so that T^2 times it keeps its size as T grows
    (Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2). A chunk of the vocabulary at a time:
    two blocks of logits are in memory, and both are made again in the backward pass. fp32, or fp64 for fp64 inputs.

    Args:
      hidden_ND, kernel_DV: final hidden states and output projection of the student; N is one axis, or two.
      teacher_hidden_NE, teacher_kernel_EV: the teacher's; they get no gradient.
      weights_N: of each position; positions of weight 0 give 0 and pass no gradient.
      temperature: T.
      chunk: columns of the vocabulary that a product makes.
      impl: "auto" or a name in `KL_DIVERGENCE.table`.
      cap, teacher_cap: of `cross_entropy.capped`, on the logits of either, before the temperature.

    Returns:
      [N], weights * KL, in nats.
    """
    used, weights = weights_N != 0, jax.lax.stop_gradient(weights_N)
    # Nothing of an unused row, not even NaN, reaches the kernel's gradient.
    hidden, teacher_hidden = (jnp.where(used[..., None], x, 0) for x in (hidden_ND, teacher_hidden_NE))
    rows = ("batch", "seq")[: weights_N.ndim]
    of_model = ((*rows, None), (None, "vocab"))
    teacher_lse, lse, gap = KL_DIVERGENCE(
        hidden,
        kernel_DV,
        jax.lax.stop_gradient(teacher_hidden),
        jax.lax.stop_gradient(teacher_kernel_EV),
        axes=of_model + of_model,
        out_axes=[rows, rows, rows],
        impl=impl,
        temperature=temperature,
        chunk=chunk,
        cap=cap,
        teacher_cap=teacher_cap,
    )
    return jnp.where(used, weights * (gap - teacher_lse + lse), 0)


@dataclasses.dataclass(frozen=True)
class DivergenceSpec:
    """The static facts by which an implementation is chosen: of a device's rows, and its columns of the vocabulary."""

    rows: int
    width: int
    teacher_width: int
    columns: int
    dtype: str
    chunk: int

    def __str__(self) -> str:
        return f"N{self.rows} D{self.width} E{self.teacher_width} V{self.columns} C{self.chunk} {self.dtype}"

    @classmethod
    def of(
        cls, exchange: SequenceParallel | None, hidden, kernel, teacher_hidden, teacher_kernel, *, chunk: int, **_
    ) -> DivergenceSpec:
        """Of the arrays of a device."""
        del exchange  # rows know nothing of each other
        rows = math.prod(hidden.shape[:-1])
        return cls(rows, kernel.shape[0], teacher_kernel.shape[0], kernel.shape[1], str(hidden.dtype), chunk)


def definition(
    hidden, kernel, teacher_hidden, teacher_kernel, *, temperature: float, chunk: int, cap=None, teacher_cap=None
) -> Statistics:
    """All logits at once; `chunk` plays no part."""
    del chunk
    z = vocabulary_logits(hidden, kernel, cap) / temperature
    t = jax.lax.stop_gradient(vocabulary_logits(teacher_hidden, teacher_kernel, teacher_cap) / temperature)
    gap = jnp.sum(jax.nn.softmax(t, axis=-1) * (t - z), axis=-1)
    return jax.nn.logsumexp(t, axis=-1), jax.nn.logsumexp(z, axis=-1), gap


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden, kernel, teacher_hidden, teacher_kernel, options) -> Statistics:
    return _chunked_forward(hidden, kernel, teacher_hidden, teacher_kernel, options)[0]


def _both(hidden, columns, teacher_hidden, teacher_columns, options):
    """Logits of student and teacher of a chunk of columns, over the temperature."""
    temperature, _, cap, teacher_cap = options
    z = vocabulary_logits(hidden, columns, cap) / temperature
    return z, vocabulary_logits(teacher_hidden, teacher_columns, teacher_cap) / temperature


def _chunked_forward(hidden, kernel, teacher_hidden, teacher_kernel, options):
    n, dtype = hidden.shape[:-1], jnp.promote_types(hidden.dtype, jnp.float32)
    peak = teacher_peak = jnp.full(n, -jnp.inf, dtype)
    total = teacher_total = gap = jnp.zeros(n, dtype)
    for lo, hi in vocabulary_chunks(kernel.shape[1], options[1]):
        z, t = _both(hidden, kernel[:, lo:hi], teacher_hidden, teacher_kernel[:, lo:hi], options)
        new, new_teacher = (jnp.maximum(old, jnp.max(x, axis=-1)) for old, x in ((peak, z), (teacher_peak, t)))
        total = total * jnp.exp(peak - new) + jnp.sum(jnp.exp(z - new[..., None]), axis=-1)
        shrunk, p = jnp.exp(teacher_peak - new_teacher), jnp.exp(t - new_teacher[..., None])
        teacher_total = teacher_total * shrunk + jnp.sum(p, axis=-1)
        gap = gap * shrunk + jnp.sum(p * (t - z), axis=-1)
        peak, teacher_peak = new, new_teacher
    lse, teacher_lse = peak + jnp.log(total), teacher_peak + jnp.log(teacher_total)
    residuals = (hidden, kernel, teacher_hidden, teacher_kernel, teacher_lse, lse)
    return (teacher_lse, lse, gap / teacher_total), residuals


def _chunked_backward(options, residuals, cotangents):
    hidden, kernel, teacher_hidden, teacher_kernel, teacher_lse, lse = residuals
    _, d_lse, d_gap = cotangents
    temperature, chunk, cap, _ = options
    d_hidden, d_kernel, rows = jnp.zeros(hidden.shape, lse.dtype), [], tuple(range(hidden.ndim - 1))
    for lo, hi in vocabulary_chunks(kernel.shape[1], chunk):
        columns = kernel[:, lo:hi]
        z, t = _both(hidden, columns, teacher_hidden, teacher_kernel[:, lo:hi], options)
        q, p = jnp.exp(z - lse[..., None]), jnp.exp(t - teacher_lse[..., None])
        d_logits = (d_lse[..., None] * q - d_gap[..., None] * p) / temperature
        if cap is not None:
            d_logits = d_logits * (1 - jnp.square(z * (temperature / cap)))
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = d_hidden + jnp.matmul(d_logits, columns.astype(hidden.dtype).T, preferred_element_type=lse.dtype)
        d_kernel.append(jnp.tensordot(hidden, d_logits, (rows, rows), preferred_element_type=lse.dtype))
    d_kernel = d_kernel[0] if len(d_kernel) == 1 else jnp.concatenate(d_kernel, axis=1)
    return d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def chunked(
    hidden, kernel, teacher_hidden, teacher_kernel, *, temperature: float, chunk: int, cap=None, teacher_cap=None
) -> Statistics:
    """A chunk of columns at a time, forward and backward; rows are one axis."""
    rows, flat = hidden.shape[:-1], lambda x: x.reshape(-1, x.shape[-1])
    options = (temperature, chunk, cap, teacher_cap)
    found = _chunked(flat(hidden), kernel, flat(teacher_hidden), teacher_kernel, options)
    return tuple(x.reshape(rows) for x in found)


def _of_all_columns(run):
    """`run` on a device's columns of the vocabulary, and what all devices' columns together say."""

    @functools.wraps(run)
    def whole(*arrays, **options) -> Statistics:
        teacher_lse, lse, gap = run(*arrays, **options)
        split = partition.here("vocab")
        if split is None:
            return teacher_lse, lse, gap
        all_teacher, all_lse = log_partition(jnp.stack([teacher_lse, lse]), split)
        share = jax.lax.stop_gradient(jnp.exp(teacher_lse - all_teacher))
        return all_teacher, all_lse, jax.lax.psum(share * gap, split.names)

    return whole


KL_DIVERGENCE = Op(
    "kl_divergence",
    DivergenceSpec.of,
    {
        "definition": Implementation(_of_all_columns(definition)),
        "chunked": Implementation(_of_all_columns(chunked)),
    },
    preference=("chunked",),
    split=lambda chosen, exchange, *arrays, **options: chosen.run(*arrays, **options),
)
