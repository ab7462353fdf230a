"""The log of a plan and the claims on its runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from attnlab.ablation import state
from attnlab.ablation.state import Log


def test_a_claim_is_of_one(tmp_path):
    """Who holds a run is told; nobody else gets it until it is let go; one that is over is claimed no more."""
    log, other = Log(tmp_path), Log(tmp_path)
    with log.claim("arms/a/seed0") as mine:
        assert mine and other.held()["arms/a/seed0"]["pid"] == os.getpid()
        with other.claim("arms/a/seed0") as theirs, other.claim("arms/a/seed1") as another:
            assert not theirs and another
        assert list(log.held()) == ["arms/a/seed0"]
        log.write("done", "arms/a/seed0", metrics={})
    assert not log.held()
    with log.claim("arms/a/seed0") as mine:
        assert not mine
    log.write("retry", "arms/a/seed0")
    with log.claim("arms/a/seed0") as mine:
        assert mine


def test_a_claim_of_a_process_that_is_gone(tmp_path):
    """A killed process's claim is another's at once on its host, and elsewhere once it was not renewed for a while."""
    code = f"""
import os, pathlib, sys
from attnlab.ablation.state import Log
with Log(pathlib.Path({str(tmp_path)!r})).claim("r"):
    print("held", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    log = Log(tmp_path)
    with log.claim("r") as mine:
        assert not mine
    process.kill()
    process.wait()
    with log.claim("r") as mine:
        assert mine
    path = tmp_path / "claims" / "r.json"
    path.write_text(json.dumps({"run": "r", "host": "elsewhere", "pid": 1, "started": "1"}))
    with log.claim("r") as mine:
        assert not mine
    os.utime(path, (0, path.stat().st_mtime - state.STALE - 5))
    with log.claim("r") as mine:
        assert mine


@pytest.mark.parametrize("cut", ['{"event": "done", "run": "a"', "\x00\x00", '{"event": 1}'])
def test_a_line_that_was_cut_off(tmp_path, cut):
    """A kill in the middle of a line costs that line: what comes after is on lines of its own."""
    log = Log(tmp_path)
    log.write("started", "a", step=0)
    with log.path.open("a") as file:
        file.write(cut)
    log.write("failed", "a", reason="x")
    view = log.read()
    assert [e["event"] for e in view.events["a"]] == ["started", "failed"] and view.status("a") == "failed"
