"""The laws of the contract about numbers, for every registered mixer in every config of `cases`."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import UnsupportedPattern
from attnlab.mixers.heads import HeadMixer
from attnlab.ops import dispatch
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests import tiers
from tests.mixers import cases, differences, forced, precision, stated

# Knobs are held to the definition, on packed documents; most else is tried in the default, the combinations and
# both directions; what no combination decides, in both directions.
# Those of programs that run are tried in chunks that the rows cross.
every_config = pytest.mark.parametrize("config", cases.parameters(chunks=True))
some_configs = pytest.mark.parametrize("config", cases.parameters(knobs=False, chunks=True))
few_configs = pytest.mark.parametrize("config", cases.parameters(knobs=False, combinations=False, chunks=True))
WAYS = {mixers.get(n).sequence_parallel_of(mixers.get(n).Config()): n for n in reversed(mixers.names())}  # the first
KEPT_AS_GIVEN = {"k", "v", "keys", "values", "cache", "tail"}  # parts of states that hold inputs, not sums
call = cases.call
SHOWN = {}  # of configs whose sums were looked at: see `held_to_wide_sums`
# Few lengths: each is compiled once. Pieces longer than a chunk, in which documents begin, from a stream's beginning
# and under way.
CUTS = ([1] * cases.LENGTH, [5, 1, 5], [1, 5, 5])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@functools.partial(jax.jit, static_argnums=0)
def extend(graphdef, params, x, seq, state):
    return nnx.merge(graphdef, params).extend(x, seq, state)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def begun(graphdef, params, batch=2, length=cases.LENGTH):
    """The state before the first position, in one program."""
    return nnx.merge(graphdef, params).init_state(batch, length, jnp.float64)


def value_and_gradients(graphdef, params, x, seq, share=1.0, weights=None):
    """y and losses; gradients of a scalar of every visible position and `share` of every loss, for parameters and x."""
    return program(graphdef, params, x, seq, share, weights_of(x) if weights is None else weights)


@functools.partial(jax.jit, static_argnums=0)
def program(graphdef, params, x, seq, share, weights):
    """`value_and_gradients`; one program for all laws, which have it traced and compiled once for a config."""

    def scalar(params, x):
        out = nnx.merge(graphdef, params)(x, seq)
        used = jnp.ones(out.y.shape[:2]) if seq.segments is None else seq.segments > 0
        total = jnp.sum(weights * used[..., None] * out.y)
        return total + share * sum(out.losses.values()), (out.y, out.losses)

    (_, y), gradients = jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(params, x)
    return y, gradients


def weights_of(y):
    """Another weight for every number of y."""
    dtype = jnp.promote_types(y.dtype, jnp.float32)
    return jnp.asarray(np.cos(np.arange(y.size).reshape(y.shape)).astype(dtype))


def assert_close(a, b, tolerance):
    """Largest difference against the largest value, leaf by leaf."""
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
        assert np.all(np.isfinite(p))
        np.testing.assert_allclose(p, q, rtol=0, atol=tolerance * max(1.0, np.abs(q).max(initial=0)))


@every_config
def test_definition(config, x64):
    """Laws 1 and 7: each implementation equals the definition in float64, value and gradients (other knobs: value)."""
    x, seq = cases.inputs(jnp.float64)
    run = call if cases.of_knobs(config) else value_and_gradients
    of = lambda impl: cases.split(cases.module(dataclasses.replace(config, impl=impl), jnp.float64))
    first = forced.default(config)
    with dispatch.recording() as chosen:
        results = {first: run(*of(first), x, seq)}
    # Where the program is another law's, too, it may have been traced before.
    picked = {choice.implementation for choice in chosen.choices} or None
    _, *others = forced.implementations(config, picked)
    # Losses may stop gradients, which no difference tells.
    near = run is value_and_gradients and not results[first][0][1]
    for impl in others:
        results[impl] = (call if near and impl == "definition" else run)(*of(impl), x, seq)
    expected = results.pop("definition")
    assert results
    for result in results.values():
        assert_close(result[0][0] if near else result, expected, 1e-10)
        if near:
            differences.hold(result[1], *of("definition"), x, seq, weights_of(x))


@tiers.exhaustive
@some_configs
def test_gradients_of_the_definition(config, x64):
    """Law 1, number by number."""
    x, seq = cases.inputs(jnp.float64)
    given = (dataclasses.replace(config, impl=impl) for impl in (forced.default(config), "definition"))
    assert_close(*(value_and_gradients(*cases.split(cases.module(c, jnp.float64)), x, seq)[1] for c in given), 1e-10)


@some_configs
def test_split_anywhere(config, x64):
    """Law 2: `extend` over any cutting of a packed, padded sequence equals `__call__` on the whole."""
    module = cases.module(config, jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    if not (config.causal and module.capabilities.streaming):
        with pytest.raises(UnsupportedPattern):
            module.init_state(2, cases.LENGTH)
        return
    split = cases.split(module)
    (whole, _), _ = value_and_gradients(*split, x, seq)
    for cut in CUTS:
        y, _ = cases.streamed(functools.partial(extend, *split), begun(*split), x, seq, cut)
        used = np.asarray(seq.segments) > 0
        assert_close(y[used], np.asarray(whole)[used], 1e-10)
        zero_at_padding(config, y, used)


@some_configs
def test_causality(config, x64):
    """Law 3: changing position t changes nothing before t, bitwise; and something at or after t. Law 4: a batch without
    segments has one document in each row."""
    graphdef, params = cases.split(cases.module(config, jnp.float64))
    x = np.asarray(cases.inputs(jnp.float64)[0])
    whole, one = one_document(x)
    run = lambda x: np.asarray(value_and_gradients(graphdef, params, jnp.asarray(x), one)[0][0])
    before = run(x)
    if not written_out(config):
        assert_close(call(graphdef, params, jnp.asarray(x), whole), before, 1e-10)
    if not config.causal:
        return
    for t in (1, 4, cases.LENGTH - 1):
        after = run(np.concatenate([x[:, :t], 7 - 3 * x[:, t:]], 1))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert not np.array_equal(after[:, t:], before[:, t:])


def written_out(config):
    return stated.of(config.node_name, "WRITTEN_OUT", False)


def one_document(x):
    """A batch whose rows are one document each: without segments, and with."""
    whole = mixers.Sequence.whole(*x.shape[:2])
    return whole, dataclasses.replace(whole, segments=jnp.ones(x.shape[:2], jnp.int32))


@tiers.exhaustive
@some_configs
def test_rows_without_segments(config, x64):
    """Law 4, of those that are written out."""
    if written_out(config):
        split, x = cases.split(cases.module(config, jnp.float64)), cases.inputs(jnp.float64)[0]
        assert_close(*(call(*split, x, seq) for seq in one_document(x)), 1e-10)


@some_configs
def test_packing(config, x64):
    """Law 4: packed documents give what each gives alone, gradients too; padding changes nothing and stays finite."""
    graphdef, params = cases.split(cases.module(config, jnp.float64))
    x, seq = cases.inputs(jnp.float64)
    # The losses are of the whole batch, which documents share. All batches are of one shape: one program.
    run = functools.partial(value_and_gradients, graphdef, params, share=0.0)
    weights = weights_of(x)
    (y, losses), gradients = run(x, seq, weights=weights)
    alone = [run(*cases.alone(x, seq, rows), weights=cases.moved(weights, rows)) for rows in cases.ALONE]
    y, gradients = np.asarray(y), jax.tree.map(np.asarray, gradients)
    of_parameters = jax.tree.map(np.zeros_like, gradients[0])
    for rows, ((y_alone, _), found) in zip(cases.ALONE, alone, strict=True):
        for i, (row, first, end) in enumerate(rows):
            assert_close(y[row, first:end], np.asarray(y_alone)[i, : end - first], 1e-10)
            assert_close(gradients[1][row, first:end], np.asarray(found[1])[i, : end - first], 1e-9)
        of_parameters = jax.tree.map(lambda a, b: a + np.asarray(b), of_parameters, found[0])
    of_a_step = stated.of(config.node_name, "OF_A_STEP", "").split()
    summed = lambda found: [a for path, a in nnx.to_flat_state(found) if path[-1] not in of_a_step]
    assert_close(summed(gradients[0]), summed(of_parameters), 1e-9)
    padding = np.asarray(seq.segments) == 0
    assert not np.any(gradients[1][padding])

    loud = jnp.asarray(np.where(padding[..., None], 1e4 * np.asarray(x), x))
    (changed, changed_losses), changed_gradients = run(loud, seq, weights=weights)
    assert_close(changed_losses, losses, 1e-12)
    assert np.all(np.isfinite(changed))
    np.testing.assert_array_equal(np.asarray(changed)[~padding], y[~padding])
    zero_at_padding(config, changed, ~padding)
    assert_close(changed_gradients[0], gradients[0], 1e-10)


def zero_at_padding(config, y, used):
    """Whatever a layer of heads computes there: without a bias of its output it gives exactly 0, and nowhere else."""
    if issubclass(mixers.get(config.node_name), HeadMixer) and getattr(config, "core", config).bias != "all":
        np.testing.assert_array_equal(np.asarray(y)[~used], 0)
        assert np.all(np.abs(np.asarray(y)[used]).max(-1) > 0)


@few_configs
def test_overflow(config, x64):
    """Law 10: a document that overflows is not finite, and changes no other, values and gradients; where that is not
    declared, no other row. Streams too: what a document's later positions give is not finite, and the next is clean."""
    held_to_overflow(config)


