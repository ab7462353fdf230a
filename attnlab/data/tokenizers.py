"""Tokenizers: text to int32 ids and back. `bytes`, or a JSON file of the `tokenizers` library."""

from __future__ import annotations

import abc
import hashlib
import json
import logging
import os
from collections.abc import Sequence

import numpy as np

from attnlab import paths
from attnlab.errors import UserError

_log = logging.getLogger(__name__)

END_OF_DOCUMENT = "<|endoftext|>"
# Names under which published tokenizers keep their end-of-document token, the most telling first.
_EOD_NAMES = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "<|eod|>",
    "<|endofdocument|>",
    "<|EOD|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<EOS>",
    "<end_of_text>",
    "<eod>",
)


class Tokenizer(abc.ABC):
    """What every tokenizer offers. Ids are below `vocab_size`; `eod_id` is never produced by `encode`."""

    name: str
    vocab_size: int
    eod_id: int

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 [n], without end-of-document."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD; special tokens become nothing."""

    @abc.abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int32 [vocab_size]; 0 for special tokens.

        Exact for byte-level tokenizers, where the sum over a text's ids is its length in bytes. For
        tokenizers that normalise text it is the length of what they decode to.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A hash of all that decides which ids a text becomes."""


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes: ids 0 to 255 are the bytes, 256 is end-of-document."""

    name = "bytes"
    vocab_size = 257
    eod_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise UserError(f"ids to decode must be from 0 to {self.vocab_size - 1}, not {ids.min()} to {ids.max()}.")
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def byte_lengths(self) -> np.ndarray:
        lengths = np.ones(self.vocab_size, np.int32)
        lengths[self.eod_id] = 0
        return lengths

    def fingerprint(self) -> str:
        return "bytes-1"


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers` JSON file.

    Special tokens written out in a text (`<|endoftext|>` in a web page) are encoded as ordinary text, so that
    no document can end itself; truncation, padding and added begin/end tokens of the file are switched off.
    """

    def __init__(self, path: str, eod: str | None = None):
        from tokenizers import Tokenizer as Backend

        path = paths.expand(path)
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise UserError(
                f"tokenizer {path!r}: {error.strerror or error}. data.tokenizer must be 'bytes' or the path"
                " of a tokenizers JSON file (as `attnlab tokenizer train` writes it)."
            ) from error
        try:
            self._spec = json.loads(content)
            self._backend = Backend.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise UserError(
                f"{path} is not a tokenizer of the Hugging Face `tokenizers` library"
                f" ({str(error)[:120]}). Give its tokenizer.json, or 'bytes'."
            ) from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        vocab = self._backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(f"{path}: the tokenizer has no tokens.")
        self.name = os.path.basename(path)
        # Not the number of tokens: published vocabularies have holes, and ids must index an embedding.
        self.vocab_size = max(vocab.values()) + 1
        self.eod = self._find_eod(path, vocab, eod)
        self.eod_id = vocab[self.eod]
        self._fingerprint = hashlib.sha256(content + b"\0" + self.eod.encode()).hexdigest()

    @staticmethod
    def _find_eod(path: str, vocab: dict[str, int], named: str | None) -> str:
        if named is not None:
            if named not in vocab:
                raise UserError(
                    f"{path}: data.tokenizer names {named!r} as end-of-document, which is not among its"
                    f" {len(vocab)} tokens."
                )
            return named
        for name in _EOD_NAMES:
            if name in vocab:
                return name
        raise UserError(
            f"{path}: none of its tokens is a usual end-of-document ({', '.join(_EOD_NAMES[:6])}, ...).\n"
            f"Name the one to use: data.tokenizer = '{path}?eod=TOKEN'."
        )

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = [np.array(encoding.ids, np.int32) for encoding in encodings]
        return [
            self._encode_around_eod(text) if (ids == self.eod_id).any() else ids
            for text, ids in zip(texts, arrays, strict=True)
        ]

    def _encode_around_eod(self, text: str) -> np.ndarray:
        """Ids of a text that spells out the end-of-document token, where that is an ordinary entry of the
        vocabulary: encoded in parts cut inside every such spelling."""
        head, tail = self.eod[:1], self.eod[1:]
        pieces = text.split(self.eod)
        parts = [(tail if i else "") + piece + (head if i < len(pieces) - 1 else "") for i, piece in enumerate(pieces)]
        encodings = self._backend.encode_batch_fast([part for part in parts if part], add_special_tokens=False)
        ids = np.array([i for encoding in encodings for i in encoding.ids], np.int32)
        # What is left came from normalisation; one lost id is better than a document that ends early.
        return ids[ids != self.eod_id]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise UserError(f"ids to decode must be from 0 to {self.vocab_size - 1}, not {ids.min()} to {ids.max()}.")
        return self._backend.decode(ids[ids != self.eod_id].tolist(), skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        added = {token["id"]: token for token in self._spec.get("added_tokens") or []}
        byte_level = _mentions(self._spec.get("decoder"), "ByteLevel") or _mentions(
            self._spec.get("pre_tokenizer"), "ByteLevel"
        )
        word_pieces = _mentions(self._spec.get("decoder"), "WordPiece")
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                lengths[index] = 0 if added[index].get("special") else len(added[index]["content"].encode())
            elif byte_level:
                lengths[index] = len(token)  # the byte-level alphabet writes every byte as one character
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                lengths[index] = 1  # byte fallback
            elif word_pieces:
                lengths[index] = len(token.removeprefix("##").encode()) + (not token.startswith("##"))
            else:
                lengths[index] = len(token.replace("\u2581", " ").encode())  # U+2581 stands for a space
        lengths[self.eod_id] = 0
        return lengths

    def fingerprint(self) -> str:
        return self._fingerprint


def _mentions(node: object, kind: str) -> bool:
    """Whether a part of a tokenizer's JSON is, or holds, a component of type `kind`."""
    if isinstance(node, dict):
        return node.get("type") == kind or any(_mentions(child, kind) for child in node.values())
    return isinstance(node, list) and any(_mentions(child, kind) for child in node)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: `bytes`, `path.json`, a directory with one, or `path?eod=TOKEN`.

    Raises:
      UserError: no such file, not a tokenizer, or no end-of-document token found in it.
    """
    if spec == "bytes":
        return BytesTokenizer()
    path, _, eod = spec.partition("?eod=")
    return HuggingFaceTokenizer(path, eod or None)
