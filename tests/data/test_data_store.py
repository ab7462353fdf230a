"""The token cache."""

import errno
import json
import logging
import multiprocessing
import os
import pathlib
import shutil

import numpy as np
import pytest

from attnlab import data
from attnlab.data import digests, store
from attnlab.errors import UserError
from tests.data.batches import BYTES, assert_same, batches_of, cache_files

# A loader that hangs fails its test.
pytestmark = pytest.mark.timeout(120)


def test_the_cache_is_used_and_follows_its_inputs(corpus, tmp_path, monkeypatch):
    config = data.DataConfig(source=corpus, length=16, batch=4)
    built = []
    original = store.build
    monkeypatch.setattr(store, "build", lambda *args: (built.append(args[0].config), original(*args))[1])
    first = batches_of(config)
    assert_same(first, batches_of(config))
    assert len(built) == 1
    file = next((tmp_path / "text").rglob("*.txt"))
    file.write_text("changed")
    batches_of(config)
    assert len(built) == 2
    os.utime(file, ns=(0, 0))
    batches_of(config)
    assert len(built) == 3
    # A store with records left out is none for a config that wants to hear of them.
    batches_of(data.DataConfig(source=corpus, length=16, batch=4, on_bad_record="skip"))
    assert len(built) == 4
    assert not list((tmp_path / "cache").glob("partial-*"))


