"""Runs whose workdir is in a bucket: what holds on a disk holds there."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

from attnlab import storage
from attnlab.errors import TrainingFailed, UserError
from attnlab.storage import workdir as workdir_lib
from attnlab.storage.bucket import Bucket, Url
from attnlab.storage.workdir import merged
from tests import flags, tiers
from tests.storage.servers import Answer, only
from tests.train import runs

# One program for all of them: what a step does depends neither on their number nor on where it is saved.
SMALL = {
    "optimizer": {"name": "lion", "learning_rate": 1e-3, "warmup": 2, "schedule": "constant"},  # an array less of each
    "train__on_config_change": "continue",
}
LONG = {**SMALL, "train__steps": 400}


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """The workdir of an unbroken run on a disk."""
    path = tmp_path_factory.mktemp("alone") / "run"
    runs.run(runs.config(source, **SMALL), path)
    return path


def lines(place):
    with storage.opened(Url(place)) as path:
        return runs.lines(path)


def broken_off(config, place, step):
    """A run that a kill ends as it begins a step, as far as one process can: nothing is put in order."""

    class Killed(BaseException):
        pass

    from attnlab.train import loop

    class Run(loop._Run):
        def _finish(self, at, *args, **kwargs):
            if at >= step:
                raise Killed
            return super()._finish(at, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "_Run", Run)
        patch.setattr(storage.RemoteWorkdir, "stop", lambda self: self._end.set())
        runs.run(config, place)


@tiers.parametrize("store", ["gs", "s3"], often=["s3"], indirect=True)
def test_a_run(place, source, alone, attnlab, tmp_path):
    """It leaves what it would on a disk, bit for bit, whatever broke it off; every verb reads it there."""
    config, url = runs.config(source, **SMALL), Url(place)
    broken_off(config, url, 7)
    assert Bucket(url).size("checkpoints/4/digests.json") and lines(place)[:4] == runs.lines(alone)[:4]
    bucket = Bucket(url)
    bucket.put("checkpoints/8/state/left", b"by a killed upload")  # never complete
    said = runs.run(config, url)
    assert f"resuming {place} at step 4" in said and f"checkpoints and metrics are in {place}" in said
    assert lines(place) == runs.lines(alone)
    names = set(bucket.listing())
    assert {"config.json", "metrics.jsonl", "goodput.jsonl", "log.txt", "samples.txt"} < names
    assert not [n for n in names if ".parts/" in n or n == "checkpoints/8/state/left" or "lock" in n]
    assert {n.split("/")[1] for n in names if n.startswith("checkpoints/")} == {"8", "12"}
    assert place.encode() in bucket.get("log.txt") and str(tmp_path).encode() not in bucket.get("log.txt")
    assert f"the run in {place} is complete" in runs.run(config, url)
    if place.startswith("gs:"):  # the verbs go to a bucket alike
        code, out, _ = attnlab("generate", "--workdir", place, "--prompt", "def", "--tokens", "4", "--json")
        assert code == 0 and json.loads(out)["step"] == 12
    code, out, _ = attnlab("eval", "--workdir", place, "--batches", "2", "--json")
    assert code == 0 and json.loads(out)["step"] == 12
    assert json.loads(out)["loss"] == pytest.approx(lines(place)[-1]["heldout_loss"], rel=1e-6)
    code, out, _ = attnlab("goodput", "--workdir", place, "--json")
    assert code == 0 and len(json.loads(out)["attempts"]) == 2
    assert not list((tmp_path / "staging" / f"attnlab-{os.getuid()}").iterdir())


@only("gs")
def test_damage(place, source, alone):
    """A checkpoint that is not what was written is set aside in the bucket, and the run is as it would have been."""
    config, url = runs.config(source, **SMALL), Url(place)
    broken_off(config, url, 11)
    bucket = Bucket(url)
    name = max(bucket.listing("checkpoints/8/state"), key=lambda n: bucket.listing()[n].size)
    content = bytearray(bucket.get(name))
    content[len(content) // 2] ^= 1
    bucket.put(name, bytes(content))
    said = runs.run(config, url)
    assert "checkpoint 8 is damaged" in said and f"moved to {place}/damaged_checkpoints/8" in said.replace("\n", "")
    assert lines(place) == runs.lines(alone)
    assert bucket.get(f"damaged_checkpoints/8/{name.split('/', 2)[2]}") == content


@only("s3")
def test_faults(place, store, source, alone):
    """A bucket that refuses for a while costs nothing; one that is read-only ends the run, and nothing is lost."""
    config, url, first = runs.config(source, **SMALL, **{"train__save_every": 6}), Url(place), []

    def at_times(method, path):
        first.append(path)
        return Answer(503, {}, b"") if len(first) % 7 == 0 else None

    with store.failing(at_times):
        runs.run(config, url)
    assert lines(place) == runs.lines(alone)
    bucket = Bucket(url)
    bucket.remove([n for n in bucket.listing() if n.startswith("checkpoints/12")])
    kept = set(bucket.listing("checkpoints"))

    writes = []

    def read_only(method, path):
        if method in ("GET", "HEAD"):
            return None
        writes.append(path)
        return Answer(403, {}, b"denied") if len(writes) > 3 else None

    with store.failing(read_only), pytest.raises((UserError, TrainingFailed), match=place):
        runs.run(config, url)
    assert len(writes) > 3 and kept <= set(bucket.listing("checkpoints")) and saved(bucket) == [6]
    runs.run(config, url)
    assert lines(place) == runs.lines(alone)


@only("s3")
def test_local_checkpoints(place, source, alone, patch, tmp_path):
    """What a kill takes of the staging directory is in the copy on the host's own disk: no step is done again, none is
    missing; the bucket's checkpoint is gone on from where it is newer."""
    patch.setattr(workdir_lib, "EVERY", 1000.0)  # nothing comes to the bucket between saves
    local = {"train__local_checkpoint_every": 3, "train__local_checkpoint_dir": str(tmp_path / "disk")}
    config, url = runs.config(source, **SMALL, **{**local, "train__save_every": 100}), Url(place)
    broken_off(config, url, 7)
    assert not saved(Bucket(url)) and len(list((tmp_path / "disk").glob("*/process0/6"))) == 1
    broken_off(runs.config(source, **SMALL, **local), url, 9)
    assert saved(Bucket(url)) == [8] and f"resuming {place} at step 6".encode() in merged(Bucket(url), "log.txt")
    said = runs.run(config, url)
    assert f"resuming {place} at step 8" in said and lines(place) == runs.lines(alone)
    assert not list((tmp_path / "disk").iterdir())


