"""Tasks whose answer stands in a context: one asks for values by key, the other copies.

With the tasks of one sequence they make the four patterns of attention: to itself or to a context, in order or not.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import numpy as np

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import TokenTask, TokenTaskConfig, other_than

_SOURCE = "ours, for the patterns of Zhang et al. 2023, CAB, arXiv:2210.07661"


class CrossTaskConfig(TokenTaskConfig):
    """What tasks with a context of items share."""

    @property
    @abc.abstractmethod
    def items(self) -> tuple[int, int]:
        """Items of the context, and ids of each."""

    def batch_spec(self) -> batch_lib.Spec:
        spec = super().batch_spec()
        said = spec["tokens"].said
        return {**spec, "context": batch_lib.Field(self.items, "int32", (None, None), ids=self.ids, said=said)}

    def fitting(self) -> dict[str, Any]:
        return {"name": "reader", "vocab": self.ids}


@dataclasses.dataclass(frozen=True)
class RetrieveConfig(CrossTaskConfig):
    """Retrieval from a context."""

    length: int = knob(16, "T, keys asked for", other=(8,), least=1)
    pairs: int = knob(16, "items of the context, each a key and its value", other=(24,), least=1)
    vocab: int = knob(256, "V: half are keys, half values; even", other=(128,), least=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.require(self.vocab % 2 == 0, "data.vocab", self.vocab, "an even number")
        most = self.vocab // 2
        config_lib.require(
            self.pairs <= most, "data.pairs", self.pairs, f"at most {most} with data.vocab = {self.vocab}"
        )

    @property
    def ids(self) -> int:
        return self.vocab

    @property
    def items(self) -> tuple[int, int]:
        return self.pairs, 2


@register("retrieve")
class Retrieve(TokenTask):
    """The value of each key, which stands in the context beside it; positions have nothing to do with each other."""

    Config = RetrieveConfig
    inputs = ("tokens", "context")
    title = "values by key from a context"
    source = _SOURCE

    def example(self, stream: Stream, split: str) -> Arrays:
        c, half = self.config, self.config.vocab // 2
        keys, values = stream.distinct(c.pairs, half), half + stream.distinct(c.pairs, half)
        asked = stream.integers(c.pairs, c.length)
        context = np.column_stack([keys, values])
        return {"tokens": keys[asked], "targets": values[asked], "weights": np.ones(c.length), "context": context}

    def solve(self, row: Arrays) -> np.ndarray:
        told = dict(row["context"].tolist())
        return np.array([told[key] for key in row["tokens"].tolist()])

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        context, half = row["context"].copy(), self.config.vocab // 2
        at = np.flatnonzero(context[:, 0] == row["tokens"][0])[0]
        context[at, 1] = other_than(stream, context[at, 1], half, half)
        return {**row, "context": context}

    def answers(self) -> int:
        return self.config.vocab // 2


@dataclasses.dataclass(frozen=True)
class RegionsConfig(CrossTaskConfig):
    """Retrieval from a part of a context."""

    length: int = knob(16, "T, keys asked for", other=(8,), least=1)
    regions: int = knob(4, "parts of the context, R", other=(2,), least=2, below=32)
    pairs: int = knob(4, "keys; each is in every part, with a value of its own there", other=(6,), least=1)
    vocab: int = knob(256, "V: half are keys, half values; even", other=(128,), least=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.require(self.vocab % 2 == 0, "data.vocab", self.vocab, "an even number")
        most = self.vocab // 2 // self.regions
        allowed = f"at most {most} with data.vocab = {self.vocab} and data.regions = {self.regions}"
        config_lib.require(self.pairs <= most, "data.pairs", self.pairs, allowed)

    @property
    def ids(self) -> int:
        return self.vocab

    @property
    def items(self) -> tuple[int, int]:
        return self.regions * self.pairs, 2

    def batch_spec(self) -> batch_lib.Spec:
        node = batch_lib.Field((self.length,), "int32", ("seq",))
        of_items = batch_lib.Field(self.items[:1], "int32", (None,))
        return {**super().batch_spec(), "node": node, "context_node": of_items}


@register("regions")
class Regions(TokenTask):
    """The value that a key has in the part of the context that a position belongs to.

    `node` and `context_node` say which part that is, from 1, and no token does: a mask that reads them must.
    """

    Config = RegionsConfig
    inputs = ("tokens", "context", "node", "context_node")
    title = "values by key from one part of a context, told by numbers alone"
    source = "ours, for masks of regions (after Wang et al. 2024, PrimeComposer, arXiv:2403.05053)"

    def example(self, stream: Stream, split: str) -> Arrays:
        c, half = self.config, self.config.vocab // 2
        count, _ = c.items
        keys, values = stream.distinct(c.pairs, half), half + stream.distinct(count, half)
        order, asked = stream.permutation(count), stream.integers(count, c.length)
        row = {"tokens": keys[asked % c.pairs], "node": 1 + asked // c.pairs, "targets": values[asked]}
        context = np.column_stack([keys[order % c.pairs], values[order]])
        return {**row, "weights": np.ones(c.length), "context": context, "context_node": 1 + order // c.pairs}

    def solve(self, row: Arrays) -> np.ndarray:
        return row["context"][[self._item(row, t) for t in range(self.config.length)], 1]

    def _item(self, row: Arrays, t: int) -> int:
        """Which item position t asks for."""
        here = (row["context"][:, 0] == row["tokens"][t]) & (row["context_node"] == row["node"][t])
        return int(np.flatnonzero(here)[0])

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        context, half = row["context"].copy(), self.config.vocab // 2
        at = self._item(row, 0)
        context[at, 1] = other_than(stream, context[at, 1], half, half)
        return {**row, "context": context}

    def answers(self) -> int:
        return self.config.vocab // 2


@dataclasses.dataclass(frozen=True)
class TranscribeConfig(CrossTaskConfig):
    """Copying a context."""

    length: int = knob(32, "T, ids of the context, and of the copy", other=(16,), least=1)
    vocab: int = knob(16, "different ids", other=(8,), least=2)

    @property
    def ids(self) -> int:
        return self.vocab + 1

    @property
    def items(self) -> tuple[int, int]:
        return self.length, 1


@register("transcribe")
class Transcribe(TokenTask):
    """`START x1 x2 ..`: what comes next, which the context says at the same place."""

    Config = TranscribeConfig
    inputs = ("tokens", "context")
    title = "writing a context down in its order"
    source = _SOURCE

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        x = stream.integers(c.vocab, c.length)
        tokens = np.append(c.vocab, x[:-1])
        return {"tokens": tokens, "targets": x, "weights": np.ones(c.length), "context": x[:, None]}

    def solve(self, row: Arrays) -> np.ndarray:
        return row["context"][:, 0]

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        context, c = row["context"].copy(), self.config
        at = stream.integer(c.length)
        context[at] = other_than(stream, context[at, 0], 0, c.vocab)
        return {**row, "context": context}

    def answers(self) -> int:
        return self.config.vocab
