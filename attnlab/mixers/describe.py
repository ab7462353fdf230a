"""Mixers as tables for people and machines: what `attnlab list` prints."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers import base
from attnlab.mixers.roles import Role

WIDTH, LENGTH = 512, 4096  # of the table, unless asked for others


def mixer(name: str) -> dict[str, Any]:
    """One mixer: what it is and its knobs."""
    cls = base.get(name)
    knobs = [{"key": f.name, "default": f.default, "doc": f.metadata["doc"]} for f in dataclasses.fields(cls.Config)]
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    described = {"name": name, "summary": summary, "paper": cls.paper, "extension": cls.extension}
    return described | {"sequence_parallel": cls.sequence_parallel_of(cls.Config()), "knobs": knobs}


def parameters(name: str, width: int = WIDTH) -> list[dict[str, Any]]:
    """Every parameter of a mixer with its default knobs, and what optimizers make of it.

    Args:
      name: of the mixer.
      width: D, a multiple of what the default heads need.

    Returns:
      A row per parameter; `parts` and `groups` are of matrices that share one kernel (`roles.Fused`), `optimizer` is
      who updates it where `optimizer=muon`.

    Raises:
      ConfigError: an unknown mixer, or a width that it cannot have.
    """
    config_lib.require(width >= 1, "width", width, "1 or more")
    module = nnx.eval_shape(lambda: base.build({"name": name}, width=width, rngs=nnx.Rngs(0)))
    is_variable = lambda v: isinstance(v, nnx.Variable)
    rows = []
    for path, variable in jax.tree_util.tree_leaves_with_path(nnx.state(module, nnx.Param), is_leaf=is_variable):
        role, fused = variable.role, variable.fused
        rows.append(
            {
                "path": jax.tree_util.keystr(path, simple=True, separator="."),
                "shape": list(variable.shape),
                "axes": list(variable.axes),
                "role": role.value,
                "parts": dict(fused.parts) if fused else None,
                "groups": fused.groups if fused else None,
                "decayed": role.decayed,
                "optimizer": _updated_by(role),
            }
        )
    return rows


def _updated_by(role: Role) -> str:
    if role is Role.AVERAGE:
        return "none"
    return "muon" if role.orthogonalised else "adamw"


def parameter_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of `parameters`."""

    def cells(row: dict[str, Any]) -> list[str]:
        parts = "-"
        if row["parts"]:
            each = ", ".join(f"{name} {columns}" for name, columns in row["parts"].items())
            parts = each if row["groups"] == 1 else f"{row['groups']} times {each}"
        shape, axes = " x ".join(map(str, row["shape"])), ", ".join(row["axes"])
        return [row["path"], shape, axes, row["role"], parts, "yes" if row["decayed"] else "no", row["optimizer"]]

    return ["parameter", "shape", "axes", "role", "parts", "decayed", "optimizer"], [cells(row) for row in rows]


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
