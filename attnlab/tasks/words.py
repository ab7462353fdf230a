"""Three tasks that read the whole haystack: variables that name each other, and words by how often they stand there."""

from __future__ import annotations

import abc
import dataclasses

import numpy as np

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig, place

_SOURCE = "Hsieh et al. 2024, RULER, arXiv:2404.06654; as ids, and the order of the answer, are ours"
LINE, ASK, NUMBERS = 0, 1, 2
MANY = 16  # numbers, and as many filler ids
_FILLER, _NAMES = NUMBERS + MANY, NUMBERS + 2 * MANY


@dataclasses.dataclass(frozen=True)
class VariablesConfig(TokenTaskConfig):
    """Variable tracking."""

    chains: int = knob(
        1, "numbers that variables stand for, one of which is asked for", other=(2,), least=1, below=MANY + 1
    )
    hops: int = knob(4, "assignments of a variable to the next, in every chain", other=(2,), least=0)
    length: int = knob(256, "T", other=(128,), least=8)
    vocab: int = knob(
        64, f"all ids: {_NAMES} are markers, numbers and filler, the rest names", other=(96,), least=_NAMES + 2
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        lines, names = self.chains * (self.hops + 1), self.vocab - _NAMES
        need(lines <= names, "data.hops", self.hops, f"at most {names // self.chains - 1} with {names} names")
        least = 3 * lines + 2 + self.hops
        need(self.length >= least, "data.length", self.length, f"{least} or more for {lines} lines and the question")

    @property
    def ids(self) -> int:
        return self.vocab

    @property
    def room(self) -> int:
        """Positions before the question."""
        return self.length - 2 - self.hops


@register("variables")
class Variables(TokenTask):
    """Lines `VAR a 7`, `VAR b a` .. among filler, then `ASK 7`: the names of 7 are to be told as they stand."""

    Config = VariablesConfig
    title = "following a chain of assignments"
    source = _SOURCE

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        steps, lines = c.hops + 1, c.chains * (c.hops + 1)
        names = _NAMES + stream.distinct(lines, c.vocab - _NAMES).reshape(c.chains, steps)
        numbers = NUMBERS + stream.distinct(c.chains, MANY)
        sources = np.column_stack([numbers, names[:, :-1]])
        chain = stream.permutation(lines) % c.chains
        step = np.zeros(lines, np.int64)
        for i in range(c.chains):
            step[chain == i] = np.arange(steps)
        tokens, (targets, weights) = _FILLER + stream.integers(MANY, c.length), np.zeros((2, c.length), np.int64)
        starts = place(stream, [3] * lines, c.room)
        text = np.column_stack([np.full(lines, LINE), names[chain, step], sources[chain, step]])
        tokens[starts[:, None] + np.arange(3)] = text
        asked = stream.integer(c.chains)
        tokens[c.room :] = [ASK, numbers[asked], *names[asked, :-1]]
        targets[c.room + 1 :], weights[c.room + 1 :] = names[asked], 1
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def solve(self, row: Arrays) -> np.ndarray:
        tokens, room = row["tokens"], self.config.room
        known, found, out = {int(tokens[room + 1])}, [], np.zeros(len(tokens), np.int64)
        for at in np.flatnonzero(tokens[:room] == LINE):
            if int(tokens[at + 2]) in known:
                known.add(int(tokens[at + 1]))
                found.append(tokens[at + 1])
        out[room + 1 : room + 1 + len(found)] = found
        return out

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """The first name of the chain becomes one that stands nowhere, and so do the rest."""
        tokens, c = row["tokens"].copy(), self.config
        lines = np.flatnonzero(tokens[: c.room] == LINE)
        first = next(at for at in lines if tokens[at + 2] == tokens[c.room + 1])
        used = set(tokens[lines + 1].tolist())
        spare = [name for name in range(_NAMES, c.vocab) if name not in used] or [_FILLER]
        tokens[first + 1] = spare[stream.integer(len(spare))]
        return {**row, "tokens": tokens}

    def answers(self) -> int:
        return self.config.vocab - _NAMES

    def slices(self, rows: Arrays) -> Slices:
        """By how many assignments lie before the name."""
        c = self.config
        hop = np.where(rows["weights"] > 0, np.arange(c.length) - c.room - 1, -1)
        return {"hops": ([str(i) for i in range(c.hops + 1)], hop)}


@dataclasses.dataclass(frozen=True)
class CommonWordsConfig(TokenTaskConfig):
    """Common words."""

    common: int = knob(10, "words that stand often", other=(5,), least=1)
    often: int = knob(6, "times that each of them stands", other=(4,), least=2)
    others: int = knob(40, "words that stand rarely", other=(20,), least=1)
    rarely: int = knob(1, "times that each of them stands", other=(2,), least=1)
    length: int = knob(256, "T; what words leave is filler", other=(192,), least=4)
    vocab: int = knob(128, "all ids: filler, a marker and the words", other=(96,), least=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        need(self.rarely < self.often, "data.rarely", self.rarely, f"less than data.often = {self.often}")
        words = self.common + self.others
        need(words <= self.vocab - 2, "data.vocab", self.vocab, f"{words + 2} or more for {words} words")
        least = self.common * self.often + self.others * self.rarely + self.common
        need(self.length >= least, "data.length", self.length, f"{least} or more for these words and the answer")

    @property
    def ids(self) -> int:
        return self.vocab


class Counted(TokenTask):
    """Tasks about how often words stand before the marker. Ids: 0 filler, 1 the marker, then words."""

    source = _SOURCE

    @abc.abstractmethod
    def told(self, words: np.ndarray) -> np.ndarray:
        """The words to tell, of all that stand before the marker."""

    def asked(self, body: np.ndarray, answer: np.ndarray) -> Arrays:
        """The row of a body and its answer."""
        tokens = np.concatenate([body, [ASK], answer[:-1]])
        targets, weights = np.zeros((2, len(tokens)), np.int64)
        targets[len(body) :], weights[len(body) :] = answer, 1
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def solve(self, row: Arrays) -> np.ndarray:
        tokens = row["tokens"]
        at, out = int(np.flatnonzero(tokens == ASK)[0]), np.zeros(len(tokens), np.int64)
        told = self.told(tokens[:at])[: len(tokens) - at]
        out[at : at + len(told)] = told
        return out

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """Wherever the first word told stands, a word does that stands nowhere else."""
        tokens = row["tokens"].copy()
        at = int(np.flatnonzero(tokens == ASK)[0])
        word, body = self.told(tokens[:at])[0], tokens[:at]
        spare = np.setdiff1d(np.arange(2, self.config.vocab), body)
        body[body == word] = spare[stream.integer(len(spare))] if len(spare) else 0
        return {**row, "tokens": tokens}

    def answers(self) -> int:
        return self.config.vocab - 2


@register("common_words")
class CommonWords(Counted):
    """Words, some of which stand often; these are to be told in the order in which they first do."""

    Config = CommonWordsConfig
    title = "counting: which words stand often"

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        words = 2 + stream.distinct(c.common + c.others, c.vocab - 2)
        text = np.concatenate([np.repeat(words[: c.common], c.often), np.repeat(words[c.common :], c.rarely)])
        body = np.zeros(c.length - c.common, np.int64)
        body[: len(text)] = text
        body = body[stream.permutation(len(body))]
        return self.asked(body, self.told(body))

    def told(self, words: np.ndarray) -> np.ndarray:
        found, first, count = np.unique(words[words > ASK], return_index=True, return_counts=True)
        often = np.argsort(-count, kind="stable")[: self.config.common]
        return found[often][np.argsort(first[often])]


@dataclasses.dataclass(frozen=True)
class FrequentWordsConfig(TokenTaskConfig):
    """Frequent words."""

    alpha: float = knob(
        2.0, "the word of rank k stands about k^-alpha times as often as the first", other=(1.5,), above=1
    )
    told: int = knob(3, "words to tell, from rank 2 on: rank 1 is filler", other=(2,), least=1)
    length: int = knob(256, "T", other=(384,), least=8)
    vocab: int = knob(66, "all ids: filler, a marker and the words", other=(40,), least=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = self.counts()
        clear = len(counts) > self.told and all(np.diff(counts[: self.told + 1]) < 0)
        config_lib.require(
            clear, "data.length", self.length, f"more, so that {self.told} words differ in how often they stand"
        )

    @property
    def ids(self) -> int:
        return self.vocab

    def counts(self) -> np.ndarray:
        """How often the words of rank 2 on stand."""
        rank = np.arange(1, self.vocab)
        share = rank**-self.alpha / (rank**-self.alpha).sum()
        counts = np.floor((self.length - self.told) * share).astype(int)[1:]
        return counts[counts > 0]


@register("frequent_words")
class FrequentWords(Counted):
    """Words that stand as often as Zipf's law says; those of ranks 2 on are to be told, the most frequent first."""

    Config = FrequentWordsConfig
    title = "counting: the most frequent words in their order"

    def example(self, stream: Stream, split: str) -> Arrays:
        c, counts = self.config, self.config.counts()
        words = 2 + stream.distinct(len(counts), c.vocab - 2)
        body = np.zeros(c.length - c.told, np.int64)
        body[: counts.sum()] = np.repeat(words, counts)
        body = body[stream.permutation(len(body))]
        return self.asked(body, words[: c.told])

    def told(self, words: np.ndarray) -> np.ndarray:
        found, count = np.unique(words[words > ASK], return_counts=True)
        return found[np.argsort(-count, kind="stable")[: self.config.told]]

    def slices(self, rows: Arrays) -> Slices:
        """By rank."""
        c = self.config
        rank = np.where(rows["weights"] > 0, np.arange(c.length) - (c.length - c.told), -1)
        return {"rank": ([str(2 + i) for i in range(c.told)], rank)}
