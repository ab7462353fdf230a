"""Nodes of a graph that see no further than some edges: positions that carry a node's number, and text beside them."""

from __future__ import annotations

import dataclasses

import numpy as np

from attnlab.config import knob
from attnlab.masks.base import MaskConfig, NodeMask, register, relation


@dataclasses.dataclass(frozen=True)
class GraphHopsConfig(MaskConfig):
    """Knobs of a graph."""

    path: str = knob("", "a .npy file, bool [n, n]: from which node (rows) an edge goes to which", other=("graph.npy",))
    hops: int = knob(1, "edges that a position sees along; 0: its own node alone", other=(0, 2), least=0)


@register("graph_hops")
class GraphHops(NodeMask):
    """A position sees those whose node can be reached from its own along at most `hops` edges.

    `Sequence.node` is 0 for text, which sees all nodes and is seen by all, and i for node i - 1 of the table. Positions
    of another number see nothing, and nobody sees them. In causal mixing it is the earlier ones of these. Hops are no
    parameter: a run that goes on with another number of them goes on with its checkpoint.
    """

    Config = GraphHopsConfig
    paper = "Guan et al. 2025, Attention Mechanisms Perspective: ... Graph-Structured Data, arXiv:2505.02130"
    extension = "a window of hops as a table of nodes, with text that sees all of them; read from the abstract alone"

    def __init__(self, config: GraphHopsConfig):
        super().__init__(config)
        edges = relation(self.name, config.path)
        self._sees = np.ones((len(edges) + 1,) * 2, bool)
        self._sees[1:, 1:] = reached(edges, config.hops)

    def table(self) -> np.ndarray:
        return self._sees


def reached(edges: np.ndarray, hops: int) -> np.ndarray:
    """Which nodes are reached from each along at most `hops` edges, itself included: bool [n, n]."""
    step = edges | np.eye(len(edges), dtype=bool)
    found = np.eye(len(edges), dtype=bool)
    for _ in range(min(hops, len(edges))):
        further = (found.astype(np.float32) @ step) > 0
        if (further == found).all():
            break
        found = further
    return found
