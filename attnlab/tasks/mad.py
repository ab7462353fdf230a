"""The six tasks of MAD: three kinds of recall, selective copying, memorising, compressing.

Recall: a row is `key value key value ..`, what a key stands for is fixed within a row, and the value of a key that was
seen before is to be told. Ids: 0 is filler, the first half of `vocab` after it are keys, the second values, then noise.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.copying import CopyConfig, SelectiveCopy
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig, buckets, other_than

_SOURCE = "Poli et al. 2024, Mechanistic Design and Scaling of Hybrid Architectures (MAD), arXiv:2403.17844"


@dataclasses.dataclass(frozen=True)
class RecallConfig(TokenTaskConfig):
    """In-context recall."""

    vocab: int = knob(16, "ids of keys and values, half of each; even", other=(32,), least=4)
    length: int = knob(128, "T", other=(64,), least=8)
    noise: float = knob(0.0, "share of pairs in whose place noise ids stand", least=0, below=1)
    noise_vocab: int = knob(0, "noise ids", least=0)
    motif: int = knob(1, "ids of a key and of a value, at most; held-out rows have keys of that many", least=1)
    items: int = knob(8, "different keys of a row, at most", other=(4,), least=2)
    loss: str = knob("scored", "scored: of answers; all: training also tells every next token, as the publication does",
                     other=("all",), choices=("scored", "all"))  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        need, half = config_lib.require, self.vocab // 2
        need(self.vocab % 2 == 0, "data.vocab", self.vocab, "an even number")
        need((self.noise > 0) == (self.noise_vocab > 0), "data.noise_vocab", self.noise_vocab,
             "1 or more where data.noise is above 0, else 0")  # fmt: skip
        need(self.motif <= half // 2, "data.motif", self.motif, f"at most {half // 2} with data.vocab = {self.vocab}")
        most = half if self.motif == 1 else half * (half - 1)
        need(self.items <= most, "data.items", self.items, f"at most {most} with data.vocab = {self.vocab}")
        least = 2 * self.motif * (self.items + 2) * (2 if self.noise else 1)
        need(self.length >= least, "data.length", self.length, f"{least} or more for {self.items} keys")

    @property
    def ids(self) -> int:
        return 1 + self.vocab + self.noise_vocab


class Recall(TokenTask):
    """What the three recall tasks share."""

    Config = RecallConfig
    source = _SOURCE

    def example(self, stream: Stream, split: str) -> Arrays:
        c, half = self.config, self.config.vocab // 2
        keys = self._motifs(stream, 1, fixed=split != "train", distinct=True)
        values = self._motifs(stream, 1 + half, fixed=False, distinct=False)
        text: list[int] = []
        told: list[tuple[int, int]] = []  # position of a value's id, and the id
        seen: set[int] = set()
        for item, noisy in zip(stream.integers(c.items, c.length), stream.uniform(c.length) < c.noise):
            pair = (1 + c.vocab + stream.integers(c.noise_vocab, 2)).tolist() if noisy else [*keys[item], *values[item]]
            if len(text) + len(pair) > c.length:
                break
            if not noisy and item in seen:
                first = len(text) + len(keys[item])
                told += [(first + i, v) for i, v in enumerate(values[item])]
            if not noisy:
                seen.add(int(item))
            text += pair
        tokens, targets, weights = np.zeros((3, c.length), np.int64)
        pad = c.length - len(text)  # on the left
        tokens[pad:] = text
        for at, value in told:
            targets[pad + at - 1], weights[pad + at - 1] = value, 1
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def _motifs(self, stream: Stream, first: int, *, fixed: bool, distinct: bool) -> list[list[int]]:
        """One per item, of different ids in each; all of full length where it is fixed."""
        c, half = self.config, self.config.vocab // 2
        if c.motif == 1:
            drawn = stream.distinct(c.items, half) if distinct else stream.integers(half, c.items)
            return [[first + int(i)] for i in drawn]
        found: list[list[int]] = []
        while len(found) < c.items:
            ids = (first + stream.distinct(c.motif, half)).tolist()
            ids = ids if fixed else ids[: 1 + stream.integer(c.motif)]
            if not distinct or ids not in found:
                found.append(ids)
        return found

    def solve(self, row: Arrays) -> np.ndarray:
        """Reads from left to right; of a key seen before it tells the value, and of a value begun the rest."""
        half, out = self.config.vocab // 2, []
        known: dict[tuple[int, ...], list[int]] = {}
        key: list[int] = []
        value: list[int] = []
        is_key = lambda t: 1 <= t <= half
        is_value = lambda t: half < t <= 2 * half
        for token in row["tokens"].tolist():
            if not is_value(token) and value:
                known[tuple(key)], key, value = value, [], []
            key = [*key, token] if is_key(token) else key if is_value(token) else []
            value = [*value, token] if is_value(token) else []
            before = known.get(tuple(key), [])
            out.append(before[len(value)] if key and len(value) < len(before) else 0)
        return np.array(out)

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """Wherever the first value that is asked for stands before, another id of its kind does."""
        tokens, half = row["tokens"].copy(), self.config.vocab // 2
        asked = int(np.flatnonzero(row["weights"])[0])
        begin = asked
        while begin and 1 <= tokens[begin - 1] <= half:
            begin -= 1
        key = tokens[begin : asked + 1]
        n = len(key)
        at = next(i for i in range(begin) if (tokens[i : i + n] == key).all() and not (i and 1 <= tokens[i - 1] <= half)
                  and half < tokens[i + n] <= 2 * half)  # fmt: skip
        tokens[at + n] = other_than(stream, tokens[at + n], 1 + half, half)
        return {**row, "tokens": tokens}

    def answers(self) -> int | None:
        return self.config.vocab // 2

    def slices(self, rows: Arrays) -> Slices:
        """By position in the row: the later, the more was told."""
        place = np.where(rows["weights"] > 0, np.arange(self.config.length), -1)
        return {"position": buckets(place, self.config.length - 1)}


@register("mad_recall")
class MadRecall(Recall):
    """`k v k v ..`: the value of every key that was seen before."""

    title = "in-context recall"
    variants = ({"noise": 0.3, "noise_vocab": 4}, {"motif": 2})


@dataclasses.dataclass(frozen=True)
class NoisyRecallConfig(RecallConfig):
    """Noisy in-context recall."""

    noise: float = knob(0.2, "share of pairs in whose place noise ids stand", other=(0.6,), least=0, below=1)
    noise_vocab: int = knob(16, "noise ids", other=(8,), least=0)


@register("mad_noisy_recall")
class MadNoisyRecall(Recall):
    """Recall with noise ids between the pairs."""

    Config = NoisyRecallConfig
    variants = ({"length": 256, "motif": 2},)
    title = "in-context recall among noise"


@dataclasses.dataclass(frozen=True)
class FuzzyRecallConfig(RecallConfig):
    """Fuzzy in-context recall."""

    motif: int = knob(
        3, "ids of a key and of a value, at most; held-out rows have keys of that many", other=(2,), least=1
    )


@register("mad_fuzzy_recall")
class MadFuzzyRecall(Recall):
    """Recall where keys and values are one to three ids."""

    Config = FuzzyRecallConfig
    title = "in-context recall of keys and values of several tokens"
    variants = ({"noise": 0.3, "noise_vocab": 4},)

    def answers(self) -> None:
        return None  # within a motif no id comes twice


@dataclasses.dataclass(frozen=True)
class MadCopyConfig(CopyConfig):
    """Selective copying at MAD's sizes."""

    items: int = knob(16, "items of a row, at most", other=(8,), least=1)
    length: int = knob(256, "T; what is not needed is blank", other=(128,), least=3)