@tiers.exhaustive
@few_configs
def test_overflow_in_every_implementation(config, x64):
    """Law 10, each implementation by its name."""
    for impl in forced.implementations(config)[1:]:
        held_to_overflow(dataclasses.replace(config, impl=impl))


def held_to_overflow(config):
    """The second of the three documents of row 0 overflows; row 1 is one document. In the program of other laws."""
    segments = np.array([[1] * 3 + [2] * 5 + [3] * 3, [4] * 11], np.int32)
    positions = np.array([[*range(3), *range(5), *range(3)], [*range(11)]], np.int32)
    seq = mixers.Sequence(jnp.asarray(positions), jnp.asarray(segments))
    split = cases.split(cases.module(config, jnp.float64))
    x = np.asarray(cases.inputs(jnp.float64, seed=2)[0])
    contained = mixers.get(config.node_name).contains_overflow
    others = segments != 2 if contained else segments == 4
    weights = jnp.where(others[..., None], weights_of(x), 0)

    def run(x):
        (y, _), (_, gradient) = value_and_gradients(*split, jnp.asarray(x), seq, 0.0, weights)
        return np.asarray(y), np.asarray(gradient)

    y, gradient = run(x)
    assert np.all(np.isfinite(y)) and np.all(np.isfinite(gradient))
    for value in (np.inf, np.nan, 1e200):
        bad = x.copy()
        bad[0, 4, :3] = value
        y_bad, gradient_bad = run(bad)
        np.testing.assert_array_equal(y_bad[others], y[others])
        # Where work is laid out by what is chosen (gather), sums are taken in another order.
        np.testing.assert_allclose(gradient_bad[others], gradient[others], rtol=0, atol=1e-12 * np.abs(gradient).max())
        if contained:
            assert not np.any(np.isfinite(y_bad[0, 4:8]).all(-1))

    if not (config.causal and mixers.get(config.node_name).capabilities.streaming):
        return
    pieces = functools.partial(extend, *split)
    y, y_bad = (np.asarray(cases.streamed(pieces, begun(*split), jnp.asarray(a), seq, CUTS[1])[0]) for a in (x, bad))
    np.testing.assert_array_equal(y_bad[others], y[others])
    if contained:
        assert not np.any(np.isfinite(y_bad[0, 4:8]).all(-1))