@pytest.mark.parametrize("name", ["tokens.bin", "lengths.npy", "keys.npy", "text_bytes.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "empty"])
def test_a_damaged_cache_is_noticed_and_made_again(corpus, tmp_path, caplog, name, damage):
    config = data.DataConfig(source=corpus, length=16, batch=4)
    first = batches_of(config)
    [path] = [path for path in cache_files(tmp_path) if path.name == name]
    content = bytearray(path.read_bytes())
    path.unlink()  # a new file: to cut one that is mapped would kill the process
    if damage != "remove":
        content[len(content) // 2] ^= 0x04
        path.write_bytes({"cut": content[:-1], "flip": content, "empty": b""}[damage])
    again = batches_of(config)
    assert_same(first, again)
    assert "is damaged" in caplog.text and "tokenising again" in caplog.text
    caplog.clear()
    assert_same(first, batches_of(config))
    assert not caplog.text


def _replace(path, damage):
    """Puts something else in the place of a file or directory of the cache."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage == "fifo":
        os.mkfifo(path)
    elif damage == "link to itself":
        path.symlink_to(path)
    elif damage == "link to nowhere":
        path.symlink_to(path.parent / "nowhere")
    elif damage == "endless":
        path.symlink_to("/dev/zero")
    elif damage == "file":
        path.write_text("in the way")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("damage", ["directory", "fifo", "link to itself", "link to nowhere", "endless", "file"])
def test_anything_in_the_place_of_a_cache_is_replaced(corpus, tmp_path, caplog, damage):
    config = data.DataConfig(source=corpus, length=16, batch=4)
    first = batches_of(config)
    [meta] = [path for path in cache_files(tmp_path) if path.name == "meta.json"]
    for path in (meta, meta.with_name("tokens.bin"), meta.with_name("keys.npy"), meta.parent):
        _replace(path, damage)
        caplog.clear()
        assert_same(first, batches_of(config))
        assert "is damaged" in caplog.text and "tokenising again" in caplog.text
        caplog.clear()
        assert_same(first, batches_of(config))
        assert not caplog.text


@pytest.mark.parametrize(
    "name, value",
    [
        ("meta.json", {"files": "x"}),
        ("meta.json", {"skipped": None}),
        ("meta.json", {"empty": -1}),
        ("meta.json", {"digest": 5}),
        ("meta.json", {"sha256": 5}),
        ("lengths.npy", lambda a: a * 1.5),
        ("lengths.npy", lambda a: -a),
        ("lengths.npy", lambda a: a + 1),
        ("lengths.npy", lambda a: a + 2**60),
        ("lengths.npy", lambda a: a[:, None]),
        ("lengths.npy", lambda a: a[:5]),
        ("lengths.npy", lambda a: a[:0]),
        ("keys.npy", lambda a: a.astype(np.int64)),
        ("keys.npy", lambda a: a.astype(object)),
        ("text_bytes.npy", lambda a: a[1:]),
        ("tokens.bin", lambda a: a[:-1]),
        ("tokens.bin", lambda a: a + np.uint16(300)),
    ],
)
def test_a_cache_that_contradicts_itself_is_made_again(corpus, tmp_path, caplog, name, value):
    """Though every checksum is that of the content."""
    config = data.DataConfig(source=corpus, length=16, batch=4)
    first = batches_of(config)
    [meta] = [path for path in cache_files(tmp_path) if path.name == "meta.json"]
    content = digests.without_checksum(digests.read_json(str(meta)))
    if name == "meta.json":
        content |= value
    else:
        path = meta.with_name(name)
        array = np.fromfile(path, np.uint16) if name == "tokens.bin" else np.load(path)
        path.unlink()
        value(array).tofile(path) if name == "tokens.bin" else np.save(path, value(array), allow_pickle=True)
        content["sha256"][name] = digests.sha256_of(str(path))
    digests.write_json(str(meta), content)
    assert_same(first, batches_of(config))
    assert "is damaged" in caplog.text and "tokenising again" in caplog.text


def test_a_cache_that_cannot_be_written(corpus, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    config = data.DataConfig(source=corpus, length=16, batch=4, cache=str(tmp_path / "file"))
    expected = batches_of(data.DataConfig(source=corpus, length=16, batch=4))
    assert_same(expected, batches_of(config))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "data.cache" in caplog.text and str(tmp_path / "file") in caplog.text
    monkeypatch.setattr(store, "_MEMORY_LIMIT_BYTES", 10)
    config = data.DataConfig(source=corpus, length=16, batch=4, cache=str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="cannot be written.*\n.*data.cache"):
        data.train_loader(config, BYTES, seed=0)


def test_a_full_disk(corpus, tmp_path, monkeypatch, caplog):
    expected = batches_of(data.DataConfig(source=corpus, length=16, batch=4))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    config = data.DataConfig(source=corpus, length=16, batch=4, cache=str(tmp_path / "other"))
    assert_same(expected, batches_of(config))
    assert "No space left" in caplog.text
    assert os.listdir(tmp_path / "other") == []


def test_the_place_of_the_cache(monkeypatch):
    assert store.cache_directory(data.DataConfig(cache="/a/b")) == "/a/b"
    monkeypatch.setenv("ATTNLAB_CACHE", "/c")
    assert store.cache_directory(data.DataConfig()) == "/c"
    assert store.cache_directory(data.DataConfig(cache="/a/b")) == "/a/b"
    monkeypatch.delenv("ATTNLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/d")
    assert store.cache_directory(data.DataConfig()) == "/d/attnlab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_directory(data.DataConfig()) == str(pathlib.Path.home() / ".cache" / "attnlab")


def _open_in_process(source, cache, barrier, results):
    config = data.DataConfig(source=source, length=16, batch=4, cache=cache)
    barrier.wait(30)
    results.put(data.train_loader(config, BYTES, seed=0).summary()["digest"])


def test_two_processes_at_once(corpus, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_open_in_process, args=(corpus, str(tmp_path / "both"), barrier, results))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    digests = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert len(digests) == 1 and len(os.listdir(tmp_path / "both")) == 1


def test_of_two_that_finish_the_second_takes_the_first(corpus, tmp_path, monkeypatch):
    """The other finishes, well or badly, between this one's look at the cache and its rename."""
    config = data.DataConfig(source=corpus, length=16, batch=4)
    expected = batches_of(config)
    [meta] = [path for path in cache_files(tmp_path) if path.name == "meta.json"]
    original = store.build

    for damaged in (False, True):
        kept = meta.parent.with_name("kept")
        meta.parent.rename(kept)

        def build(*args, damaged=damaged, kept=kept):
            result = original(*args)
            kept.rename(meta.parent)
            if damaged:
                meta.write_text("{}")
            return result

        monkeypatch.setattr(store, "build", build)
        assert_same(expected, batches_of(config))
        assert os.listdir(tmp_path / "cache") == [meta.parent.name]
        assert json.loads(meta.read_text())["files"] == 20


def test_progress_is_reported(corpus):
    seen = []
    config = data.DataConfig(source=corpus, length=16, batch=4)
    data.train_loader(config, BYTES, seed=0, progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] > 0
