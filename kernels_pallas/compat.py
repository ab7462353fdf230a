"""What differs between the versions of jax that attnlab runs on: the only place that knows."""

from __future__ import annotations

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])
tpu_params = pltpu.CompilerParams
reciprocal = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal
