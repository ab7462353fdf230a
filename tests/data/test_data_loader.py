"""Index addressing, resumption, packing and splits."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from attnlab import data
from attnlab.data.loader import Batches
from attnlab.data.packing import PackedRows, split_documents
from attnlab.data.store import Corpus, FlatStore
from attnlab.errors import ConfigError, UserError

# A loader that hangs fails its test.
pytestmark = pytest.mark.timeout(120)

BYTES = data.load_tokenizer("bytes")


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_equal(left, right):
    for name in ("tokens", "targets", "segments", "positions"):
        np.testing.assert_array_equal(left[name], right[name], name)
        assert left[name].dtype == np.int32


def store_of(documents, keys=None):
    """A flat store of documents given as lists of ids; 256 is end-of-document."""
    flat = np.array([256] + [i for document in documents for i in [*document, 256]], np.uint16)
    lengths = np.array([len(document) for document in documents])
    keys = np.arange(len(documents), dtype=np.uint64) if keys is None else np.array(keys, np.uint64)
    return FlatStore(flat, Corpus(lengths, keys, lengths, 1, 0, 0, ""))


def stream_of(documents):
    """The packed stream by its definition: (input, target, document, place in the document)."""
    return [
        (a, b, i, place)
        for i, document in enumerate(documents)
        for place, (a, b) in enumerate(zip([256, *document], [*document, 256], strict=True))
    ]


@pytest.mark.parametrize("length", [1, 3, 8, 17, 500])
def test_packing_is_the_stream_of_shifted_documents(length):
    random = np.random.default_rng(length)
    # A document's tokens lie in its own hundred, so that one that leaks is seen.
    documents = [
        list(random.integers(20 * i, 20 * i + 20, size)) for i, size in enumerate([5, 1, 30, 2, 2, 7, 1, 16, 17])
    ]
    order = np.array([3, 0, 8, 1, 2, 7, 5, 4, 6])
    rows = PackedRows(store_of(documents), order, length, 256)
    stream = stream_of([documents[i] for i in order])
    assert rows.positions == len(stream) and len(rows) == -(-len(stream) // length)
    for index in range(len(rows)):
        row, expected = rows[index], stream[index * length : (index + 1) * length]
        size = len(expected)
        assert all(array.shape == (length,) and array.dtype == np.int32 for array in row.values())
        np.testing.assert_array_equal(row["tokens"][:size], [entry[0] for entry in expected])
        np.testing.assert_array_equal(row["targets"][:size], [entry[1] for entry in expected])
        number = {document: i + 1 for i, document in enumerate(dict.fromkeys(entry[2] for entry in expected))}
        np.testing.assert_array_equal(row["segments"][:size], [number[entry[2]] for entry in expected])
        begins = {document: min(e[3] for e in expected if e[2] == document) for document in number}
        np.testing.assert_array_equal(row["positions"][:size], [e[3] - begins[e[2]] for e in expected])
        assert index == len(rows) - 1 or size == length
        assert (row["segments"][size:] == 0).all() and (row["positions"][size:] == 0).all()
        # No target belongs to another document than its input.
        for token, target, segment in zip(row["tokens"], row["targets"], row["segments"], strict=True):
            assert segment == 0 or 256 in (token, target) or token // 20 == target // 20


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_visits_every_row_once(shuffle):
    store = store_of([[1] * 50] * 7)
    config = data.DataConfig(length=5, batch=3, shuffle=shuffle)
    rows = PackedRows(store, np.arange(7), 5, 256)
    batches = Batches(rows, config, 7, range(3))
    count = len(rows)
    epochs = [[batches.row_index(i) for i in range(e * count, (e + 1) * count)] for e in range(4)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert all((epochs[0] == epoch) != shuffle for epoch in epochs[1:])
    # The epochs of one seed are not those of the next.
    other = Batches(rows, config, 8, range(3))
    assert ([other.row_index(i) for i in range(count)] in epochs) != shuffle
    # Batches run on from one epoch into the next.
    entries = [i for step in range(count) for i in range(step * 3, step * 3 + 3)]
    expected = rows.pack([batches.row_index(i) for i in entries])
    got = [batches[step] for step in range(count)]
    assert_equal(expected, {name: np.concatenate([batch[name] for batch in got]) for name in got[0]})


@pytest.mark.parametrize("processes", [2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(corpus, processes):
    config = data.DataConfig(source=corpus, length=32, batch=8)
    whole = take(data.train_loader(config, BYTES, seed=3), 20)
    parts = [
        take(data.train_loader(config, BYTES, seed=3, rows=np.array_split(range(8), processes)[p]), 20)
        for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        assert parts[0][step]["tokens"].shape == (8 // processes, 32)
        assert_equal(batch, {name: np.concatenate([part[step][name] for part in parts]) for name in batch})
    assert any(
        (a["tokens"] != b["tokens"]).any()
        for a, b in zip(whole, take(data.train_loader(config, BYTES, seed=4), 20), strict=True)
    )


def test_rows_of_a_batch_are_read_by_those_who_hold_them(corpus):
    """Devices of a pod lie in the mesh by its wiring: a host may hold any rows, and several hosts the same ones."""
    config = data.DataConfig(source=corpus, length=32, batch=8, heldout=0.4)
    whole, heldout = take(data.train_loader(config, BYTES, seed=3), 5), list(data.heldout_loader(config, BYTES))
    for rows in ([0, 1, 4, 5], [7], range(8)):
        part = take(data.train_loader(config, BYTES, seed=3, rows=rows), 5)
        for loaded, expected in ((part, whole), (list(data.heldout_loader(config, BYTES, rows=rows)), heldout)):
            for a, b in zip(loaded, expected, strict=True):
                assert_equal(a, {name: array[list(rows)] for name, array in b.items()})
    for rows in ([], [1, 1], [2, 1], [-1, 0], [8]):
        with pytest.raises(ConfigError, match="rows = .* from 0 to data.batch - 1 = 7"):
            data.train_loader(config, BYTES, seed=3, rows=rows)


@pytest.mark.slow
def test_batches_and_resumption_do_not_depend_on_the_number_of_workers(corpus):
    config = data.DataConfig(source=corpus, length=32, batch=4)
    expected = take(data.train_loader(config, BYTES, seed=0), 46)
    with data.train_loader(dataclasses.replace(config, workers=2), BYTES, seed=0, rows=[2, 3]) as loader:
        loader.set_state({**loader.get_state(), "step": 41})
        for batch in expected[41:]:
            assert_equal({name: array[2:] for name, array in batch.items()}, next(loader))


def test_resume_is_exact_at_any_step(corpus):
    config = data.DataConfig(source=corpus, length=16, batch=4)
    loader = data.train_loader(config, BYTES, seed=5)
    states, batches = [], []
    for _ in range(70):  # more than an epoch
        states.append(json.loads(json.dumps(loader.get_state())))
        batches.append(next(loader))
    assert 70 * 4 > loader.summary()["rows"]
    for step in (0, 1, 33, 69):
        for other in (loader, data.train_loader(config, BYTES, seed=5)):
            other.set_state(states[step])
            assert other.get_state() == states[step]
            for batch in batches[step : step + 3]:
                assert_equal(batch, next(other))
    loader.set_state({**states[0], "step": 10**15})  # no walk from the start
    next(loader)
    assert loader.get_state()["step"] == 10**15 + 1
    loader.close()
    next(loader)  # closing frees the threads, and does not lose the place
    assert loader.get_state()["step"] == 10**15 + 2


def test_without_shuffle_rows_come_in_the_order_of_the_source(corpus, tmp_path):
    texts = [path.read_text() for path in sorted((tmp_path / "text").rglob("*.txt"))]
    stream = stream_of([list(text.encode()) for text in texts])
    config = data.DataConfig(source=corpus, length=16, batch=4, heldout=0, shuffle=False)
    with data.train_loader(config, BYTES, seed=0) as loader:
        for step in range(len(stream) // 64):
            expected = [entry[1] for entry in stream[step * 64 : (step + 1) * 64]]
            assert next(loader)["targets"].reshape(-1).tolist() == expected


@pytest.mark.parametrize(
    "change, word",
    [
        ({"length": 17}, "data.length was 16 and is 17"),
        ({"batch": 2}, "data.batch"),
        ({"heldout": 0.2}, "data.heldout"),
        ({"shuffle": False}, "data.shuffle"),
        ({"seed": 6}, "the seed was 5 and is 6"),
    ],
)
def test_resume_refuses_what_differs(corpus, change, word):
    config = data.DataConfig(source=corpus, length=16, batch=4)
    state = data.train_loader(config, BYTES, seed=5).get_state()
    changed = dataclasses.replace(config, **{k: v for k, v in change.items() if k != "seed"})
    loader = data.train_loader(changed, BYTES, seed=change.get("seed", 5))
    with pytest.raises(UserError, match=word):
        loader.set_state(state)


def test_resume_refuses_other_text(corpus, tmp_path):
    config = data.DataConfig(source=corpus, length=16, batch=4)
    state = data.train_loader(config, BYTES, seed=5).get_state()
    path = next((tmp_path / "text").rglob("*.txt"))
    path.write_text(path.read_text().upper())
    with pytest.raises(UserError, match="the text of data.source"):
        data.train_loader(config, BYTES, seed=5).set_state(state)
    with pytest.raises(UserError, match="step = -1"):
        loader = data.train_loader(config, BYTES, seed=5)
        loader.set_state({**loader.get_state(), "step": -1})


def test_split_is_by_file_and_stays_when_files_are_added(corpus, tmp_path):
    def texts(config):
        summary = data.train_loader(config, BYTES, seed=0).summary()
        heldout = data.heldout_loader(config, BYTES)
        streams = []
        for loader in (
            [next(data.train_loader(dataclasses.replace(config, shuffle=False, batch=summary["rows"]), BYTES, seed=0))],
            heldout,
        ):
            tokens = np.concatenate([batch["targets"][batch["segments"] > 0] for batch in loader])
            streams.append(set(BYTES.decode(np.where(tokens == 256, 0, tokens)).split("\0")[:-1]))
        return streams

    config = data.DataConfig(source=corpus, length=16, batch=2, heldout=0.3)
    train, heldout = texts(config)
    assert not train & heldout and heldout
    assert train | heldout == {path.read_text() for path in (tmp_path / "text").rglob("*.txt")}
    for i in range(10):
        (tmp_path / "text" / f"new{i}.txt").write_text(f"new {i}\n")
    more_train, more_heldout = texts(config)
    assert train < more_train and heldout < more_heldout


def test_split_of_the_tiniest_corpora():
    config = data.DataConfig(heldout=0.05)
    for keys in ([2**63, 2**64 - 1], [0, 1]):
        train, heldout = split_documents(store_of([[1], [2]], keys).corpus, config)
        assert len(train) == len(heldout) == 1
    train, heldout = split_documents(store_of([[1], [2]]).corpus, dataclasses.replace(config, heldout=0.0))
    assert len(train) == 2 and not len(heldout)


@pytest.mark.parametrize("processes", [1, 2])
def test_heldout_loader(corpus, processes):
    config = data.DataConfig(source=corpus, length=16, batch=6, heldout=0.4)
    loaders = [data.heldout_loader(config, BYTES, rows=rows) for rows in np.array_split(range(6), processes)]
    summary = loaders[0].summary()
    rows = -(-(summary["heldout_tokens"] + summary["heldout_documents"]) // 16)
    assert rows % 6, "choose a corpus whose last batch is not full"
    for _ in range(2):
        parts = [list(loader) for loader in loaders]
        assert all(len(part) == len(loader) == -(-rows // 6) for part, loader in zip(parts, loaders, strict=True))
        batches = [
            {k: np.concatenate([batch[k] for batch in step]) for k in step[0]} for step in zip(*parts, strict=True)
        ]
        assert all(batch["tokens"].shape == (6, 16) for batch in batches)
        weights = np.concatenate([batch["segments"] for batch in batches]) > 0
        assert weights.sum() == summary["heldout_tokens"] + summary["heldout_documents"]
        assert not weights[rows:].any() and weights[: rows - 1].all()
        # Bits per byte divides by the bytes of text, which are those of the targets.
        assert {loader.bytes for loader in loaders} == {summary["heldout_bytes"]}
        assert ((np.concatenate([b["targets"] for b in batches]) < 256) & weights).sum() == summary["heldout_bytes"]
    assert len(list(data.heldout_loader(config, BYTES, batches=2))) == 2


def test_stdlib_is_there_and_split_by_file():
    config = data.DataConfig()
    loader = data.train_loader(config, BYTES, seed=0)
    summary = loader.summary()
    assert summary["tokens"] == summary["bytes"] > 3e6
    assert 0.01 < summary["heldout_documents"] / summary["documents"] < 0.12
    batch = next(loader)
    assert batch["tokens"].shape == (16, 256)
    inside = batch["positions"][:, 1:] > 0
    assert (batch["tokens"][:, 1:][inside] == batch["targets"][:, :-1][inside]).all()
    line = data.describe({**summary, "skipped": 3})
    assert f"{summary['documents']:,} documents" in line and "SKIPPED 3" in line and "\n" not in line


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("source", "web", "stdlib"),
        ("source", "text:", "text:GLOB"),
        ("tokenizer", "", "non-empty"),
        ("length", 0, "at least 1"),
        ("length", 2.5, "integer"),
        ("batch", True, "integer"),
        ("batch", -1, "at least 1"),
        ("heldout", 1.0, "below 1"),
        ("heldout", "0.1", "fraction"),
        ("on_bad_record", "ignore", "'raise' or 'skip'"),
        ("workers", -1, "at least 0"),
        ("cache", "", "directory"),
        ("shuffle", 1, "True or False"),
        ("field", 3, "string"),
    ],
)
def test_config_names_key_value_and_allowed(field, value, allowed):
    with pytest.raises(ConfigError) as error:
        data.DataConfig(**{field: value})
    assert f"data.{field} = {value!r}" in str(error.value) and allowed in str(error.value)


def test_impossible_requests(corpus):
    config = data.DataConfig(source=corpus, length=16, batch=6)
    with pytest.raises(ConfigError, match="rows = .*from 0 to data.batch - 1 = 5"):
        data.heldout_loader(config, BYTES, rows=[6])
    with pytest.raises(ConfigError, match="seed"):
        data.train_loader(config, BYTES, seed=-1)
    with pytest.raises(ConfigError, match="batches"):
        data.heldout_loader(config, BYTES, batches=0)
    with pytest.raises(UserError, match=r"fills \d+ row\(s\).*less than one batch of 600"):
        data.train_loader(dataclasses.replace(config, batch=600), BYTES, seed=0)
    with pytest.raises(UserError, match="data.heldout is 0"):
        data.heldout_loader(dataclasses.replace(config, heldout=0), BYTES)


@pytest.mark.slow
def test_a_program_that_closes_nothing_ends(corpus, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
from attnlab import data
if __name__ == "__main__":
    config = data.DataConfig(source={corpus!r}, length=16, batch=4, workers=1)
    loader = data.train_loader(config, data.load_tokenizer("bytes"), seed=0)
    kept = [next(loader) for _ in range(5)]
""")
    done = subprocess.run(
        [sys.executable, str(script)],
        timeout=60,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0 and not done.stderr


def test_one_row_and_one_batch(tmp_path):
    (tmp_path / "one.txt").write_text("abc")
    config = data.DataConfig(source=f"text:{tmp_path}/one.txt", length=8, batch=1)
    with data.train_loader(config, BYTES, seed=0) as loader:
        for _ in range(3):
            batch = next(loader)
            assert batch["tokens"].tolist() == [[256, 97, 98, 99, 256, 256, 256, 256]]
            assert batch["targets"].tolist() == [[97, 98, 99, 256, 256, 256, 256, 256]]
            assert batch["segments"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
            assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 0, 0, 0]]


def test_one_document_cannot_be_held_out(tmp_path):
    (tmp_path / "one.txt").write_text("one document " * 50)
    config = data.DataConfig(source=f"text:{tmp_path}/one.txt", length=16, batch=2)
    next(data.train_loader(config, BYTES, seed=0))
    with pytest.raises(UserError, match="1 document cannot be split"):
        data.heldout_loader(config, BYTES)
