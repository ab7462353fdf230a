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

_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "f8": 1, "bf16": 2, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")  # fmt: skip
# These move nothing: they name, or group, what is there.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
         "after-all", "partition-id", "replica-id", "opt-barrier", "broadcast"}  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$", re.DOTALL)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's shape; `hbm` is false for one that lives in a chip's fast memory."""

    dtype: str
    shape: tuple[int, ...]
    hbm: bool = True

    @property
    def bytes(self) -> float:
        """Size without padding."""
        kind = self.dtype
        width = _WIDTHS.get(kind) or _WIDTHS.get(kind[:2]) if kind[:2] == "f8" or kind in _WIDTHS else None
        if width is None:
            width = int(re.sub(r"\D", "", kind) or 0) / 8
        return width * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the text.

    Attributes:
      name, opcode: as written.
      arrays: of the result; several for a tuple.
      operands: names.
      attributes: the text after the operands.
      literal: what stands in the brackets of a constant or a parameter.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str
    root: bool

    def attribute(self, key: str) -> str | None:
        """The name or the word that an attribute holds."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


@dataclasses.dataclass
class Costs:
    """Sums over a whole program, for one device.

    Attributes:
      flops: of dot and convolution, a multiply-add counted as 2.
      bytes: read from and written to HBM by everything but collectives; operands and results of a fused operation once.
      count: collectives by kind.
      payload: bytes of their results by kind (of its operand, for a reduce-scatter).
      sent: bytes that a device sends for them by kind, over rings.
      kernels: custom kernels by name: nothing of their inside is in `flops`.
      unknown_loops: loops whose number of turns is not in the text; their bodies are counted once.
    """

    flops: float = 0.0
    bytes: float = 0.0
    count: Counter[str] = dataclasses.field(default_factory=Counter)
    payload: Counter[str] = dataclasses.field(default_factory=Counter)
    sent: Counter[str] = dataclasses.field(default_factory=Counter)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Costs, times: int = 1) -> None:
        """Adds what runs `times` times."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for name in ("count", "payload", "sent", "kernels"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value
        self.unknown_loops += other.unknown_loops


def analyse(text: str) -> Costs:
    """Costs of a program, from `compiled.as_text()`."""
    return _Program(text).costs()


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(re.sub(r"\D", "", n)) for n in dims.split(",") if n), "S(1)" not in (layout or ""))
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _matching(text: str, start: int) -> int:
    """Index after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if depth == 0:
                return i + 1
    return len(text)


def _parse(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    root, name, rest = found.groups()
    if rest.startswith("("):
        end = _matching(rest, 0)
    else:
        end = rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket:
        return None
    close = _matching(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode, _arrays(kind), operands, rest[close:], inside, root is not None)


class _Program:
    """The computations of a module, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        pending = ""
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header and not line.startswith(" "):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
                continue
            if current is None:
                continue
            starts = _INSTRUCTION.match(line)
            if pending and (starts or line == "}"):
                parsed = _parse(pending)
                if parsed is not None:
                    current[parsed.name] = parsed
                pending = ""
            if line == "}":
                current = None
            elif starts:
                pending = line
            elif pending:  # attributes may hold line breaks
                pending += "\n" + line
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

    def _count(self, op: Instruction, body: dict[str, Instruction], total: Costs, seen: set[str]) -> None:
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
        elif code == "fusion":
            inside = Costs()
            fused = self.computations[op.attribute("calls")]
            for instruction in fused.values():
                self._count(instruction, fused, inside, seen)
            total.add(dataclasses.replace(inside, bytes=0.0))
            total.bytes += self._fusion_bytes(op, body)
        elif code not in _FREE and not code.endswith("-done"):
            if code in ("dot", "convolution"):
                total.flops += _product_flops(op, body)
            if code == "custom-call" and 'custom_call_target="tpu_custom_call"' in op.attributes:
                total.kernels[re.sub(r"[.\d]+$", "", op.name)] += 1
            total.bytes += self._moved(op, body)

    # Loops.

    def _turns(self, op: Instruction, body: dict[str, Instruction]) -> int | None:
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

    def _comparison(self, condition: dict[str, Instruction]) -> tuple[int, int, str] | None:
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

    def _element(self, body: dict[str, Instruction], name: str, index: int) -> str | None:
        """The name of a tuple's element, where the tuple is made in this computation."""
        tuple_ = body.get(name)
        if tuple_ is None or tuple_.opcode != "tuple":
            return None
        return tuple_.operands[index]

    def _constant(self, body: dict[str, Instruction], name: str | None) -> int | None:
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

    def _collective(self, kind: str, op: Instruction, body: dict[str, Instruction], total: Costs) -> None:
        inputs = sum(a.bytes for name in op.operands for a in self._result(body, name))
        outputs = sum(a.bytes for a in op.arrays)
        if op.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, and contexts)
            half = len(op.operands)
            outputs = sum(a.bytes for a in op.arrays[half : 2 * half])
        n = _group_size(op.attributes)
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

    # Bytes.

    def _result(self, body: dict[str, Instruction], name: str) -> tuple[Array, ...]:
        return body[name].arrays if name in body else ()

    def _hbm(self, arrays: tuple[Array, ...]) -> float:
        return sum(a.bytes for a in arrays if a.hbm)

    def _moved(self, op: Instruction, body: dict[str, Instruction]) -> float:
        arrays = op.arrays
        if op.opcode in ("copy-start", "slice-start"):  # (result, operand, context)
            arrays = arrays[:1]
        if op.opcode in ("dynamic-slice", "slice", "slice-start", "gather"):
            read = arrays[0].bytes if self._hbm(self._result(body, op.operands[0])) else 0
            return read + self._hbm(arrays[:1])
        if op.opcode == "dynamic-update-slice":
            return 2 * self._hbm(self._result(body, op.operands[1]))
        return self._hbm(arrays) + sum(self._hbm(self._result(body, name)) for name in op.operands)

    def _fusion_bytes(self, op: Instruction, body: dict[str, Instruction]) -> float:
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

    def _read(self, inside: dict[str, Instruction], name: str) -> float:
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

    def _source(self, inside: dict[str, Instruction], name: str) -> str:
        while inside[name].opcode == "bitcast":
            name = inside[name].operands[0]
        return name


