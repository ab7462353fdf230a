"""Finds narrow floating numbers in a jaxpr: float32 in a float64 model, bf16 sums in a bf16 model."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import mixers
from attnlab.parallel import partition
from tests.mixers import cases

_SUMS = ("reduce_sum", "reduce_prod", "cumsum", "cumprod", "cumlogsumexp", "add_any", "exp", "exp2", "log", "log1p")
_MOVES = ("dynamic_update_slice", "scatter", "concatenate", "slice", "dynamic_slice", "gather", "reshape", "transpose")


@contextlib.contextmanager
def on_every_platform():
    """What is traced inside has the forms of CPUs and those of accelerators in it, whichever runs; gives a mock that
    counts where there are two."""
    with unittest.mock.patch.object(partition, "by_platform", side_effect=jax.lax.platform_dependent) as both:
        yield both


def traced(module, dtype):
    """`__call__` as a function of arrays, and `extend` where it streams, each with its arguments."""
    graphdef, params = cases.split(module)
    x, seq = cases.inputs(dtype)

    def call_all(params, x):
        out = nnx.merge(graphdef, params)(x, seq)
        return out.y, out.losses, out.metrics

    functions = [(call_all, (params, x))]
    if module.config.causal and module.capabilities.streaming:
        state = jax.eval_shape(lambda: module.init_state(*x.shape[:2], dtype))
        placed, _ = cases.placed(mixers.Stream.start(len(x)), seq)

        def extend(params, x, state):
            out = nnx.merge(graphdef, params).extend(x, placed, state)
            return out.y, out.state

        functions.append((extend, (params, x, state)))
    return functions


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner jaxprs after their own."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def narrower(value: Any, dtype: Any) -> bool:
    """Whether it is of a floating dtype of fewer bits."""
    own = getattr(getattr(value, "aval", value), "dtype", None)
    floating = own is not None and jnp.issubdtype(own, jnp.floating)
    return floating and jnp.finfo(own).bits < jnp.finfo(dtype).bits


def narrow_results(fn: Any, *args: Any, dtype: Any) -> list[str]:
    """Results of `fn(*args)` and in it that are floating and narrower than `dtype`."""
    return narrow_in(jax.make_jaxpr(fn)(*args).jaxpr, dtype)


def narrow_in(jaxpr: Any, dtype: Any) -> list[str]:
    """Of a jaxpr, results that are floating and narrower than `dtype`."""
    found = [f"{e.primitive.name}: {v.aval}" for e in equations(jaxpr) for v in e.outvars if narrower(v, dtype)]
    return found + [f"a result: {v.aval}" for v in jaxpr.outvars if narrower(v, dtype)]


def narrow_sums(jaxpr: Any) -> list[str]:
    """Of a jaxpr, sums, exponentials, products other than projections, and what loops add up, in less than float32."""
    found = []
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "scan":
            found += _narrow_carries(eqn)
        elif eqn.primitive.name in _SUMS or (eqn.primitive.name == "dot_general" and not _is_projection(eqn)):
            found += [f"{eqn.primitive.name}: {v.aval}" for v in eqn.outvars if narrower(v, jnp.float32)]
    return found


def _is_projection(eqn: Any) -> bool:
    """Of rows with a matrix: what a row gives depends on no other."""
    _, (batch, _) = eqn.params["dimension_numbers"]
    return not batch and eqn.invars[1].aval.ndim == 2


def _narrow_carries(scan: Any) -> list[str]:
    """Carries that are computed and narrow, or that are wide and were rounded. Narrow ones that are filled slice by
    slice, or chosen among what was there, add nothing up."""
    body, found = scan.params["jaxpr"].jaxpr, []
    made = {id(v): e for e in body.eqns for v in e.outvars}

    def sources(variable: Any) -> list[tuple[str, Any]]:
        maker = made.get(id(variable))
        if maker is None:
            return []
        name = maker.primitive.name
        if name in ("scan", "remat2", "checkpoint"):  # looked at by itself
            return []
        if name == "select_n" or maker.params.get("name") == "_where":
            return [s for v in maker.invars[1:] for s in sources(v)]
        return [(name, maker.invars[0])]

    # What is stacked has one axis more outside; how many carries there are, versions of jax say each in their way.
    for out in (o for o, whole in zip(body.outvars, scan.outvars) if o.aval.ndim == whole.aval.ndim):
        if not jnp.issubdtype(out.aval.dtype, jnp.floating):
            continue
        for name, operand in sources(out):
            converted = name == "convert_element_type"
            rounded = converted and narrower(out, jnp.float32) != narrower(operand, jnp.float32)
            if rounded or (narrower(out, jnp.float32) and not converted and name not in _MOVES):
                found.append(f"a carry by {name}: {out.aval}")
    return found
