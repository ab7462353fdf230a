"""The data node of a run's config."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from attnlab.batch import NEXT, Field, Spec
from attnlab.config import show
from attnlab.data.files import split_globs
from attnlab.errors import ConfigError

KINDS = ("text", "jsonl", "parquet", "array_record")
_SOURCES = "'stdlib', 'text:GLOB', 'jsonl:GLOB', 'parquet:GLOB' or 'array_record:GLOB'"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text is read, how it becomes tokens, and how tokens become batches.

    Raises:
      ConfigError: a field has a wrong type or an impossible value; the message names `data.FIELD`, the
        value and what is allowed.
    """

    node_name: ClassVar[str]
    free: ClassVar[tuple[str, ...]] = ("workers", "cache")

    # `stdlib`: the .py files of the running Python's standard library (always at hand, no download).
    # `text:GLOB`: one document per UTF-8 file. `jsonl:GLOB`: one JSON object per line, plain, .gz or .zst.
    # `parquet:GLOB`. `array_record:GLOB`: shards of tokens, written by `apply_tokenizer`.
    # Globs may hold `**`; several are separated by commas. A comma in a name: `a,b.txt` where that file is there,
    # `a[,]b*.txt` in a glob. A file that several names or links lead to is read once.
    source: str = "stdlib"
    # `bytes` (257 ids: the bytes and end-of-document), or the path of a Hugging Face `tokenizers` JSON file;
    # `path.json?eod=TOKEN` names its end-of-document token where that is not a usual one.
    tokenizer: str = "bytes"
    # Tokens per row, T.
    length: int = 256
    # Rows per step over all devices and hosts, B.
    batch: int = 16
    # The JSONL key or Parquet column that holds the text.
    field: str = "text"
    # Fraction held out for evaluation: of files for stdlib and text, of documents otherwise. Chosen by a
    # stable hash of the file's name (and the record's index), so that adding files moves no other. In [0, 1).
    heldout: float = 0.05
    # What a record that cannot be read does: `raise` stops, naming file and record; `skip` counts it.
    on_bad_record: str = "raise"
    # Processes that read batches; 0 reads in threads of this process. The batches are the same.
    workers: int = 0
    # Directory of tokenised corpora, and of the marks of shards that were verified. None: $ATTNLAB_CACHE, else
    # $XDG_CACHE_HOME/attnlab, else ~/.cache/attnlab.
    cache: str | None = None
    # True: documents are laid out, and rows visited in every epoch, in a seeded random order. False: in the
    # source's own order.
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name in ("source", "tokenizer", "field", "on_bad_record"):
            _require(isinstance(getattr(self, name), str) and getattr(self, name), name, self, "a non-empty string")
        for name, least in (("length", 1), ("batch", 1), ("workers", 0)):
            value = getattr(self, name)
            integer = isinstance(value, int) and not isinstance(value, bool)
            _require(integer and value >= least, name, self, f"an integer of at least {least}")
        tokens = self.batch * self.length
        _require(tokens < 2**31, "length", self, f"below 2^31 tokens a step, with data.batch = {self.batch}")
        number = isinstance(self.heldout, (int, float)) and not isinstance(self.heldout, bool)
        _require(number and 0 <= self.heldout < 1, "heldout", self, "a fraction of at least 0 and below 1")
        _require(self.on_bad_record in ("raise", "skip"), "on_bad_record", self, "'raise' or 'skip'")
        _require(
            self.cache is None or (isinstance(self.cache, str) and self.cache and "://" not in self.cache),
            "cache",
            self,
            "a local directory, or None for the default",
        )
        _require(isinstance(self.shuffle, bool), "shuffle", self, "True or False")
        kind, colon, globs = self.source.partition(":")
        known = self.source == "stdlib" or (kind in KINDS and colon and globs.strip(", "))
        _require(known, "source", self, _SOURCES)

    def batch_spec(self) -> Spec:
        """The arrays of a batch, whatever the tokenizer."""
        plain = Field((self.length,), "int32", ("seq",))
        targets = dataclasses.replace(plain, about=NEXT)
        return {"tokens": plain, "targets": targets, "segments": plain, "positions": plain}

    def longer(self, multiple: int) -> DataConfig:
        """The same text in rows of `multiple` times the length."""
        return dataclasses.replace(self, length=multiple * self.length)

    @property
    def kind(self) -> str:
        """`stdlib`, `text`, `jsonl`, `parquet` or `array_record`."""
        return self.source.partition(":")[0]

    @property
    def globs(self) -> tuple[str, ...]:
        """The globs after the colon of `source`, see `files.split_globs`."""
        return split_globs(self.source.partition(":")[2])


def _require(condition: Any, name: str, config: DataConfig, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"data.{name} = {show(getattr(config, name))} is not allowed: it must be {allowed}.")
