"""What a compiled program does, read from XLA's text of it: products, collectives and bytes, loops counted as they run.

XLA's own cost analysis counts the body of a loop once, and knows nothing of a kernel's inside. Here every computation
is counted as often as it runs: once for each call, and for a loop as often as its condition says.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

from attnlab.launch.hlo_text import Array, Body, Instruction, computations, groups, product_flops

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")  # fmt: skip
# These move nothing: they name, or group, what is there.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
         "after-all", "partition-id", "replica-id", "opt-barrier", "broadcast"}  # fmt: skip


@dataclasses.dataclass
class Costs:
    """Sums over a whole program, for one device.

    Attributes:
      flops: of dot and convolution, a multiply-add counted as 2.
      bytes: read from and written to HBM by everything but collectives; operands and results of a fused operation once.
      count: collectives by kind.
      payload: bytes of their results by kind (of its operand, for a reduce-scatter).
      sent: bytes that a device sends for them by kind, over rings.
      crossing: those of them that leave what the fast interconnect joins, shared by the devices of a group that are in
        the same place. Between TPU slices they are of this sum alone.
      kernels: custom kernels by name, and calls of NVIDIA's libraries: nothing of their inside is in `flops`.
      unknown_loops: loops whose number of turns is not in the text; their bodies are counted once.
    """

    flops: float = 0.0
    bytes: float = 0.0
    count: Counter[str] = dataclasses.field(default_factory=Counter)
    payload: Counter[str] = dataclasses.field(default_factory=Counter)
    sent: Counter[str] = dataclasses.field(default_factory=Counter)
    crossing: Counter[str] = dataclasses.field(default_factory=Counter)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Costs, times: int = 1) -> None:
        """Adds what runs `times` times."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for name in ("count", "payload", "sent", "crossing", "kernels"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value
        self.unknown_loops += other.unknown_loops


def analyse(text: str, domains: Sequence[int] = ()) -> Costs:
    """Costs of a program.

    Args:
      text: of `compiled.as_text()`.
      domains: for each device of the program's mesh, which group of devices with a fast interconnect it is in; none:
        all in one.
    """
    return _Program(text, domains).costs()


def _kernel(op: Instruction) -> str | None:
    """The name of a custom call that computes; None for one that only marks or allocates."""
    target = re.search(r'custom_call_target="([^"]*)"', op.attributes)
    name = target[1] if target else ""
    if name == "tpu_custom_call":
        return re.sub(r"[.\d]+$", "", op.name)
    if name.startswith("mosaic_gpu"):
        own = re.search(r'op_name="(?:[^"]*/)?([^"/]+)/mpmd_map"', op.attributes)
        return own[1] if own else name
    return name if name.startswith(("__cu", "__gpu$")) else None


