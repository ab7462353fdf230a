"""Agent attention without a causal order: few agents gather from all keys and hand out to all queries.

    V_A = softmax(A K^T / sqrt(d) + bias) V        the agents' values
    O   = softmax(Q A^T / sqrt(d) + bias) V_A      one average of them for every query

Here are the definition (of the causal forms too), the pooling that makes agents of queries, and the form that is linear
in the length. Source: Han et al. 2023, Agent Attention, arXiv:2312.08874. The causal forms are in `agent_causal.py` and
`agent_refreshed.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops.attention import attention
from attnlab.ops.masks import Mask, mask_from_segments

# --- the definition ---------------------------------------------------------------------------------------------------


def definition(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    v_BTHe: jax.Array,
    agents_BTHmd: jax.Array,
    visible_BTT: jax.Array,
    used_BTm: jax.Array | None = None,
    bias_in_HmT: jax.Array | None = None,
    bias_out_HmT: jax.Array | None = None,
) -> jax.Array:
    """Both softmaxes written out for every position, with the agents that this position reads by.

    Args:
      q_BTHd, k_BTHd, v_BTHe: queries, keys and values.
      agents_BTHmd: agents of each position; leading axes of size 1 broadcast.
      visible_BTT: bool, whether the agents of position t see key j.
      used_BTm: bool, which agents position t has; None: all.
      bias_in_HmT, bias_out_HmT: added to the logits of agents over keys and of queries over agents.

    Returns:
      o_BTHe, 0 where nothing is visible.
    """
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    q, k, v, agents = (x.astype(dtype) for x in (q_BTHd, k_BTHd, v_BTHe, agents_BTHmd))
    B, T, H, d = q.shape
    agents = jnp.broadcast_to(agents, (B, T, H, *agents.shape[3:]))
    gather = jnp.einsum("bthmd,bjhd->bhtmj", agents, k, precision="highest") * d**-0.5
    hand_out = jnp.einsum("bthd,bthmd->bhtm", q, agents, precision="highest") * d**-0.5
    if bias_in_HmT is not None:
        gather += bias_in_HmT[None, :, None]
    if bias_out_HmT is not None:
        hand_out += bias_out_HmT.swapaxes(1, 2)[None]
    seen = visible_BTT[:, None, :, None]
    values_BHTme = jnp.einsum("bhtmj,bjhe->bhtme", _softmax(gather, seen), v, precision="highest")
    used = jnp.any(visible_BTT, -1)[:, None, :, None] if used_BTm is None else used_BTm[:, None]
    o = jnp.einsum("bhtm,bhtme->bthe", _softmax(hand_out, used), values_BHTme, precision="highest")
    return o.astype(q_BTHd.dtype)


def _softmax(logits: jax.Array, visible: jax.Array) -> jax.Array:
    """Over the last axis; zeros where nothing is visible."""
    logits = jnp.where(visible, logits, -jnp.inf)
    highest = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(highest))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def definition_pooled_agents(q_BTHd: jax.Array, segments_BT: jax.Array, agents: int) -> tuple[jax.Array, ...]:
    """What `definition` takes for agents pooled from each document: agents_BTHmd, visible_BTT, used_BTm."""
    mask = mask_from_segments(segments_BT, q_BTHd.shape[1], causal=False)
    visible = mask.visible(q_BTHd.shape[1], q_BTHd.shape[1])[:, 0]
    start, end = mask.k_start[..., None], mask.k_end[..., None]
    length, key = end - start, jnp.arange(q_BTHd.shape[1])
    count, bin_m = jnp.minimum(agents, length), jnp.arange(agents)
    first = start + bin_m * length // jnp.maximum(count, 1)
    last = start - (-(bin_m + 1) * length // jnp.maximum(count, 1))
    used = bin_m < count
    member = used[..., None] & (key >= first[..., None]) & (key < last[..., None])
    weights = member / jnp.maximum(member.sum(-1, keepdims=True), 1)
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    pooled = jnp.einsum("btmj,bjhd->bthmd", weights.astype(dtype), q_BTHd.astype(dtype), precision="highest")
    return pooled, visible, used


def definition_grid_agents(q_BTHd: jax.Array, grid: tuple[int, int], agents: int) -> jax.Array:
    """What `definition` takes for agents pooled from an image, [B, 1, H, m, d]: each cell's mean."""
    (rows, columns), side = grid, round(agents**0.5)
    image = q_BTHd[:, q_BTHd.shape[1] - rows * columns :].reshape(-1, rows, columns, *q_BTHd.shape[2:])
    down, across = (list(zip(*adaptive_bins(n, side))) for n in grid)
    cells = [image[:, a:b, c:e].mean((1, 2)) for a, b in down for c, e in across]
    return jnp.stack(cells, axis=2)[:, None]


