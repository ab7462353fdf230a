"""Masks that configs choose by name, one file each; adding it registers it (attnlab/registry.py)."""

from attnlab.masks.base import MASKS, MaskBuilder, MaskConfig, build, config_from_node, get, names, register

__all__ = ["MASKS", "MaskBuilder", "MaskConfig", "build", "config_from_node", "get", "names", "register"]
