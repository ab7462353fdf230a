"""Sources of every kind, and every way in which their files can be bad."""

import gzip
import json
import lzma
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from attnlab import data
from attnlab.data import sources
from attnlab.data.sources import Source
from attnlab.errors import UserError

TEXTS = ["first", "zweitens: ü", "\tthird\r\nline\n", "四"]


def read(source, **fields):
    opened = Source(data.DataConfig(source=source, **fields))
    texts = ["".join(document.pieces) for document in opened.documents()]
    return texts, opened


def lines(texts, field="text"):
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def error_of(source, **fields):
    with pytest.raises(UserError) as error:
        read(source, **fields)
    message = str(error.value)
    assert len(message.splitlines()) <= 3
    return message


def write_parquet(path, column, kind=None):
    values = pyarrow.array(column, kind)
    pyarrow.parquet.write_table(
        pyarrow.table({"n": range(len(column)), "text": values}),
        path,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )


def test_text_is_kept_to_the_byte(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    (tmp_path / "other.md").write_text("other")
    assert read(f"text:{tmp_path}/*.txt")[0] == TEXTS
    assert read(f"text:{tmp_path}/0.txt, {tmp_path}/*.md,{tmp_path}/[0-1].txt")[0] == [*TEXTS[:2], "other"]
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf")
    assert read(f"text:{tmp_path}/bom.txt")[0] == ["a\ufeff"]
    brackets = tmp_path / "a[1].txt"
    brackets.write_text("brackets")
    assert read(f"text:{brackets}")[0] == ["brackets"]


def test_commas_in_names(tmp_path):
    """A comma is part of a file's path where that file is there, and of a glob in brackets."""
    for i, name in enumerate(["a,b.txt", "a, c.txt", "b.txt", "x,y,z.txt", "d,1/e.txt"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(str(i))
    for source, expected in [
        ("{0}/a,b.txt", "0"),
        ("{0}/a, c.txt", "1"),
        ("{0}/b.txt,{0}/a,b.txt, {0}/x,y,z.txt", "023"),
        ("{0}/a[,]*.txt,{0}/b.txt", "012"),
        ("{0}/d[,]1/*.txt", "4"),
        ("{0}/b.txt,{0}/x*.txt,", "23"),
    ]:
        assert sorted(read("text:" + source.format(tmp_path))[0]) == list(expected), source
    with pytest.raises(UserError, match="d' matches no file"):
        read(f"text:{tmp_path}/d,1/*.txt")


@pytest.mark.timeout(20)
def test_links_lead_to_one_document(tmp_path):
    """However many names a file has it is one document, with the key of the name that it has without the links."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for path in (inside / "sub" / "deep" / "m.txt", inside / "n.txt", outside / "o.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.stem)
    keys = lambda source: {"".join(d.pieces): d.key for d in Source(data.DataConfig(source=source)).documents()}
    before = keys(f"text:{inside}/**/*.txt")
    assert set(before) == {"m", "n"} and len(keys(f"text:{inside}/*.txt")) == 1
    (inside / "a.txt").symlink_to(inside / "n.txt")
    (inside / "sub" / "0.txt").symlink_to("../n.txt")
    (inside / "z.txt").hardlink_to(inside / "sub" / "deep" / "m.txt")
    (inside / "another").symlink_to(inside / "sub")
    for loop in ("loop", "round", "sub/loop", "sub/deep/loop"):  # every round more than doubles the ways
        (inside / loop).symlink_to(inside)
    (inside / "gone.txt").symlink_to(inside / "nowhere")
    (inside / "self.txt").symlink_to(inside / "self.txt")
    for glob in ("**/*.txt", "**/**/*.txt", "**", "*/*/*.txt,{0}/**/*.txt", "**/deep/*.txt,{0}/n.txt,{0}/a.txt"):
        texts, opened = read(f"text:{inside}/{glob}".replace("{0}", str(inside)))
        assert sorted(texts) == ["m", "n"], glob
        assert len(opened.files) == 2
    assert keys(f"text:{inside}/**/*.txt") == before
    # What only a link leads to is part of the corpus, under the link's name.
    (inside / "far").symlink_to(outside)
    (inside / "far2").symlink_to(outside)
    assert keys(f"text:{inside}/**/*.txt") == {**before, "o": sources.stable_key("far/o.txt")}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".GZ", ".Zst"])
def test_jsonl(tmp_path, suffix):
    content = lines(TEXTS[:2], "body") + b"\n" + lines(TEXTS[2:], "body")
    half = len(lines(TEXTS[:1], "body"))
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix.lower()]
    # Two members or frames, as parallel compressors write them.
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(content[:half]) + pack(content[half:]))
    texts, opened = read(f"jsonl:{tmp_path}/*", field="body")
    assert texts == TEXTS and opened.skipped == opened.empty == 0


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_and_foreign_compressed_files(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    content = lines([f"text {i} {i**7}" for i in range(2000)])
    whole = pack(content)
    for damaged in (whole[: len(whole) // 2], whole[:-3], b"not compressed at all\n", whole + whole[:40]):
        path.write_bytes(damaged)
        for fields in ({}, {"on_bad_record": "skip"}):  # a lost half of a file is no single bad record
            message = error_of(f"jsonl:{path}", **fields)
            assert str(path) in message and "after line" in message and "truncated" in message
    path.write_bytes(whole)
    assert len(read(f"jsonl:{path}")[0]) == 2000


@pytest.mark.parametrize(
    "content, kind",
    [(gzip.compress(b"{}"), "gzip"), (zstandard.compress(b"{}"), "zstd"), (lzma.compress(b"{}"), "xz")],
    ids=["gzip", "zstd", "xz"],  # not the content, in which gzip puts the time
)
def test_compressed_files_named_as_if_plain(tmp_path, content, kind):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert f"a.jsonl is compressed with {kind}" in error_of(f"jsonl:{tmp_path}/a.jsonl", on_bad_record="skip")


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
    ],
    ids=str,
)
def test_parquet(tmp_path, kind):
    write_parquet(tmp_path / "a.parquet", TEXTS, kind)
    assert read(f"parquet:{tmp_path}/*.parquet")[0] == TEXTS


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"text": "cut off', "not JSON"),
        (b"[1, 2]", "a JSON list"),
        (b'{"txt": "a"}', "no key 'text' (it has 'txt')"),
        (b'{"text": 5}', "is int, not text"),
        (b'{"text": null}', "is null"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "a", "text": "b"}', "key 'text' twice"),
        (b'{"text": "a", "meta": {"id": 1, "id": 1}}', "key 'id' twice"),
        (b'{"text": "a\\u0000b"}', "NUL"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
        (b"\x00\x01\x02", "not JSON"),
        (b"[" * 100_000, "not JSON|deep"),
    ],
)
def test_bad_lines_are_named_or_counted(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["good"]) + line + b"\n" + lines(["", "also good"]))
    message = error_of(f"jsonl:{path}")
    assert f"{path}, line 2:" in message and any(part in message for part in problem.split("|"))
    assert "data.on_bad_record='skip'" in message
    texts, opened = read(f"jsonl:{path}", on_bad_record="skip")
    assert texts == ["good", "also good"] and opened.skipped == 1 and opened.empty == 1


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"fine\nbut \xff\n", "not UTF-8: byte 0xff in line 2"),
        (b"cut \xe2\x82", "not UTF-8"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"PNG\0\0\0", "looks binary"),
    ],
)
def test_bad_text_files_are_named_or_counted(tmp_path, content, problem):
    (tmp_path / "bad.txt").write_bytes(content)
    (tmp_path / "good.txt").write_bytes(b"good")
    message = error_of(f"text:{tmp_path}/*.txt")
    assert str(tmp_path / "bad.txt") in message and problem in message
    texts, opened = read(f"text:{tmp_path}/*.txt", on_bad_record="skip")
    assert texts == ["good"] and opened.skipped == 1


def test_lines_with_marks_and_huge_numbers(tmp_path):
    """A byte order mark before any line is none of it; no number beside the text keeps it from being read."""
    many = b"9" * 5000
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "\xef\xbb\xbfb", "n": -%b, "m": [1.5, %b, NaN]}\n'
        % (many, many)
    )
    assert read(f"jsonl:{tmp_path}/a.jsonl")[0] == ["a", "\ufeffb"]


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["good", None, "", "good too"])
    assert f"{path}, row 1: 'text' is null" in error_of(f"parquet:{path}")
    texts, opened = read(f"parquet:{path}", on_bad_record="skip")
    assert texts == ["good", "good too"] and opened.skipped == 1 and opened.empty == 1
    assert "no column 'body'" in error_of(f"parquet:{path}", field="body")
    assert "column 'n' is int64, not string" in error_of(f"parquet:{path}", field="n")
    whole = path.read_bytes()
    for damaged in (
        whole[:-20],
        whole.replace(b"good too", b"good tap"),
        whole.replace(b"good", b"\xff\xff\xff\xff"),
        b"neither",
    ):
        path.write_bytes(damaged)
        message = error_of(f"parquet:{path}", on_bad_record="skip")
        assert str(path) in message and "damaged" in message
    path.write_bytes(b"")
    assert "is empty" in error_of(f"parquet:{path}")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'attnlab[parquet]'" in error_of(f"parquet:{tmp_path}/*")


def test_nothing_to_read(tmp_path):
    tokenizer = data.load_tokenizer("bytes")
    for kind in ("text", "jsonl", "parquet", "array_record"):
        with pytest.raises(UserError, match=r"none\*' matches no file"):
            data.train_loader(data.DataConfig(source=f"{kind}:{tmp_path}/none*"), tokenizer, seed=0)
    (tmp_path / "a.jsonl").write_bytes(lines(["", ""]))
    with pytest.raises(UserError, match=r"no text in its 1 file.*2 empty document"):
        data.train_loader(data.DataConfig(source=f"jsonl:{tmp_path}/*"), tokenizer, seed=0)
    for name in "bc":
        (tmp_path / f"{name}.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"no text in its 2 file.*2 skipped"):
        data.train_loader(data.DataConfig(source=f"text:{tmp_path}/*.txt", on_bad_record="skip"), tokenizer, seed=0)


def test_skipped_records_are_in_the_summary(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(lines(["good " * 50] * 5) + b"bad\nworse\n")
    config = data.DataConfig(source=f"jsonl:{tmp_path}/*", on_bad_record="skip", length=16, batch=2)
    for _ in range(2):  # tokenised, then from the cache
        summary = data.train_loader(config, data.load_tokenizer("bytes"), seed=0).summary()
        assert summary["skipped"] == 2 and summary["documents"] == 5 and "SKIPPED 2" in data.describe(summary)
    assert "skipped 2 bad record(s)" in caplog.text and "line 6" in caplog.text


def test_long_documents_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 7)
    text = "".join(f"zeile {i} ü\n" for i in range(40)) + "z" * 170 + "\nend"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_bytes(lines([text]))
    documents = [
        next(iter(Source(data.DataConfig(source=source)).documents()))
        for source in (f"text:{tmp_path}/a.txt", f"jsonl:{tmp_path}/a.jsonl")
    ]
    pieces = [list(document.pieces) for document in documents]
    assert pieces[0] == pieces[1] and "".join(pieces[0]) == text
    assert max(map(len, pieces[0])) <= 50 and pieces[0][0].endswith("\n")
    # And the store holds them as one document.
    config = data.DataConfig(source=f"text:{tmp_path}/a.txt", length=8, batch=2)
    summary = data.train_loader(config, data.load_tokenizer("bytes"), seed=0).summary()
    assert summary["documents"] == 1 and summary["tokens"] == summary["bytes"] == len(text.encode())


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines(["a"]))
    opened = Source(data.DataConfig(source=f"jsonl:{tmp_path}/a.jsonl"))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match="a.jsonl: No such file"):
        list(opened.documents())


def test_import_needs_no_jax():
    import subprocess

    code = "import attnlab.data, sys; sys.exit(any(m in sys.modules for m in ('jax', 'grain', 'pyarrow')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
