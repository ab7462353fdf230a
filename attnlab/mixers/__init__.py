"""Mixers: one file per mechanism; adding it registers it (attnlab/registry.py)."""

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
    known,
    names,
    register,
    require_layers,
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
    "known",
    "names",
    "register",
    "require_layers",
]
