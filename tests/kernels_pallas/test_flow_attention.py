"""The kernels of causal flow attention, interpreted: against the definition in float64, values and every gradient."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnlab.ops.flow_definition import FlowRule, FlowState, causal_definition
from kernels_pallas.flow_attention import Blocks, Rule, Sums, flow_attention
from tests import tiers
from tests.mixers import precision

COUNT = 5  # positions that a given state stands for
PLAIN, CLIPPED = FlowRule(), FlowRule(clip=1.0)
# Documents' first positions by row; a row whose first document begins at 0 does not continue the state.
STARTS = ((), (16, 32), (5, 20, 21, 100), (0, 64, 129))
CASES = {
    "documents, state": {"length": 130, "starts": STARTS, "given": True, "rule": FlowRule(epsilon=1e-2)},
    "documents at edges": {"length": 96, "starts": ((0, 32), (64, 95)), "blocks": Blocks(16, 2), "rule": CLIPPED},
    "two heads in lockstep": {"length": 256, "heads": 2, "blocks": Blocks(64, 1)},
    "1": {"length": 1, "given": True, "rule": FlowRule(epsilon=1e-2)},
    "7": {"length": 7},
    "64": {"length": 64, "heads": 3, "blocks": Blocks(64, 1, 2), "rule": FlowRule(False, False, None, 1e-2)},
    "competition": {"length": 40, "rule": FlowRule(allocation=False)},
    "allocation": {"length": 40, "rule": FlowRule(competition=False), "starts": ((9, 33),)},
    "bfloat16": {"length": 256, "blocks": Blocks(128, 1), "dtype": "bfloat16", "widths": (128, 128)},
}  # fmt: skip
OFTEN = "documents, state", "bfloat16"


def documents_of(starts, length: int) -> np.ndarray:
    """int32 [B, T]: how many documents began up to each position."""
    begun = np.zeros((len(starts), length), np.int32)
    for row, firsts in zip(begun, starts):
        for first in firsts:
            row[first:] += 1
    return begun


def inputs(length, starts=None, given=False, heads=1, widths=(6, 5), dtype="float32", seed=0, **_):
    """Arrays by name, of features in (0, 1); the state's as of `COUNT` positions."""
    rng = np.random.default_rng(seed)
    B, H, (d, e) = len(starts or "ab"), heads, widths
    feature = lambda *shape: 1 / (1 + np.exp(-rng.standard_normal(shape)))
    round_ = lambda x: x.astype(jnp.dtype(dtype)).astype(np.float32)
    q, k, v = map(round_, (*(feature(B, length, H, d) for _ in "qk"), rng.standard_normal((B, length, H, e))))
    arrays = {"q": q, "k": k, "v": v}
    if given:
        vectors = [COUNT * feature(B, H, d) / (1, 1, d, d)[i] for i in range(4)]
        arrays["state"] = Sums(*vectors, COUNT * np.exp(feature(B, H)), COUNT * rng.standard_normal((B, H, d, e)))
    return arrays, None if starts is None else jnp.asarray(documents_of(starts, length))


def defined(rule: FlowRule, arrays, documents):
    """o, O^ and the state's sums by `causal_definition`."""
    state = arrays.get("state")
    if state is not None:
        used = {name: x if uses(rule)[name] else None for name, x in state._asdict().items()}
        state = FlowState(count=jnp.full(len(arrays["q"]), COUNT, jnp.int32), peak=None, **used)
    out = causal_definition(arrays["q"], arrays["k"], arrays["v"], documents, state, rule)
    return out.o, out.outgoing, {name: getattr(out.state, name) for name in Sums._fields}


def kernel(rule: FlowRule, blocks: Blocks, interpret, arrays, documents):
    """The same by the kernels."""
    count = jnp.full(len(arrays["q"]), COUNT, jnp.int32)
    own = Rule(rule.competition, rule.allocation, rule.clip or 0.0, rule.epsilon)
    o, outgoing, after = flow_attention(
        arrays["q"], arrays["k"], arrays["v"], own,
        documents=documents, state=(count, arrays["state"]) if "state" in arrays else None,
        interpret=interpret, blocks=blocks,
    )  # fmt: skip
    return o, outgoing, {name: x if uses(rule)[name] else None for name, x in after._asdict().items()}


