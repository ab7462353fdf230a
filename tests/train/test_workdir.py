"""What a workdir holds is checked before it is used, and what cannot be written ends the run with its cause."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest

from attnlab import data as data_lib
from attnlab.data.digests import write_json
from attnlab.errors import Damaged, TrainingFailed, UserError
from attnlab.train import digests, files, restore, workdir
from attnlab.train.checkpoints import Checkpoints
from attnlab.train.metrics import read_lines
from tests import tiers
from tests.train import runs

SMALL = {
    "model__width": 8, "model__layers": 1, "model__vocab": 300, "data__batch": 2, "train__eval_every": 0,
    "train__sample_tokens": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    runs.run(runs.config(source, **SMALL, train__steps=4, train__save_every=2), path)
    return path


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def at_batch(monkeypatch, number, action):
    """Calls `action` when the loader gives its batch of this number."""
    original, given = data_lib.Loader.__next__, [0]

    def counting(self):
        given[0] += 1
        if given[0] == number:
            action()
        return original(self)

    monkeypatch.setattr(data_lib.Loader, "__next__", counting)


@tiers.parametrize(
    "error", ERRORS := [OSError(28, "No space left on device"), RuntimeError("decoder says no")], often=ERRORS[:1]
)
def test_a_save_that_fails_ends_the_run(source, tmp_path, monkeypatch, error):
    """Whatever the background save raises: the run ends with it, and the newest good checkpoint is named and there."""
    written = digests.write

    def failing(directory):
        if directory.name.startswith("4"):
            raise error
        written(directory)

    monkeypatch.setattr(digests, "write", failing)
    config = runs.config(source, **SMALL, train__steps=400, train__save_every=2)
    with pytest.raises(
        UserError, match="checkpoint 4 could not be written.*(No space|decoder says no).*checkpoint is 2"
    ):
        runs.run(config, tmp_path)
    assert Checkpoints(tmp_path).steps() == [2]


def test_an_unwritable_place_is_refused_at_the_start(source, copy):
    """checkpoints that is no directory, and files that are links or pipes, which would be followed or waited for."""
    config = runs.config(source, **SMALL, train__steps=6, train__save_every=2, train__on_config_change="continue")
    for name in ("log.txt", "metrics.jsonl", "samples.txt", "lock", "config.json"):
        place, kept = copy / name, copy / "kept"
        if place.exists():
            place.rename(kept)
        for make, word in (
            (os.mkfifo, "a pipe"),
            (lambda p: p.symlink_to("/etc/hostname"), "a link"),
            (os.mkdir, "a dir"),
        ):
            make(place)
            with pytest.raises(UserError, match=f"{name} is {word}"):
                runs.run(config, copy)
            place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink()
        if kept.exists():
            kept.rename(place)
    for name in ("checkpoints", "tensorboard", "profile"):
        shutil.rmtree(copy / name, ignore_errors=True)
        (copy / name).write_text("x")
        with pytest.raises(UserError, match=f"{name} is a file, not a directory"):
            runs.run(config, copy)
        (copy / name).unlink()


def test_holding_leaves_other_files_alone(tmp_path):
    """That the workdir can be written is tried without touching a file of the user's."""
    (tmp_path / "probe").write_text("mine")
    with workdir.hold(tmp_path):
        pass
    assert (tmp_path / "probe").read_text() == "mine"


@tiers.parametrize("again", [False, True], often=[True])
def test_a_workdir_that_vanishes_is_an_error(source, tmp_path, monkeypatch, again):
    """Removed, or removed and made again: the run says so, and not that it is done."""
    path = tmp_path / "run"

    def vanish():
        shutil.rmtree(path)
        if again:
            path.mkdir()

    at_batch(monkeypatch, 3, vanish)
    with pytest.raises(TrainingFailed, match="was removed or replaced"):
        runs.run(runs.config(source, **SMALL, train__steps=6, train__save_every=0), path)


