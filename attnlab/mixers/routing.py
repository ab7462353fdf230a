"""Routing attention: each head sorts positions into clusters, and a query attends to the last members of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.averages import averaging
from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.roles import Role, drawn, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.indexed_attention import indexed_attention
from attnlab.ops.masks import mean_visible_keys

_IMPLS = "indexed", "definition"
_SMOOTHING = 1e-5  # added to counts in positions of a step, of which none may be 0


@dataclasses.dataclass(frozen=True)
class RoutingConfig(HeadConfig):
    """Knobs of routing attention. It has no positions; `input_conv` or another layer gives order."""

    clusters: int = knob(8, "clusters of each head, c", other=(3,), least=1)
    window: int = knob(
        64, "members of its cluster that a query attends to, the newest, itself included", other=(2,), least=1
    )
    scale: str = knob(
        "root", "logits are multiplied by: root: 1 / sqrt(d); one: 1, as published, with logits up to d",
        other=("one",), choices=("root", "one"),
    )  # fmt: skip
    commitment: float = knob(
        1e-4, "weight of the loss that draws positions and centroids together", other=(0.1,), least=0
    )
    centroid_decay: float | None = knob(
        None, "of the moving averages of their members that centroids are, as published (0.99 or 0.999); none: they "
        "learn by the gradient of the commitment loss", other=(0.9,), least=0, below=1,
    )  # fmt: skip
    impl: str = knob("indexed", "indexed, or definition (all pairs)", other=("definition",), choices=_IMPLS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rings:
    """The newest members of each cluster.

    Attributes:
      k, v: [B, c, w, H, d]; member number m of a cluster lies in slot m % w.
      count: int32 [B, H, c], members so far of the current document.
    """

    k: jax.Array
    v: jax.Array
    count: jax.Array


def normed(x: jax.Array) -> jax.Array:
    """x [..., d] with mean 0 and mean square 1, in fp32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def _centroids(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return normed(jax.random.normal(key, shape, dtype))


def _first_totals(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Those of centroids as above, where each cluster has an equal share of the positions."""
    return _centroids(key, shape, dtype) / shape[1]


@register("routing")
class Routing(HeadMixer):
    """Causal softmax attention to the last `window` members of the query's cluster, in its document, itself included.

    Queries are keys: `u = (x W - mean) / deviation` per head, in cluster `argmax_m u . mu_m` of the head's centroids.
    The choice has no gradient. The loss `commitment mean |u - mu|^2` draws u to its centroid, and centroids to what is
    theirs; with `centroid_decay` these are `total / count` instead, moving averages of the sum and of the number of
    each cluster's u in training, without padding, and the loss moves u alone. Counts are smoothed by 1e-5 positions, as
    published: all averages are over the batch's weight, and that of the number 1, `steps`, says what a position is in
    that measure. A stream holds `window` keys for each cluster, whatever the length.
    """

    Config = RoutingConfig
    capabilities = Capabilities(fixed_state=True)
    paper = "Roy et al. 2020, Efficient Content-Based Sparse Attention with Routing Transformers, arXiv:2003.05997"
    extension = (
        "a position joins the nearest centroid's cluster and attends to the last members up to itself, where the paper "
        "has each cluster take its best positions of the whole sequence, which looks ahead; without centroid_decay "
        "centroids learn by the gradient of the commitment loss, where the paper has moving averages; the factor "
        "1 / sqrt(d)"
    )
    implementations = _IMPLS
    variants = (
        {"heads": 2, "clusters": 2, "window": 3, "scale": "one"},
        {"clusters": 2, "window": 3, "centroid_decay": 0.9, "bias": "all"},
    )

    def __init__(self, config: RoutingConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make, inner = Projections(config, width, rngs=rngs, dtype=dtype), config.heads * self.head_dim
        self.qk, self.v, self.out = make.qkv(inner), make.qkv(inner), make.out(inner)
        shape = (config.heads, config.clusters, self.head_dim)
        axes, kind = ("heads", "tokens", "head"), param_dtype(dtype)
        if config.centroid_decay is None:
            self.centroids = drawn(rngs, _centroids, shape, kind, axes=axes, role=Role.TOKENS)
        else:
            average = dict(role=Role.AVERAGE, keep=config.centroid_decay)
            self.total = drawn(rngs, _first_totals, shape, kind, axes=axes, **average)
            self.count = param(jnp.full(shape[:2], 1 / config.clusters, kind), axes=axes[:2], **average)
            self.steps = param(jnp.zeros(shape[:1], kind), axes=axes[:1], **average)

    def heads(self, x: jax.Array, seq: Sequence, carried: Rings | None = None) -> MixerOutput:
        c, (B, T, _) = self.config, x.shape
        u, v = normed(split_heads(self.qk(x), self.head_dim)), split_heads(self.v(x), self.head_dim)
        mu = self.current_centroids().astype(u.dtype)
        scores = jnp.einsum("bthd,hcd->bthc", *jax.lax.stop_gradient((u, mu)), precision="highest")
        cluster = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        documents = jnp.zeros((B, T), jnp.int32) if seq.documents is None else seq.documents
        losses, q = self._losses(u, mu, cluster, seq.padding), u.astype(self.dtype)
        scale = self.head_dim**-0.5 if c.scale == "root" else 1.0
        if c.impl == "definition" and carried is None:
            o = _all_pairs(q, v, documents, cluster, c.window, scale)
            return MixerOutput(self._learning(o, u, cluster, seq.padding), losses=losses)
        index, valid, rank = _newest(documents * c.clusters, cluster, min(c.window, T))
        if carried is None:
            o = indexed_attention(q, q, v, index, valid, scale=scale)[0]
            return MixerOutput(self._learning(o, u, cluster, seq.padding), losses=losses)
        index, valid, rings, keys = self._with_rings(carried, index, valid, rank, documents, cluster, (q, v))
        o, _ = indexed_attention(q, *keys, index, valid, scale=scale)
        return MixerOutput(o, rings, losses=losses)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> Rings:
        c = self.config
        empty = jnp.zeros((batch, c.clusters, c.window, c.heads, self.head_dim), dtype)
        return Rings(empty, empty, jnp.zeros((batch, c.heads, c.clusters), jnp.int32))

    @classmethod
    def flops(cls, config: RoutingConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        inner, span = config.heads * config.head_dim(width), mean_visible_keys(length, True, config.window)
        parts = {
            "projections": 6.0 * width * inner,
            "routing": 2.0 * inner * config.clusters,
            "attention": 4.0 * inner * span,
        }
        if config.centroid_decay is not None:
            parts["averages"] = 2.0 * inner * config.clusters
        return parts, span

    def current_centroids(self) -> jax.Array:
        """The centroids [H, c, d]: parameters, or with `centroid_decay` the averages `total / count'`, which have no
        gradient. With a whole of n positions a step, `count' = n (count + 1e-5) / (n + 1e-5 c)`, counts in positions.
        """
        if self.config.centroid_decay is None:
            return self.centroids[...]
        count, clusters = self.count[...], self.config.clusters
        whole, added = count.sum(-1, keepdims=True), _SMOOTHING * self.steps[...][:, None]
        smoothed = (count + added) / (whole + clusters * added) * whole
        return jax.lax.stop_gradient(self.total[...] / smoothed[..., None])

    # Inside.

    def _learning(self, o: jax.Array, u: jax.Array, cluster: jax.Array, padding: jax.Array | None) -> jax.Array:
        """The heads' outputs o; moving averages, where centroids are some, learn by them what is whose."""
        if self.config.centroid_decay is None:
            return o
        member = jax.nn.one_hot(cluster, self.config.clusters, dtype=u.dtype)
        if padding is not None:
            member = jnp.where(padding[..., None, None], 0, member)
        total = jnp.einsum("bthc,bthd->hcd", member, jax.lax.stop_gradient(u), precision="highest")
        averages = self.total[...], self.count[...], self.steps[...]
        return averaging(o, averages, (total, member.sum((0, 1)), jnp.ones_like(member, shape=member.shape[2:3])))

    def _losses(self, u, mu, cluster, padding) -> dict[str, jax.Array]:
        own = mu[jnp.arange(mu.shape[0]), cluster]  # [B, T, H, d]
        distance = jnp.sum((u - own) ** 2, axis=-1).mean(-1)
        used = jnp.ones_like(distance) if padding is None else (~padding).astype(distance.dtype)
        mean = jnp.sum(distance * used) / jnp.maximum(used.sum(), 1)
        return {"commitment": self.config.commitment * mean}

    def _with_rings(self, rings: Rings, index, valid, rank, documents, cluster, new):
        """Index and validity of each new query's keys among those of the rings and the new ones; the rings after them.

        Where a query's cluster has fewer new members than the window, older ones of the ring follow.
        """
        c, (B, _, H) = self.config, cluster.shape
        w, slots = c.window, c.clusters * c.window
        of_cluster = jnp.take_along_axis(rings.count, cluster.swapaxes(1, 2), axis=-1).swapaxes(1, 2)
        before = jnp.where(documents[..., None] == 0, of_cluster, 0)  # members of the query's document in the ring
        back = jnp.arange(w, dtype=jnp.int32) - (rank[..., None] + 1)  # 0: the newest one in the ring
        member = before[..., None] - 1 - back
        old = (back >= 0) & (member >= 0)
        pad = ((0, 0), (0, 0), (0, 0), (0, w - index.shape[-1]))
        index, valid = jnp.pad(index + slots, pad), jnp.pad(valid, pad)
        index = jnp.where(old, cluster[..., None] * w + member % w, index)
        flat = lambda old, y: jnp.concatenate([old.astype(y.dtype).reshape(B, slots, H, -1), y], axis=1)
        keys = tuple(map(flat, (rings.k, rings.v), new))
        # What remains: the last document's members.
        last = documents[:, -1:]
        mine = (documents == last)[..., None]
        ours = mine[..., None] & (cluster[..., None] == jnp.arange(c.clusters))
        count = jnp.where(last[..., None] == 0, rings.count, 0) + ours.sum(1, dtype=jnp.int32)
        number = before + rank
        total = jnp.take_along_axis(count, cluster.swapaxes(1, 2), axis=-1).swapaxes(1, 2)
        slot = jnp.where(mine & (number >= total - w), number % w, w)  # w: not kept
        at = jnp.arange(B)[:, None, None], cluster, slot, jnp.arange(H)
        put = lambda ring, y: ring.at[at].set(y.astype(ring.dtype), mode="drop")
        return index, valid | old, Rings(put(rings.k, new[0]), put(rings.v, new[1]), count), keys


def _newest(first_BT: jax.Array, cluster_BTH: jax.Array, w: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The last w members of each position's cluster in its document, itself first: index and validity [B, T, H, w]; and
    how many there are before it, [B, T, H]. `first_BT`: the name of the first cluster of the position's document.

    Positions are sorted by document and cluster, and stay in order within them: members lie side by side.
    """
    B, T, H = cluster_BTH.shape
    name = (first_BT[..., None] + cluster_BTH).swapaxes(1, 2)  # [B, H, T]
    order = jnp.argsort(name, axis=-1, stable=True).astype(jnp.int32)
    place = jnp.argsort(order, axis=-1).astype(jnp.int32)
    ordered, t = jnp.take_along_axis(name, order, axis=-1), jnp.arange(T, dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones((B, H, 1), bool), ordered[..., 1:] != ordered[..., :-1]], axis=-1)
    start = jax.lax.cummax(jnp.where(begins, t, 0), axis=2)
    rank = place - jnp.take_along_axis(start, place, axis=-1)
    back = jnp.arange(w, dtype=jnp.int32)
    at = jnp.maximum(place[..., None] - back, 0)
    index = jnp.take_along_axis(order, at.reshape(B, H, -1), axis=-1).reshape(B, H, T, w)
    valid = back <= rank[..., None]
    return index.swapaxes(1, 2), valid.swapaxes(1, 2), rank.swapaxes(1, 2)


def _all_pairs(q, v, documents, cluster, window: int, scale: float) -> jax.Array:
    """The definition: every pair, most of them hidden."""
    wide, T = jnp.promote_types(q.dtype, jnp.float32), q.shape[1]
    cluster = cluster.swapaxes(1, 2)
    same = (cluster[..., :, None] == cluster[..., None, :]) & (documents[:, :, None] == documents[:, None])[:, None]
    same &= jnp.tril(jnp.ones((T, T), bool))
    later = same.sum(-1)[..., None] - same.sum(-1)[..., None, :]  # members after s, up to t
    seen = same & (later < window)
    logits = jnp.einsum("bthd,bshd->bhts", q.astype(wide), q.astype(wide), precision="highest") * scale
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshe->bthe", weights, v.astype(wide), precision="highest").astype(q.dtype)
