"""How a program uses its parameters, read off its jaxpr."""

from __future__ import annotations

from typing import Any

PRODUCT = "product with activations"
_SAME_ARRAY = ("convert_element_type", "copy", "sharding_constraint", "optimization_barrier")


def of(jaxpr: Any, count: int) -> list[set[str]]:
    """For each of a jaxpr's first `count` arguments, what it does with them.

    `PRODUCT` is a dot_general that contracts the first of its two axes, as `x @ w` does; anything else is the name of
    the primitive. Casts are looked through.
    """
    found: list[set[str]] = [set() for _ in range(count)]
    _walk(jaxpr, dict(zip(jaxpr.invars, range(count))), found)
    return found


def _walk(jaxpr: Any, which: dict[Any, int], found: list[set[str]]) -> None:
    for eqn in jaxpr.eqns:
        given = {i: which[v] for i, v in enumerate(eqn.invars) if not hasattr(v, "val") and v in which}
        if not given:
            continue
        if eqn.primitive.name in _SAME_ARRAY:
            which[eqn.outvars[0]] = given[0]
        elif inner := _bodies(eqn):
            for body, first in inner:
                inside = {body.invars[i - first]: p for i, p in given.items() if i >= first}
                _walk(body, inside, found)
                handed_on = zip(eqn.outvars, body.outvars)
                which |= {out: inside[v] for out, v in handed_on if not hasattr(v, "val") and v in inside}
        else:
            for operand, parameter in given.items():
                found[parameter].add(PRODUCT if _is_product(eqn, operand) else eqn.primitive.name)


def _bodies(eqn: Any) -> list[tuple[Any, int]]:
    """Jaxprs inside, each with the index of the operand that is its first. A weight in a `while` counts as its use."""
    if eqn.primitive.name == "cond":
        return [(branch.jaxpr, 1) for branch in eqn.params["branches"]]
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            inner = getattr(eqn.params[key], "jaxpr", eqn.params[key])
            assert len(inner.invars) == len(eqn.invars), eqn.primitive
            return [(inner, 0)]
    return []


def _is_product(eqn: Any, operand: int) -> bool:
    if eqn.primitive.name != "dot_general" or eqn.invars[operand].aval.ndim != 2:
        return False
    contracted, batch = eqn.params["dimension_numbers"]
    return tuple(contracted[operand]) == (0,) and not batch[operand]
