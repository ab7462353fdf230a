"""Which pieces of a train state's arrays each process holds, and how devices of one process hand theirs to another's.

A piece is what one device holds of an array. A process that several devices of have the same piece counts it once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from attnlab.errors import ConfigError

_AT_ONCE = 1 << 28  # bytes a device holds of what is on its way


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an array.

    Attributes:
      leaf: which array of the state, in the order of its leaves.
      start: index of its first element.
      shape: its own.
      rank: which of its process's devices holds it, the lowest one.
      size: in bytes.
    """

    leaf: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    rank: int
    size: int

    @property
    def key(self) -> tuple[int, tuple[int, ...]]:
        """What it is of the state, whoever holds it."""
        return self.leaf, self.start


class Layout:
    """Where a state lies, of all processes.

    Args:
      mesh: of all devices.
      like: a tree of ShapeDtypeStructs with their shardings.

    Attributes:
      held: of each process its pieces.
      passed: of each process those that the next process keeps, too: of arrays that have a piece which one process
        alone holds. Where every piece is held by two processes there are none.
      digest: of all of it; two layouts with the same one are the same.

    Raises:
      ConfigError: the mesh has not as many devices of each process.
    """

    def __init__(self, mesh: Mesh, like: Any):
        self.mesh, self.like = mesh, like
        self.devices = _by_process(mesh)
        leaves = jax.tree_util.tree_leaves_with_path(like)
        self.held = [self._pieces(devices, leaves) for devices in self.devices]
        count: dict[Any, int] = {}
        for pieces in self.held:
            for piece in pieces:
                count[piece.key] = count.get(piece.key, 0) + 1
        alone = {leaf for (leaf, _), holders in count.items() if holders == 1}
        several = len(self.devices) > 1
        self.passed = [tuple(p for p in pieces if several and p.leaf in alone) for pieces in self.held]
        told = [[jax.tree_util.keystr(path), list(x.shape), str(x.dtype)] for path, x in leaves]
        placed = [[(p.leaf, p.start, p.shape, p.rank) for p in pieces] for pieces in self.held]
        self.digest = hashlib.sha256(json.dumps([told, placed]).encode()).hexdigest()

    def bytes_of(self, process: int) -> int:
        """What a process writes: its own pieces and those that are passed to it."""
        return sum(p.size for p in (*self.held[process], *self.passed[process - 1]))

    def pull(self, state: Any, pieces: Sequence[Piece], process: int) -> list[np.ndarray]:
        """The content of pieces, as arrays of the host that nothing changes any more."""
        leaves, devices = jax.tree.leaves(state), self.devices[process]
        shards = {
            leaf: {s.device: s.data for s in leaves[leaf].addressable_shards} for leaf in {p.leaf for p in pieces}
        }
        found = [shards[p.leaf][devices[p.rank]] for p in pieces]
        for shard in found:
            shard.copy_to_host_async()
        # On CPU numpy would look at the device's own memory, which the next step takes.
        take = np.array if devices[0].platform == "cpu" else np.asarray
        return [take(shard) for shard in found]

    def pull_passed(self, state: Any, process: int) -> list[np.ndarray]:
        """The content of `passed` of the process before; every process calls this at the same step."""
        leaves, taken = jax.tree.leaves(state), self.passed[process - 1]
        sizes = {p.leaf: p.size for pieces in self.passed for p in pieces}
        found: dict[Any, np.ndarray] = {}
        for group in _groups(sizes):
            specs = tuple(leaves[leaf].sharding.spec for leaf in group)
            moved = self._ring(specs)(*(leaves[leaf] for leaf in group))
            pieces = [p for p in taken if p.leaf in group]
            shards = {leaf: {s.device: s.data for s in x.addressable_shards} for leaf, x in zip(group, moved)}
            mine = self.devices[process]
            found |= {p.key: np.asarray(shards[p.leaf][mine[p.rank]]) for p in pieces}
        return [found[p.key] for p in taken]

    def send(self, moves: Sequence[tuple[int, int, int]], payload: dict[int, bytes], process: int) -> dict[int, bytes]:
        """Sends bytes between processes; every process calls this with the same moves.

        Args:
          moves: (sender, receiver, bytes); each process is at most once either.
          payload: of the moves that this process sends, by receiver.
          process: this one.

        Returns:
          What this process received, by sender.
        """
        local, most = self.devices[process], max(size for *_, size in moves)
        each = min(_AT_ONCE // 4, -(-most // len(local)))
        spec = PartitionSpec(self.mesh.axis_names)
        sharding = jax.sharding.NamedSharding(self.mesh, spec)
        pairs = tuple((sender, receiver) for sender, receiver, _ in moves)
        move = _permute(self.mesh, (spec,), tuple(self._between(pairs)))
        sent = next((payload[receiver] for sender, receiver, _ in moves if sender == process), b"")
        received = bytearray()
        for begin in range(0, most, each * len(local)):
            buffer = np.zeros(each * len(local), np.uint8)
            part = np.frombuffer(sent, np.uint8)[begin : begin + buffer.size]
            buffer[: part.size] = part
            rows = [jax.device_put(row, device) for row, device in zip(buffer.reshape(len(local), each), local)]
            whole = jax.make_array_from_single_device_arrays((each * self.mesh.size,), sharding, rows)
            (moved,) = move(whole)
            shards = {s.device: s.data for s in moved.addressable_shards}
            for device in local:
                received += np.asarray(shards[device]).tobytes()
        return {sender: bytes(received[:size]) for sender, receiver, size in moves if receiver == process}

    def place(self, content: dict[Any, np.ndarray], process: int) -> Any:
        """The state, of this process's pieces by their key."""
        shapes, treedef = jax.tree.flatten(self.like)
        devices, arrays = self.devices[process], []
        for leaf, x in enumerate(shapes):
            starts = x.sharding.devices_indices_map(x.shape)
            rows = [jax.device_put(content[leaf, _start(starts[device])], device) for device in devices]
            arrays.append(jax.make_array_from_single_device_arrays(x.shape, x.sharding, rows))
        return jax.block_until_ready(jax.tree.unflatten(treedef, arrays))

    # Inside.

    def _pieces(self, devices: list[Any], leaves: Any) -> tuple[Piece, ...]:
        pieces: dict[Any, Piece] = {}
        for leaf, (_, x) in enumerate(leaves):
            indices = x.sharding.devices_indices_map(x.shape)
            shape = x.sharding.shard_shape(x.shape)
            for rank, device in enumerate(devices):
                size = math.prod(shape) * x.dtype.itemsize
                piece = Piece(leaf, _start(indices[device]), shape, rank, size)
                pieces.setdefault(piece.key, piece)
        return tuple(pieces.values())

    def _between(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Pairs of processes as pairs of the mesh's devices."""
        place = {device: i for i, device in enumerate(self.mesh.devices.flat)}
        return [(place[a], place[b]) for one, other in pairs for a, b in zip(self.devices[one], self.devices[other])]

    def _ring(self, specs: tuple[PartitionSpec, ...]) -> Any:
        count = len(self.devices)
        return _permute(self.mesh, specs, tuple(self._between([(i, (i + 1) % count) for i in range(count)])))


def _by_process(mesh: Mesh) -> list[list[Any]]:
    """Devices of each process, in the order of their ids."""
    by: dict[int, list[Any]] = {}
    for device in sorted(mesh.devices.flat, key=lambda d: d.id):
        by.setdefault(device.process_index, []).append(device)
    if len({len(devices) for devices in by.values()}) != 1:
        counts = ", ".join(f"{len(by[p])} of process {p}" for p in sorted(by))
        raise ConfigError(
            f"mesh has {counts}; train.local_checkpoint_every needs as many devices of each process; "
            "allowed: another mesh, or train.local_checkpoint_every=0"
        )
    return [by[p] for p in sorted(by)]


def _start(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.start or 0 for part in index)


def _groups(sizes: dict[int, int]) -> list[list[int]]:
    """Leaves in order, in groups of at most so many bytes a device; one that is larger is a group of its own."""
    groups: list[list[int]] = []
    left = 0
    for leaf, size in sorted(sizes.items()):
        if not groups or size > left:
            groups.append([])
            left = _AT_ONCE
        groups[-1].append(leaf)
        left -= size
    return groups


@functools.lru_cache(maxsize=64)
def _permute(mesh: Mesh, specs: tuple[PartitionSpec, ...], pairs: tuple[tuple[int, int], ...]) -> Any:
    """Arrays whose device `b` holds what device `a` held, for each pair; what nobody sends to holds zeros."""
    move = lambda *xs: tuple(jax.lax.ppermute(x, mesh.axis_names, pairs) for x in xs)
    # What is called replicated in the result differs from device to device: it is read device by device.
    return jax.jit(jax.shard_map(move, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))
