"""Two processes of one run, whose workdir is in a bucket: they share no directory."""

import collections
import json
import os
import re
import socket
import subprocess
import sys
import urllib.parse

import pytest

from attnlab import storage
from attnlab.storage.bucket import Bucket, Url
from tests import flags, tiers
from tests.train import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = {
    "model__layers": 1, "data__length": 16, "train__eval_every": 4, "train__steps": 12, "train__sample_tokens": 0,
    "optimizer": {"name": "lion", "learning_rate": 1e-3, "warmup": 2, "schedule": "constant"},
    "mesh__data": 1, "mesh__fsdp": 2, "train__on_config_change": "continue",
}  # fmt: skip

# The command line; on the second host directories take long to make.
CODE = """
import os, sys, time
def slow(path, *args, mkdir=os.mkdir, **kwargs):
    time.sleep(0.3 * ("host." in os.path.basename(path)))
    mkdir(path, *args, **kwargs)
if "--config.cluster.index=1" in sys.argv:
    os.mkdir = slow
from attnlab.cli import main
sys.exit(main())
"""


def pair(directory, source, workdir, **more):
    """Both processes of a run, to its end; each has a staging directory of its own."""
    config = runs.write_config(directory / "config.py", source, **{**SMALL, **more})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    cluster = [f"--config.cluster.coordinator=127.0.0.1:{port}", "--config.cluster.processes=2"]
    processes = []
    for index in range(2):
        command = [sys.executable, "-c", CODE, "train", "--config", config, "--workdir", str(workdir)]
        env = {**os.environ, "ATTNLAB_STAGING": str(directory / f"host{index}"), "JAX_PLATFORMS": "cpu"}
        env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1" + flags.UNOPTIMISED
        env["PYTHONPATH"] = str(runs.ROOT)
        processes.append(
            subprocess.Popen(
                [*command, *cluster, f"--config.cluster.index={index}"],
                env=env, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return said


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The corpus, and the metrics of a run on a disk, of one process on as many devices."""
    home = tmp_path_factory.mktemp("unbroken")
    source = runs.corpus(home / "corpus")
    runs.run(runs.config(source, **SMALL), home / "disk")
    return source, runs.lines(home / "disk")


def fetched(store, below):
    """How often objects below a name were read; gcsfs asks for what is known of them by another path."""
    paths = [path for method, path in store.proxy.requests if method == "GET" and not path.startswith("/storage/")]
    names = (urllib.parse.unquote(path).partition("?")[0] for path in paths)
    return collections.Counter(name.partition(below)[2] for name in names if below in name)


def wrote_their_parts(place, step):
    listed = json.loads(Bucket(Url(place)).get(f"checkpoints/{step}/digests.json"))["files"]
    assert {n for n in listed if "array_metadatas" in n} == {f"state/array_metadatas/process_{i}" for i in range(2)}
    assert not Bucket(Url(place)).listing("uploads")


@tiers.exhaustive
@pytest.mark.parametrize("store", ["gs", "s3"], indirect=True)
@pytest.mark.parametrize("began", [1, 2])
def test_two_hosts(place, store, tmp_path, unbroken, attnlab, began):
    """Each writes its part of a checkpoint; broken off and gone on with, losses are those of a run on a disk, and
    each reads its own part. One host alone evaluates what both wrote, and leaves the optimizer's arrays there. So it is
    of a run that both began, and, but for the parts, of one that one process began."""
    source, lines = unbroken
    if began == 1:
        runs.run(runs.config(source, **{**SMALL, "train__steps": 8}), Url(place))
    else:
        pair(tmp_path, source, place, train__steps=8)
        wrote_their_parts(place, 8)
    store.proxy.requests.clear()
    said = pair(tmp_path, source, place)
    assert f"resuming {place} at step 8" in said[0]
    if began == 2:  # what one process wrote is in files of other parts
        split = {n: count for n, count in fetched(store, "checkpoints/8/state/").items() if re.search(r"kernel/\d", n)}
        assert split and set(split.values()) == {1}  # of what is split each host reads its own
    wrote_their_parts(place, 12)
    with storage.opened(Url(place)) as path:
        assert runs.lines(path) == lines
    store.proxy.requests.clear()
    code, out, err = attnlab("eval", "--workdir", place, "--config.mesh.fsdp=1", "--batches=2", "--json")
    assert code == 0, err
    read = fetched(store, "checkpoints/12/state/")
    assert any(n.startswith("params.") for n in read) and not [n for n in read if re.match(r"opt_state.*/\d", n)]
    assert json.loads(out)["loss"] == pytest.approx(lines[-1]["heldout_loss"], rel=1e-6)
