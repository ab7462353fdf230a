"""In-context classification that emerges abruptly: is a label read from the context or from the weights?

K classes have means N(0, I/D) and labels k mod L, labels have vectors N(0, I/D), all fixed by the task's seed. A row
is N pairs of an item (its class's mean, with noise) and its label's vector, then an item whose label is to be told.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import numpy as np

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig, other_than

SETS = ("as_trained", "new_classes", "swapped_labels", "weights_only")
MOST_PAIRS = 32  # that the one-hot positions have room for


@dataclasses.dataclass(frozen=True)
class IclClassesConfig(TokenTaskConfig):
    """In-context classification."""

    length_field: ClassVar[str] = "pairs"

    classes: int = knob(256, "K, a multiple of labels", other=(64,), least=2)
    labels: int = knob(32, "L", other=(16,), least=2)
    pairs: int = knob(8, "N, items with labels before the one asked for", other=(4,), least=1)
    width: int = knob(63, "D, numbers of an item and of a label's vector", other=(31,), least=8)
    eps: float = knob(
        0.1, "of the noise on items: (mean + eps noise) / sqrt(1 + eps^2)", other=(0.2,), least=0, below=0.5
    )
    burst: int = knob(4, "times that each class of a bursty row is there, a divisor of pairs", other=(2,), least=1)
    p_burst: float = knob(
        1.0, "share of bursty rows: the item asked for is of one of their classes", other=(0.5,), least=0
    )
    p_novel: float = knob(
        0.0, "share of bursty rows whose classes are new, with labels for this row only", other=(0.5,), least=0
    )
    zipf: float = knob(0.0, "class k comes with probability ~ k^-zipf", other=(1.0,), least=0)
    positions: str = knob("rope", "rope: the mixers' own; onehot: 65 more inputs that say it, from a random offset on",
                          other=("onehot",), choices=("rope", "onehot"))  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        need(self.classes % self.labels == 0, "data.classes", self.classes, f"multiples of data.labels = {self.labels}")
        need(self.pairs % self.burst == 0, "data.burst", self.burst, f"divisors of data.pairs = {self.pairs}")
        need(
            self.pairs // self.burst <= self.classes,
            "data.pairs",
            self.pairs,
            "fewer: a bursty row has too many classes",
        )
        for key in ("p_burst", "p_novel"):
            need(getattr(self, key) <= 1, f"data.{key}", getattr(self, key), "0 to 1")
        room = self.positions == "rope" or self.pairs <= MOST_PAIRS
        need(room, "data.pairs", self.pairs, f"at most {MOST_PAIRS} where data.positions = 'onehot'")

    @property
    def length(self) -> int:
        return 2 * self.pairs + 1

    @property
    def ids(self) -> int:
        return self.labels

    @property
    def inputs(self) -> int:
        return self.width + (2 * MOST_PAIRS + 1 if self.positions == "onehot" else 0)

    def batch_spec(self) -> batch_lib.Spec:
        spec = dict(super().batch_spec())
        del spec["tokens"]
        return {"inputs": batch_lib.Field((self.length, self.inputs), "float32", ("seq", None))} | spec

    def fitting(self) -> dict[str, Any]:
        return {"name": "vectors", "vocab": self.labels, "inputs": self.inputs}


@register("icl_classes")
class IclClasses(TokenTask):
    """`item label item label .. item`. Held-out rows are of four sets, as likely, which the slices tell apart:

    as trained; of new classes, which the context alone tells; of known classes whose labels in the context are each the
    next one, which counts; and of classes that are not in the context, which the weights alone tell.
    """

    Config = IclClassesConfig
    inputs = ("inputs",)
    variants = ({"p_burst": 0.3, "p_novel": 0.3}, {"pairs": 16, "burst": 1})
    title = "labels from the context, or from the weights"
    source = "Reddy 2023, The mechanistic basis of data dependence and abrupt learning, arXiv:2312.03002"

    @functools.cached_property
    def _means(self) -> np.ndarray:
        c = self.config
        return Stream(["class means", c.seed, c.classes, c.width], 0).normal(c.classes, c.width) / np.sqrt(c.width)

    @functools.cached_property
    def _vectors(self) -> np.ndarray:
        c = self.config
        return Stream(["label vectors", c.seed, c.labels, c.width], 0).normal(c.labels, c.width) / np.sqrt(c.width)

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        chance = stream.uniform(2)
        kind = "as_trained" if split == "train" else SETS[stream.integer(len(SETS))]
        bursty = kind in SETS[1:3] or (kind == "as_trained" and chance[0] < c.p_burst)
        novel = kind == "new_classes" or (kind == "as_trained" and bursty and chance[1] < c.p_novel)
        if bursty:
            order = np.repeat(np.arange(c.pairs // c.burst), c.burst)[stream.permutation(c.pairs)]
            which = np.append(order, order[stream.integer(c.pairs)])
            known = stream.weighted(self._log_share, c.pairs // c.burst)
        else:
            which, known = np.arange(c.pairs + 1), self._independent(stream, kind == "weights_only")
        means, labels = self._means[known], known % c.labels
        if novel:
            means = stream.normal(len(known), c.width) / np.sqrt(c.width)
            labels = stream.integers(c.labels, len(known))
        if kind == "swapped_labels":
            labels = (labels + 1) % c.labels
        noise = stream.normal(c.pairs + 1, c.width) / np.sqrt(c.width)
        inputs = np.zeros((c.length, c.inputs))
        inputs[0::2, : c.width] = (means[which] + c.eps * noise) / np.sqrt(1 + c.eps**2)
        inputs[1::2, : c.width] = self._vectors[labels[which[:-1]]]
        if c.positions == "onehot":
            at = c.width + stream.integer(2 * (MOST_PAIRS - c.pairs) + 1) + np.arange(c.length)
            inputs[np.arange(c.length), at] = 1
        targets, weights = np.zeros((2, c.length), np.int64)
        targets[-1], weights[-1] = labels[which[-1]], 1
        return {"inputs": inputs, "targets": targets, "weights": weights}

    @property
    def _log_share(self) -> np.ndarray:
        return -self.config.zipf * np.log(np.arange(1, self.config.classes + 1))

    def _independent(self, stream: Stream, absent: bool) -> np.ndarray:
        """Classes of all items, each drawn by itself; the last is not among the others where it is to be absent."""
        c = self.config
        share = np.cumsum(np.exp(self._log_share))
        drawn = np.searchsorted(share / share[-1], stream.uniform(c.pairs + 1), side="right")
        if absent:
            others = np.setdiff1d(np.arange(c.classes), drawn[:-1])
            drawn[-1] = others[stream.integer(len(others))]
        return drawn

    def _read(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels told in the context [N], and which of its items are of the class of the one asked for [N]."""
        c = self.config
        items, told = inputs[0::2, : c.width], inputs[1::2, : c.width]
        labels = ((told[:, None] - self._vectors) ** 2).sum(-1).argmin(1)
        # Items of a class differ by 2 eps^2 / (1 + eps^2) on average, others by 2: between the two, by ratios.
        near = ((items[:-1] - items[-1]) ** 2).sum(-1) < 2 * np.sqrt(max(c.eps, 0.05) ** 2 / (1 + c.eps**2))
        return labels, near

    def solve(self, row: Arrays) -> np.ndarray:
        """The label of the nearest item of the same class; without one, that of the nearest class."""
        c, inputs = self.config, row["inputs"].astype(np.float64)
        labels, near = self._read(inputs)
        if near.any():
            return np.full(c.length, labels[near][0])
        item = inputs[-1, : c.width] * np.sqrt(1 + c.eps**2)
        return np.full(c.length, ((self._means - item) ** 2).sum(-1).argmin() % c.labels)

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """Labels of the class asked for become another; where it is not there, another class is asked for."""
        c, inputs = self.config, row["inputs"].copy()
        labels, near = self._read(inputs)
        answer = int(row["targets"][-1])
        other = other_than(stream, answer, 0, c.labels)
        if near.any():
            inputs[1::2, : c.width][near] = self._vectors[other]
        else:
            inputs[-1, : c.width] = self._means[other]
        return {**row, "inputs": inputs}

    def answers(self) -> int | None:
        return self.config.labels if self.config.zipf == 0 else None

    def slices(self, rows: Arrays) -> Slices:
        """By set, told from the rows: is the class there, is it known, does the context say what the weights do?"""
        c, found = self.config, []
        for inputs, targets in zip(rows["inputs"].astype(np.float64), rows["targets"]):
            _, near = self._read(inputs)
            away = ((self._means - inputs[-1, : c.width] * np.sqrt(1 + c.eps**2)) ** 2).sum(-1)
            known, label = away.min() < 0.5, away.argmin() % c.labels
            if not near.any():
                found.append(3)
            else:
                found.append(1 if not known else 0 if label == targets[-1] else 2)
        labels = ["context_or_weights", "context_new_classes", "context_swapped", "weights_only"]
        return {"set": (labels, np.array(found))}