@few_configs
def test_sharding(config, x64):
    """Law 6: the same numbers on 1 and 8 devices, split over rows, parameters, heads and, where possible, positions.

    One mixer for each way of splitting positions is run, its gradients too where these cost little: others' are those
    of their ops. Whoever shares a way is traced, without gradients.
    """
    runs = config.node_name in WAYS.values()
    same_on_eight_devices(config, gradients=runs and split_gradients(config), runs=runs)


@tiers.exhaustive
@few_configs
def test_gradients_on_eight_devices(config, x64):
    """Law 6, numbers and gradients of the others."""
    if not split_gradients(config) or config.node_name not in WAYS.values():
        same_on_eight_devices(config)


def split_gradients(config):
    return stated.of(config.node_name, "SPLIT_GRADIENTS", True)


def same_on_eight_devices(config, gradients=True, runs=True):
    """Values and losses, and gradients; or only that the program can be split."""
    assert jax.device_count() == 8
    graphdef, params = cases.split((cases.module if runs else cases.blank)(config, jnp.float64))
    x, seq = cases.inputs(jnp.float64)
    if runs:
        (y, losses), (of_parameters, of_x) = value_and_gradients(graphdef, params, x, seq)
    # Each row four times with a quarter of its weight, in another order on each part of the mesh; and one more position
    # of padding, so that positions divide.
    rows, weights = np.array([0, 1, 1, 0, 0, 0, 1, 1]), np.pad(np.asarray(weights_of(x)) / 4, [(0, 0), (0, 1), (0, 0)])
    x, seq = cases.inputs(jnp.float64, behind=1)
    x, seq, weights = jax.tree.map(lambda a: np.asarray(a)[rows], (x, seq, weights))
    context = mixers.get(config.node_name).sequence_parallel_of(config)
    sizes = {"context": 2} if context else {"data": 2}
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1, "fsdp": 2, "tensor": 2} | sizes), 8, length=x.shape[1])
    shardings = sharding.parameter_shardings(mesh, sharding.logical_axes(params), nnx.to_pure_dict(params))
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(shardings))
    # Traced anew: what jit keeps of one device knows nothing of the mesh.
    run = partition.traced(program.__wrapped__ if gradients else forward, mesh, sharding.ACTIVATION_RULES)
    if not runs:
        (y, _), _ = jax.eval_shape(functools.partial(run, graphdef), params, x, seq, 1.0, weights)
        assert y.shape == x.shape
        return
    split_params = jax.tree.map(lambda a: a, params)
    values = jax.tree.map(np.asarray, nnx.to_pure_dict(params))  # of a device's arrays parts are compiled
    nnx.replace_by_pure_dict(split_params, jax.device_put(values, shardings))
    expected = ((np.asarray(y)[rows], losses), (of_parameters, np.asarray(of_x)[rows] / 4))
    x, seq, weights = jax.device_put((x, seq, weights), sharding.batch_sharding(mesh))
    (y, losses), found = jax.jit(run, static_argnums=0)(graphdef, split_params, x, seq, 1.0, weights)
    zero_at_padding(config, y, np.asarray(seq.segments) > 0)
    y = np.asarray(y)
    assert_close((y[:, :-1], losses), expected[0], 1e-10)
    if gradients:
        of_parameters, of_x = found[0], np.asarray(found[1])
        assert not np.any(of_x[:, -1])
        assert_close((of_parameters, of_x[:, :-1]), expected[1], 1e-10)


