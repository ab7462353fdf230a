"""Mixers: one file per mechanism. Every module of this package is imported, so that adding a file registers it."""

import importlib
import pkgutil

from attnlab.mixers.base import (
    Capabilities,
    Cost,
    Mixer,
    MixerConfig,
    MixerOutput,
    build,
    config_from_node,
    get,
    knob,
    names,
    register,
)
from attnlab.mixers.heads import HeadMixer
from attnlab.mixers.sequence import Context, Sequence, Stream

__all__ = [
    "Capabilities",
    "Context",
    "Cost",
    "HeadMixer",
    "Mixer",
    "MixerConfig",
    "MixerOutput",
    "Sequence",
    "Stream",
    "build",
    "config_from_node",
    "get",
    "knob",
    "names",
    "register",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
