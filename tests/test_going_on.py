"""docs/going_on.md does what it says: its commands, its plan and its Python, in order, on a tiny checkpoint."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import shlex

import numpy as np
import pytest

from attnlab import cli
from attnlab.data.tokenizers import load_tokenizer
from attnlab.interchange import tokens
from tests import tiers
from tests.interchange import test_verbs
from tests.train import runs

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs/going_on.md"
# A page speaks of real sizes; these are what a test can wait for.
SMALLER = {
    "length=1024": "length=32", "steps=2000": "steps=2", "--batches 16": "--batches 1", "--tokens 32": "--tokens 3",
    "[0, 1, 2]": "[0, 1]", "--limit 100": "--limit 2",
}  # fmt: skip


def blocks():
    """(kind, text) of each block of code: bash, or what the comment above it calls it."""
    for name, language, text in re.findall(r"(?:<!-- (\w+) -->\n)?```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        yield name or language, text


def test_every_command_is_understood(monkeypatch, capsys):
    """Its verbs and flags are there, its plan and its Python are Python: nothing is run."""
    seen = []
    for verb in list(cli._VERBS):
        monkeypatch.setitem(cli._VERBS, verb, lambda args, overrides: seen.append(args.verb))
    for kind, text in blocks():
        if kind != "bash":
            compile(text, str(PAGE), "exec")
            continue
        for line in text.splitlines():
            program, *args = shlex.split(line)
            assert program == "attnlab" and cli.main(args) == 0, (line, capsys.readouterr().err)
    assert {"import", "eval", "generate", "ablate", "lm-eval", "export"} <= set(seen)


@tiers.exhaustive
@pytest.mark.slow
def test_every_command_of_the_page(tmp_path, monkeypatch, capsys):
    """Three imports are one function, the plan ends in verdicts, each arm is evaluated, and goes out as it must."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("ATTNLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    source = runs.corpus(tmp_path / "text")
    folder = test_verbs.folder(tmp_path / "from", source)
    tokens.write("bytes", load_tokenizer("bytes"), folder, 32)
    small = SMALLER | {"DIR": str(folder), "text:/data/*.txt": source}
    ran = []
    for kind, text in blocks():
        assert kind in ("bash", "plan", "load")
        for given, becomes in small.items():
            text = text.replace(given, becomes)
        if kind == "plan":
            pathlib.Path("plan.py").write_text(text)
        elif kind == "load" and importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            exec(compile(text, str(PAGE), "exec"), {})
        for line in text.splitlines() if kind == "bash" else ():
            program, verb, *args = shlex.split(line)
            assert program == "attnlab"
            if verb == "lm-eval" and not importlib.util.find_spec("lm_eval"):
                continue
            code = cli.main([verb, *args, *(["--json"] if verb == "eval" else [])])
            out, err = capsys.readouterr()
            assert code == 0, f"{line}: {err}"
            ran.append((verb, out))
    plain, gated, moh, _ = (json.loads(out)["loss"] for verb, out in ran if verb == "eval")
    np.testing.assert_allclose([gated, moh], plain, rtol=2e-3)
    results = json.loads(pathlib.Path("runs/compare/results.json").read_text())
    assert {c["arm"] for c in results["comparisons"]} == {"gated", "moh"}
    assert pathlib.Path("runs/compare/report.html").is_file()
    kinds = [
        json.loads(pathlib.Path(f"out/{arm}/config.json").read_text())["model_type"]
        for arm in ("plain", "gated", "moh")
    ]
    assert kinds == ["llama", "attnlab", "attnlab"]
    node = json.loads(pathlib.Path("out/moh/config.json").read_text())["attnlab"]["mixers"]["S"]
    assert (node["name"], node["active"]) == ("moh", 1)
