"""Text as data of a run: packed rows of tokens, for language models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnlab import batch as batch_lib
from attnlab.data import loader
from attnlab.data.base import Data, register
from attnlab.data.config import DataConfig
from attnlab.data.tokenizers import load_tokenizer
from attnlab.errors import UserError


@register("text")
class Text(Data):
    """Rows of `attnlab.data.packing.PackedRows`."""

    Config = DataConfig
    names_other = ("source",)

    def __init__(self, config: DataConfig):
        super().__init__(config)
        self.tokenizer = load_tokenizer(config.tokenizer)

    def batch_spec(self) -> batch_lib.Spec:
        ids = {"ids": self.tokenizer.vocab_size}
        ids["said"] = f"the vocabulary of data.tokenizer = {self.config.tokenizer!r}"
        spec = self.config.batch_spec()
        return {k: dataclasses.replace(f, **ids) if k in ("tokens", "targets") else f for k, f in spec.items()}

    def training(self, *, seed: int, rows: Sequence[int] | None = None) -> loader.Loader:
        return loader.train_loader(self.config, self.tokenizer, seed=seed, rows=rows)

    def heldout(self, *, batches: int | None = None, rows: Sequence[int] | None = None) -> loader.HeldoutLoader:
        return loader.heldout_loader(self.config, self.tokenizer, batches=batches, rows=rows)

    def heldout_texts(self) -> Iterator[str]:
        """The held-out documents, whole, as the tokenizer gives them back; errors as `heldout`."""
        return loader.heldout_texts(self.config, self.tokenizer)

    def describe(self, summary: Mapping[str, Any]) -> str:
        return loader.describe(dict(summary))

    def require_readable(self, trained_on: Mapping[str, Any], who: str, *, named: bool) -> list[str]:
        if self.tokenizer.fingerprint() == trained_on["tokenizer"]:
            return []
        if not named:
            raise UserError(
                f"data.tokenizer = {self.config.tokenizer!r} is not the tokenizer that {who} was "
                "trained with, whatever its name: its ids mean other text\ngive that one with "
                "data.tokenizer, or name other data, too, with data.source"
            )
        return ["with another tokenizer than it was trained with"]

    def require_heldout(
        self, heldout: loader.HeldoutLoader, trained_on: Mapping[str, Any], who: str, *, named: bool
    ) -> list[str]:
        return loader.require_held_out(self.config, heldout.summary()["digest"], trained_on, who, named=named)
