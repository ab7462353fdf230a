"""Damaged and hostile indices of tokenised corpora: one UserError, nothing read wrong, nothing unpickled."""

import io
import json
import os
import pathlib
import pickle
import shutil
import zipfile

import numpy as np
import pytest

from attnlab import data
from attnlab.data import digests
from attnlab.errors import UserError

# A reader that hangs fails its test.
pytestmark = pytest.mark.timeout(60)

BYTES = data.load_tokenizer("bytes")
INDEX_KEYS = (
    "version source tokenizer tokenizer_fingerprint vocab_size eod_id dtype token_bytes record_tokens documents tokens"
    " bytes files skipped empty digest documents_sha256 shards"
).split()
SHARD_KEYS = ("name", "records", "size", "sha256")
BAD = [None, "x", "", -1, 2**70, 1.5, True, [], [1], {}, {"name": "x"}]


@pytest.fixture
def written(corpus, tmp_path):
    data.apply_tokenizer(data.DataConfig(source=corpus), str(tmp_path / "out"), shards=3, progress=lambda *_: None)
    return tmp_path / "out"


def read(directory):
    config = data.DataConfig(source=f"array_record:{directory}/*.array_record", length=16, batch=2, heldout=0)
    with data.train_loader(config, BYTES, seed=0) as loader:
        return [next(loader) for _ in range(loader.summary()["rows"] // 2)]


def refused(directory, case):
    with pytest.raises(UserError) as error:
        read(directory)
        pytest.fail(f"{case} was read")
    message = str(error.value)
    assert str(directory) in message and len(message.splitlines()) <= 2 and len(message) < 600, case


def index_of(directory):
    return digests.without_checksum(digests.read_json(str(directory / "index.json")))


def test_every_key_of_the_index(written):
    """Absent, or of another type or value, though the checksum was made anew; and with the old checksum."""
    good = index_of(written)
    checksum = json.loads((written / "index.json").read_text())[digests.CHECKSUM]
    assert sorted(good) == sorted(INDEX_KEYS) and sorted(good["shards"][0]) == sorted(SHARD_KEYS)
    absent = object()
    for path in [(key,) for key in INDEX_KEYS] + [("shards", 1, key) for key in SHARD_KEYS] + [("shards", 1)]:
        for value in (absent, *BAD):
            index = json.loads(json.dumps(good))
            node = index
            for name in path[:-1]:
                node = node[name]
            if path[0] in ("source", "tokenizer") and isinstance(value, str):
                continue  # for people only
            if value is absent:
                del node[path[-1]]
            else:
                node[path[-1]] = value
            digests.write_json(str(written / "index.json"), index)
            refused(written, f"{path} = {value!r}")
            index |= {digests.CHECKSUM: checksum}
            (written / "index.json").write_text(json.dumps(index))
            refused(written, f"{path} = {value!r} with the old checksum")
    digests.write_json(str(written / "index.json"), good)
    read(written)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"[1]", b"5", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"version": 2}', b'{"version": 1}'],
    ids=lambda content: repr(content[:12]),
)
def test_an_index_that_is_none(written, content):
    (written / "index.json").write_bytes(content)
    refused(written, content[:20])


@pytest.mark.parametrize("name", ["index.json", "documents.npz"])
@pytest.mark.parametrize("damage", ["directory", "fifo", "link to itself", "endless", "gone", "cut", "flip"])
def test_anything_in_the_place_of_a_file(written, name, damage):
    path = written / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage == "fifo":
        os.mkfifo(path)
    elif damage == "link to itself":
        path.symlink_to(path)
    elif damage == "endless":
        path.symlink_to("/dev/zero")
    elif damage != "gone":
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-1] if damage == "cut" else content)
    refused(written, damage)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def _zip(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return out.getvalue()


def _npy(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def test_documents_that_are_none(written, tmp_path):
    """Whatever documents.npz holds under a digest that is right."""
    with np.load(written / "documents.npz") as loaded:
        good = dict(loaded)
    evil = np.array([Evil(tmp_path / "ran")] * 20, object)
    huge = _npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }\n")

    def saved(**columns):
        out = io.BytesIO()
        np.savez(out, **columns)
        return out.getvalue()

    single = io.BytesIO()
    np.save(single, good["lengths"])
    cases = {
        **{f"no {name}": saved(**{n: a for n, a in good.items() if n != name}) for name in good},
        "one more": saved(**good, more=good["keys"]),
        **{f"{name} pickled": saved(**good | {name: evil}) for name in good},
        **{f"{name} float": saved(**good | {name: a * 1.5}) for name, a in good.items()},
        **{f"{name} big-endian": saved(**good | {name: a.astype(a.dtype.newbyteorder())}) for name, a in good.items()},
        **{f"{name} 2-d": saved(**good | {name: a[None]}) for name, a in good.items()},
        **{f"{name} scalar": saved(**good | {name: a[0]}) for name, a in good.items()},
        **{f"{name} short": saved(**good | {name: a[:-1]}) for name, a in good.items()},
        "all short": saved(**{name: a[:-1] for name, a in good.items()}),
        "all empty": saved(**{name: a[:0] for name, a in good.items()}),
        "lengths negative": saved(**good | {"lengths": -good["lengths"]}),
        "lengths moved": saved(**good | {"lengths": good["lengths"] + np.array([9000, -1] + [0] * 18)}),
        "lengths that overflow": saved(**good | {"lengths": good["lengths"] + 2**62}),
        "bytes more": saved(**good | {"text_bytes": good["text_bytes"] + 1}),
        "no zip": b"not a zip file",
        "nothing": b"",
        "one array": single.getvalue(),
        "pickle": pickle.dumps(Evil(tmp_path / "ran")),
        "members that are no arrays": _zip(lengths=b"x", keys=b"x", text_bytes=b"x"),
        "huge arrays": _zip(lengths=huge, keys=huge, text_bytes=huge),
        "bad headers": _zip(lengths=_npy(b"{\n"), keys=_npy(b"__import__('os')\n"), text_bytes=_npy(b"")),
        "members twice": _zip(lengths=b"x") + saved(**good)[:-30],
    }
    index = index_of(written)
    for case, content in cases.items():
        (written / "documents.npz").write_bytes(content)
        digest = digests.sha256_of(str(written / "documents.npz"))
        digests.write_json(str(written / "index.json"), {**index, "documents_sha256": digest})
        refused(written, case)
    assert not (tmp_path / "ran").exists()


def test_version_1_and_the_checksum_exclude_each_other(written, as_version_1):
    shutil.copytree(written, written.with_name("old"))
    whole = read(written)
    as_version_1(written.with_name("old"))
    for a, b in zip(whole, read(written.with_name("old")), strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    index = json.loads((written / "index.json").read_text())
    (written / "index.json").write_text(json.dumps({**index, "version": 1}))
    refused(written, "version 1 with a checksum")
    index.pop(digests.CHECKSUM)
    (written / "index.json").write_text(json.dumps(index))
    refused(written, "version 2 without one")
    digests.write_json(str(written / "index.json"), {**index, "version": 3})
    with pytest.raises(UserError, match="format 3; this attnlab reads 1 to 2"):
        read(written)
