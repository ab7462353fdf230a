"""What tests of stores share: batches of a config, and the files of its cache."""

import numpy as np

from attnlab import data

BYTES = data.load_tokenizer("bytes")


def batches_of(config, count=6, tokenizer=BYTES):
    with data.train_loader(config, tokenizer, seed=1) as loader:
        return [next(loader) for _ in range(count)]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def cache_files(tmp_path):
    return sorted((tmp_path / "cache").glob("tokens-*/*"))
