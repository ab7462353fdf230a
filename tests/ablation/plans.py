"""A plan of tiny runs for tests."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from tests.train import runs


def tree(source: str, **changes: Any) -> dict[str, Any]:
    """Two arms, two seeds, runs of a few steps; `changes` replace keys of the plan."""
    few = {"train__sample_tokens": 0, "train__steps": 6, "train__save_every": 2, "train__eval_every": 3}
    plan = {
        "question": "Does a gate help?",
        "base": runs.tree(source, model__mlp_width=64, **few),
        "arms": {"plain": {}, "gate": {"model.mixers.M": "gated"}},
        "seeds": [0, 1],
        "metrics": {"heldout_loss": {"primary": True, "margin": 0.1}},
    }
    return {**plan, **changes}


def write(path: pathlib.Path, plan: dict[str, Any]) -> pathlib.Path:
    """A plan file."""
    path.write_text(f"def get_config(arg=None):\n    return {plan!r}\n")
    return path


def events(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The log of a plan."""
    return [json.loads(line) for line in (workdir / "state.jsonl").read_text().splitlines()]


def curves(workdir: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """metrics.jsonl of every run, without what depends on the clock."""
    return {str(p.parent.relative_to(workdir)): runs.lines(p.parent) for p in sorted(workdir.rglob("metrics.jsonl"))}