def _group_size(attributes: str) -> int:
    """Devices in a group of a collective, from any of XLA's ways to write it."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([^']+)'", named[2]))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=", attributes)
    if iota:
        return int(iota[1].split(",")[-1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    return 2  # a permutation has pairs, not groups


# Products.


def _product_flops(op: Instruction, body: dict[str, Instruction]) -> float:
    left, right = (body[name].arrays[0].shape for name in op.operands[:2])
    if op.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        dims = [int(i) for i in contracted[1].split(",") if i] if contracted else []
        return 2.0 * math.prod(op.arrays[0].shape) * math.prod(left[i] for i in dims)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    assert labels, op.attributes
    of_left, of_right, of_out = labels.groups()
    out = op.arrays[0].shape
    # Multiply-adds: every output feature of every output batch element, for each input feature of the kernel, at all
    # pairs of output position and window position that fall on an element and not on padding.
    size = out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    for i, window in _windows(op.attributes, of_left, of_right, left, right).items():
        size *= _pairs(out[of_out.index(i)], left[of_left.index(i)], window)
    return 2.0 * size


@dataclasses.dataclass(frozen=True)
class _Window:
    size: int
    stride: int = 1
    low: int = 0
    base: int = 1
    dilation: int = 1


def _windows(attributes: str, of_left: str, of_right: str, left, right) -> dict[str, _Window]:
    spatial = [c for c in of_right if c.isdigit()]
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}

    def values(key: str, default: str) -> list[str]:
        return fields[key].split("x") if key in fields else [default] * len(spatial)

    out = {}
    for name in spatial:
        n = int(name)
        size = right[of_right.index(name)]
        out[name] = _Window(
            size,
            int(values("stride", "1")[n]),
            int(values("pad", "0_0")[n].split("_")[0]),
            int(values("lhs_dilate", "1")[n]),
            int(values("rhs_dilate", "1")[n]),
        )
    return out


def _pairs(outputs: int, inputs: int, window: _Window) -> int:
    """Pairs of output and window position that read an element of the input."""
    reach = (inputs - 1) * window.base + 1
    count = 0
    for k in range(window.size):
        for position in range(outputs):
            at = position * window.stride + k * window.dilation - window.low
            count += 0 <= at < reach and at % window.base == 0
    return count
