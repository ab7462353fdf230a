"""The style of the Python files is what ruff makes of them, with the settings of pyproject.toml."""

import ast
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


def test_files_and_functions_are_short():
    """No file of the two packages is longer than 450 lines, no function longer than 70."""
    long = []
    for path in sorted(path for package in ("attnlab", "kernels_pallas") for path in (ROOT / package).rglob("*.py")):
        text = path.read_text()
        long += [str(path.relative_to(ROOT))] * (text.count("\n") > 450)
        functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        long += [f"{path.relative_to(ROOT)}:{f.name}" for f in functions if f.end_lineno - f.lineno >= 70]
    assert long == []
