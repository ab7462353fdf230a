"""Ops: where an implementation is chosen, from what it will get on a device, and the record of what was chosen.

An `Op` holds one table of implementations, kernels among them. Calling it enters `shard_map`, builds the op's spec from
the local arrays in their own dtype, chooses, and runs: casts are the implementations' business. Adding an
implementation is one function and one line in the table.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from attnlab.errors import UserError
from attnlab.parallel import partition, sequence_parallel
from attnlab.parallel.sequence_parallel import SequenceParallel

Tree = Any  # a pytree of arrays


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      run: the function itself; its arguments are the op's arrays and static options. Inside `shard_map` it gets local
        arrays, in the dtype that the caller gave, and returns what the op documents, in the dtypes it documents.
      supports: from the op's spec to None, or why it cannot serve.
      worth: whether "auto" should take it where it serves.
      platforms: those that it runs on; None: all.
      interpretable: whether `run` takes `interpret=True`, with which it runs on any platform (slowly).
      split: what runs instead where positions are split over devices; the op says what it gets. None: the op's own
        way of running any implementation so, or, if it has none, `run` on positions that are gathered before.
      kernel_flops: from the spec to the FLOPs of one run of each kernel that the compiler cannot see into, by the
        beginning of its name in a compiled program.
    """

    run: Callable[..., Any]
    supports: Callable[[Any], str | None] = lambda spec: None
    worth: Callable[[Any], bool] = lambda spec: True
    platforms: tuple[str, ...] | None = None
    interpretable: bool = False
    split: Callable[..., Any] | None = None
    kernel_flops: Callable[[Any], dict[str, float]] = lambda spec: {}

    def unsupported(self, spec: Any, *, asked_for: bool = False) -> str | None:
        """Why it cannot serve `spec` here, or None; `asked_for`: by its name, so that it may be interpreted."""
        platform = partition.platform()
        elsewhere = self.platforms is not None and platform not in self.platforms
        if elsewhere and not (asked_for and self.interpretable and _interpreted.get()):
            return f"it runs on {', '.join(self.platforms or ())}; the platform is {platform}"
        return self.supports(spec)

    def bound(self) -> Implementation:
        """This one, its functions told whether they are interpreted."""
        if not self.interpretable:
            return self
        interpret = partition.platform() not in (self.platforms or ())
        split = None if self.split is None else functools.partial(self.split, interpret=interpret)
        return dataclasses.replace(self, run=functools.partial(self.run, interpret=interpret), split=split)


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation and the ways to compute it.

    Attributes:
      name: by which it is recorded.
      spec: `(exchange, *arrays, **options)` to the static facts by which an implementation is chosen, a dataclass;
        `exchange` is None, or how the positions of the local arrays are split over devices.
      table: implementations by name, `definition` among them.
      preference: which "auto" tries, the best first.
      split: `(chosen, exchange, *arrays, **options)`, any implementation of this op on arrays whose positions are split
        over devices. None: see `Implementation.split`.
    """

    name: str
    spec: Callable[..., Any]
    table: Mapping[str, Implementation]
    preference: tuple[str, ...]
    split: Callable[..., Any] | None = None

    def names(self) -> tuple[str, ...]:
        """What may be asked for: "auto" and the implementations."""
        return "auto", *self.table

    def pick(self, spec: Any, impl: str = "auto") -> str:
        """The name of what would run: `impl`, or for "auto" the first of `preference` that serves and is worth it.

        Raises UserError for an unknown name, and for a named implementation that cannot serve, with its reason.
        """
        if impl == "auto":
            serves = lambda way: way.unsupported(spec) is None and way.worth(spec)
            name = next((n for n in self.preference if serves(self.table[n])), None)
            if name is None:
                raise UserError(f"{self.name}: no implementation supports {spec}")
            return name
        if impl not in self.table:
            raise UserError(f"{self.name}: unknown impl {impl!r}; allowed: {', '.join(self.names())}")
        if reason := self.table[impl].unsupported(spec, asked_for=True):
            raise UserError(f"{self.name}: impl={impl!r} cannot serve {spec}: {reason}")
        return impl

    def choose(self, spec: Any, impl: str = "auto") -> Implementation:
        """The implementation that `pick` names, which is recorded."""
        name = self.pick(spec, impl)
        for record in _records.get():
            record.choices.append(Choice(self.name, spec, name, self.table[name].kernel_flops(spec)))
        return self.table[name].bound()

    def __call__(
        self,
        *arrays: Tree,
        axes: Tree,
        out_axes: list[partition.Axes],
        impl: str = "auto",
        facts: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Tree:
        """The op on each device's own part of the arrays.

        Args:
          arrays: pytrees whose leaves are arrays or None.
          axes: logical axes of every leaf, in pytrees of the same structure.
          out_axes: logical axes of every leaf of the result, in order.
          impl: "auto", or a name in `table`.
          facts: what `spec` and `split` are told beside the options.
          options: static arguments of the implementations.
        """
        facts = facts or {}
        leaves, kind = jax.tree.flatten(arrays, is_leaf=lambda x: x is None)
        results = []

        def on_device(*leaves: Any) -> tuple[Any, ...]:
            arrays = jax.tree.unflatten(kind, leaves)
            exchange = sequence_parallel.here()
            chosen = self.choose(self.spec(exchange, *arrays, **facts, **options), impl)
            if exchange is None:
                out = chosen.run(*arrays, **options)
            elif self.split is not None:
                out = self.split(chosen, exchange, *arrays, **facts, **options)
            elif chosen.split is not None:
                out = chosen.split(exchange, *arrays, **facts, **options)
            else:
                whole = [_gathered(exchange, x, names) for x, names in zip(leaves, leaf_axes)]
                out = chosen.run(*jax.tree.unflatten(kind, whole), **options)
                own, out_kind = jax.tree.flatten(out)
                own = [_own(exchange, x, names) for x, names in zip(own, out_axes, strict=True)]
                out = jax.tree.unflatten(out_kind, own)
            own, out_kind = jax.tree.flatten(out)
            results.append(out_kind)
            return tuple(own)

        leaf_axes = tuple(kind.flatten_up_to(axes))
        out = partition.local(on_device, tuple(leaves), leaf_axes, out_axes)
        return jax.tree.unflatten(results[0], out)


def _gathered(exchange: SequenceParallel, x: Any, names: partition.Axes) -> Any:
    if x is None or "seq" not in names or x.shape[names.index("seq")] == 1:
        return x
    return exchange.all_gather(x, names.index("seq"))


def _own(exchange: SequenceParallel, x: jax.Array, names: partition.Axes) -> jax.Array:
    """This device's positions of a result that it has whole."""
    if "seq" not in names:
        return x
    return exchange.own(x, names.index("seq"))


