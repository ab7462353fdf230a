"""A pattern of its own for every head: an A, a vertical slash or a grid."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.errors import ConfigError
from attnlab.masks.base import MaskConfig, config_from_node, get, names, register
from attnlab.masks.patterns import HeadMask, Pattern, PatternMask


def _nodes(tree: Any, path: str) -> tuple[MaskConfig, ...]:
    """The typed Configs of a list of nodes."""
    if isinstance(tree, config_lib.Override):
        try:
            tree = ast.literal_eval(tree.text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass  # a text is no list, either
    config_lib.require(isinstance(tree, (list, tuple)), path, tree, "a list of masks, each a name or {'name': ...}")
    return tuple(config_from_node(node, f"{path}[{i}]") for i, node in enumerate(tree))


_A, _GRID = ({"name": name} for name in ("a_shape", "grid_pattern"))


@dataclasses.dataclass(frozen=True)
class PerHeadConfig(MaskConfig):
    """The knob of heads' patterns."""

    by_head = "heads"

    heads: tuple[Any, ...] = knob(
        (),
        "a mask for each query head, or one for all: a_shape, vertical_slash with block 0 or grid_pattern, with its "
        "knobs",
        other=((_A, _GRID),),
        build=_nodes,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.require(len(self.heads) >= 1, "heads", self.heads, "masks: one for each query head, or one for all")
        for i, node in enumerate(self.heads):
            if not issubclass(get(node.node_name), HeadMask):
                allowed = ", ".join(name for name in names() if issubclass(get(name), HeadMask))
                config_lib.require(False, f"heads[{i}]", node.node_name, allowed)
            try:
                get(node.node_name)(node).pattern()
            except ConfigError as error:
                raise ConfigError(f"heads[{i}].{error}") from None


@register("per_head")
class PerHead(PatternMask):
    """Query head h sees what the mask `heads[h]` shows, whatever that is; the mask of all is one union of two terms."""

    Config = PerHeadConfig
    paper = "Li et al. 2025, MMInference: Modality-Aware Permutation Sparse Attention, arXiv:2504.16083"
    extension = "patterns are given, not searched; all rows of a head have one, whatever their modality"

    def patterns(self) -> tuple[Pattern, ...]:
        return tuple(get(node.node_name)(node).pattern() for node in self.config.heads)