def start(source, place, directory, **overrides):
    config = runs.write_config(directory / "config.py", source, **overrides)
    command = [sys.executable, "-m", "attnlab", "train", "--config", config, "--workdir", str(place)]
    return subprocess.Popen(
        command, cwd=runs.ROOT, env=flags.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def saved(bucket):
    """Steps of the checkpoints that are complete."""
    return [int(n.split("/")[1]) for n in bucket.listing("checkpoints") if n.endswith("digests.json")]


def wait_until(process, condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.stdout.read()
        time.sleep(0.1)


@tiers.exhaustive
@only("gs")
def test_killed(place, source, tmp_path):
    """SIGKILL at a random time; another run is refused while it lives; then the losses are as if it never had been."""
    process, url = start(source, place, tmp_path, **LONG), Url(place)
    bucket = Bucket(url)
    try:
        wait_until(process, lambda: saved(bucket))
        with pytest.raises(UserError, match=rf"in use by another run \(process {process.pid} on .*holds until"):
            runs.run(runs.config(source, **LONG), url)
        time.sleep(random.uniform(0, 0.5))
    finally:
        process.kill()
        process.wait()
    went_on = runs.config(source, **{**LONG, "train__steps": max(saved(bucket)) + 6})
    runs.run(went_on, url)
    runs.run(went_on, tmp_path / "alone")
    assert lines(place) == runs.lines(tmp_path / "alone")


@only("s3")
@tiers.exhaustive
@pytest.mark.timeout(600)
def test_killed_five_times(place, source, tmp_path):
    """SIGKILL at five random times, in start-up, steps, uploads: no step is missing or doubled, none is another's."""
    url, bucket = Url(place), Bucket(Url(place))
    for i in range(5):
        process, before = start(source, place, tmp_path, **LONG), saved(bucket)
        if i % 2 == 0:
            wait_until(process, lambda: max(saved(bucket), default=0) > max(before, default=0))
        time.sleep(random.uniform(0, 6))
        process.kill()
        process.wait()
    went_on = runs.config(source, **{**LONG, "train__steps": max(saved(bucket)) + 6})
    runs.run(went_on, url)
    runs.run(went_on, tmp_path / "alone")
    assert lines(place) == runs.lines(tmp_path / "alone")


@only("gs")
def test_a_run_begins_as_one_in_a_bucket(place, source, alone):
    """Read from the bucket, the parameters are those that the same run has on a disk, and the record says the URL."""
    from attnlab.train import beginning, restore
    from attnlab.train import source as source_lib
    from attnlab.train.program import Program
    from attnlab.train.state import flat

    runs.run(runs.config(source, **SMALL), Url(place))
    program = Program.of(runs.config(source, **SMALL))
    with source_lib.opened(Url(place), None, print) as found:
        begin = beginning.fit(found, program.model)
        values = flat(begin.params(program, 0, print))
    assert begin.record()["source"] == place and begin.record()["step"] == 12
    for name, value in flat(restore.load(alone, "latest").params).items():
        assert value.tolist() == values[name].tolist(), name