def test_lines_after_a_torn_one_are_kept(source, copy):
    """A line that is no record, anywhere, costs only itself; it is told, and the file as it was is kept."""
    metrics = copy / "metrics.jsonl"
    first, second, third, fourth = metrics.read_text().splitlines()
    torn = "\n".join([first, second[:9], '["foreign"]', '{"step": "2"}', "\x00\x01", third, fourth]) + "\n"
    metrics.write_text(torn)
    config = runs.config(source, **SMALL, train__steps=5, train__save_every=2, train__on_config_change="continue")
    printed = runs.run(config, copy)
    assert "4 line(s) are no metrics (line 2, 3, 4, 5)" in printed
    assert [line["step"] for line in runs.lines(copy)] == [1, 3, 4, 5]
    assert (copy / "metrics.jsonl.damaged").read_text() == torn
    metrics.write_text(f'{first}\n{{"step": 2, "lo')  # cut off by a kill, which is nothing to tell
    assert read_lines(metrics)[1] == [] and len(read_lines(metrics)[0]) == 1


def test_a_lost_config_is_known_to_the_checkpoint(source, copy):
    """Without config.json a run goes on under the config that it had, and under no other."""
    (copy / "config.json").unlink()
    longer = {**SMALL, "train__steps": 4, "train__save_every": 2}
    with pytest.raises(UserError, match="optimizer.learning_rate: 0.01 -> 0.5"):
        runs.run(runs.config(source, **longer, optimizer__learning_rate=0.5), copy)
    assert "complete: step 4 of 4" in runs.run(runs.config(source, **longer), copy)


