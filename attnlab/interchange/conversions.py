"""`--as`: a checkpoint's softmax attention continued as another mixer, whose function is at first the same, or near."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from attnlab.config import require_choice
from attnlab.errors import UserError
from attnlab.interchange.pieces import Filled, Piece, Table

CONVERSIONS = {
    "moh": "mixture of heads, all heads on and routers zero: all weights are 1, the function is the same",
    "moh_llama3": "MoH-LLaMA3: the first half of the heads always on, the half of the others of largest queries; the "
    "function is another one, which the paper trains on",
    "gated": "a gate of logits 0, so 1/2, and an output projection twice as large: the function is the same, exactly",
    "sinks": "a sink per head whose logit is -30 at first: the function is the same but for e^-30",
}


def convert(name: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The node `model` with every softmax layer as `name` has it.

    Raises:
      UserError: an unknown name, or no layer that is softmax attention.
    """
    require_choice("--as", name, list(CONVERSIONS))
    nodes = model["mixers"]
    if not any(node["name"] == "softmax" for node in nodes.values()):
        raise UserError(f"--as {name}: no layer of the checkpoint is plain softmax attention")
    return {**model, "mixers": {k: _node(name, n) if n["name"] == "softmax" else n for k, n in nodes.items()}}


def _node(name: str, node: dict[str, Any]) -> dict[str, Any]:
    if name == "gated":
        return {**node, "name": "gated"}
    if name == "sinks":
        return {**node, "sinks": True}
    heads = node["heads"]
    core = {key: value for key, value in node.items() if key != "heads"}
    if name == "moh_llama3":
        if heads % 4:
            raise UserError(f"--as moh_llama3: heads = {heads}; allowed: multiples of 4")
        return {
            "name": "moh",
            "heads": heads,
            "shared": heads // 2,
            "active": heads // 4,
            "router": "norm",
            "core": core,
        }
    return {"name": "moh", "heads": heads, "shared": heads // 4, "active": heads - heads // 4, "core": core}


def converted(name: str, table: Table, plain: Any, leaves: Mapping[str, Any]) -> Table:
    """The table of the converted model.

    Args:
      table: of the checkpoint's own.
      plain: config of that model.
      leaves: shapes of the converted model's parameters.
    """
    starts = [
        f"transformer.periods.blocks.{i}.sublayers.0.branch."
        for i, block in enumerate(plain.blocks)
        if plain.mixers[block].node_name == "softmax"
    ]

    def moved(piece: Piece) -> Piece:
        start = next((s for s in starts if piece.leaf.startswith(s)), None)
        if start is None:
            return piece
        if name.startswith("moh"):
            return dataclasses.replace(piece, leaf=piece.leaf.replace(start, f"{start}core.", 1))
        if name == "gated" and piece.leaf == f"{start}out.kernel":
            return dataclasses.replace(piece, factor=2.0)
        return piece

    pieces = [moved(piece) for piece in table.pieces]
    given = {piece.leaf for piece in pieces}
    new = {"moh": "router.", "moh_llama3": "router.", "gated": "gate.linear.", "sinks": "sinks"}[name]
    value = -30.0 if name == "sinks" else 0.0
    fresh = [leaf for leaf in leaves if leaf not in given and any(leaf.startswith(s + new) for s in starts)]
    return Table(pieces, tuple(Filled(leaf, value) for leaf in fresh))