class _Program:
    """The computations of a module, by name."""

    def __init__(self, text: str, domains: Sequence[int]):
        self.computations, self.entry = computations(text)
        partitions = re.search(r"\bnum_partitions=(\d+)", text.partition("\n")[0])
        self.devices = int(partitions[1]) if partitions else 1
        self.domains = domains
        self._of = functools.cache(self._computation)

    def costs(self) -> Costs:
        return self._of(self.entry)

    def _computation(self, name: str) -> Costs:
        """What one run of a computation costs, all that it calls included."""
        total, seen = Costs(), set()
        body = self.computations[name]
        for instruction in body.values():
            self._count(instruction, body, total, seen)
        return total

    def _count(self, op: Instruction, body: Body, total: Costs, seen: set[str]) -> None:
        """Adds what an instruction costs; `seen` holds the channels of this computation's collectives."""
        code = op.opcode
        if code == "while":
            turns = self._turns(op, body)
            if turns is None:
                total.unknown_loops.append(op.name)
            total.add(self._of(op.attribute("body")), 1 if turns is None else turns)
        elif code == "conditional":
            branches = [op.attribute("true_computation"), op.attribute("false_computation")]
            listed = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
            names = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else [b for b in branches if b]
            # The dearest: which one runs is known at run time only.
            total.add(max((self._of(n) for n in names), key=lambda c: (c.flops, c.bytes)))
        elif code in ("call", "async-start"):
            total.add(self._of(op.attribute("to_apply") or op.attribute("calls")))
        elif (kind := code.removesuffix("-start")) in COLLECTIVES:
            # One collective that runs beside other work is written several times: where it starts, in the fused
            # operations that it runs beside, and where it ends.
            channel = op.attribute("channel_id")
            if channel is None or channel not in seen:
                self._collective(kind, op, body, total)
            seen.add(channel or "")
        elif code == "send" and "_xla_megascale_transfer_type" in op.attributes:
            self._between_slices(op, body, total)
        elif code == "fusion":
            inside = Costs()
            name = op.attribute("calls")
            fused = self.computations[name]
            for instruction in fused.values():
                # How the TPU compiler writes a reduce-scatter: an all-reduce and the slice that a device keeps.
                if name.startswith("all-reduce-scatter") and instruction.opcode == "all-reduce":
                    instruction = dataclasses.replace(instruction, opcode="reduce-scatter")
                self._count(instruction, fused, inside, seen)
            total.add(dataclasses.replace(inside, bytes=0.0))
            total.bytes += self._fusion_bytes(op, body)
        elif code not in _FREE and not code.endswith("-done"):
            if code in ("dot", "convolution"):
                total.flops += product_flops(op, body)
            if code == "custom-call" and (kernel := _kernel(op)):
                total.kernels[kernel] += 1
            total.bytes += self._moved(op, body)

    # Loops.

    def _turns(self, op: Instruction, body: Body) -> int | None:
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', op.attributes)
        if known:
            return int(known[1])
        condition = self.computations.get(op.attribute("condition") or "", {})
        compared = self._comparison(condition)
        if compared is None:
            return None
        index, bound, direction = compared
        first = self._constant(body, self._element(body, op.operands[0], index))
        step = self._step(op.attribute("body"), index)
        if first is None or not step:
            return None
        last = {"LT": bound, "LE": bound + 1, "GT": bound, "GE": bound - 1, "NE": bound}.get(direction)
        return None if last is None else max(0, math.ceil((last - first) / step))

    def _comparison(self, condition: Body) -> tuple[int, int, str] | None:
        """Which element of the loop's state its condition compares, with what, and how."""
        root = next((i for i in condition.values() if i.root), None)
        if root is None:
            return None
        compare, names = root, dict(enumerate(root.operands))
        outer = condition
        if root.opcode == "fusion":  # its parameters are the fusion's operands
            inner = self.computations[root.attribute("calls")]
            compare = next(i for i in inner.values() if i.root)
            if compare.opcode != "compare":
                return None
            names = {}
            for i, operand in enumerate(compare.operands):
                parameter = inner[operand]
                if parameter.opcode == "parameter":
                    names[i] = root.operands[int(parameter.literal)]
                elif (value := self._constant(inner, operand)) is not None:
                    names[i] = value
        if compare.opcode != "compare" or len(names) < 2:
            return None
        sides = []
        for name in (names[0], names[1]):
            if isinstance(name, int):
                sides.append(("value", name))
            elif (value := self._constant(outer, name)) is not None:
                sides.append(("value", value))
            elif outer[name].opcode == "get-tuple-element":
                sides.append(("index", int(outer[name].attribute("index"))))
        if [kind for kind, _ in sides] != ["index", "value"]:
            return None
        return sides[0][1], sides[1][1], compare.attribute("direction")

    def _element(self, body: Body, name: str, index: int) -> str | None:
        """The name of a tuple's element, where the tuple is made in this computation."""
        tuple_ = body.get(name)
        if tuple_ is None or tuple_.opcode != "tuple":
            return None
        return tuple_.operands[index]

    def _constant(self, body: Body, name: str | None) -> int | None:
        op = body.get(name or "")
        while op is not None and op.opcode in ("copy", "bitcast", "convert") and op.operands:
            op = body.get(op.operands[0])
        if op is None or op.opcode != "constant" or not re.fullmatch(r"-?\d+", op.literal):
            return None
        return int(op.literal)

    def _step(self, name: str | None, index: int) -> int | None:
        """What a loop's body adds to an element of its state."""
        body = self.computations.get(name or "", {})
        root = next((i for i in body.values() if i.root), None)
        if root is None or root.opcode != "tuple":
            return None
        op, here, bindings = body.get(root.operands[index]), body, {}
        while op is not None and op.opcode == "copy":
            op = body.get(op.operands[0])
        if op is not None and op.opcode == "fusion":
            here = self.computations[op.attribute("calls")]
            bindings = dict(enumerate(op.operands))
            op = next((i for i in here.values() if i.root), None)
        if op is None or op.opcode != "add":
            return None
        for operand in op.operands:
            value = self._constant(here, operand)
            inner = here.get(operand)
            if value is None and inner is not None and inner.opcode == "parameter" and bindings:
                value = self._constant(body, bindings[int(inner.literal)])
            if value is not None:
                return value
        return None

    # Collectives.

    def _collective(self, kind: str, op: Instruction, body: Body, total: Costs) -> None:
        inputs = sum(a.bytes for name in op.operands for a in self._result(body, name))
        outputs = sum(a.bytes for a in op.arrays)
        if op.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, and contexts)
            half = len(op.operands)
            outputs = sum(a.bytes for a in op.arrays[half : 2 * half])
        n, places = self._spread(op.attributes, pairs=kind == "collective-permute")
        share = (n - 1) / n
        sent = {
            "all-gather": outputs * share,
            "all-reduce": 2 * inputs * share,
            "reduce-scatter": inputs * share,
            "all-to-all": inputs * share,
            "ragged-all-to-all": inputs * share,
        }.get(kind, inputs)
        total.count[kind] += 1
        total.payload[kind] += inputs if kind == "reduce-scatter" else outputs
        total.sent[kind] += sent
        if places > 1:
            total.crossing[kind] += sent * places / n

    def _between_slices(self, op: Instruction, body: Body, total: Costs) -> None:
        """A collective over TPU slices: the compiler leaves it to the hosts, as a send and a receive."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)[1].lower().replace("_", "-")
        slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', op.attributes)
        first, _, last = slices[1].partition(":") if slices else ("1", "", "2")
        n = int(last) - int(first) + 1 if last else len(first.split(","))
        inputs = sum(a.bytes for a in self._result(body, op.operands[0]))
        share = (n - 1) / n
        total.count[kind] += 1
        total.payload[kind] += inputs * (n if kind == "all-gather" else 1)
        total.crossing[kind] += inputs * {"all-reduce": 2 * share, "all-gather": n - 1.0}.get(kind, share)

    def _spread(self, attributes: str, *, pairs: bool) -> tuple[int, int]:
        """Devices in a group of a collective, and in how many places they are."""
        found = groups(attributes) or (tuple(range(self.devices)),)
        places = max(len({self.domains[i] for i in group}) for group in found) if self.domains else 1
        return (places, places) if pairs else (max(map(len, found)), places)

    # Bytes.

    def _result(self, body: Body, name: str) -> tuple[Array, ...]:
        return body[name].arrays if name in body else ()

    def _hbm(self, arrays: tuple[Array, ...]) -> float:
        return sum(a.bytes for a in arrays if a.hbm)

    def _moved(self, op: Instruction, body: Body) -> float:
        arrays = op.arrays
        if op.opcode == "copy-start":  # (result, operand, context)
            arrays = arrays[:1]
        elif op.opcode == "slice-start":  # ((operands), result, context)
            arrays = arrays[len(op.operands) :][:1]
        if op.opcode in ("dynamic-slice", "slice", "slice-start", "gather"):
            read = arrays[0].bytes if self._hbm(self._result(body, op.operands[0])) else 0
            return read + self._hbm(arrays[:1])
        if op.opcode == "dynamic-update-slice":
            return 2 * self._hbm(self._result(body, op.operands[1]))
        return self._hbm(arrays) + sum(self._hbm(self._result(body, name)) for name in op.operands)

    def _fusion_bytes(self, op: Instruction, body: Body) -> float:
        """Operands and results in HBM; of what is only sliced, or updated in place, the slice."""
        inside = self.computations[op.attribute("calls")]
        collectives = [i for i in inside.values() if i.opcode in COLLECTIVES]
        moved_by_collectives = {
            (a.dtype, a.shape)
            for i in collectives
            for a in (*i.arrays, *(a for name in i.operands for a in self._result(inside, name)))
        }
        root = next(i for i in inside.values() if i.root)
        results = [inside[n] for n in root.operands] if root.opcode == "tuple" else [root]
        moved = 0.0
        in_place = set()
        for array, result in itertools.zip_longest(op.arrays, results):
            if array is None or not array.hbm or (array.dtype, array.shape) in moved_by_collectives:
                continue
            while result is not None and result.opcode == "bitcast":
                result = inside.get(result.operands[0])
            if result is not None and result.opcode == "dynamic-update-slice":
                moved += inside[result.operands[1]].arrays[0].bytes
                in_place.add(self._source(inside, result.operands[0]))
            else:
                moved += array.bytes
        for parameter in (i for i in inside.values() if i.opcode == "parameter"):
            arrays = self._result(body, op.operands[int(parameter.literal)])
            carried = all((a.dtype, a.shape) in moved_by_collectives for a in arrays)
            if self._hbm(arrays) and parameter.name not in in_place and not carried:
                moved += min(self._hbm(arrays), self._read(inside, parameter.name))
        return moved

    def _read(self, inside: Body, name: str) -> float:
        """Bytes of a value that the instructions of a fusion read: of what is only sliced, the slices."""
        read = 0.0
        for user in inside.values():
            for place, operand in enumerate(user.operands):
                if operand != name:
                    continue
                if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                    read += user.arrays[0].bytes
                elif user.opcode == "bitcast":
                    read += self._read(inside, user.name)
                elif user.opcode == "fusion":
                    inner = self.computations[user.attribute("calls")]
                    parameter = next(i for i in inner.values() if i.opcode == "parameter" and i.literal == str(place))
                    read += self._read(inner, parameter.name)
                else:
                    read += sum(a.bytes for a in inside[name].arrays)
        return read

    def _source(self, inside: Body, name: str) -> str:
        while inside[name].opcode == "bitcast":
            name = inside[name].operands[0]
        return name
