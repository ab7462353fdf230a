"""The scripts that start runs elsewhere: what they would do, with nothing run; and shellcheck over all of them."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from attnlab import arguments
from attnlab.train.config import load

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
POD = ["--name", "a", "--zone", "z"]
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
    printed = re.findall(r"^\+ (.*?)(?=^\+ |^\w+\.sh: |\Z)", text, re.M | re.S)
    return [shlex.split(command) for command in printed]


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.iterdir() if p.is_file()))
def test_shellcheck(script):
    """No script has a finding of shellcheck."""
    tool = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [tool, "--external-sources", SCRIPTS / script], capture_output=True, text=True, cwd=SCRIPTS.parent
    )
    assert done.returncode == 0, done.stdout


def test_pod_from_nothing_to_a_log(tmp_path):
    """`run` asks for the slice, for so long only, copies, installs, starts on all workers and follows the first."""
    code, _, err = run(
        tmp_path, "tpu_pod.sh", "run", *POD, "--type", "v5p-128", "--spot", "--wait", "90", "--dry-run", "--", *TRAIN
    )
    assert code == 0, err
    create, archive, copy, install, train, follow = commands(err)
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "a"] and "--spot" in create
    assert create[create.index("--accelerator-type") + 1] == "v5p-128"
    assert create[create.index("--valid-until-duration") + 1] == "90m"
    assert archive[:2] == ["git", "archive"] and copy[4] == "scp" and "--worker=all" in copy
    assert ".[tpu,gcs,s3]" in " ".join(install)
    assert "attnlab train" in " ".join(train) and "mixer=moh" in " ".join(train) and "--worker=all" in train
    assert "--worker=0" in follow and "tail" in " ".join(follow)
    assert "costs until: bash scripts/tpu_pod.sh down --name a --zone z" in err


def test_pod_ends_with_the_run(tmp_path):
    """With `--down-when-done` the last thing is that the slice is deleted."""
    args = (*POD, "--type", "v5litepod-16", "--down-when-done", "--dry-run", "--", *TRAIN)
    code, _, err = run(tmp_path, "tpu_pod.sh", "run", *args)
    assert code == 0 and commands(err)[-1][:6] == ["gcloud", "compute", "tpus", "queued-resources", "delete", "a"]


@pytest.mark.parametrize("action", ["follow", "status", "stop", "down", "install"])
def test_pod_actions(tmp_path, action):
    """Each prints its commands and runs none."""
    code, _, err = run(tmp_path, "tpu_pod.sh", action, *POD, "--dry-run")
    assert code == 0 and commands(err) and all(c[0] in ("gcloud", "git") for c in commands(err))


@pytest.mark.parametrize(
    "args, says",
    [
        ((), "unknown action"),
        (("fly",), "unknown action 'fly'"),
        (("up", "--zone", "z"), "--name is missing"),
        (("up", *POD, "--type", "v9-8", "--dry-run"), "--type 'v9-8' is not known"),
        (("up", *POD, "--wait", "soon"), "--wait soon is no number of minutes"),
        (("train", *POD), "after --"),
        (("train", *POD, "--", "--config", "x"), "--workdir is missing"),
        (("stop", *POD, "--down-when-done"), "--down-when-done is for run and follow"),
        (("up", *POD, "--fast"), "unknown option '--fast'"),
    ],
)
def test_pod_refuses(tmp_path, args, says):
    """What is wrong is named, before anything runs."""
    code, _, err = run(tmp_path, "tpu_pod.sh", *args)
    assert code == 2 and says in err


# Stands in for Google's: a slice is a directory with its state and a home for each of two workers, where commands run.
GCLOUD = """#!/usr/bin/env bash
set -u
cloud=$(dirname "$0")/cloud
worker() { for a in "$@"; do case $a in --worker=all) echo "0 1" ;; --worker=*) echo "${a#*=}" ;; esac; done; }
case "$3 $4" in
    "queued-resources describe")
        [ -e "$cloud/state" ] || { echo "ERROR: NOT_FOUND: no $5" >&2; exit 1; }
        [[ "$*" == *acceleratorType* ]] && cat "$cloud/type" || cat "$cloud/state" ;;
    "queued-resources create")
        mkdir -p "$cloud/0" "$cloud/1"; echo "${FAKE_STATE:-ACTIVE}" >"$cloud/state"
        while [ "$1" != --accelerator-type ]; do shift; done; echo "$2" >"$cloud/type" ;;
    "queued-resources delete") rm "$cloud/state" ;;
    "tpu-vm scp") for w in $(worker "$@"); do cp "$5" "$cloud/$w/${6#*:}"; done ;;
    "tpu-vm ssh")
        code=0
        for last in "$@"; do :; done
        for w in $(worker "$@"); do (cd "$cloud/$w" && HOME=$PWD bash -c "${last#--command=}") || code=$?; done
        exit $code ;;