def forward(graphdef, params, x, seq, share, weights):
    """As `program`, without gradients."""
    out = nnx.merge(graphdef, params)(x, seq)
    return (out.y, out.losses), None


def pytest_generate_tests(metafunc):
    """In bf16 every run tries the mixers by whose numbers others are. They are known here and not above, as tests that
    state it import this file."""
    if metafunc.function is test_bfloat16:
        of = {name: stated.of(name, "NUMBERS_OF") for name in mixers.names()}
        often = {name for name, other in of.items() if other is None}
        assert often.issuperset(filter(None, of.values())), "NUMBERS_OF names a mixer that is not tried itself"
        metafunc.parametrize("config", cases.parameters(knobs=False, combinations=False, chunks=True, often=often))


def test_bfloat16(config):
    """Law 8: bf16 activations stay finite and near float64, for large inputs too; gradients where they are stated."""
    held_to_bfloat16(config, gradients=bfloat16_gradients(config))


@tiers.exhaustive
@few_configs
def test_bfloat16_gradients_of_memories(config):
    """Law 8, gradients of the others, memories that learn."""
    if not bfloat16_gradients(config):
        held_to_bfloat16(config)


def bfloat16_gradients(config):
    return stated.of(config.node_name, "BFLOAT16_GRADIENTS", True)


