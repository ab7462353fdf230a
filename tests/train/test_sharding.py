"""The mesh: which device stands where, which process reads which rows, and what is refused."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.train import sharding
from attnlab.train.config import MeshConfig


class Chip:
    """As much of a TPU core as laying out a mesh reads."""

    platform, device_kind = "tpu", "TPU v5e"

    def __init__(self, index: int, per_slice: int, per_host: int = 4):
        self.id, self.slice_index, self.process_index = index, index // per_slice, index // per_host
        self.coords, self.core_on_chip = (index % per_slice, 0, 0), 0

    def __repr__(self):
        return f"chip {self.id}"


def laid_out(monkeypatch, count: int, per_slice: int, **sizes):
    """`make_mesh` of `count` slices, whose devices are kept as they are."""
    monkeypatch.setattr(sharding, "Mesh", lambda devices, names, axis_types: mesh_of(devices))
    chips = [Chip(i, per_slice) for i in range(count * per_slice)]
    return sharding.make_mesh(MeshConfig(**sizes), 64, chips)


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_only_one_axis_crosses_slices(monkeypatch, axis):
    """Along every other axis all chips are of one slice."""
    sizes = {"data": 2, "fsdp": 4, "context": 1, "tensor": 2} | {"slices": axis}
    mesh = laid_out(monkeypatch, 2, 8, **sizes)
    index = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    for i, name in enumerate(("data", "fsdp", "context", "tensor")):
        same = np.all(index == np.take(index, [0], axis=i))
        assert same == (name != axis), name
    assert len({chip.id for chip in mesh.devices.flat}) == 16


def test_an_axis_over_slices_is_a_multiple_of_them(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"mesh.data = 1 goes over 2 slices \(mesh.slices = 'data'\); allowed: multiples of 2"
    ):
        laid_out(monkeypatch, 2, 8, data=1, fsdp=16)


@pytest.mark.parametrize(
    "sizes, rows",
    [
        ((4, 2, 1, 1), ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15])),
        ((1, 1, 8, 1), (list(range(16)), list(range(16)))),  # two processes split the positions of the same rows
        ((2, 1, 2, 2), ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15])),
    ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(sizes, rows):
    devices = np.array([Chip(i, 8) for i in range(8)], object).reshape(sizes)
    assert [sharding.rows_of_process(mesh_of(devices), 16, process) for process in range(2)] == list(rows)


def test_rows_need_not_be_consecutive():
    """Where the mesh follows the chips' network, a process may hold every other shard."""
    devices = np.array([Chip(i, 8) for i in (0, 4, 1, 5, 2, 6, 3, 7)], object).reshape(8, 1, 1, 1)
    assert sharding.rows_of_process(mesh_of(devices), 8, 0) == [0, 2, 4, 6]


def mesh_of(devices):
    return types.SimpleNamespace(devices=devices, shape=dict(zip(("data", "fsdp", "context", "tensor"), devices.shape)))


def test_parameters_are_split_over_positions_devices_too():
    """`embed` goes over fsdp and context together: splitting positions costs no copy of the parameters."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2), 8)
    found = sharding.parameter_shardings(
        mesh, {"w": ("embed", "mlp")}, {"w": jax.ShapeDtypeStruct((3, 8, 6), "float32")}
    )
    assert found["w"].shard_shape((3, 8, 6)) == (3, 2, 3)
    with pytest.raises(
        ConfigError, match="mesh.fsdp x mesh.context = 4 does not divide 6, the axis 'embed' of parameter w"
    ):
        sharding.parameter_shardings(mesh, {"w": ("embed",)}, {"w": jax.ShapeDtypeStruct((6,), "float32")})
