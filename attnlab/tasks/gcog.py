"""gCOG: questions about objects on a grid, composed of operators, with held-out rows that compose them anew.

An object has a shape, a colour and a cell. Operators ask about the object of a shape, a colour or both: `exist`,
`getcolour`, `getshape`, `go` (its cell), and whether x + y or x * y of its cell is even or odd. A rule is one
operator, or `IF a b c` with a boolean a: b where it holds, else c, and b or c may be a rule again, so that a rule of n
operators has n odd. Objects that no operator selects are added as distractors.

Ids: end of the rule, the question, IF, any, an empty cell, true, false, operators, cells, shapes, colours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab.config import knob
from attnlab.data.base import Arrays
from attnlab.tasks.base import register
from attnlab.tasks.streams import Stream
from attnlab.tasks.tokens import Slices, TokenTask, TokenTaskConfig

EOS, ASK, IF, ANY, EMPTY, TRUE, FALSE, OPS = range(8)
NAMES = ("exist", "getcolour", "getshape", "go", "sumeven", "sumodd", "producteven", "productodd")
BOOLEAN = (0, 4, 5, 6, 7)
SHIFTS = ("none", "distractors", "systematic", "productive")
Op = tuple[int, int, int]  # operator, shape and colour selected; -1: any
Scene = dict[int, tuple[int, int]]  # shape and colour by cell


@dataclasses.dataclass(frozen=True)
class GcogConfig(TokenTaskConfig):
    """gCOG."""

    grid: int = knob(5, "cells in a row and in a column", other=(4,), least=3, below=16)
    shapes: int = knob(5, "different shapes", other=(4,), least=3)
    colours: int = knob(5, "different colours", other=(6,), least=3)
    depths: tuple[int, ...] = knob((1,), "operators of a rule, each number as likely; odd", other=((1, 3),))
    distractors: tuple[int, ...] = knob((0, 5), "fewest and most distractors", other=((2, 3),))
    shift: str = knob("none", "what held-out rows have that training has not: none; distractors: more of them; "
                              "systematic: combinations of an operator and what it selects, or of operators; "
                              "productive: longer rules",
                      other=("distractors", "systematic", "productive"), choices=SHIFTS)  # fmt: skip
    heldout_distractors: tuple[int, ...] = knob((8, 12), "of held-out rows where shift = distractors")
    heldout_depths: tuple[int, ...] = knob((5,), "of held-out rows where shift = productive")
    form: str = knob("concat", "concat: the rule, then every cell as two ids; cross: the cells are a context",
                     other=("cross",), choices=("concat", "cross"))  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        need, cells = config_lib.require, self.grid**2
        for key in ("depths", "heldout_depths"):
            value = getattr(self, key)
            good = bool(value) and all(1 <= n <= 7 and n % 2 for n in value)
            need(good, f"data.{key}", value, "of 1, 3, 5 and 7, one or more")
        for key in ("distractors", "heldout_distractors"):
            value = getattr(self, key)
            good = len(value) == 2 and 0 <= value[0] <= value[1] <= cells - max(self.most_ops)
            need(good, f"data.{key}", value, f"two numbers, the second at most {cells - max(self.most_ops)}")

    @property
    def most_ops(self) -> tuple[int, ...]:
        """Operators of all rules that there are."""
        return self.depths + (self.heldout_depths if self.shift == "productive" else ())

    @property
    def rule(self) -> int:
        """Positions of the longest rule."""
        most = max(self.most_ops)
        return 3 * most + (most - 1) // 2

    @property
    def length(self) -> int:
        return self.rule + 1 + (2 * self.grid**2 if self.form == "concat" else 0)

    @property
    def ids(self) -> int:
        return self.first_colour + self.colours

    @property
    def first_cell(self) -> int:
        return OPS + len(NAMES)

    @property
    def first_shape(self) -> int:
        return self.first_cell + self.grid**2

    @property
    def first_colour(self) -> int:
        return self.first_shape + self.shapes

    def longer(self, multiple: int) -> GcogConfig:
        config_lib.require(multiple == 1, "multiple", multiple, "1: a grid has one size")
        return self

    def different(self) -> float:
        """Of the shortest rules, with the fewest distractors."""
        rules = float(len(NAMES) * self.shapes * self.colours) ** min(self.depths)
        return rules * self.grid ** (2 * (min(self.depths) + self.distractors[0]))

    def batch_spec(self) -> batch_lib.Spec:
        spec = super().batch_spec()
        if self.form == "concat":
            return spec
        said = spec["tokens"].said
        return {**spec, "context": batch_lib.Field((self.grid**2, 3), "int32", (None, None), ids=self.ids, said=said)}

    def fitting(self) -> dict[str, Any]:
        return {"name": "lm" if self.form == "concat" else "reader", "vocab": self.ids}


@register("gcog")
class Gcog(TokenTask):
    """`rule .. cells .. ASK`: the answer is to be told at the end."""

    Config = GcogConfig
    inputs = ("tokens", "context")
    title = "composing operators about a scene"
    source = (
        "Ito et al. 2024, On the generalization capacity of neural networks during generic multimodal reasoning (gCOG)"
    )
    commonest = True
    variants = (
        {"shift": "distractors", "heldout_distractors": (6, 9)},
        {"shift": "productive", "heldout_depths": (7,)},
        {"depths": (3,), "shift": "systematic"},
    )

    def example(self, stream: Stream, split: str) -> Arrays:
        c = self.config
        new = split != "train"
        depths = c.heldout_depths if new and c.shift == "productive" else c.depths
        least, most = c.heldout_distractors if new and c.shift == "distractors" else c.distractors
        while True:
            ops = self._ops(stream, depths[stream.integer(len(depths))])
            if c.shift == "systematic" and self._held_out(ops) != new:
                continue
            rule = self._nested(stream, ops)
            if (scene := self._scene(stream, ops, least + stream.integer(most - least + 1))) is not None:
                break
        answer, _ = self._evaluate(rule, scene)
        return self._ids(rule, scene) | self._asked(answer)

    # Drawing.

    def _ops(self, stream: Stream, count: int) -> list[Op]:
        """Operators in the order a, b, a, b, .. c: at even places but the last, booleans."""
        c, ops = self.config, []
        kinds, booleans = stream.integers(len(NAMES), count), stream.integers(len(BOOLEAN), count)
        shapes, colours = stream.integers(c.shapes, count), stream.integers(c.colours, count)
        for i in range(count):
            kind = BOOLEAN[booleans[i]] if i % 2 == 0 and i < count - 1 else int(kinds[i])
            ops.append((kind, -1 if kind == 2 else int(shapes[i]), -1 if kind == 1 else int(colours[i])))
        return ops

    def _held_out(self, ops: list[Op]) -> bool:
        """A fifth of the combinations."""
        return (sum(kind for kind, _, _ in ops) + (sum(ops[0][1:]) if len(ops) == 1 else 0)) % 5 == 0

    def _nested(self, stream: Stream, ops: list[Op]) -> Any:
        """An operator, or (a, b, c) of which b and c are in random order."""
        if len(ops) == 1:
            return ops[0]
        a, b, rest = ops[0], ops[1], self._nested(stream, ops[2:])
        return (a, b, rest) if stream.integer(2) else (a, rest, b)

    def _scene(self, stream: Stream, ops: list[Op], distractors: int) -> Scene | None:
        """Objects of which every operator but exist selects exactly one; None where these draws give none."""
        c = self.config
        cells = stream.permutation(c.grid**2).tolist()
        scene: Scene = {}
        for kind, shape, colour in ops:
            if kind == 0 and stream.integer(2):
                continue
            if not _selected(scene, shape, colour):
                found = (
                    stream.integer(c.shapes) if shape < 0 else shape,
                    stream.integer(c.colours) if colour < 0 else colour,
                )
                scene[cells.pop()] = found
        if any(kind and len(_selected(scene, shape, colour)) != 1 for kind, shape, colour in ops):
            return None
        free = [(s, k) for s in range(c.shapes) for k in range(c.colours)
                if not any(shape in (-1, s) and colour in (-1, k) for _, shape, colour in ops)]  # fmt: skip
        for which in stream.integers(len(free), distractors) if free else ():
            scene[cells.pop()] = free[which]
        return scene

    # Rules and scenes as ids, and back.

    def _ids(self, rule: Any, scene: Scene) -> Arrays:
        c = self.config
        text = self._written(rule)
        text += [EOS] * (c.rule - len(text))
        cells = [(c.first_cell + i, *self._object(scene.get(i))) for i in range(c.grid**2)]
        if c.form == "cross":
            return {"tokens": np.array([*text, ASK]), "context": np.array(cells)}
        return {"tokens": np.array([*text, *(i for _, shape, colour in cells for i in (shape, colour)), ASK])}

    def _object(self, found: tuple[int, int] | None) -> tuple[int, int]:
        c = self.config
        return (EMPTY, EMPTY) if found is None else (c.first_shape + found[0], c.first_colour + found[1])

    def _written(self, rule: Any) -> list[int]:
        if isinstance(rule[0], tuple):
            return [IF, *(i for part in rule for i in self._written(part))]
        (kind, shape, colour), c = rule, self.config
        return [OPS + kind, ANY if shape < 0 else c.first_shape + shape, ANY if colour < 0 else c.first_colour + colour]

    def _read(self, row: Arrays) -> tuple[Any, Scene]:
        c, tokens = self.config, row["tokens"].tolist()

        def rule(at: int) -> tuple[Any, int]:
            if tokens[at] != IF:
                kind, shape, colour = tokens[at : at + 3]
                return (kind - OPS, -1 if shape == ANY else shape - c.first_shape,
                        -1 if colour == ANY else colour - c.first_colour), at + 3  # fmt: skip
            parts, at = [], at + 1
            for _ in range(3):
                part, at = rule(at)
                parts.append(part)
            return tuple(parts), at

        cells = np.array(tokens[c.rule : -1]).reshape(-1, 2) if c.form == "concat" else row["context"][:, 1:]
        scene = {i: (int(s) - c.first_shape, int(k) - c.first_colour) for i, (s, k) in enumerate(cells) if s != EMPTY}
        return rule(0)[0], scene

    # Meaning.

    def _evaluate(self, rule: Any, scene: Scene) -> tuple[int, Op]:
        """The answer's id, and the operator that gave it."""
        while isinstance(rule[0], tuple):
            rule = rule[1] if self._evaluate(rule[0], scene)[0] == TRUE else rule[2]
        kind, shape, colour = rule
        cells, c = _selected(scene, shape, colour), self.config
        truth = lambda holds: TRUE if holds else FALSE
        if kind == 0:
            return truth(cells), rule
        (cell,) = cells
        if kind < 4:
            return (c.first_colour + scene[cell][1], c.first_shape + scene[cell][0], c.first_cell + cell)[
                kind - 1
            ], rule
        y, x = divmod(cell, c.grid)
        return truth((x + y if kind < 6 else x * y) % 2 == kind % 2), rule

    def _asked(self, answer: int) -> Arrays:
        targets, weights = np.zeros((2, self.config.length), np.int64)
        targets[-1], weights[-1] = answer, 1
        return {"targets": targets, "weights": weights}

    def oracle(self, rows: Arrays) -> np.ndarray:
        rows = {"context": np.zeros(len(rows["tokens"])), **rows}
        return super().oracle(rows)

    def solve(self, row: Arrays) -> np.ndarray:
        return np.full(self.config.length, self._evaluate(*self._read(row))[0])

    def corrupt(self, row: Arrays, stream: Stream) -> Arrays:
        """The object that the last operator is about becomes another, goes elsewhere, comes or goes."""
        c = self.config
        rule, scene = self._read(row)
        answer, (kind, shape, colour) = self._evaluate(rule, scene)
        cells = _selected(scene, shape, colour)
        empty = [cell for cell in stream.permutation(c.grid**2).tolist() if cell not in scene]
        changes: list[Callable[[], Scene]] = (
            [lambda: {k: v for k, v in scene.items() if k not in cells}] if kind == 0 else []
        )
        for cell in empty:
            found = scene[cells[0]] if cells else (max(shape, 0), max(colour, 0))
            changes.append(
                lambda cell=cell, found=found: {k: v for k, v in scene.items() if k not in cells} | {cell: found}
            )
        for other in range(max(c.shapes, c.colours)):
            if kind in (1, 2) and other < (c.colours if kind == 1 else c.shapes):
                found = (shape, other) if kind == 1 else (other, colour)
                changes.append(lambda found=found: scene | {cells[0]: found})
        for change in changes:
            try:
                if self._evaluate(rule, change())[0] != answer:
                    return {**row, **self._ids(rule, change())}
            except ValueError:  # an operator before selects no single object any more
                continue
        return row

    def slices(self, rows: Arrays) -> Slices:
        """By the operator of a rule of one, and of all others together."""
        first = rows["tokens"][:, 0]
        return {"operator": ([*NAMES, "if"], np.where(first == IF, len(NAMES), first - OPS))}

    def guess_groups(self, rows: Arrays) -> np.ndarray:
        return rows["tokens"][:, 0]


def _selected(scene: Scene, shape: int, colour: int) -> list[int]:
    """Cells of the objects of a shape and a colour, -1: any."""
    return [cell for cell, (s, k) in scene.items() if shape in (-1, s) and colour in (-1, k)]
