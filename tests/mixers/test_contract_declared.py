"""The laws of the contract about what a mixer declares: its knobs, cost and parameters' roles, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UnsupportedPattern
from attnlab.mixers import roles
from attnlab.models.transformer import StackConfig, Transformer
from tests import tiers
from tests.mixers import cases, flops, stated, uses

call = cases.call


def _takes(cls, key, needs):
    return {key, *needs} <= {field.name for field in dataclasses.fields(cls.Config)}


def _of_a_stack(config, x, seq):
    """The program of three layers: knobs of what layers hand on show in no layer alone."""
    of = type("Stack", (StackConfig,), {"causal": config.causal})
    stack = of(width=cases.WIDTH, layers=3, mixers={"M": config}, mlp_width=0)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(stack, rngs=nnx.Rngs(0))))
    return str(jax.make_jaxpr(lambda p: nnx.merge(graphdef, p)(x, seq).y)(params))


@tiers.exhaustive
@pytest.mark.parametrize("name", mixers.names())
def test_every_knob_turns(name):
    """Law 5: another value of any field changes the parameters, the program or the output, or is refused."""
    cls = mixers.get(name)
    x, seq = cases.inputs(jnp.float32)

    def shown(config):
        """Whatever tells two configs apart, what is cheap to find first."""
        graphdef, params = cases.split(cases.blank(config, jnp.float32))
        yield str(jax.tree.map(lambda a: a.shape, nnx.to_pure_dict(params)))
        yield str(jax.make_jaxpr(lambda p: call(graphdef, p, x, seq))(params))
        yield np.asarray(call(*cases.split(cases.module(config, jnp.float32)), x, seq)).tobytes()
        if config.causal and cls.capabilities.streaming:  # what chooses for one position of a stream shows there
            one, _ = mixers.Stream.start(2).extend(mixers.Sequence(seq.positions[:, :1]))
            state = cases.module(config, jnp.float32).init_state(2, cases.LENGTH)
            yield str(jax.make_jaxpr(lambda p: nnx.merge(graphdef, p).extend(x[:, :1], one, state).y)(params))
        if cls.init_shared is not mixers.Mixer.init_shared:
            yield _of_a_stack(config, x, seq)

    plain = list(shown(cls.Config()))
    fields = cases.BESIDE | stated.of(name, "BESIDE", {})
    beside = {key: list(shown(cls.Config(**needs))) for key, needs in fields.items() if _takes(cls, key, needs)}
    for field in dataclasses.fields(cls.Config):
        assert field.metadata.get("doc"), f"{name}.{field.name} is not documented"
        assert field.metadata["other"], f"{name}.{field.name} names no other value to try"
        if field.name in cases.CROSS:
            continue
        for value in field.metadata["other"]:
            needs = fields[field.name] if field.name in beside else {}
            try:
                config = cls.Config(**needs, **{field.name: value})
            except ConfigError as error:
                assert str(error).startswith(f"{field.name} = ")
                continue
            pairs = itertools.zip_longest(shown(config), beside.get(field.name, plain))
            assert any(a != b for a, b in pairs), f"{name}.{field.name} = {value!r} changes nothing"


@pytest.mark.parametrize("name", mixers.names())
def test_knobs_of_what_is_no_knob_are_none(name):
    """A knob that only matters beside a value of another is one where the other can have it; else it is unknown."""
    cls = mixers.get(name)
    fields = {field.name: field for field in dataclasses.fields(cls.Config)}
    for key, needs in cases.BESIDE.items():
        if key in fields and key != "impl":
            assert needs.keys() <= fields.keys(), f"{name} has {key} and no {', '.join(needs)}: make it a ClassVar, too"
            cls.Config(**needs, **{key: fields[key].metadata["other"][0]})


@functools.lru_cache(maxsize=4)
def traced(config):
    """The module without numbers, its parameters and the program on whole rows, of the implementation whose products
    are declared; once for both laws."""
    module = cases.blank(dataclasses.replace(config, impl=mixers.get(config.node_name).counted), jnp.float32)
    graphdef, params = cases.split(module)
    leaves, treedef = jax.tree.flatten(params)
    x = jax.ShapeDtypeStruct((2, cases.LENGTH, cases.WIDTH), jnp.float32)
    seq = mixers.Sequence.whole(*x.shape[:2])
    if getattr(config, "grid", None):  # tables of positions are read where there is an image
        seq = dataclasses.replace(seq, grid=config.grid)
    run = lambda leaves, x: nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))(x, seq).y
    return module, params, jax.make_jaxpr(run)(leaves, x).jaxpr


@pytest.mark.parametrize("config", cases.parameters(turned=True))
def test_cost(config):
    """Law 9: declared FLOPs are those of the program traced, parameters and state bytes those of the arrays."""
    cls = mixers.get(config.node_name)
    cost = cls.cost(dataclasses.replace(config, impl=cls.counted), cases.WIDTH, cases.LENGTH)
    module, params, jaxpr = traced(config)
    assert cost.parameters == sum(p.size for p in jax.tree.leaves(params))
    counted = flops.of(jaxpr) / (2 * cases.LENGTH)
    # Where pairs are counted, the program computes all and the declaration those that the mask lets through.
    declared = dict(cost.flops)
    if cost.span is not None:
        span = sum(flops.keys_seen(config, t) for t in range(cases.LENGTH)) / cases.LENGTH
        assert cost.span == pytest.approx(span, rel=1e-6)
        declared["attention"] *= flops.keys_computed(config) / span
    assert counted == pytest.approx(sum(declared.values()), rel=1e-6)
    if cls.capabilities.streaming and config.causal:
        length = 64 * cases.LENGTH if cls.capabilities.fixed_state else cases.LENGTH
        state = jax.eval_shape(lambda: module.init_state(1, length))
        assert cost.state_bytes == sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))


@pytest.mark.parametrize("config", cases.parameters(turned=True))
def test_roles(config):
    """Law 12: a parameter is called a matrix where the program multiplies activations by it, and does nothing else."""
    _, params, jaxpr = traced(config)
    stated = jax.tree_util.tree_leaves_with_path(roles.usages(params))
    for (path, usage), used in zip(stated, uses.of(jaxpr, len(stated)), strict=True):
        assert used, f"{jax.tree_util.keystr(path)} is not used"
        assert (usage.role is roles.Role.MATRIX) == (used == {uses.PRODUCT}), (path, usage, used)


@pytest.mark.parametrize("name", mixers.names())
def test_undeclared_is_refused(name):
    """What the capabilities do not declare raises UnsupportedPattern."""
    module = cases.blank(mixers.get(name).Config(), jnp.float32)
    x, seq = cases.inputs(jnp.float32)
    assert module.capabilities.cross == hasattr(module.config, "source")
    if not module.capabilities.packed:
        with pytest.raises(UnsupportedPattern, match="packed"):
            module(x, seq)
    if not module.capabilities.bidirectional:
        assert module.config.causal, "a mixer that only looks back has no knob `causal`"
