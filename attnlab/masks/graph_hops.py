"""Nodes of a graph that see no further than some edges: positions that carry a node's number, and text beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.masks.base import MaskConfig, NodeMask, Sequence, register, relation, require_relation
from attnlab.ops.mask_algebra import packed_bits
from attnlab.ops.masks import Array


@dataclasses.dataclass(frozen=True)
class GraphHopsConfig(MaskConfig):
    """Knobs of a graph."""

    path: str = knob("", "a .npy file, bool [n, n]: from which node (rows) an edge goes to which", other=("graph.npy",))
    hops: int = knob(1, "edges that a position sees along; 0: its own node alone", other=(0, 2), least=0)
    grow: int = knob(
        0, "steps of training over which edges grow from `first` to `hops`, evenly; 0: they are `hops` from the start",
        other=(8,), least=0,
    )  # fmt: skip
    first: int = knob(0, "edges in the first step of training, where grow is above 0", other=(1,), least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_relation(self.path)
        config_lib.require(self.first == 0 or self.grow > 0, "first", self.first, "0 where grow is 0")
        config_lib.require(self.first <= self.hops, "first", self.first, f"at most hops, {self.hops}")


@register("graph_hops")
class GraphHops(NodeMask):
    """A position sees those whose node can be reached from its own along at most `hops` edges.

    `Sequence.node` is 0 for text, which sees all nodes and is seen by all, and i for node i - 1 of the table. Positions
    of another number see nothing, and nobody sees them. In causal mixing it is the earlier ones of these. Hops are no
    parameter: a run that goes on with another number of them goes on with its checkpoint.

    With `grow` a training step, counted from 0, has `first + floor((hops - first) min(step, grow) / grow)` of them;
    evaluation and decoding have `hops`.
    """

    Config = GraphHopsConfig
    paper = "Guan et al. 2025, Attention Mechanisms Perspective: ... Graph-Structured Data, arXiv:2505.02130"
    extension = (
        "a window of hops as a table of nodes, with text that sees all of them, and how the window grows; read "
        "from the abstract alone"
    )

    def __init__(self, config: GraphHopsConfig):
        super().__init__(config)
        edges = relation(self.name, config.path)
        self._sees = np.ones((len(edges) + 1,) * 2, bool)
        words = []
        for hops, found in enumerate(reached(edges, config.hops)):
            self._sees[1:, 1:] = found
            if hops >= config.first and self.reads_step:
                words.append(packed_bits(self._sees))
        self._words = np.stack(words or [packed_bits(self._sees)])
        each = range(1, len(self._words))
        self._begin = np.array([-(-i * config.grow // (config.hops - config.first)) for i in each], np.int32)

    @property
    def reads_step(self) -> bool:
        return self.config.grow > 0

    def table(self) -> np.ndarray:
        return self._sees

    def bits(self, seq: Sequence) -> Array:
        if seq.step is None:
            return self._words[-1]
        return jnp.asarray(self._words)[jnp.sum(seq.step >= self._begin)]


def reached(edges: np.ndarray, hops: int) -> Iterator[np.ndarray]:
    """Which nodes are reached from each along at most 0, 1, 2, ... `hops` edges, itself included: bool [n, n] each.

    It ends with the last that is another than the one before.
    """
    step = edges | np.eye(len(edges), dtype=bool)
    found = np.eye(len(edges), dtype=bool)
    yield found
    for _ in range(min(hops, len(edges))):
        further = (found.astype(np.float32) @ step) > 0
        if (further == found).all():
            break
        found = further
        yield found
