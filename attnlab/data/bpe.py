"""Training a byte-level BPE tokenizer on a corpus."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from attnlab import paths
from attnlab.config import show
from attnlab.data.config import DataConfig
from attnlab.data.progress import ProgressFn, stderr_progress
from attnlab.data.records import require_text
from attnlab.data.sources import Source
from attnlab.data.tokenizers import END_OF_DOCUMENT
from attnlab.errors import ConfigError, UserError

_log = logging.getLogger(__name__)

_SMALLEST = 257  # every byte, and end-of-document
_LARGEST = 2**24  # the library makes room for all of them at the start


def train_tokenizer(
    config: DataConfig, vocab_size: int, out: str, *, overwrite: bool = False, progress: ProgressFn | None = None
) -> dict[str, Any]:
    """Trains byte-level BPE on the documents that are not held out, and writes it to `out` as one JSON file.

    The same corpus and vocab_size give the same file. `<|endoftext|>` is id 0. The file is written whole or
    not at all.

    Args:
      vocab_size: ids in all, 257 to 2^24. A small corpus may have fewer pairs to merge than that.
      overwrite: whether a regular file at `out` is replaced; nothing else ever is.
      progress: called with bytes read and bytes in all; None shows a bar on stderr.

    Returns:
      `path, vocab_size, asked, documents, bytes, skipped, empty`; vocab_size as reached.

    Raises:
      ConfigError: vocab_size is not allowed.
      UserError: the source cannot be read, `out` is there, or it cannot be written.
    """
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or not _SMALLEST <= vocab_size <= _LARGEST:
        raise ConfigError(
            f"vocab_size = {show(vocab_size)} is not allowed: an integer of at least {_SMALLEST}, at most 2^24."
        )
    require_text(config)
    source = Source(config)
    out = os.path.abspath(paths.expand(out))
    counts = {"documents": 0, "bytes": 0}
    tokenizer, trainer = _byte_level(vocab_size)

    def check() -> None:
        paths.require_new_file(out, overwrite)
        if os.path.realpath(out) in {os.path.realpath(file.path) for file in source.files}:
            raise UserError(f"{out} is a file of data.source, which is never replaced; name another.")

    with paths.file_beside(out, check) as partial:
        with contextlib.ExitStack() as stack:
            if progress is None:
                progress = stack.enter_context(stderr_progress(f"training a tokenizer on {config.source}"))
            tokenizer.train_from_iterator(_texts(source, counts, progress), trainer)
        if not counts["bytes"]:
            raise UserError(
                f"data.source = {config.source!r}: no text to train a tokenizer on in"
                f" {len(source.files)} file(s) (data.heldout = {config.heldout} leaves out the rest)."
            )
        with open(partial, "w", encoding="utf-8") as file:
            file.write(tokenizer.to_str(pretty=True))
            file.flush()
            os.fsync(file.fileno())
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        _log.warning(
            "tokenizer: the corpus has pairs to merge for %d ids, fewer than the %d asked for.",
            reached,
            vocab_size,
        )
    return {
        "path": out,
        "vocab_size": reached,
        "asked": vocab_size,
        **counts,
        "skipped": source.skipped,
        "empty": source.empty,
    }


def _texts(source: Source, counts: dict[str, int], report: ProgressFn) -> Iterator[str]:
    """The pieces of the documents that are not held out; counts these."""
    limit = int(source.config.heldout * 2.0**64)
    read = 0
    for document in source.documents():
        kept = document.key >= limit
        counts["documents"] += kept
        for piece in document.pieces:
            size = len(piece.encode("utf-8"))
            read += size
            report(source.position(read), source.bytes)
            if kept:
                counts["bytes"] += size
                yield piece


def _byte_level(vocab_size: int) -> tuple[Any, Any]:
    """A byte-level BPE tokenizer of the library that knows nothing yet, and its trainer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    return tokenizer, trainer