@register("mad_selective_copy")
class MadSelectiveCopy(SelectiveCopy):
    """Selective copying at MAD's sizes."""

    Config = MadCopyConfig
    source = _SOURCE


@dataclasses.dataclass(frozen=True)
class MemoriseConfig(TokenTaskConfig):
    """Memorisation."""

    vocab: int = knob(256, "ids of keys and values, half of each; even", other=(128,), least=4)
    length: int = knob(32, "T, even", other=(16,), least=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.require(self.vocab % 2 == 0, "data.vocab", self.vocab, "an even number")
        config_lib.require(self.length % 2 == 0, "data.length", self.length, "an even number")

    @property
    def ids(self) -> int:
        return self.vocab + 1

    def different(self) -> float:
        return float(self.vocab // 2) ** min(self.length // 2, 99)


@register("mad_memorise")
class MadMemorise(TokenTask):
    """`k ? k ? ..`: what each key stands for is the same in all rows, and stands in none."""

    Config = MemoriseConfig
    title = "memorising a fixed table in the weights"
    source = _SOURCE

    def _value_of(self, keys: np.ndarray) -> np.ndarray:
        c = self.config
        table = Stream(["the table of mad_memorise", c.vocab, c.seed], 0).permutation(c.vocab // 2)
        return c.vocab // 2 + table[keys]

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        keys = stream.integers(c.vocab // 2, c.length // 2)
        tokens, targets, weights = np.full(c.length, c.vocab), np.zeros(c.length, np.int64), np.zeros(c.length)
        tokens[0::2], targets[1::2], weights[1::2] = keys, self._value_of(keys), 1
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def solve(self, row: Arrays) -> np.ndarray:
        return np.repeat(self._value_of(row["tokens"][0::2]), 2)

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        tokens, c = row["tokens"].copy(), self.config
        at = 2 * stream.integer(c.length // 2)
        tokens[at] = other_than(stream, tokens[at], 0, c.vocab // 2)
        return {**row, "tokens": tokens}

    def answers(self) -> int:
        return self.config.vocab // 2


@dataclasses.dataclass(frozen=True)
class CompressConfig(TokenTaskConfig):
    """Compression."""

    vocab: int = knob(16, "different ids", other=(8,), least=2)
    length: int = knob(32, "T, the mark at the end among them", other=(16,), least=2)

    @property
    def ids(self) -> int:
        return self.vocab + 1

    def fitting(self) -> dict[str, Any]:
        return {"name": "compressor", "vocab": self.ids}

    def batch_spec(self) -> batch_lib.Spec:
        spec = super().batch_spec()
        return {**spec, "targets": dataclasses.replace(spec["targets"], about=batch_lib.OWN)}


@register("mad_compress")
class MadCompress(TokenTask):
    """Every id of a row is to be told from the state at the row's end."""

    Config = CompressConfig
    title = "compressing a row into one vector"
    source = _SOURCE

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        tokens = np.append(stream.integers(c.vocab, c.length - 1), c.vocab)
        return {"tokens": tokens, "targets": tokens, "weights": tokens < c.vocab}

    def solve(self, row: Arrays) -> np.ndarray:
        return row["tokens"]

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        tokens, c = row["tokens"].copy(), self.config
        at = stream.integer(c.length - 1)
        tokens[at] = other_than(stream, tokens[at], 0, c.vocab)
        return {**row, "tokens": tokens}

    def answers(self) -> int:
        return self.config.vocab

    def slices(self, rows: Arrays) -> Slices:
        """By position in the row."""
        place = np.where(rows["weights"] > 0, np.arange(self.config.length), -1)
        return {"position": buckets(place, self.config.length - 2)}