esac
"""
# Stands in for a worker's environment: its attnlab runs until SIGTERM, then saves and ends with the number in `ends`.
ATTNLAB = """#!/usr/bin/env bash
echo "started with $*"
trap 'sleep 0.5; echo saved >>saved; exit "$(cat ends)"' TERM
while [ ! -e finished ]; do sleep 0.1; done
exit "$(cat ends)"
"""


@pytest.fixture
def pod(tmp_path):
    """Runs tpu_pod.sh with a stand-in for gcloud; `pod.worker(i)` is a worker's directory."""

    def worker(index):
        return tmp_path / "cloud" / str(index) / "attnlab"

    def script(action, *args, **env):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "POLL_SECONDS": "1", **env}
        command = ["bash", SCRIPTS / "tpu_pod.sh", action, *POD, *args]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    for index in range(2):
        (worker(index) / ".venv/tpu/bin").mkdir(parents=True)
        (worker(index) / "ends").write_text("0")
        for name, text in (("attnlab", ATTNLAB), ("python", "#!/bin/sh\n")):
            (worker(index) / ".venv/tpu/bin" / name).write_text(text)
            (worker(index) / ".venv/tpu/bin" / name).chmod(0o755)
    script.worker = worker
    yield script
    for index in range(2):
        (worker(index) / "finished").touch()


def test_the_life_of_a_slice(pod):
    """Up, install, train, stop and down do on the workers what they say, and again nothing that would harm."""
    assert "is active" in pod("up", "--type", "v5p-128")[1]
    code, out = pod("up", "--type", "v5p-128")
    assert code == 0 and "reusing a, which is ACTIVE" in out
    code, out = pod("up", "--type", "v5p-8")
    assert code == 2 and "a is there and is a v5p-128, not a v5p-8" in out

    assert pod("install")[0] == 0
    assert all(
        (pod.worker(i) / "attnlab" / "cli.py").exists() and (pod.worker(i) / "COMMIT").exists() for i in range(2)
    )

    assert pod("train", "--", *TRAIN)[0] == 0
    logs = [pod.worker(i) / "train.log" for i in range(2)]
    said, until = f"started with train {' '.join(TRAIN)}\n", time.monotonic() + 30
    while any(log.read_text() != said for log in logs) and time.monotonic() < until:  # they start in the background
        time.sleep(0.1)
    assert [log.read_text() for log in logs] == [said] * 2
    for again in (("train", "--", *TRAIN), ("install",)):
        code, out = pod(*again)
        assert code == 0 and out.count("a run is on") >= 2
    assert all(log.read_text().count("started") == 1 for log in logs)
    assert len(re.findall("^the run is on$", pod("status")[1], re.M)) == 2

    code, out = pod("stop")
    assert code == 0 and out.count(": ended") >= 2 and "costs until" in out
    assert all((pod.worker(i) / "saved").read_text() == "saved\n" for i in range(2))
    assert pod("stop")[0] == 0 and "ended with exit code 0" in pod("status")[1]

    assert pod("down")[0] == 0
    assert "there is no a" in pod("down")[1]


