"""VMoBA: block attention of videos, whose blocks are chosen by their share of all scores, cut anew in every layer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.grouped import GroupedConfig, GroupedMixer
from attnlab.mixers.sequence import Sequence
from attnlab.ops.attention import ATTENTION, attention
from attnlab.ops.key_blocks import by_rows
from attnlab.ops.mask_algebra import packed_bits
from attnlab.ops.masks import Array, Groups, numpy_if
from attnlab.ops.share_choice import best, by_share, take_rows

_IMPLS = "definition", "tiles"
_BEFORE = "vmoba_layers"
_CUTS = "1d", "2d", "3d"
_ROWS = 32  # of packed documents, whose scores are computed together, at least
POOLS = {
    "head": "all rows and blocks of a head",
    "row": "the blocks of one row of a head",
    "block": "all rows and heads of a block",
    "all": "everything",
}


@dataclasses.dataclass(frozen=True)
class VMoBAConfig(GroupedConfig):
    """Knobs of VMoBA."""

    causal: ClassVar[bool] = False

    frame: tuple[int, ...] = knob(
        (1, 1), "rows and columns of a frame; a document is frames one after the other, each row by row",
        other=((1, 2),),
    )  # fmt: skip
    line: int = knob(64, "positions of a block of the cut 1d, one after the other", other=(3,), least=1)
    area: tuple[int, ...] = knob((8, 8), "rows and columns of a block of the cut 2d, in all frames", other=((1, 1),))
    volume: tuple[int, ...] = knob((4, 8, 8), "frames, rows and columns of a block of the cut 3d", other=((2, 1, 1),))
    cut: str = knob(
        "cycle", "how positions are cut into blocks: 1d, 2d, 3d, or cycle: these one after the other, in the layers "
        "of a stack that cycle",
        other=_CUTS, choices=("cycle", *_CUTS),
    )  # fmt: skip
    pool: str = knob(
        "head", f"what scores compete in; {'; '.join(f'{k}: {v}' for k, v in POOLS.items())}",
        other=("row", "block", "all"), choices=POOLS,
    )  # fmt: skip
    threshold: float = knob(
        0.25, "share of a pool's scores that is to be chosen; above 1: everything; as it is where top_k is set",
        other=(0.6,), least=0,
    )  # fmt: skip
    top_k: int | None = knob(
        None, "blocks per row of a head that a pool has, on average, in place of a share; none: by share", other=(2,),
        least=1,
    )  # fmt: skip
    impl: str = knob(
        "auto", "auto (tiles), tiles (those that no row chose are skipped), definition (all pairs)",
        other=("definition",), choices=("auto", *_IMPLS),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, count in (("frame", 2), ("area", 2), ("volume", 3)):
            value = getattr(self, key)
            good = len(value) == count and all(n >= 1 for n in value)
            config_lib.require(good, key, value, f"{count} numbers, each 1 or more")
        config_lib.require(self.top_k is None or self.pool != "block", "top_k", self.top_k, "none where pool is block")
        default = type(self).threshold
        given = self.top_k is None or self.threshold == default
        config_lib.require(given, "threshold", self.threshold, f"{default}, the default, where top_k is set")

    @property
    def cuts(self) -> tuple[str, ...]:
        """Those that there are."""
        return _CUTS if self.cut == "cycle" else (self.cut,)

    def block_of(self, cut: str, offset: Array) -> Array:
        """The number of each position's block in its document."""
        if cut == "1d":
            return offset // self.line
        columns = self.frame[1]
        t, cell = offset // (self.frame[0] * columns), offset % (self.frame[0] * columns)
        frames, (rows, wide) = (1, self.area) if cut == "2d" else (self.volume[0], self.volume[1:])
        down, across = -(-self.frame[0] // rows), -(-columns // wide)
        place = (cell // columns // rows) * across + (cell % columns) // wide
        return place if cut == "2d" else t // frames * (down * across) + place

    def blocks(self, length: int) -> int:
        """Most blocks of a document of so many positions, over the cuts."""
        return max(len(np.unique(self.block_of(cut, np.arange(length)))) for cut in self.cuts)


@register("vmoba")
class VMoBA(GroupedMixer):
    """Softmax attention, both ways, to the own block and to those whose mean keys score best among a pool of scores.

    A score is `q . mean of the block's keys`, both after RoPE, in fp32. Scores of a pool become numbers from 0 to 1,
    `(s - min) / (max - min)`; chosen are the own blocks and, of the others, the best ones until all chosen make up
    `threshold` of the pool's sum, one at least. With `top_k` it is a number of blocks in place of a share. Pools are of
    one document. Blocks are runs of positions (1d), areas of all frames (2d) or boxes (3d), in turn over the layers
    of the stack that cycle; by itself a layer is the first of these. Neither scores nor means have a gradient.
    """

    Config = VMoBAConfig
    capabilities = Capabilities(causal=False, bidirectional=True, streaming=False)
    sequence_parallel = "keys, values and scores are gathered, queries stay where they are"
    paper = "Wu et al. 2025, VMoBA: Mixture-of-Block Attention for Video Diffusion Models, arXiv:2506.23858"
    extension = "frames that blocks do not divide; several documents in a row; of equal scores the first"
    implementations = {name: ATTENTION.table[name] for name in _IMPLS}
    variants = (
        {"frame": (2, 2), "volume": (1, 1, 2), "cut": "3d", "pool": "all", "kv_heads": 2, "threshold": 0.4},
        {"line": 2, "cut": "1d", "pool": "row", "top_k": 2, "rope_base": None, "bias": "all"},
    )

    def heads(self, x: jax.Array, seq: Sequence, carried: None = None) -> MixerOutput:
        """As in the contract; it does not stream."""
        c, (q, k, v) = self.config, self.positioned(x, seq)
        block = self.places(seq)
        bits = packed_bits(self.chosen(q, k, block, seq))
        groups = Groups(block, jnp.moveaxis(bits, 2, 1), chosen=True)
        mask = dataclasses.replace(seq.mask(causal=False), groups=groups, documents=False)
        number = (seq.shared or {}).get(_BEFORE)
        shared = {} if number is None or c.cut != "cycle" else {_BEFORE: number + 1}
        return MixerOutput(attention(q, k, v, mask, impl=c.impl), None, shared=shared)

    def init_shared(self, batch: int, length: int) -> dict[str, jax.Array]:
        return {_BEFORE: jnp.int32(0)} if self.config.cut == "cycle" else {}

    def places(self, seq: Sequence) -> Array:
        """The number of each position's block in its document, int32 [B or 1, T]."""
        c, T = self.config, seq.positions.shape[1]
        xp = numpy_if(seq.offsets is None)
        offset = np.arange(T, dtype=np.int32)[None] if seq.offsets is None else seq.offsets
        found = xp.stack([c.block_of(cut, offset) for cut in c.cuts]).astype(xp.int32)
        if len(found) > 1 and _BEFORE in (seq.shared or {}):
            return jnp.asarray(found)[seq.shared[_BEFORE] % len(found)]
        return found[0]

    def chosen(self, q: jax.Array, k: jax.Array, block: Array, seq: Sequence) -> jax.Array:
        """Which blocks of its document each query head attends to at each position: bool [B, T, H, N]."""
        (B, T, H, d), K, N = q.shape, k.shape[2], self.config.blocks(q.shape[1])
        q, k = jax.lax.stop_gradient((q, k))
        wide = jnp.promote_types(q.dtype, jnp.float32)
        rows, block = jnp.arange(B)[:, None], jnp.broadcast_to(jnp.asarray(block), (B, T))
        document = jnp.zeros((B, T), jnp.int32) if seq.documents is None else seq.documents
        many = jnp.zeros((B, _documents(seq)), jnp.int32).at[rows, document].max(block + 1)
        first, many = (take_rows(x, document) for x in (jnp.cumsum(many, axis=1) - many, many))
        # Blocks of all documents stand one after the other: T positions have no more than T.
        entries, entry = N if seq.documents is None else T, first + block
        counts = jnp.zeros((B, entries), wide).at[rows, entry].add(1.0)
        sums = jnp.zeros((B, entries, K, d), wide).at[rows, entry].add(k.astype(wide))
        means = sums / jnp.maximum(counts, 1)[..., None, None]
        q = q.astype(wide).reshape(B, T, K, H // K, d)
        scores = _scores(q, means) if seq.documents is None else _scores_of_documents(q, means, first, N)
        scores = jnp.moveaxis(scores.reshape(B, T, H, N), 2, 1)
        number = jnp.arange(N, dtype=jnp.int32)
        valid = (number < many[..., None])[:, None]
        if seq.padding is not None:
            valid &= ~seq.padding[:, None, :, None]
        own = block[:, None, :, None] == number
        return jnp.moveaxis(self._in_pools(scores, own & valid, valid, document, _documents(seq)), 1, 2)

    def _in_pools(
        self, scores: jax.Array, own: jax.Array, valid: jax.Array, document: jax.Array, documents: int
    ) -> jax.Array:
        """The choice, [B, H, T, N], made in each pool."""
        c, (B, H, T, N) = self.config, scores.shape
        axes = (0, 3, 1, 2) if c.pool == "block" else (0, 1, 2, 3)
        shape = {"row": (B * H * T, N), "head": (B * H, T * N), "all": (B, H * T * N), "block": (B * N, H * T)}[c.pool]
        within = lambda y: jnp.broadcast_to(y, scores.shape).transpose(axes).reshape(shape)
        mixed = c.pool != "row"  # whether what a pool holds may be of several documents
        of, documents = (within(document[:, None, :, None]), documents) if mixed else (jnp.zeros(shape, jnp.int32), 1)
        args = within(scores), within(own), within(valid), of
        if c.top_k is None:
            found = by_share(*args, documents, c.threshold)
        else:
            rows = jnp.ones((shape[0], 1), jnp.int32)
            if mixed:
                lengths = jnp.zeros((B, documents), jnp.int32).at[jnp.arange(B)[:, None], document].add(1)
                rows = jnp.repeat(lengths, shape[0] // B, axis=0) * (H if c.pool == "all" else 1)
            found = best(*args, c.top_k * rows)
        return found.reshape([scores.shape[axis] for axis in axes]).transpose(np.argsort(axes))

    @classmethod
    def flops(cls, config: VMoBAConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        inner = config.heads * config.head_dim(width)
        return {
            "projections": cls.projection_flops(config, width),
            "gate": 2.0 * inner * config.blocks(length),
            "attention": 4.0 * inner * length,
        }, float(length)


def _documents(seq: Sequence) -> int:
    """How many numbers there may be in `Sequence.documents`."""
    return 1 if seq.documents is None else 1 + seq.positions.shape[1]


def _scores(q_BTKgd: jax.Array, means_BNKd: jax.Array) -> jax.Array:
    """[B, T, K, g, N]."""
    return jnp.einsum("btkgd,bnkd->btkgn", q_BTKgd, means_BNKd, precision="highest")


def _scores_of_documents(q_BTKgd: jax.Array, means_BTKd: jax.Array, first_BT: jax.Array, blocks: int) -> jax.Array:
    """`q[t] . means[first[t] + n]`, [B, T, K, g, N], n below `blocks`: anything behind the last block of a document.

    Args:
      means_BTKd: of the blocks of all documents, those of each in a row.
      first_BT: the entry that is the first of a position's document, which has `blocks` at most.

    As many rows as there are blocks, `_ROWS` at least, are computed at a time, with the entries that they may read: the
    document of the first row and that of the last have N at most, those between them no more than the rows between.
    """
    T = q_BTKgd.shape[1]
    rows, number = max(blocks, _ROWS), jnp.arange(blocks, dtype=jnp.int32)
    entries = min(T, 2 * blocks + rows - 2)

    def of_rows(q, first):
        here = jnp.minimum(first[:, :1] + jnp.arange(entries, dtype=jnp.int32), T - 1)
        scores = _scores(q, means_BTKd[jnp.arange(len(q))[:, None], here])
        at = jnp.clip((first - first[:, :1])[..., None] + number, 0, entries - 1)
        return jnp.take_along_axis(scores, at[:, :, None, None], axis=-1)

    return by_rows(of_rows, q_BTKgd, first_BT, rows=rows)
