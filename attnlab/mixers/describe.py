"""Mixers as tables for people and machines: what `attnlab list` prints."""

from __future__ import annotations

import dataclasses
from typing import Any

from attnlab.mixers import base

WIDTH, LENGTH = 512, 4096


def mixer(name: str) -> dict[str, Any]:
    """One mixer: what it is and its knobs."""
    cls = base.get(name)
    knobs = [
        {"key": f.name, "default": f.default, "doc": f.metadata["doc"]} for f in dataclasses.fields(cls.Config)
    ]
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    return {"name": name, "summary": summary, "paper": cls.paper, "extension": cls.extension, "knobs": knobs}


def all_mixers() -> list[dict[str, Any]]:
    """Every mixer: source, capabilities, state and FLOPs per token of one layer of `WIDTH` at `LENGTH` positions.

    `relative_flops` is against softmax attention of the same width and length.
    """
    reference = base.get("softmax")
    softmax = reference.cost(reference.Config(), WIDTH, LENGTH).total_flops
    rows = []
    for name in base.names():
        cls = base.get(name)
        cost = cls.cost(cls.Config(), WIDTH, LENGTH)
        rows.append(
            {
                "name": name,
                "paper": cls.paper,
                "extension": cls.extension,
                "capabilities": [k for k, able in dataclasses.asdict(cls.capabilities).items() if able],
                "parameters": cost.parameters,
                "flops_per_token": cost.total_flops,
                "relative_flops": cost.total_flops / softmax,
                "state_bytes": cost.state_bytes,
            }
        )
    return rows