# --- pooling ----------------------------------------------------------------------------------------------------------


def adaptive_bins(length: int, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """First and end of each bin: bin i covers floor(i * length / bins) to ceil((i + 1) * length / bins)."""
    i = np.arange(bins)
    return i * length // bins, -(-(i + 1) * length // bins)


def adaptive_pool(x: jax.Array, axis: int, bins: int) -> jax.Array:
    """Means over `adaptive_bins` along an axis, which becomes `bins` long; sums in fp32 (fp64 for fp64)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    first, end = adaptive_bins(x.shape[axis], bins)
    index = first[:, None] + np.arange((end - first).max())
    weight = (index < end[:, None]) / (end - first)[:, None]
    members = jnp.take(x, np.minimum(index, x.shape[axis] - 1), axis=axis).astype(dtype)
    weight = jnp.asarray(weight, dtype).reshape(index.shape + (1,) * (x.ndim - axis - 1))
    return (members * weight).sum(axis + 1).astype(x.dtype)


def grid_agents(q_BTHd: jax.Array, grid: tuple[int, int], agents: int) -> jax.Array:
    """Agents [B, m, H, d] of an image: its queries pooled to a square of m cells.

    Args:
      q_BTHd: queries; the last rows * columns are the image's, those before (a class token) are not pooled.
      grid: rows and columns.
      agents: m, a square number.
    """
    rows, columns = grid
    side = round(agents**0.5)
    B, T, H, d = q_BTHd.shape
    image = q_BTHd[:, T - rows * columns :].reshape(B, rows, columns, H, d)
    return adaptive_pool(adaptive_pool(image, 1, side), 2, side).reshape(B, agents, H, d)


def _document_agents(q_BTHd: jax.Array, start_BT: jax.Array, length_BT: jax.Array, agents: int) -> jax.Array:
    """Agents of each document, pooled as `adaptive_pool` does, at the document's first positions [B, T, H, d].

    A document of n positions has min(m, n), so that no bin is empty and a position is in two bins at most. Sums are
    over a bin's own members: differences of a running sum would let one document's size into another's rounding.
    """
    B, T = start_BT.shape
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    own = jnp.arange(T, dtype=jnp.int32)
    place, n = own - start_BT, jnp.maximum(length_BT, 1)
    count = jnp.minimum(agents, n)
    low, high = place * count // n, -(-(place + 1) * count // n) - 1
    inside = length_BT > 0
    row = T * jnp.arange(B, dtype=jnp.int32)[:, None]

    def add(bin_BT: jax.Array, member_BT: jax.Array) -> jax.Array:
        members = jnp.where(member_BT[..., None, None], q_BTHd.astype(dtype), 0)
        to = row + jnp.where(member_BT, start_BT + bin_BT, own)
        return jax.ops.segment_sum(members.reshape(B * T, *members.shape[2:]), to.reshape(-1), B * T)

    total = add(low, inside) + add(high, inside & (high > low))
    size = -(-(place + 1) * n // count) - place * n // count
    pooled = total.reshape(q_BTHd.shape) / jnp.maximum(size, 1).astype(dtype)[..., None, None]
    return pooled.astype(q_BTHd.dtype)


# --- the linear form --------------------------------------------------------------------------------------------------


def agent_attention(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    v_BTHe: jax.Array,
    agents_BmHd: jax.Array,
    bias_in_HmT: jax.Array | None = None,
    bias_out_HmT: jax.Array | None = None,
) -> jax.Array:
    """Agent attention over whole rows by given agents: o_BTHe in the dtype of q; time and memory of order T * m."""
    dtype = jnp.promote_types(q_BTHd.dtype, jnp.float32)
    scale = q_BTHd.shape[-1] ** -0.5
    gather = jnp.einsum("bmhd,bthd->bhmt", agents_BmHd, k_BTHd, preferred_element_type=dtype) * scale
    hand_out = jnp.einsum("bmhd,bthd->bhmt", agents_BmHd, q_BTHd, preferred_element_type=dtype) * scale
    if bias_in_HmT is not None:
        gather += bias_in_HmT
    if bias_out_HmT is not None:
        hand_out += bias_out_HmT
    weights_in = jax.nn.softmax(gather, axis=-1).astype(v_BTHe.dtype)
    weights_out = jax.nn.softmax(hand_out, axis=2).astype(v_BTHe.dtype)
    values = jnp.einsum("bhmt,bthe->bhme", weights_in, v_BTHe, preferred_element_type=dtype)
    o = jnp.einsum("bhmt,bhme->bthe", weights_out, values.astype(v_BTHe.dtype), preferred_element_type=dtype)
    return o.astype(q_BTHd.dtype)


def packed_agent_attention(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    v_BTHe: jax.Array,
    segments_BT: jax.Array,
    agents: int,
    attend: Callable[..., jax.Array] = attention,
) -> jax.Array:
    """Agent attention within each document of packed rows, by min(m, n) agents pooled from its n queries: o_BTHe.

    Both softmaxes are over intervals of positions: a document's agents stand at its first positions, see the document's
    keys, and are what its queries see. Memory is of order T; time is that of attention over the documents. `attend` is
    softmax attention of queries, keys, values and a mask.
    """
    T = q_BTHd.shape[1]
    mask = mask_from_segments(segments_BT, T, causal=False)
    start, end = mask.k_start, mask.k_end
    last = start + jnp.minimum(agents, end - start)
    pooled = _document_agents(q_BTHd, start, end - start, agents)
    used = jnp.arange(T, dtype=jnp.int32) < last
    values = attend(pooled, k_BTHd, v_BTHe, Mask(start, jnp.where(used, end, start)))
    return attend(q_BTHd, pooled, values, Mask(start, last))


# --- convolution of the values ----------------------------------------------------------------------------------------


def depthwise_conv(
    x_BTC: jax.Array, kernel_33C: jax.Array, grid: tuple[int, int] | None, documents_BT: jax.Array | None = None
) -> jax.Array:
    """A 3 x 3 depthwise convolution of an image, zeros around it.

    Args:
      x_BTC: the last rows * columns positions are the image.
      kernel_33C: row and column offsets -1, 0, 1, then channels.
      grid: rows and columns; None: a row of one document or more is an image of one row, which only the kernel's middle
        row meets.
      documents_BT: of `attnlab.ops.documents.document_index`, without a grid only; None: one document.

    Returns:
      y_BTC in the dtype of x, 0 at positions before the image.
    """
    dtype = jnp.promote_types(x_BTC.dtype, jnp.float32)
    B, T, C = x_BTC.shape
    rows, columns = (1, T) if grid is None else grid
    image = x_BTC[:, T - rows * columns :].reshape(B, rows, columns, C)
    reach = 0 if grid is None else 1
    padded = jnp.pad(image, ((0, 0), (reach, reach), (1, 1), (0, 0)))
    of = None if documents_BT is None else jnp.pad(documents_BT, ((0, 0), (1, 1)), constant_values=-1)
    y = jnp.zeros(image.shape, dtype)
    for i in range(-reach, reach + 1):
        for j in (-1, 0, 1):
            seen = padded[:, i + reach : i + reach + rows, j + 1 : j + 1 + columns].astype(dtype)
            if of is not None and j:
                seen = jnp.where((of[:, j + 1 : j + 1 + T] == documents_BT)[:, None, :, None], seen, 0)
            y += kernel_33C[i + 1, j + 1].astype(dtype) * seen
    return jnp.pad(y.reshape(B, rows * columns, C).astype(x_BTC.dtype), ((0, 0), (T - rows * columns, 0), (0, 0)))