def uses(rule: FlowRule) -> dict[str, bool]:
    """Which sums a rule needs."""
    needs = {"sinks": rule.allocation, "emitted": rule.allocation}
    needs |= {"absorbed": rule.competition, "rivals": rule.competition}
    return {name: needs.get(name, True) for name in Sums._fields}


def results(fn, arrays, documents, rule: FlowRule) -> dict:
    """Values, and gradients of one random combination of all of them."""
    rng = np.random.default_rng(1)

    def loss(arrays):
        out = fn(arrays, documents)
        leaves = [x for x in jax.tree.leaves(out)]
        return sum(jnp.sum(x.astype(s.dtype) * s) for x, s in zip(leaves, map(weight, leaves))), out

    def weight(x):
        return jnp.asarray(rng.standard_normal(x.shape), jnp.promote_types(x.dtype, jnp.float32))

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    if "state" in grads:
        grads["state"] = {name: x for name, x in grads["state"]._asdict().items() if uses(rule)[name]}
    found = {"o": out[0], "outgoing": out[1], "after": out[2], "gradients": grads}
    return jax.tree.map(lambda x: np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))), found)


def typed(arrays, dtype):
    """Inputs in a dtype, the state in float32."""
    as_ = lambda name: lambda x: jnp.asarray(x, "float32" if name == "state" else dtype)
    return {name: jax.tree.map(as_(name), x) for name, x in arrays.items()}


def exact(arrays, documents, rule: FlowRule) -> dict:
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        return results(functools.partial(defined, rule), wide, documents, rule)


@tiers.parametrize("case", CASES.values(), often=[CASES[name] for name in OFTEN], ids=CASES)
def test_equals_the_definition(case):
    """Any length, across chunks and grid steps; padding behind the end is NaN while the kernels are interpreted."""
    rule, dtype = case.get("rule", PLAIN), case.get("dtype", "float32")
    arrays, documents = inputs(**case)
    fn = functools.partial(kernel, rule, case.get("blocks", Blocks(16, 1)), True)
    found, expected = results(fn, typed(arrays, dtype), documents, rule), exact(arrays, documents, rule)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        if dtype == "float32":
            error, allowed = np.abs(a - b).max() / np.abs(b).max(), 2e-6
        else:
            error, allowed = np.sqrt(((a - b) ** 2).mean() / (b**2).mean()), 8e-3
        assert error < allowed, f"{jax.tree_util.keystr(path)} {error:.1e}"


@tiers.exhaustive
def test_parts_composed_are_the_whole():
    """The sums after a part, given to the next, give the outputs and the sums of one pass, across a document's end."""
    arrays, documents = inputs(60, ((7, 45), (30,)))
    run = jax.jit(functools.partial(kernel, PLAIN, Blocks(16, 1), True))
    o, outgoing, after = run(typed(arrays, "float32"), documents)
    cut = lambda at: typed({name: x[:, at] for name, x in arrays.items()}, "float32")
    first, rest = slice(0, 37), slice(37, None)
    part, _, state = run(cut(first), documents[:, first])
    before = np.asarray([30, 7])  # of the documents that go on at 37
    call = jax.jit(functools.partial(flow_attention, interpret=True, blocks=Blocks(16, 1)))
    arrays = cut(rest)
    index = documents[:, rest] - documents[:, 36:37]
    given = (jnp.asarray(before, jnp.int32), Sums(**state))
    other, flows, last = call(arrays["q"], arrays["k"], arrays["v"], documents=index, state=given)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    close(jnp.concatenate([part, other], 1), o)
    close(flows, outgoing[:, 37:])
    jax.tree.map(close, last._asdict(), after)


RACES = {
    "documents, state": {"length": 40, "starts": ((9, 16),), "given": True, "heads": 2},
    "plain": {"length": 33, "heads": 2},
}


