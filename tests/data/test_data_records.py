"""Corpora written as array_record: what is read is what was written, or damage is named."""

import errno
import io
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from attnlab import data
from attnlab.data import digests, records
from attnlab.errors import ConfigError, UserError
from tests import tiers
from tests.data.batches import BYTES, assert_same, batches_of, cache_files

# A loader that hangs fails its test.
pytestmark = pytest.mark.timeout(120)


@tiers.often("7-3", "8192-64")
@pytest.mark.parametrize("shards", [1, 3, 64])
@pytest.mark.parametrize("record_tokens", [7, 1 << 13])
def test_array_record_gives_the_rows_of_the_source(corpus, tmp_path, monkeypatch, shards, record_tokens):
    monkeypatch.setattr(records, "RECORD_TOKENS", record_tokens)
    direct = data.DataConfig(source=corpus, length=16, batch=4, heldout=0.2)
    summary = data.apply_tokenizer(direct, str(tmp_path / "out"), shards=shards, progress=lambda *_: None)
    assert summary["shards"] == min(shards, 20) == len(list((tmp_path / "out").glob("*.array_record")))
    written = data.DataConfig(source=f"array_record:{tmp_path}/out/*.array_record", length=16, batch=4, heldout=0.2)
    assert_same(batches_of(direct, 80), batches_of(written, 80))
    assert_same(*(data.heldout_loader(config, BYTES) for config in (direct, written)))
    left, right = (data.train_loader(config, BYTES, seed=0) for config in (direct, written))
    next(left)
    right.set_state(left.get_state())
    assert_same([next(left)], [next(right)])
    different = {key for key, value in left.summary().items() if right.summary()[key] != value}
    assert different == {"source"}


def test_array_record_with_workers_and_two_directories(corpus, tmp_path):
    config = data.DataConfig(source=corpus, length=16, batch=4)
    for name in ("one", "two"):
        data.apply_tokenizer(config, str(tmp_path / name), shards=2)
    source = ",".join(
        f"array_record:{tmp_path}/{name}/*.array_record" if name == "one" else f"{tmp_path}/{name}/*.array_record"
        for name in ("one", "two")
    )
    both = data.DataConfig(source=source, length=16, batch=4, workers=1)
    with data.train_loader(both, BYTES, seed=0) as loader:
        assert loader.summary()["documents"] == 40
        with data.train_loader(data.DataConfig(source=source, length=16, batch=4), BYTES, seed=0) as plain:
            assert_same([next(loader) for _ in range(3)], [next(plain) for _ in range(3)])


def test_apply_refuses(corpus, tmp_path):
    config = data.DataConfig(source=corpus)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(UserError, match="not an empty directory"):
        data.apply_tokenizer(config, str(tmp_path / "full"))
    with pytest.raises(UserError, match="cannot be written"):
        data.apply_tokenizer(config, str(tmp_path / "full" / "file" / "below"))
    with pytest.raises(ConfigError, match="shards = 0"):
        data.apply_tokenizer(config, str(tmp_path / "new"), shards=0)
    with pytest.raises(UserError, match="is tokens already"):
        data.apply_tokenizer(data.DataConfig(source="array_record:x"), str(tmp_path / "new"))
    (tmp_path / "empty").mkdir()
    data.apply_tokenizer(config, str(tmp_path / "empty"))
    with pytest.raises(UserError, match="not an empty directory"):
        data.apply_tokenizer(config, str(tmp_path / "empty"))


def test_apply_that_fails_leaves_nothing(corpus, tmp_path):
    (tmp_path / "text" / "zz.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        data.apply_tokenizer(data.DataConfig(source=corpus), str(tmp_path / "out"))
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]


