"""The scripts that start runs elsewhere: what they would do, with nothing run; and shellcheck over all of them."""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "scripts"
TRAIN = ["--config", "configs/lm.py:mixer=moh,size=1b", "--workdir", "/shared/my runs/a"]


def run(tmp_path, script, *args):
    """Exit code, stdout and stderr, where every outside command would say so by failing."""
    for name in ("gcloud", "kubectl", "srun", "scancel", "scontrol", "pip"):
        fake = tmp_path / name
        fake.write_text("#!/bin/sh\nexit 99\n")
        fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "ATTNLAB_VENV": str(tmp_path / "venv")}
    done = subprocess.run(["bash", SCRIPTS / script, *args], env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def commands(text):
    """The words of each command that a dry run prints."""
    lines = text.replace("\\\n", "").splitlines()
    return [shlex.split(line[2:].replace("$'", "'")) for line in lines if line.startswith("+ ")]


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.iterdir() if p.is_file()))
def test_shellcheck(script):
    """No script has a finding of shellcheck."""
    tool = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([tool, "--external-sources", SCRIPTS / script], capture_output=True, text=True, cwd=SCRIPTS.parent)
    assert done.returncode == 0, done.stdout


def test_pod_from_nothing_to_a_log(tmp_path):
    """`run` asks for the slice, copies, installs, starts on all workers and follows the first."""
    code, _, err = run(
        tmp_path, "tpu_pod.sh", "run", "--name", "a", "--zone", "z", "--type", "v5p-128", "--spot", "--dry-run", "--", *TRAIN
    )
    assert code == 0, err
    create, archive, copy, install, train, follow = commands(err)
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "a"] and "--spot" in create
    assert create[create.index("--accelerator-type") + 1] == "v5p-128"
    assert archive[:2] == ["git", "archive"] and copy[4] == "scp" and "--worker=all" in copy
    assert ".[tpu]" in " ".join(install)
    assert "attnlab train" in " ".join(train) and "mixer=moh" in " ".join(train) and "--worker=all" in train
    assert "--worker=0" in follow and "tail" in " ".join(follow)


@pytest.mark.parametrize("action", ["follow", "status", "stop", "down"])
def test_pod_actions(tmp_path, action):
    """Each prints its commands and runs none."""
    code, _, err = run(tmp_path, "tpu_pod.sh", action, "--name", "a", "--zone", "z", "--dry-run")
    assert code == 0 and commands(err) and all(c[0] == "gcloud" for c in commands(err))


@pytest.mark.parametrize(
    "args, says",
    [
        ((), "unknown action"),
        (("fly",), "unknown action 'fly'"),
        (("up", "--zone", "z"), "--name is missing"),
        (("up", "--name", "a", "--zone", "z", "--type", "v9-8", "--dry-run"), "--type 'v9-8' is not known"),
        (("train", "--name", "a", "--zone", "z"), "after --"),
        (("up", "--name", "a", "--zone", "z", "--fast"), "unknown option '--fast'"),
    ],
)
def test_pod_refuses(tmp_path, args, says):
    """What is wrong is named, before anything runs."""
    code, _, err = run(tmp_path, "tpu_pod.sh", *args)
    assert code == 2 and says in err


def test_slurm(tmp_path):
    """A job makes its environment, starts one process per task, and says how it would go on."""
    code, _, err = run(tmp_path, "slurm.sbatch", "--dry-run", *TRAIN)
    assert code == 0
    srun = next(c for c in commands(err) if c[0] == "srun")
    assert srun[-len(TRAIN) :] == TRAIN
    assert "scontrol requeue" in err
    assert run(tmp_path, "slurm.sbatch", "--dry-run", "--config", "x")[0] == 2


def test_jobset(tmp_path):
    """The manifest is for the asked hosts and chips, with the arguments as they were given."""
    args = ["--name", "a", "--image", "i", "--accelerator", "tpu-v5p-slice", "--topology", "4x4x4", "--hosts", "16"]
    code, out, _ = run(tmp_path, "gke_jobset.sh", *args, "--slices", "2", "--claim", "c", "--dry-run", "--", *TRAIN)
    assert code == 0
    for line in ("replicas: 2", "parallelism: 16", "google.com/tpu: 4", "cloud.google.com/gke-tpu-topology: 4x4x4"):
        assert line in out
    assert "'/shared/my runs/a'" in out
    assert run(tmp_path, "gke_jobset.sh", "--name", "a", "--", *TRAIN)[0] == 2