def held_to_bfloat16(config, gradients=True):
    with jax.enable_x64(True):
        graphdef, params = cases.split(cases.module(config, jnp.float64))
        x, seq = cases.inputs(jnp.float64)
        (expected, _), _ = value_and_gradients(graphdef, params, x, seq)
    expected, low = np.asarray(expected, np.float32), cases.split(cases.module(config, jnp.bfloat16))
    narrow = lambda x: jnp.asarray(np.asarray(x).astype(jnp.bfloat16))
    run = value_and_gradients if gradients else lambda *args: ((call(*args), {}), None)
    (y, _), found = run(*low, narrow(x), seq)
    assert y.dtype == jnp.bfloat16
    error = np.abs(np.asarray(y, np.float32) - expected).max() / np.abs(expected).max()
    assert error < 0.05
    large = run(*low, narrow(30 * np.asarray(x)), seq)
    for leaf in jax.tree.leaves((found, large)):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


@some_configs
def test_sums_are_wide(config):
    """Law 8: in bf16 sums over positions, exponentials and what a state adds up are fp32."""
    held_to_wide_sums(config)


@tiers.exhaustive
@some_configs
def test_sums_are_wide_in_every_implementation(config):
    """Law 8, each implementation by its name."""
    for impl in forced.implementations(config)[1:]:
        held_to_wide_sums(dataclasses.replace(config, impl=impl))


def held_to_wide_sums(config):
    shown = True  # whether the programs that other laws run have all in them that there is
    for i, (fn, args) in enumerate(precision.traced(cases.blank(config, jnp.bfloat16), jnp.bfloat16)):
        with precision.on_every_platform() as both:
            jaxpr, (y, after, *metrics) = jax.make_jaxpr(fn, return_shape=True)(*args)
        shown = shown and not both.called and not any(metrics)
        SHOWN[config] = shown
        assert y.dtype == jnp.bfloat16
        assert precision.narrow_sums(jaxpr.jaxpr) == []
        if i == 0:  # the layer on whole rows
            continue
        assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, args[2])
        for path, leaf in jax.tree.leaves_with_path(after):
            if precision.narrower(leaf, jnp.float32):
                assert KEPT_AS_GIVEN & set(re.findall(r"\w+", jax.tree_util.keystr(path))), path


@some_configs
def test_float64_throughout(config, x64):
    """Law 11: in a float64 model whatever is floating is float64: y, losses, metrics, states, and all between.

    In the programs that other laws run, gradients too; traced anew where these lack a platform's form, or metrics.
    """
    if not SHOWN.get(config):
        held_to_float64(config)
    graphdef, params = cases.split(cases.module(config, jnp.float64))
    x, seq = cases.inputs(jnp.float64)
    traced = [program.trace(graphdef, params, x, seq, 1.0, weights_of(x))]
    if config.causal and mixers.get(config.node_name).capabilities.streaming:
        state = begun.eval_shape(graphdef, params)
        for n in sorted(set(sum(CUTS, []))):
            part, piece = cases.first(x, seq, n)
            traced.append(extend.trace(graphdef, params, piece, part, state))
    for each in traced:
        assert precision.narrow_in(each.jaxpr.jaxpr, jnp.float64) == []


@tiers.exhaustive
@some_configs
def test_float64_in_every_implementation(config, x64):
    """Law 11, each implementation by its name, and the gradients of the first."""
    for impl in forced.implementations(config)[1:]:
        held_to_float64(dataclasses.replace(config, impl=impl))
    x, seq = cases.inputs(jnp.float64)
    graphdef, params = cases.split(cases.blank(config, jnp.float64))
    given = params, x, seq, 1.0, weights_of(x)
    with precision.on_every_platform():
        gradients = functools.partial(program.__wrapped__, graphdef)
        assert precision.narrow_results(gradients, *given, dtype=jnp.float64) == []


def held_to_float64(config):
    with precision.on_every_platform():
        for fn, args in precision.traced(cases.blank(config, jnp.float64), jnp.float64):
            assert precision.narrow_results(fn, *args, dtype=jnp.float64) == []