def test_follow_ends_with_the_run(pod):
    """The exit code of the run is that of `follow`; then the slice goes, where that was asked for."""
    pod("up", "--type", "v5p-128")
    pod("train", "--", *TRAIN)
    for index in range(2):
        (pod.worker(index) / "ends").write_text("7")
        (pod.worker(index) / "finished").touch()
    code, out = pod("follow")
    assert code == 7 and "started with train" in out and "the run has ended with exit code 7" in out
    assert "costs until" in out
    code, out = pod("follow", "--down-when-done")
    assert code == 7 and "there is no a" in pod("down")[1]


def test_a_slice_that_was_taken_away(pod):
    """What is suspended, or failed, is told, with the command that clears it away."""
    code, out = pod("up", "--type", "v5p-128", FAKE_STATE="SUSPENDED")
    assert code == 2 and "a is SUSPENDED" in out and "tpu_pod.sh down --name a --zone z" in out


def test_slurm(tmp_path):
    """A job makes its environment, starts one process per task, and says how it would go on."""
    code, _, err = run(tmp_path, "slurm.sbatch", "--dry-run", *TRAIN)
    assert code == 0
    srun = next(c for c in commands(err) if c[0] == "srun")
    assert srun[-len(TRAIN) :] == TRAIN
    assert "scontrol requeue" in err
    assert run(tmp_path, "slurm.sbatch", "--dry-run", "--config", "x")[0] == 2


@pytest.mark.parametrize(
    "told, ends, queued_again", [(True, 0, True), (True, 1, False), (False, 0, False), (False, 3, False)]
)
def test_slurm_goes_on_when_its_time_is_up(tmp_path, told, ends, queued_again):
    """USR1: the run gets SIGTERM, and only if it saved, the job is queued again. Else the job ends as the run does."""
    fakes = {
        "srun": f"trap 'sleep 0.3; exit {ends}' TERM\necho $$ >{tmp_path}/srun.pid\n"
        f"for i in $(seq {50 if told else 3})\ndo sleep 0.1; done\nexit {ends}",
        "scancel": f'kill -TERM "$(cat {tmp_path}/srun.pid)"',
        "scontrol": f"echo $* >{tmp_path}/requeued",
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/attnlab").touch(mode=0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "ATTNLAB_VENV": str(tmp_path / "venv"),
        "SLURM_JOB_ID": "5",
    }
    job = subprocess.Popen(["bash", SCRIPTS / "slurm.sbatch", *TRAIN], env=env, stderr=subprocess.PIPE)
    if told:
        wait_until(lambda: (tmp_path / "srun.pid").exists() and (tmp_path / "srun.pid").read_text())
        job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=30)
    assert job.returncode == ends
    assert (tmp_path / "requeued").exists() == queued_again
    assert not queued_again or (tmp_path / "requeued").read_text() == "requeue 5\n"


JOBSET = ["--name", "a", "--image", "i", "--accelerator", "tpu-v5p-slice", "--topology", "4x4x4", "--hosts", "16"]


def manifest(tmp_path, *options):
    code, out, _ = run(tmp_path, "gke_jobset.sh", *JOBSET, *options, "--dry-run", "--", *TRAIN, "--config.a='b c'")
    assert code == 0
    job = yaml.safe_load(out)["spec"]["replicatedJobs"][0]
    return job["replicas"], job["template"]["spec"], job["template"]["spec"]["template"]["spec"]


