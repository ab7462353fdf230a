"""Tokenizers: text to int32 ids and back. `bytes`, or a JSON file of the `tokenizers` library."""

from __future__ import annotations

import abc
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attnlab import paths, storage
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

    def encode_batch_with_ends(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode` of each text, and where each token ends: int64 [n], UTF-8 bytes from the text's beginning.

        Ends never fall. Tokens that share a character end where it ends.
        """
        table = self.byte_lengths()
        assert table is not None, "a tokenizer without a table tells the ends itself"
        return [(ids, np.cumsum(table[ids], dtype=np.int64)) for ids in self.encode_batch(texts)]

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD; special tokens become nothing."""

    @abc.abstractmethod
    def byte_lengths(self) -> np.ndarray | None:
        """UTF-8 bytes of text that each id stands for, int32 [vocab_size]; 0 for ids that no text becomes.

        The sum over a text's ids is its length in bytes. None where that depends on more than the ids: a
        tokenizer that normalises, adds or strips spaces, or has words that it does not know.
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
        if getattr(self._backend.model, "dropout", None):
            self._backend.model.dropout = None  # a text is the same ids at every time and on every host
        self._backend.post_processor = None  # it adds begin and end, and cuts spaces off offsets
        vocab = self._backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(f"{path}: the tokenizer has no tokens.")
        self.name = os.path.basename(path)
        # Not the number of tokens: published vocabularies have holes, and ids must index an embedding.
        self.vocab_size = max(vocab.values()) + 1
        self.eod = self._find_eod(path, vocab, eod)
        self.eod_id = vocab[self.eod]
        self._byte_lengths = self._find_byte_lengths()
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
        encodings = self._encoded(self._backend.encode_batch_fast, texts)
        arrays = [np.array(encoding.ids, np.int32) for encoding in encodings]
        return [
            self._encode_around_eod(text)[0] if (ids == self.eod_id).any() else ids
            for text, ids in zip(texts, arrays, strict=True)
        ]

    def encode_batch_with_ends(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        if self.byte_lengths() is not None:
            return super().encode_batch_with_ends(texts)
        encodings = self._encoded(self._backend.encode_batch, texts)
        pairs = [
            (np.array(encoding.ids, np.int32), _byte_ends(text, encoding.offsets))
            for text, encoding in zip(texts, encodings, strict=True)
        ]
        return [
            self._encode_around_eod(text) if (ids == self.eod_id).any() else (ids, ends)
            for text, (ids, ends) in zip(texts, pairs, strict=True)
        ]

    def _encoded(self, encode: Callable[..., list[Any]], texts: Sequence[str]) -> list[Any]:
        try:
            return encode(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception, e.g. for a word without an unknown token
            raise UserError(f"tokenizer {self.name}: a text cannot be encoded: {str(error)[:200]}") from None

    def _encode_around_eod(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and ends of a text that spells out the end-of-document token, where that is an ordinary entry of
        the vocabulary: encoded in parts cut inside every such spelling."""
        head, tail = self.eod[:1], self.eod[1:]
        pieces = text.split(self.eod)
        parts = [(tail if i else "") + piece + (head if i < len(pieces) - 1 else "") for i, piece in enumerate(pieces)]
        parts = [part for part in parts if part]
        encodings = self._encoded(self._backend.encode_batch, parts)
        starts = np.cumsum([0, *(len(part.encode()) for part in parts)])
        ids = np.array([i for encoding in encodings for i in encoding.ids], np.int32)
        ends = np.concatenate(
            [
                start + _byte_ends(part, encoding.offsets)
                for start, part, encoding in zip(starts, parts, encodings)  # one start more than parts
            ]
        )
        # What is left came from normalisation; one lost id is better than a document that ends early.
        kept = ids != self.eod_id
        return ids[kept], ends[kept]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise UserError(f"ids to decode must be from 0 to {self.vocab_size - 1}, not {ids.min()} to {ids.max()}.")
        return self._backend.decode(ids[ids != self.eod_id].tolist(), skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray | None:
        return self._byte_lengths

    def _find_byte_lengths(self) -> np.ndarray | None:
        """The table of `byte_lengths`: of byte-level BPE in which every byte of the text goes into one token."""
        model, spec = self._spec["model"], self._spec
        if model.get("type") != "BPE" or spec.get("normalizer") or not _only_maps_bytes(spec.get("pre_tokenizer")):
            return None
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            return None
        words = self._backend.get_vocab(with_added_tokens=False)
        if len(set(words.values())) < len(words) or not _byte_level_alphabet().issubset(words):
            return None
        lengths = np.zeros(self.vocab_size, np.int32)
        for word, index in words.items():
            lengths[index] = len(word)  # the byte-level alphabet writes every byte as one character
        for token in spec.get("added_tokens") or []:
            if token["special"]:
                continue  # not looked for in texts
            index, size = self._backend.token_to_id(token["content"]), len(token["content"].encode())
            if token["lstrip"] or token["rstrip"] or lengths[index] not in (0, size):
                return None
            lengths[index] = size
        if self.eod in words:
            # Where merges lead to it, `encode` has to drop it.
            merges = (merge if isinstance(merge, str) else "".join(merge) for merge in model.get("merges") or [])
            joined = {merge.replace(" ", "") for merge in merges}
            if len(self.eod) == 1 or model.get("ignore_merges") or self.eod in joined:
                return None
        lengths[self.eod_id] = 0
        return lengths

    def fingerprint(self) -> str:
        return self._fingerprint


def _byte_level_alphabet() -> set[str]:
    """The characters for the bytes of the byte-level alphabet that occur in UTF-8."""
    from tokenizers.pre_tokenizers import ByteLevel

    # The library gives the alphabet unordered: its characters below U+0100 are those of their own bytes, and the
    # rest, from U+0100 on, of the other bytes in order.
    alphabet = set(ByteLevel.alphabet())
    moved = [byte for byte in range(256) if chr(byte) not in alphabet]
    character = {byte: chr(0x100 + i) for i, byte in enumerate(moved)}
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    return {character.get(byte, chr(byte)) for byte in range(256) if byte not in never}


def _only_maps_bytes(node: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer's JSON maps text to the byte-level alphabet once, and else only cuts it."""
    steps = node["pretokenizers"] if node and node["type"] == "Sequence" else [node]
    kinds = [step["type"] if step else None for step in steps]
    cuts = {"Split", "Punctuation", "Digits", "UnicodeScripts", "ByteLevel"}
    return (
        kinds.count("ByteLevel") == 1
        and cuts.issuperset(kinds)
        and not any(step.get("add_prefix_space") or step.get("behavior") == "Removed" for step in steps)
    )


def _byte_ends(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The library's ends, in characters of the text, as bytes; none before that of an earlier token."""
    ends = np.array([end for _, end in offsets], np.int64)
    ends = np.minimum(np.maximum.accumulate(ends), len(text))
    if text.isascii():
        return ends
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])[ends]


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: `bytes`, `path.json`, a directory with one, or `path?eod=TOKEN`.

    Raises:
      UserError: no such file, not a tokenizer, or no end-of-document token found in it.
    """
    if spec == "bytes":
        return BytesTokenizer()
    path, _, eod = spec.partition("?eod=")
    try:
        path = storage.local_copy(path)
    except UserError as error:
        raise UserError(f"data.tokenizer: {error}") from error
    return HuggingFaceTokenizer(path, eod or None)
