"""The scripts that start plans elsewhere: what they would do, with nothing run."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
import yaml

from tests.test_scripts import SCRIPTS, commands, run, wait_until

PLAN = ["--config", "configs/ablations/core_six.py:size=125m", "--workdir", "/shared/my runs/a"]
JOBSET = ["--name", "a", "--image", "i", "--accelerator", "tpu-v6e-slice", "--topology", "2x2", "--slices", "3",
          "--claim", "c"]  # fmt: skip


def test_array(tmp_path, monkeypatch):
    """A task takes the slice of its place in the array, wherever the array begins and however it steps."""
    for name, value in {"ID": 9, "MIN": 3, "STEP": 2, "COUNT": 5}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    code, _, err = run(tmp_path, "ablate.sbatch", "--dry-run", *PLAN)
    assert code == 0
    assert commands(err)[0][1:] == ["ablate", *PLAN, "--slice", "3/5"]
    assert run(tmp_path, "ablate.sbatch", "--dry-run", "--config", "x")[0] == 2
    assert "array's to say" in run(tmp_path, "ablate.sbatch", "--dry-run", *PLAN, "--slice", "0/2")[2]


@pytest.mark.parametrize(
    "told, ends, code, queued", [(True, 143, 0, True), (True, 1, 1, False), (True, 0, 0, False), (False, 3, 3, False)]
)
def test_array_goes_on_when_its_time_is_up(tmp_path, told, ends, code, queued):
    """USR1: what runs gets SIGTERM, and if that stopped it, the task is queued again. Else it ends as the plan does."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    fakes = {
        "venv/bin/attnlab": f"trap 'sleep 0.3; exit {ends}' TERM\ntouch {tmp_path}/started\n"
        f"for i in $(seq {50 if told else 3})\ndo sleep 0.1; done\nexit {ends}",
        "scontrol": f"echo $* >{tmp_path}/requeued",
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "ATTNLAB_VENV": f"{tmp_path}/venv",
           "SLURM_JOB_ID": "5"}  # fmt: skip
    job = subprocess.Popen(["bash", SCRIPTS / "ablate.sbatch", *PLAN], env=env, stderr=subprocess.PIPE)
    if told:
        wait_until((tmp_path / "started").exists)
        job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=30)
    assert job.returncode == code and (tmp_path / "requeued").exists() == queued


def container(tmp_path, *options):
    code, out, _ = run(tmp_path, "ablate_jobset.sh", *JOBSET, *options, "--dry-run", "--", *PLAN, "--config.a='b c'")
    assert code == 0
    job = yaml.safe_load(out)["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job, job["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("told, ends, code", [(True, 143, 143), (False, 0, 0), (False, 3, 0), (False, 1, 1)])
def test_pods(tmp_path, told, ends, code):
    """Each pod takes the slice of its index; one that is stopped is started again, one with failed runs is not."""
    (tmp_path / "attnlab").write_text(
        f"#!/bin/bash\ntrap 'sleep 0.3; exit {ends}' TERM\necho $* >{tmp_path}/started\n"
        f"for i in $(seq {50 if told else 3}); do sleep 0.1; done\nexit {ends}\n"
    )
    (tmp_path / "attnlab").chmod(0o755)
    job, made = container(tmp_path, "--spot")
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] == 3
    assert made["resources"]["limits"] == {"google.com/tpu": 4}
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "2"}
    pod = subprocess.Popen(made["command"], env=env)
    wait_until(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text())
    if told:
        pod.terminate()
    assert pod.wait(30) == code
    assert (tmp_path / "started").read_text() == f"ablate {' '.join(PLAN)} --config.a='b c' --slice 2/3\n"


@pytest.mark.parametrize(
    "args, says",
    [
        (["--name", "a", "--", *PLAN], "--image is missing"),
        ([*JOBSET, "--slices", "0", "--", *PLAN], "one or more"),
        ([*JOBSET, "--topology", "big", "--", *PLAN], "--topology big is none"),
        ([*JOBSET, "--", *PLAN, "--slice", "0/2"], "--slice is the pods'"),
        ([*JOBSET, "--", "--config", "x"], "--workdir is missing"),
    ],
)
def test_jobset_refuses(tmp_path, args, says):
    """What is wrong is named, before anything is applied."""
    code, _, err = run(tmp_path, "ablate_jobset.sh", *args)
    assert code == 2 and says in err