@tiers.exhaustive
@pytest.mark.parametrize("case", RACES.values(), ids=RACES)
def test_no_races(case, capfd):
    """Under the simulation of a TPU, with memory that is NaN until written, cores that share the grid and blocks that
    reach over the arrays' ends, results are those of the kernels interpreted as XLA operations."""
    arrays, documents = inputs(**case)
    run = lambda interpret: results(
        functools.partial(kernel, PLAIN, Blocks(16, 1, 1), interpret), typed(arrays, "float32"), documents, PLAIN
    )
    simulated = run(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), simulated, run(True))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("given", [False, True])
def test_declared_bytes_are_those_of_the_blocks(given):
    """Each block counts as often as the grid comes to another one of its array: what is copied to and from HBM."""
    B, T, H, d = 2, 1024, 4, 128
    x, blocks = jax.ShapeDtypeStruct((B, T, H, d), jnp.bfloat16), Blocks(128, 2, 2)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    vector = f32(B, H, d)
    state = (jax.ShapeDtypeStruct((B,), jnp.int32), Sums(*[vector] * 4, f32(B, H), f32(B, H, d, d)))
    documents = jax.ShapeDtypeStruct((B, T), jnp.int32)
    run = lambda q, doc, s: flow_attention(
        q, q, q, documents=doc, state=s if given else None, interpret=True, blocks=blocks
    )
    gradient = jax.grad(lambda *a: run(*a)[0].astype(jnp.float32).sum())
    found = {}
    for eqn in precision.equations(jax.make_jaxpr(gradient)(x, documents, state).jaxpr):
        if eqn.primitive.name == "pallas_call":
            found[eqn.params["name"]] = eqn.params["cost_estimate"].bytes_accessed, moved(eqn.params["grid_mapping"])
    assert set(found) == {"flow_forward", "flow_backward"}
    for declared, counted in found.values():
        assert abs(declared / counted - 1) < 0.05
    # What the backward moves beside queries, keys, values, two gradients of each and the output's is little.
    assert found["flow_backward"][1] < 1.25 * 7 * 2 * B * T * H * d + given * 2**20


def moved(mapping) -> int:
    """Bytes of the blocks that a grid comes to."""
    total = 0
    for block in mapping.block_mappings:
        size = int(np.prod([int(getattr(n, "block_size", n)) for n in block.block_shape]))
        places = [where(block, at) for at in np.ndindex(*mapping.grid)]
        changes = 1 + sum(a != b for a, b in zip(places, places[1:]))
        total += changes * size * block.array_aval.dtype.itemsize
    return total


def where(block, at):
    """The block that an index map gives at a point of the grid; its scalars are not read."""
    jaxpr = block.index_map_jaxpr.jaxpr
    names = dict(zip(jaxpr.invars, at))
    value = lambda x: int(x.val if hasattr(x, "val") else names[x])
    for eqn in jaxpr.eqns:
        a, b = map(value, eqn.invars)
        assert eqn.primitive.name == "sub"
        names[eqn.outvars[0]] = a - b
    return tuple(map(value, jaxpr.outvars))


def test_what_cannot_be_is_refused():
    """With what is allowed."""
    x = jnp.ones((1, 4, 2, 8))
    for change, message in (
        ({"k": x[:, :3]}, "do not fit; expected q"),
        ({"v": x.astype(jnp.bfloat16)}, "allowed: all bfloat16, or all float32"),
        ({"rule": dataclasses.replace(Rule(), clip=60.0)}, "clip=60.0; allowed: from 0 to 50"),
        ({"rule": dataclasses.replace(Rule(), epsilon=-1.0)}, "epsilon=-1.0; allowed"),
        ({"documents": jnp.zeros((1, 4))}, "expected integers"),
        ({"blocks": Blocks(12)}, "allowed: chunk a multiple of 8"),
        ({"state": (jnp.zeros((1,), jnp.int32), Sums(*[x] * 6))}, "state of shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            flow_attention(**({"q": x, "k": x, "v": x, "interpret": True} | change))
