"""Models: stacks of blocks around mixers, one file each; adding it registers it (attnlab/registry.py)."""

from attnlab.models.objective import Figures, Objective, Sums, config_from_node, names, of, register

__all__ = ["Figures", "Objective", "Sums", "config_from_node", "names", "of", "register"]
