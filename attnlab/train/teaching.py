"""What a train step knows of a teacher."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from attnlab.models.distillation import Matching
from attnlab.train import sharding
from attnlab.train.state import Model


@dataclasses.dataclass(frozen=True)
class Teaching:
    """What a train step must know of the teacher besides its parameters, which it is given.

    Attributes:
      model: the teacher, taken apart.
      matching: resolved for it and the student.
    """

    model: Model
    matching: Matching

    @property
    def key(self) -> Any:
        """What it depends on, hashable."""
        return self.model.config, self.matching

    def params(self, mesh: Mesh) -> Any:
        """ShapeDtypeStructs of the teacher's parameters, split over the mesh as the student's are."""
        shapes = self.model.pure_shapes
        placed = sharding.parameter_shardings(mesh, self.model.axes, shapes)
        return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, placed)
