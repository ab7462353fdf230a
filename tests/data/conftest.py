import json

import pytest

from attnlab.data.digests import CHECKSUM


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test has its own token cache."""
    monkeypatch.setenv("ATTNLAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
    """Twenty text files of different lengths, non-ASCII text among them; the glob that matches them."""
    directory = tmp_path / "text"
    for i in range(20):
        path = directory / f"part{i % 3}" / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i}: " + "naïve café " * (i % 7) + "x" * (i * 13 % 97) + "\n", encoding="utf-8")
    return f"text:{directory}/**/*.txt"


@pytest.fixture
def as_version_1():
    """Makes a directory of array_record what it was before shards had digests and tokens their bytes."""

    def change(directory):
        index = json.loads((directory / "index.json").read_text())
        del index[CHECKSUM], index["token_bytes"]
        for shard in index["shards"]:
            del shard["sha256"]
        (directory / "index.json").write_text(json.dumps({**index, "version": 1}))

    return change