def test_jobset(tmp_path):
    """The manifest is for the asked hosts and chips, with the arguments as they were given."""
    replicas, job, pod = manifest(tmp_path, "--slices", "2", "--claim", "c", "--spot")
    assert replicas == 2 and job["parallelism"] == job["completions"] == 16
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["hostNetwork"] and pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "c"}
    (container,) = pod["containers"]
    assert (
        container["resources"]["limits"] == {"google.com/tpu": 4}
        and container["volumeMounts"][0]["mountPath"] == "/runs"
    )
    assert container["command"][-len(TRAIN) - 1 :] == [*TRAIN, "--config.a='b c'"]
    _, _, plain = manifest(tmp_path)
    assert "hostNetwork" not in plain and "volumes" not in plain and len(plain["nodeSelector"]) == 2


@pytest.mark.parametrize("told, ends, code", [(True, 0, 143), (True, 1, 1), (False, 0, 0), (False, 3, 3)])
def test_a_stopped_pod_is_no_finished_one(tmp_path, told, ends, code):
    """SIGTERM reaches the run, which saves; the pod then ends with what makes Kubernetes start it again."""
    (tmp_path / "attnlab").write_text(
        f"#!/bin/bash\ntrap 'sleep 0.3; exit {ends}' TERM\necho $* >{tmp_path}/started\n"
        f"for i in $(seq {50 if told else 3}); do sleep 0.1; done\nexit {ends}\n"
    )
    (tmp_path / "attnlab").chmod(0o755)
    command = manifest(tmp_path)[2]["containers"][0]["command"]
    pod = subprocess.Popen(command, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    wait_until(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text())
    if told:
        pod.terminate()
    assert pod.wait(30) == code
    assert (tmp_path / "started").read_text() == f"train {' '.join(TRAIN)} --config.a='b c'\n"


@pytest.mark.parametrize(
    "args, says",
    [
        (["--name", "a", "--", *TRAIN], "--image is missing"),
        ([*JOBSET, "--hosts", "4", "--", *TRAIN], "--topology 4x4x4 has 64 chips; --hosts 4 of --chips 4 have 16"),
        ([*JOBSET, "--topology", "big", "--", *TRAIN], "--topology big is none"),
        ([*JOBSET, "--name", "My run", "--", *TRAIN], "--name My run: only a-z, 0-9 and - are allowed"),
        ([*JOBSET, "--", "--config", "x"], "--workdir is missing"),
    ],
)
def test_jobset_refuses(tmp_path, args, says):
    """What is wrong is named, before anything is applied."""
    code, _, err = run(tmp_path, "gke_jobset.sh", *args)
    assert code == 2 and says in err


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# Every command of a page is written down instead of run; the scripts say what they would do.
RECORDER = r"""
set -euo pipefail
cd "$1"
log=$2
record() { { printf '%s\0' "$@"; echo; } >>"$log"; }
for name in attnlab gcloud kubectl pip sbatch scancel ssh-add; do eval "$name() { record $name \"\$@\"; }"; done
bash() {
    case $1 in
        *tpu_pod.sh) command bash "$1" "$2" --dry-run "${@:3}" ;;
        *) command bash "$1" --dry-run "${@:2}" ;;
    esac
    while [ $# -gt 0 ] && [ "$1" != -- ]; do shift; done
    [ $# = 0 ] || record attnlab train "${@:2}"
}
"""


def test_the_commands_of_the_page(tmp_path):
    """docs/pods.md: the scripts take their options, and the configs of all its runs are possible."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/pods.md").read_text(), re.M | re.S)
    program = RECORDER + "".join(blocks).replace(" &\n", "\n")
    command = ["bash", "-c", program, "bash", ROOT, tmp_path / "record"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ran = [line.split("\0") for line in (tmp_path / "record").read_text().split("\0\n") if line]
    read = [words[1:] for words in ran if words[0] == "attnlab"]
    read += [["train", *words[3:]] for words in ran if words[0] == "sbatch"]
    for words in read:
        args, overrides = arguments.parse(words)
        load(args.config, overrides)
    verbs = [words[0] for words in read]
    assert [verbs.count(verb) for verb in ("compile", "tokenizer", "train")] == [3, 2, 8]
