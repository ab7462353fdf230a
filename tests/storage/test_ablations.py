"""A plan whose workdir is in a bucket: what holds of it on a disk holds there."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from attnlab import storage
from attnlab.ablation import announce, worker
from attnlab.ablation.state import Log
from attnlab.errors import TrainingFailed
from attnlab.storage.bucket import Bucket, Url
from tests import flags, tiers
from tests.ablation import plans
from tests.storage.servers import Answer, only
from tests.train import runs

RUNS = [f"arms/{arm}/seed{seed}" for seed in (0, 1) for arm in ("plain", "gate")]


@pytest.fixture
def plan(tmp_path):
    """A plan of four runs of eight steps, each saved twice."""
    tree = plans.tree(runs.corpus(tmp_path / "text"))
    tree["base"]["train"] |= {"steps": 8, "save_every": 4, "eval_every": 4, "keep": 1}
    tree["base"]["optimizer"]["schedule"] = "constant"
    return plans.write(tmp_path / "plan.py", tree)


def ablate(plan, place, processes):
    return ("ablate", "--config", str(plan), "--workdir", str(place), "--processes", str(processes))


def stuck(method, path):
    """Nobody's second checkpoint comes to be."""
    return Answer(503, {}, b"") if method == "PUT" and path.endswith("checkpoints/8/digests.json") else None


def events(bucket, kind):
    found = map(json.loads, bucket.get("state.jsonl").splitlines())
    return [(e["run"], e.get("step")) for e in found if e["event"] == kind]


@contextlib.contextmanager
def started(plan, place, directory):
    """The command line in processes of its own, killed at the end, all at once."""
    command = [sys.executable, "-m", "attnlab", *ablate(plan, place, 2)]
    with (directory / "said").open("wb") as said:
        process = subprocess.Popen(command, cwd=runs.ROOT, env=flags.environment(), stdout=said, stderr=said)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGSTOP)  # so that it starts no others
        for claim in pathlib.Path(os.environ["ATTNLAB_STAGING"]).rglob("claims/*.json"):
            os.kill(json.loads(claim.read_text())["pid"], signal.SIGKILL)
        process.kill()
        process.wait()


@tiers.exhaustive
@pytest.mark.timeout(1800)
@only("s3")
def test_killed(place, store, plan, attnlab, patch, tmp_path):
    """SIGKILL to all its processes; another is refused while it lives; then all is as if it had never been."""
    patch.setenv("ATTNLAB_STORAGE_PATIENCE", "900")
    patch.setenv("ATTNLAB_LEASE_SECONDS", "20")
    bucket = Bucket(Url(place))
    with store.failing(stuck), started(plan, place, tmp_path) as process:
        until = time.monotonic() + 900
        while not all(bucket.size(f"{run}/checkpoints/4/digests.json") for run in RUNS[:2]):
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "said").read_text()
            time.sleep(0.2)
        code, _, err = attnlab(*ablate(plan, place, 1))
        assert code == 2 and f"{place} is in use by another run (process {process.pid} on " in err
        assert json.loads(bucket.get("plan.json"))["plan"]["seeds"] == [0, 1]
    assert bucket.size("results.json") is None
    code, out, err = attnlab(*ablate(plan, place, 1))
    assert code == 0, out + err
    assert f"the report is {place}/report.html" in out
    assert events(bucket, "started")[-4:] == [*((run, 4) for run in RUNS[:2]), *((run, 0) for run in RUNS[2:])]
    assert events(bucket, "done") == [(run, 8) for run in RUNS] and not events(bucket, "failed")

    disk = tmp_path / "disk"
    assert attnlab(*ablate(plan, disk, 1))[0] == 0
    for run in RUNS:
        with storage.opened(Url(f"{place}/{run}")) as path:
            assert runs.lines(path) == runs.lines(disk / run)
    text = bucket.get("results.json").decode()
    there, here = json.loads(text), json.loads((disk / "results.json").read_text())
    assert there["comparisons"] == here["comparisons"] and str(tmp_path / "staging") not in text
    assert {run["workdir"] for run in there["runs"]} == {f"{place}/{run}" for run in RUNS}
    names = set(bucket.listing())
    assert not [n for n in names if ".parts/" in n or "lock" in n or n.startswith("claims")]
    for run in RUNS:
        assert {f"{run}/{n}" for n in ("config.json", "metrics.jsonl", "goodput.jsonl", "log.txt")} < names
        assert {n.split("/")[4] for n in names if n.startswith(f"{run}/checkpoints/")} == {"8"}

    bucket.remove(["results.json", "report.html"])
    before = [n for n in bucket.listing("arms")]
    assert attnlab(*ablate(plan, place, 1))[0] == 0  # nothing is run again, and the results come of what is there
    assert json.loads(bucket.get("results.json"))["runs"] == there["runs"] and list(bucket.listing("arms")) == before
    bucket.remove(["report.html"])
    assert attnlab("report", place)[0] == 0 and bucket.size("report.html")
    assert attnlab("report", f"{place}/arms", "--out", tmp_path / "report", "--unpaired")[0] == 0
    assert attnlab("cost", "--config", f"{place}/{RUNS[0]}/config.json")[0] == 0


@only("s3")
def test_a_plan_that_another_took_over(place, store, plan, attnlab, tmp_path):
    """None of its runs has failed, and nobody's process writes to it any more; slices of it are refused."""
    code, _, err = attnlab(*ablate(plan, place, 1), "--slice", "0/2")
    assert code == 2 and "slices share files" in err and "allowed: 0/1" in err and not Bucket(Url(place)).listing()
    bucket, here = Bucket(Url(place)), tmp_path / "here"
    with storage.opened(Url(place), writes=True) as path:
        announce.announce(*announce.load(str(plan), []), path, print)
        shutil.copytree(path, here)
        term = storage.mirrored(path).term
    part = worker.Part(str(here))
    with pytest.raises(TrainingFailed, match="has let go of the workdir"), storage.joined(here, place, term):
        worker.work(part)
    later = {"host": "elsewhere", "process": 1, "token": "t", "seconds": 60, "until": time.time() + 60}
    bucket.put(f"lease/{term + 1:09d}.json", json.dumps(later).encode())
    with pytest.raises(TrainingFailed, match="taken over by process 1 on elsewhere"):
        with storage.joined(here, place, term):
            worker.work(part)
    assert not Log(here).read().events and not bucket.listing("arms")
