"""Sources: where documents come from. Each streams them in a fixed order and names what it cannot read."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import logging
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from attnlab.data.config import DataConfig
from attnlab.data.files import File, matching_files
from attnlab.errors import UserError

_log = logging.getLogger(__name__)

# A document is handed on, and tokenised, in pieces of at most this many characters, cut after a newline where
# there is one: a corpus in a single file must not be held in memory.
PIECE_CHARACTERS = 1 << 22
_CHUNK_BYTES = 1 << 22
# How compressed files begin that are named as if they were plain.
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "end its name in .gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "end its name in .zst"),
    b"\xfd7zX": ("xz", "jsonl: reads plain, .gz and .zst"),
    b"BZh": ("bzip2", "jsonl: reads plain, .gz and .zst"),
}

# Left out of `stdlib`: tests (a third of the tree, of which some files are deliberately malformed), programs
# that are no library (IDLE, turtledemo), test data and grammars of lib2to3 (gone in 3.13), bundled wheels,
# and what generators wrote (codec tables, pydoc's topics, build settings of this machine).
_STDLIB_WITHOUT = frozenset(
    "site-packages dist-packages test tests idle_test idlelib turtledemo lib2to3 ensurepip encodings"
    " pydoc_data __pycache__ __phello__".split()
)


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: its text in pieces, and the key that decides its place and its split."""

    key: int  # 64 bits, a stable hash of the file's name and, for records, the record's index
    pieces: Iterable[str]


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: which, and what is wrong with it."""

    message: str


class Source:
    """The files of a config's source, and their documents.

    Raises:
      UserError: the globs match nothing, or a file cannot be used (it is named, with line or record number).
    """

    def __init__(self, config: DataConfig):
        self.config = config
        self.files = _stdlib_files() if config.kind == "stdlib" else matching_files(config.globs, config.cache)
        self.bytes = sum(file.size for file in self.files)
        self.skipped = 0  # bad records left out
        self.empty = 0  # documents without a character, left out
        self._first_skipped: str | None = None
        self._done = self._current = 0

    def documents(self) -> Iterator[Document]:
        """Every readable document with text in it, in the order of file names and of records in them."""
        self.skipped = self.empty = self._done = 0
        read = {"stdlib": _read_python, "text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
        for file in self.files:
            self._current = file.size
            try:
                for item in read[self.config.kind](file, self.config.field):
                    if isinstance(item, BadRecord):
                        self._skip(item)
                    elif item is None:
                        self.empty += 1
                    else:
                        yield item
            except OSError as error:
                raise UserError(f"{file.path}: {error.strerror or error}.") from error
            self._done += file.size
        self._current = 0
        if self.skipped:
            _log.warning("data: skipped %d bad record(s), the first: %s", self.skipped, self._first_skipped)

    def position(self, text_bytes: int) -> int:
        """Bytes of files read, about, when `text_bytes` of text have come out of them."""
        return min(max(text_bytes, self._done), self._done + self._current)

    def _skip(self, bad: BadRecord) -> None:
        if self.config.kind == "stdlib":
            return
        if self.config.on_bad_record == "raise":
            raise UserError(
                f"{bad.message}\nRepair or remove it, or count and skip such records with data.on_bad_record='skip'."
            )
        self._first_skipped = self._first_skipped if self.skipped else bad.message
        self.skipped += 1


def stable_key(name: str) -> int:
    """64 bits that depend on `name` alone."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def in_pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Text that comes in chunks, as pieces of at most PIECE_CHARACTERS; the cuts depend on the text alone."""
    held = ""
    for chunk in chunks:
        held += chunk
        while len(held) > PIECE_CHARACTERS:
            cut = held.rfind("\n", 0, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _stdlib_files() -> list[File]:
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for directory, below, names in os.walk(root):
        below[:] = sorted(name for name in below if name not in _STDLIB_WITHOUT and not name.startswith("config-"))
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = os.path.join(directory, name)
                stat = os.stat(path)
                relative = os.path.relpath(path, root).replace(os.sep, "/")
                files.append(File(path, relative, stat.st_size, stat.st_mtime_ns))
    if not files:
        raise UserError(f"data.source = 'stdlib': no .py files under {root}. Give your own text: text:GLOB.")
    return sorted(files, key=lambda file: file.name)


def _read_python(file: File, _: str) -> Iterator[Document | BadRecord | None]:
    try:
        with tokenize.open(file.path) as opened:  # the encoding that PEP 263 says
            text = opened.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        yield BadRecord(f"{file.path}: {error}")
        return
    yield Document(stable_key(file.name), [text]) if text else None


def _read_text(file: File, _: str) -> Iterator[Document | BadRecord | None]:
    if file.size == 0:
        yield BadRecord(f"{file.path} is empty.")
        return
    # Checked whole before any of it is handed on, so that a document is never half read.
    chunk = ""
    try:
        for chunk in _decoded(file):
            if "\0" in chunk:
                yield BadRecord(f"{file.path} looks binary (it holds NUL bytes); text: reads UTF-8 text files.")
                return
    except UnicodeDecodeError as error:
        yield BadRecord(
            f"{file.path} is not UTF-8: byte 0x{error.object[error.start]:02x} in line"
            f" {_first_bad_line(file)} ({error.reason})."
        )
        return
    if not chunk:
        yield BadRecord(f"{file.path} is empty (a byte order mark alone).")
        return
    yield Document(stable_key(file.name), in_pieces(_decoded(file)))


def _decoded(file: File) -> Iterator[str]:
    # newline="": the text is the file's bytes, its line ends unchanged. A byte order mark is none of it.
    try:
        with open(file.path, encoding="utf-8-sig", newline="") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise UserError(f"{file.path}: {error.strerror or error}.") from error


def _first_bad_line(file: File) -> int:
    with open(file.path, "rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def _read_jsonl(file: File, field: str) -> Iterator[Document | BadRecord | None]:
    if file.size == 0:
        yield BadRecord(f"{file.path} is empty.")
        return
    for number, line in jsonl_lines(file):
        yield _json_document(file, field, number, line)


def jsonl_lines(file: File) -> Iterator[tuple[int, bytes]]:
    """The lines of a plain, .gz or .zst file that are not blank, with their numbers from 1.

    Raises UserError where the compressed data breaks.
    """
    number = 0
    try:
        with _open_lines(file.path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{file.path}: after line {number} the compressed data ends or breaks ({error}): the file is"
            " truncated or damaged. Fetch it again, or take it out of data.source."
        ) from error


def json_object(where: str, line: bytes, wanted: str) -> dict[str, Any] | BadRecord:
    """The JSON object of a line; `wanted`: what it must have, for messages."""
    try:
        record = _parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return BadRecord(f"{where} not UTF-8.")
    except ValueError as error:
        return BadRecord(f"{where} not JSON ({error}).")
    except RecursionError:
        return BadRecord(f"{where} JSON nested too deep.")
    if not isinstance(record, dict):
        return BadRecord(f"{where} a JSON {type(record).__name__}; each line must be one object with {wanted}.")
    return record


def _json_document(file: File, field: str, number: int, line: bytes) -> Document | BadRecord | None:
    where = f"{file.path}, line {number}:"
    record = json_object(where, line, repr(field))
    if isinstance(record, BadRecord):
        return record
    if field not in record:
        keys = ", ".join(map(repr, list(record)[:6])) or "none"
        return BadRecord(f"{where} no key {field!r} (it has {keys}); data.field names the text.")
    return _record_document(file, number - 1, record[field], f"{where} {field!r}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} twice in one object")
    return record


_decode_json = json.JSONDecoder(object_pairs_hook=_unique).decode
# Where an integer has more digits than Python converts.
_decode_huge = json.JSONDecoder(object_pairs_hook=_unique, parse_int=float).decode


def _parse_json(line: str) -> object:
    try:
        return _decode_json(line)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _decode_huge(line)


def _record_document(file: File, index: int, text: object, where: str) -> Document | BadRecord | None:
    if not isinstance(text, str):
        return BadRecord(f"{where} is {'null' if text is None else type(text).__name__}, not text.")
    if not text:
        return None
    if "\0" in text:
        return BadRecord(f"{where} holds NUL, which is no character of text.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return BadRecord(f"{where} holds half of a surrogate pair, which is not Unicode text.")
    return Document(stable_key(f"{file.name}:{index}"), in_pieces([text]))


def _open_lines(path: str) -> io.BufferedIOBase:
    name = path.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(path), _CHUNK_BYTES)
    opened = open(path, "rb")
    start = opened.peek(4)
    for magic, (kind, suffix) in _COMPRESSED.items():
        if start.startswith(magic):
            opened.close()
            raise UserError(f"{path} is compressed with {kind}: {suffix}.")
    return opened


class _ZstdFile(io.RawIOBase):
    """A .zst file, of any number of frames, that raises EOFError where it is cut short.

    `zstandard`'s own stream reader ends quietly there.
    """

    def __init__(self, path: str):
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = None
        self._ready = b""
        self._file = open(path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready and self._fill():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _fill(self) -> bool:
        chunk = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
        chunk = chunk or self._file.read(1 << 17)
        if not chunk:
            if self._frame is not None and not self._frame.eof:
                raise EOFError("the last zstd frame is incomplete")
            return False
        if self._frame is None or self._frame.eof:
            self._frame = self._decompressor.decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(chunk))
        except self._error as error:
            raise zlib.error(str(error)) from error
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_parquet(file: File, field: str) -> Iterator[Document | BadRecord | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("data.source = 'parquet:...' needs pyarrow: pip install 'attnlab[parquet]'.") from error
    if file.size == 0:
        yield BadRecord(f"{file.path} is empty.")
        return
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path, page_checksum_verification=True) as table:
            schema = table.schema_arrow
            if field not in schema.names:
                raise UserError(
                    f"{file.path} has no column {field!r}; data.field must be one of its columns:"
                    f" {', '.join(schema.names[:12])}."
                )
            kind = schema.field(field).type
            plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if plain not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise UserError(f"{file.path}: column {field!r} is {kind}, not string; data.field must name text.")
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    yield _parquet_document(file, row, value, f"{file.path}, row {row}: {field!r}")
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise  # the disk's trouble, not the file's
        raise UserError(
            f"{file.path}: after row {row}: {str(error).splitlines()[0]}: not a Parquet file, or a"
            " truncated or damaged one. Fetch it again, or take it out of data.source."
        ) from error


def _parquet_document(file: File, row: int, value: object, where: str) -> Document | BadRecord | None:
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return BadRecord(f"{where} is not UTF-8.")
    return _record_document(file, row, text, where)
