"""The style of the Python files is what ruff makes of them, with the settings of pyproject.toml."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("command", [["check"], ["format", "--diff"]], ids=lambda command: command[0])
def test_ruff(command):
    """ruff has nothing to say, and would change nothing."""
    tool = pathlib.Path(sys.executable).with_name("ruff")
    done = subprocess.run([tool, *command, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
