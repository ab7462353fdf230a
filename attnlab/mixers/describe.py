"""Mixers as tables for people and machines: what `attnlab list` prints."""

from __future__ import annotations

import dataclasses
from typing import Any

from attnlab import config as config_lib
from attnlab.mixers import base

WIDTH, LENGTH = 512, 4096  # of the table, unless asked for others


def mixer(name: str) -> dict[str, Any]:
    """One mixer: what it is and its knobs."""
    cls = base.get(name)
    knobs = [{"key": f.name, "default": f.default, "doc": f.metadata["doc"]} for f in dataclasses.fields(cls.Config)]
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    context = cls.context_of(cls.Config())
    described = {"name": name, "summary": summary, "paper": cls.paper, "extension": cls.extension}
    return described | {"context": context, "knobs": knobs}


def all_mixers(width: int = WIDTH, length: int = LENGTH) -> list[dict[str, Any]]:
    """Every mixer with its default knobs: source, capabilities, state and FLOPs per token of one layer.

    Args:
      width: D, a multiple of what the default heads need.
      length: T, positions of a sequence.

    Returns:
      A row per mixer; `relative_flops` is against softmax attention of the same width and length.

    Raises:
      ConfigError: a width that a mixer cannot have.
    """
    config_lib.require(length >= 1, "length", length, "1 or more")
    config_lib.require(width >= 1, "width", width, "1 or more")
    reference = base.get("softmax")
    softmax = reference.cost(reference.Config(), width, length).total_flops
    rows = []
    for name in base.names():
        cls = base.get(name)
        cost = cls.cost(cls.Config(), width, length)
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
