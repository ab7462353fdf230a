"""The one place where an op's implementation is chosen, and the record of what was chosen."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnlab.errors import UserError


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    run: the function itself; its arguments are the op's own.
    supports: from the op's spec (static facts: shapes, dtypes, features) to None, or why it cannot serve.
    on_parts: what runs instead where positions are split over devices, if that differs.
    """

    run: Callable[..., Any]
    supports: Callable[[Any], str | None] = lambda spec: None
    on_parts: Callable[..., Any] | None = None


_CHOICES: dict[str, dict[str, str]] = {}


def choices() -> dict[str, dict[str, str]]:
    """What was chosen so far in this process, `{op: {spec as text: implementation}}`: a copy."""
    return {op: dict(picked) for op, picked in _CHOICES.items()}


def clear_choices() -> None:
    """Forget the record (a new run in the same process)."""
    _CHOICES.clear()


def choose(
    op: str, impl: str, implementations: Mapping[str, Implementation], spec: Any, preference: Sequence[str]
) -> Implementation:
    """The implementation called `impl`, or for "auto" the first of `preference` that supports `spec`.
    The choice is recorded.

    Raises UserError for an unknown name, and for a named implementation that cannot serve, with its reason.
    """
    if impl == "auto":
        name = next((n for n in preference if implementations[n].supports(spec) is None), None)
        if name is None:
            raise UserError(f"{op}: no implementation supports {spec}")
    elif impl in implementations:
        name = impl
        if reason := implementations[name].supports(spec):
            raise UserError(f"{op}: impl={name!r} cannot serve {spec}: {reason}")
    else:
        raise UserError(f"{op}: unknown impl {impl!r}; allowed: {', '.join(['auto', *implementations])}")
    _CHOICES.setdefault(op, {})[str(spec)] = name
    return implementations[name]