@pytest.mark.parametrize(
    "call",
    [
        "data.apply_tokenizer(config, out, progress=kill)",
        "data.train_tokenizer(config, 300, out, progress=kill)",
        "data.train_loader(config, data.load_tokenizer('bytes'), seed=0, progress=kill)",
    ],
)
def test_a_killed_process_leaves_nothing_that_looks_complete(corpus, tmp_path, call):
    code = f"""
import os, signal
from attnlab import data
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
out = {str(tmp_path / "out")!r}
config = data.DataConfig(source={corpus!r}, length=16, batch=4)
{call}
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and not cache_files(tmp_path)
    config = data.DataConfig(source=corpus, length=16, batch=4)
    data.apply_tokenizer(config, str(tmp_path / "out"))
    # What was left in the cache goes once it is a day old, and not before: another process may be writing it.
    left = list((tmp_path / "cache").glob("partial-*"))
    batches_of(config, 1)
    assert list((tmp_path / "cache").glob("partial-*")) == left
    for path in left:
        for inside in (*path.iterdir(), path):
            os.utime(inside, (0, 0))
    batches_of(data.DataConfig(source=corpus, length=16, batch=4, on_bad_record="skip"), 1)
    assert not list((tmp_path / "cache").glob("partial-*"))


@pytest.mark.parametrize(
    "damage, message",
    [
        ("index", "has no index.json"),
        ("documents", "has no documents.npz"),
        ("no shard", "is missing"),
        ("cut", "truncated or damaged"),
        ("flip documents", "is damaged"),
        ("index text", "is damaged"),
        ("partly matched", "is not matched by data.source"),
        ("flip", "tokens-00001.array_record is damaged: not what index.json says"),
        ("zeros", "tokens-00001.array_record is damaged: not what index.json says"),
    ],
)
def test_bad_array_record_directories(corpus, tmp_path, damage, message):
    config = data.DataConfig(source=corpus, length=16, batch=4)
    out = tmp_path / "out"
    data.apply_tokenizer(config, str(out), shards=3)
    shard, documents = out / "tokens-00001.array_record", out / "documents.npz"
    glob = "*.array_record"
    if damage in ("index", "documents", "no shard"):
        {"index": out / "index.json", "documents": documents, "no shard": shard}[damage].unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif damage == "index text":
        (out / "index.json").write_text('{"shards": 3')
    elif damage == "partly matched":
        glob = "*1.array_record"
    else:
        path = documents if damage == "flip documents" else shard
        content = bytearray(path.read_bytes())
        content[400:500] = bytes(100) if damage == "zeros" else bytes(b ^ 0xFF for b in content[400:500])
        path.write_bytes(content)
    written = data.DataConfig(source=f"array_record:{out}/{glob}", length=16, batch=4, heldout=0)
    with pytest.raises(UserError, match=message) as error:
        with data.train_loader(written, BYTES, seed=0) as loader:
            for _ in range(loader.summary()["rows"]):
                next(loader)
    assert str(out) in str(error.value)


def _read_all(out, cache=None):
    config = data.DataConfig(source=f"array_record:{out}/*.array_record", length=16, batch=4, heldout=0, cache=cache)
    with data.train_loader(config, BYTES, seed=0) as loader:
        return [next(loader) for _ in range(loader.summary()["rows"])]


@pytest.mark.parametrize("damage", ["flip", "zeros"])
def test_damage_in_a_corpus_without_digests_of_shards(corpus, tmp_path, damage, as_version_1):
    """Version 1 had none: the record that cannot be decoded tells."""
    out = tmp_path / "out"
    data.apply_tokenizer(data.DataConfig(source=corpus), str(out), shards=2)
    whole = _read_all(out)
    as_version_1(out)
    assert_same(whole, _read_all(out))
    content = bytearray((out / "tokens-00001.array_record").read_bytes())
    content[400:500] = bytes(100) if damage == "zeros" else bytes(b ^ 0xFF for b in content[400:500])
    (out / "tokens-00001.array_record").write_bytes(content)
    with pytest.raises(UserError, match="tokens-00001.array_record is damaged: record"):
        _read_all(out)


def test_ids_that_the_tokenizer_does_not_have(corpus, tmp_path, monkeypatch):
    encode = type(BYTES).encode
    with monkeypatch.context() as patch:
        patch.setattr(type(BYTES), "encode", lambda self, text: encode(self, text) + 200)
        data.apply_tokenizer(data.DataConfig(source=corpus), str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"cannot be read \(token \d+, of 257\)"):
        _read_all(tmp_path / "out")


def test_shards_are_verified_once(corpus, tmp_path, monkeypatch):
    """By the first process on a machine that reads them, and again when they change."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    data.apply_tokenizer(data.DataConfig(source=corpus), str(out), shards=3)
    shards = sorted(out.glob("*.array_record"))
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", -10.0)
    hashed = []
    original = digests.sha256_of
    monkeypatch.setattr(digests, "sha256_of", lambda path, *read: (hashed.append(path), original(path, *read))[1])

    def opened(cache, new_process=True):
        hashed.clear()
        if new_process:
            monkeypatch.setattr(digests, "_verified", set())
        _read_all(out, str(cache))
        return sorted(map(pathlib.Path, hashed))

    assert opened(cache) == shards
    assert opened(cache) == opened(cache, False) == []
    os.utime(shards[1], ns=(0, 0))
    assert opened(cache) == shards[1:2]
    copy = shards[2].read_bytes()
    shards[2].unlink()
    shards[2].write_bytes(copy)
    assert opened(cache) == shards[2:]
    status, changed = shards[0].stat(), bytearray(shards[0].read_bytes())
    changed[400] ^= 1
    shards[0].write_bytes(changed)
    os.utime(shards[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy that keeps times would leave it
    with pytest.raises(UserError, match="tokens-00000.array_record is damaged: not what index.json says"):
        opened(cache)
    shards[0].write_bytes(bytes(a ^ (i == 400) for i, a in enumerate(changed)))
    # Where no mark can be written, the process remembers.
    (tmp_path / "file").write_text("in the way")
    assert opened(tmp_path / "file") == shards and opened(tmp_path / "file", False) == []
    assert opened(tmp_path / "file") == shards
    # What has changed just now may change again at the same time stamp.
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", 3600.0)
    assert opened(tmp_path / "new") == opened(tmp_path / "new") == shards


def test_a_shard_that_cannot_be_read_is_named(corpus, tmp_path, monkeypatch):
    data.apply_tokenizer(data.DataConfig(source=corpus), str(tmp_path / "out"), shards=1)
    original = digests.open_regular

    class Failing(io.BytesIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    failing = lambda path: Failing() if path.endswith(".array_record") else original(path)
    monkeypatch.setattr(digests, "open_regular", failing)
    with pytest.raises(UserError, match=r"out/tokens-00000.array_record: Input/output error"):
        _read_all(tmp_path / "out")


def test_progress_of_verifying(corpus, tmp_path):
    data.apply_tokenizer(data.DataConfig(source=corpus), str(tmp_path / "out"))
    seen = []
    config = data.DataConfig(source=f"array_record:{tmp_path}/out/*.array_record", length=16, batch=4)
    data.train_loader(config, BYTES, seed=0, progress=lambda *done: seen.append(done))
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.array_record"))
    assert max(seen) == (size, size)


def test_array_record_of_another_tokenizer(corpus, tmp_path):
    config = data.DataConfig(source=corpus, length=16, batch=4)
    data.apply_tokenizer(config, str(tmp_path / "out"))
    data.train_tokenizer(config, 300, str(tmp_path / "bpe.json"))
    with pytest.raises(UserError, match="tokenised with 'bytes'.*'bpe.json'"):
        data.train_loader(
            data.DataConfig(source=f"array_record:{tmp_path}/out/*.array_record"),
            data.load_tokenizer(str(tmp_path / "bpe.json")),
            seed=0,
        )