@dataclasses.dataclass(frozen=True)
class Choice:
    """One choice: of which op, for what, by which name, and its `Implementation.kernel_flops`."""

    op: str
    spec: Any
    implementation: str
    kernel_flops: Mapping[str, float]


@dataclasses.dataclass
class Record:
    """What was chosen, in the order of tracing."""

    choices: list[Choice] = dataclasses.field(default_factory=list)

    def table(self) -> dict[str, dict[str, str]]:
        """`{op: {spec as text: implementation}}`."""
        table: dict[str, dict[str, str]] = {}
        for choice in self.choices:
            table.setdefault(choice.op, {})[str(choice.spec)] = choice.implementation
        return table

    def kernel_flops(self, runs: Mapping[str, int]) -> float:
        """FLOPs inside the kernels of a program that runs them so often, by name.

        Where kernels of one name were chosen for several specs, a run counts as the mean over these choices. A kernel
        is the one of whose name it begins with the most.
        """
        total = 0.0
        names = {name for choice in self.choices for name in choice.kernel_flops}
        for kernel, count in runs.items():
            own = max((name for name in names if kernel.startswith(name)), key=len, default=None)
            flops = [choice.kernel_flops[own] for choice in self.choices if own in choice.kernel_flops]
            total += count * sum(flops) / max(len(flops), 1)
        return total


_records: contextvars.ContextVar[tuple[Record, ...]] = contextvars.ContextVar("records", default=())
_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    """Collects what is chosen while the block traces; blocks may stand in each other, and each gets all of its own.

    What jit has traced before is not chosen again.
    """
    record = Record()
    token = _records.set((*_records.get(), record))
    try:
        yield record
    finally:
        _records.reset(token)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """In this block kernels that can be interpreted serve on every platform where they are asked for by name."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)
