"""The laws of the contract on rows that are longer than the chunks and blocks that mixers have by default.

Documents begin at a chunk's edge and inside one. The short rows of `test_contract.py` cross edges of `cases.CHUNK`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.ops import dispatch
from tests import tiers
from tests.mixers import cases, forced, stated
from tests.mixers import test_contract as battery


def of(often):
    """Few configs of all mixers; those of mixers that are not often tried are exhaustive."""
    return pytest.mark.parametrize("config", cases.parameters(knobs=False, combinations=False, often=often))


SHORTER = {"log_linear": 16}  # a chunk of streams where one of the default takes long
# Blocks that no knob makes small, and chunks that are cut into blocks by default; all others' chunks are small in the
# other laws (`cases.CHUNK`).
own_blocks = "gated_deltanet", "gla", "multi_token", "softmax", "stick_breaking"
# The suite holds causality bitwise in programs of its own: here a form of each kind is optimised.
ordered = "gated_deltanet", "hebbian", "softmax"

# The suite compiles without optimisations (tests/conftest.py): what users run fuses more, and sums in other orders.
OPTIMISED = {"xla_backend_optimization_level": 3}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@of(own_blocks)
def test_definition_and_packing(config, x64):
    """Laws 1 and 4: the default implementation equals the definition, and documents are what they are alone."""
    x, seq, documents = cases.long_inputs(config, jnp.float64)
    assert x.shape[1] > cases.default_chunk(config)
    graphdef, params = cases.split(cases.module(config, jnp.float64))
    y = battery.call(graphdef, params, x, seq)
    definition = cases.split(cases.module(dataclasses.replace(config, impl="definition"), jnp.float64))
    battery.assert_close(y, battery.call(*definition, x, seq), 1e-10)
    # One that begins at an edge and one that begins inside a chunk, in the same program.
    y, begins = np.asarray(y), [documents[i] for i in (1, 3)]
    alone = np.asarray(battery.call(graphdef, params, *cases.alone(x, seq, begins)))
    for i, (row, first, end) in enumerate(begins):
        battery.assert_close(y[row, first:end], alone[i, : end - first], 1e-10)


@of(own_blocks)
def test_split_anywhere(config, x64):
    """Law 2: a stream that crosses a chunk's edge from its beginning on, and one that is under way."""
    if config.node_name in SHORTER:
        config = dataclasses.replace(config, chunk=SHORTER[config.node_name])
    module = cases.module(config, jnp.float64)
    if not (config.causal and module.capabilities.streaming):
        return
    graphdef, params = cases.split(module)
    x, seq, _ = cases.long_inputs(config, jnp.float64)
    T = x.shape[1]
    whole = battery.call(graphdef, params, x, seq)
    state = battery.begun(graphdef, params, 3, T)  # halves, which one program serves, each longer than a chunk
    y, _ = cases.streamed(functools.partial(battery.extend, graphdef, params), state, x, seq, (T // 2, T // 2))
    battery.assert_close(y, whole, 1e-10)


@of(ordered)
def test_causality_as_users_compile_it(config):
    """Law 3 in a program that is optimised as a user's: bitwise, before, at and behind a chunk's edge."""
    if not config.causal:
        return
    graphdef, params = cases.split(cases.module(config, jnp.float32))
    x = np.asarray(cases.long_inputs(config, jnp.float32)[0])[:2]
    seq, edge = mixers.Sequence.whole(*x.shape[:2]), cases.default_chunk(config)
    run = jax.jit(lambda x: nnx.merge(graphdef, params)(x, seq).y).lower(x).compile(compiler_options=OPTIMISED)
    before = np.asarray(run(x))
    for t in (1, edge // 2, edge - 1, edge, edge + 1, x.shape[1] - 1):
        after = np.asarray(run(np.concatenate([x[:, :t], 7 - 3 * x[:, t:]], 1)))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert not np.array_equal(after[:, t:], before[:, t:])


INTERPRETED = [name for name in mixers.names() if forced.kernels(mixers.get(name))]


@tiers.parametrize("name", INTERPRETED, often=["lightning", "softmax"])
def test_kernels(name):
    """Law 7: kernels, interpreted, equal the definition at a size that they serve: value and gradients, packed rows."""
    if not forced.kernels(mixers.get(name)):
        return
    T = 256
    segments = jnp.asarray([[1] * 100 + [2] * 150 + [0] * 6])
    seq = mixers.Sequence(jnp.broadcast_to(jnp.arange(T), (1, T)), segments)
    x = jnp.asarray(np.random.default_rng(4).standard_normal((1, T, cases.WIDTH)), jnp.float32)
    # Until its systems are solved: those of rows with few more keys than channels take more than by default.
    until = {"max_iterations": 500, "ridge_min": 0.1} if name == "local_linear" else {}
    expected, make = None, functools.partial(mixers.get(name).Config, heads=2, head_width=64, **until)
    impls = "definition", *forced.kernels(mixers.get(name))
    try:
        list(map(lambda impl: make(impl=impl), impls))
    except ConfigError:  # its kernels serve the other direction alone
        make = functools.partial(make, causal=False)
    for impl in impls:
        config = make(impl=impl)
        graphdef, params = cases.split(cases.module(config, jnp.float32))
        with dispatch.interpreted(), dispatch.recording() as chosen:
            result = battery.value_and_gradients(graphdef, params, x, seq)
        assert impl in {choice.implementation for choice in chosen.choices}
        expected = result if expected is None else expected
        battery.assert_close(result, expected, stated.of(name, "KERNEL_TOLERANCE", 2e-5))
