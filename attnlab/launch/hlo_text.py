"""XLA's text of a compiled program, read into instructions; what a product and a group of devices in it say."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import numpy as np

_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "f8": 1, "bf16": 2, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$", re.DOTALL)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
Body = dict[str, "Instruction"]  # a computation: its instructions by name


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


def computations(text: str) -> tuple[dict[str, Body], str]:
    """The computations of a module by name, and the name of the one that is entered."""
    found: dict[str, Body] = {}
    entry, pending = "", ""
    current: Body | None = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith(" "):
            current = found.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
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
    return found, entry


@functools.cache
def groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """The groups of devices of a collective, from any of XLA's ways to write them; () where all are one group."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))?\s*\{([^}]*)\}", attributes)
    if named:
        axes = re.findall(r"'([^']+)'=(\d+)", named[1])
        over = re.findall(r"'([^']+)'", named[3])
        names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
        devices = _devices(named[2]) if named[2] else np.arange(math.prod(sizes))
        devices = np.moveaxis(devices.reshape(sizes), [names.index(n) for n in over], range(-len(over), 0))
        return _rows(devices.reshape(-1, math.prod(sizes[names.index(n)] for n in over)))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _rows(_devices(iota[2]).reshape([int(n) for n in iota[1].split(",")]))
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes)
    return tuple(tuple(map(int, row.split(","))) for row in re.findall(r"\{([\d,]+)\}", listed[1])) if listed else ()


def _devices(written: str) -> np.ndarray:
    """Numbers of devices in an order written as `[4,16]T(1,0)`, or one by one."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", written)
    if found is None:
        return np.array([int(n) for n in re.findall(r"\d+", written)])
    dims, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
    return np.transpose(np.arange(math.prod(dims)).reshape(dims), order).reshape(-1)


def _rows(devices: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, devices.reshape(-1, devices.shape[-1]).tolist()))


# Products.


def product_flops(op: Instruction, body: Body) -> float:
    """FLOPs of a dot or a convolution, a multiply-add counted as 2; what falls on padding is not multiplied."""
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