def test_a_named_checkpoint_that_is_damaged_is_an_error(copy):
    """Who asks for one step gets no other."""
    file = max((copy / "checkpoints" / "4" / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    with pytest.raises(UserError, match="(?s)checkpoint 4 .* cannot be read: the content of .*other checkpoints: 2"):
        restore.load(copy, "4")
    assert restore.load(copy, "latest").step == 2
    assert (copy / "damaged_checkpoints" / "4").is_dir()


def test_a_reader_moves_nothing_while_a_run_is_there(copy):
    """It steps over a damaged checkpoint, and leaves it to the run."""
    (copy / "checkpoints" / "4" / "digests.json").unlink()
    with workdir.hold(copy):
        assert restore.load(copy, "latest").step == 2
    assert (copy / "checkpoints" / "4").is_dir()


@pytest.mark.parametrize("change", ["swapped", "copied"])
def test_a_checkpoint_is_of_the_step_that_it_says(copy, change):
    """Whole, but under another's number: damage."""
    here = copy / "checkpoints"
    (here / "2").rename(here / "t")
    if change == "swapped":
        (here / "4").rename(here / "2")
        (here / "t").rename(here / "4")
        with pytest.raises(UserError, match="none of the checkpoints 2, 4 .* is whole: it was saved at another step"):
            restore.load(copy, "latest")
    else:
        shutil.copytree(here / "t", here / "20")
        assert restore.load(copy, "latest").step == 4
        assert (copy / "damaged_checkpoints" / "20").is_dir()


def test_a_complete_run_is_whole(source, copy):
    """That a run is complete is said of a checkpoint whose content was checked; else it is trained again."""
    file = max((copy / "checkpoints" / "4").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(bytes(64))
    printed = runs.run(runs.config(source, **SMALL, train__steps=4, train__save_every=2), copy)
    assert "checkpoint 4 is damaged" in printed and "done: step 4" in printed


def test_damage_that_cannot_be_moved_is_stepped_over(copy):
    """By a reader; and where the lock is a pipe, which it must not wait for."""
    (copy / "checkpoints" / "4" / "digests.json").unlink()
    (copy / "damaged_checkpoints").write_text("x")
    assert restore.load(copy, "latest").step == 2
    (copy / "lock").unlink()
    os.mkfifo(copy / "lock")
    assert restore.load(copy, "latest").step == 2 and (copy / "checkpoints" / "4").is_dir()


def test_a_reader_keeps_no_run_out(source, copy, monkeypatch):
    """A run may begin while another process reads the workdir's checkpoints."""
    original = Checkpoints.host

    def host(self, step):
        with workdir.hold(copy):
            return original(self, step)

    monkeypatch.setattr(Checkpoints, "host", host)
    assert restore.load(copy, "best").step == 4


def test_the_best_is_finite(copy, monkeypatch):
    """A loss that is not a number is the best of none."""
    original = Checkpoints.host
    for losses, best in (({2: float("nan"), 4: 3.0}, 4), ({2: 3.0, 4: float("nan")}, 2), ({2: 2.0, 4: 3.0}, 2)):
        told = lambda self, step, losses=losses: dataclasses.replace(original(self, step), heldout_loss=losses[step])
        monkeypatch.setattr(Checkpoints, "host", told)
        assert Checkpoints(copy).best_first()[0] == best


def test_digests_of_something_else(copy):
    """A list with a right checksum that lists no files is damage; so is JSON too deep to be dumped."""
    file = copy / "checkpoints" / "4" / "digests.json"
    for content in ({"version": 2, "files": 40}, {}, {"files": {"a": 1}}, {"files": {"a": ["x", 1]}}):
        write_json(str(file), content)
        with pytest.raises(Damaged, match="digests.json is damaged"):
            digests.read(file.parent)
    file.write_text('{"checksum": "x", "files": ' + "[" * 990 + "]" * 990 + "}")
    with pytest.raises(Damaged):
        digests.read(file.parent)


def test_removed_metrics_are_said(source, tmp_path, monkeypatch):
    """metrics.jsonl that is removed while a run writes to it."""
    at_batch(monkeypatch, 4, (tmp_path / "metrics.jsonl").unlink)
    printed = runs.run(runs.config(source, **SMALL, train__steps=6, train__save_every=0), tmp_path)
    assert "metrics.jsonl was removed; a new one begins at step" in printed
    assert runs.lines(tmp_path)[-1]["step"] == 6


def test_files_are_read_by_kind(tmp_path):
    """A pipe is not waited for; what is no JSON object is damage."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Damaged, match="is a pipe"):
        files.read_bytes(tmp_path / "pipe")
    for content in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(Damaged, match="is damaged"):
            files.read_json(tmp_path / "x.json")


# What a checkpoint knows of its data.


def test_the_split_of_the_training_is_kept(finished, source, tmp_path):
    """Another `heldout` would score what was trained on: refused, also under another name of the same data."""
    for more in ([], [f"data.source={source}"]):
        trained = restore.load(finished, "latest", ["data.heldout=0.9", *more])
        with pytest.raises(UserError, match="data.heldout = 0.9 holds out text that checkpoint 4 was trained on"):
            restore.evaluate_heldout(trained)


def test_other_data_is_said(finished, tmp_path):
    """Data that is named is evaluated, with a note; data that changed under its name is refused."""
    other = runs.corpus(tmp_path / "other")
    (tmp_path / "other" / "m00.py").write_text("something else")
    trained = restore.load(finished, "latest", [f"data.source={other}", "data.heldout=0.5"])
    _, notes = restore.evaluate_heldout(trained)
    assert notes == [f"on other data than it was trained on ({other})"]


def test_data_that_changed_is_refused(tmp_path):
    """The files under the run's own glob are no longer those that it was trained on."""
    corpus = runs.corpus(tmp_path / "corpus")
    runs.run(runs.config(corpus, **SMALL, train__steps=3), tmp_path / "run")
    (tmp_path / "corpus" / "m00.py").write_text("something else")
    with pytest.raises(UserError, match="is not what checkpoint 3 was trained on"):
        restore.evaluate_heldout(restore.load(tmp_path / "run", "latest"))


def test_a_replaced_tokenizer_is_refused(tmp_path, source):
    """One of the same size and name gives ids of other text; with other data it is used, and said."""
    file = tmp_path / "tokenizer.json"
    config = runs.config(source, **SMALL, data__tokenizer=str(file), train__steps=3)
    data_lib.train_tokenizer(runs.config(source).data, 280, str(file))
    runs.run(config, tmp_path / "run")
    spec = json.loads(file.read_text())
    vocab = spec["model"]["vocab"]
    (a, b) = [token for token in vocab if len(token) == 1][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(spec))
    for evaluating in (True, False):  # eval, generate
        with pytest.raises(UserError, match="is not the tokenizer that checkpoint 3"):
            restore.load(tmp_path / "run", "latest", evaluating=evaluating)
    other = runs.corpus(tmp_path / "other")
    _, notes = restore.evaluate_heldout(restore.load(tmp_path / "run", "latest", [f"data.source={other}"]))
    assert notes[0] == "with another tokenizer than it was trained with"


def test_beyond_the_trained_length_is_said(finished):
    """Once, and only beyond."""
    trained = restore.load(finished, "latest", ["data.length=64"])
    assert restore.evaluate_heldout(trained, 1)[1] == ["64 positions, and it was trained on rows of 32"]
    assert restore.beyond(trained, 33) and not restore.beyond(trained, 32)
