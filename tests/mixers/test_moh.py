"""The identities of mixture-of-head attention (Jin et al. 2024), in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import config as config_lib
from attnlab import mixers
from attnlab.errors import ConfigError, UnsupportedPattern
from attnlab.mixers import moh
from attnlab.ops import dispatch
from attnlab.ops import router as route
from attnlab.parallel import partition
from tests import tiers
from tests.mixers import cases, test_contract_declared
from tests.mixers import test_contract as battery

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {
    "matrix": "core.q core.k core.v core.out core.gate.linear router.both router.routed router.shared",
    "bias": "core.sinks",
}
NUMBERS_OF = "softmax"
WRITTEN_OUT = True

CAUSAL = [n for n in mixers.names() if mixers.get(n).capabilities.causal]
CORES = [n for n in CAUSAL if issubclass(mixers.get(n), mixers.HeadMixer) and n != "moh"]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("moh").Config(**fields), jnp.float64)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, x, seq):
    return nnx.merge(graphdef, params)(x, seq)


@functools.partial(jax.jit, static_argnums=0)
def _run_heads(graphdef, params, x, seq):
    return nnx.merge(graphdef, params).heads(x, seq.derived()).y


def run(module, x, seq):
    return _run(*cases.split(module), x, seq)


def heads_of(module, x, seq):
    return _run_heads(*cases.split(module), x, seq)


PARTS = "routed", "both", "shared"
packed = functools.partial(cases.inputs, jnp.float64)


def gates_by_kind(routing):
    return routing.shared, routing.routed


def gates_of(module, x):
    gates = np.concatenate(jax.jit(lambda x: gates_by_kind(module.router(x)))(x), axis=-1)
    return gates[..., np.argsort(np.concatenate(moh.shared_and_routed(module.config)))]


def zero_router(module):
    for part in PARTS:
        if hasattr(module.router, part):
            kernel = getattr(module.router, part).kernel
            kernel[...] = jnp.zeros_like(kernel[...])


def assert_used_close(a, b, seq, atol=1e-12):
    used = np.asarray(seq.segments) > 0
    np.testing.assert_allclose(np.asarray(a)[used], np.asarray(b)[used], atol=atol)


@tiers.exhaustive
@pytest.mark.parametrize("shared", [0, 1, 4])
def test_neutral_router_with_all_heads_on_is_the_core(shared):
    """W = 0 and K = E: every weight is 1."""
    module = make(shared=shared, active=4 - shared, impl="dense")
    zero_router(module)
    x, seq = packed()
    assert_used_close(run(module, x, seq).y, run(module.core, x, seq).y, seq, atol=1e-13)


@tiers.often("1-2")
@pytest.mark.parametrize("shared, active", [(2, 1), (1, 2), (0, 3)])
def test_sums_and_zeros_of_the_weights(shared, active):
    """sum of weights = h_s a_1 + K a_2; h_s + K are not 0, and the others are 0 exactly."""
    module = make(shared=shared, active=active)
    x, _ = packed()
    gates = gates_of(module, x)
    both = jax.jit(lambda x: 2 * jax.nn.softmax(module.router.both(x), axis=-1))(x) if shared else np.array([0.0, 1.0])
    both = np.asarray(both)
    np.testing.assert_allclose(gates.sum(-1), shared * both[..., 0] + active * both[..., 1], atol=1e-12)
    np.testing.assert_array_equal((gates != 0).sum(-1), shared + active)


def test_weights_of_the_paper():
    """Eq. 5 and 6: no renormalisation, no factors."""
    module = make(shared=2, active=1, gate_norm="paper")
    x, _ = packed()
    router = module.router
    (of_shared, of_routed), *logits = jax.jit(
        lambda x: (gates_by_kind(router(x)), *(getattr(router, part)(x) for part in PARTS))
    )(x)
    p, both, shared = (np.exp(y) / np.exp(y).sum(-1, keepdims=True) for y in logits)
    expected = np.where(p == p.max(-1, keepdims=True), p, 0) * both[..., 1:]
    np.testing.assert_allclose(of_routed, expected, atol=1e-14)
    np.testing.assert_allclose(of_shared, shared * both[..., :1], atol=1e-14)


def test_one_shared_head_has_no_scores_of_its_own():
    """h_s = 1: s = 1, and no W_s (the released DiT code reads one that it does not make)."""
    module = make(shared=1)
    assert not hasattr(module.router, "shared")
    x, _ = packed()
    shared, both = jax.jit(lambda x: (module.router(x).shared, 2 * jax.nn.softmax(module.router.both(x), axis=-1)))(x)
    np.testing.assert_allclose(shared, both[..., :1], atol=1e-14)


@tiers.exhaustive
def test_no_routed_heads_is_a_weighted_sum():
    """K = 0: weights h_s softmax(x W_s), neither 1 nor a load-balance loss."""
    module = make(shared=4)
    x, seq = packed()
    out = run(module, x, seq)
    weights = 4 * jax.nn.softmax(module.router.shared(x), axis=-1)
    expected = module.core.combine(heads_of(module.core, x, seq) * weights[..., None], x)
    assert_used_close(out.y, expected, seq)
    assert not out.losses and not out.metrics


@tiers.exhaustive
def test_permuting_routed_heads_changes_nothing():
    """Their weights and the router's columns permuted together leave y."""
    module = make(shared=1, active=2)
    x, seq = packed()
    before = run(module, x, seq).y
    _, routed = moh.shared_and_routed(module.config)
    order = np.arange(4)
    order[list(routed)] = np.roll(routed, 1)
    d = module.core.head_dim
    for name in ("q", "k", "v"):
        kernel = getattr(module.core, name).kernel
        kernel[...] = kernel[...].reshape(16, 4, d)[:, order].reshape(16, -1)
    module.core.out.kernel[...] = module.core.out.kernel[...].reshape(4, d, 16)[order].reshape(-1, 16)
    columns = module.router.routed.kernel
    columns[...] = jnp.roll(columns[...], 1, axis=1)
    assert_used_close(run(module, x, seq).y, before, seq)


@tiers.often("core1")
@pytest.mark.parametrize("core", [{"name": "softmax"}, {"name": "gated", "kv_heads": 2, "operation": "additive"}])
def test_gather_is_dense(core):
    """Also where every token takes the same heads: nothing overflows."""
    dense = make(impl="dense", core=core)
    gather = make(impl="gather", core=core)
    x, seq = packed()
    for module in (dense, gather):
        columns = module.router.routed.kernel
        columns[...] = columns[...].at[:, 0].set(0.0)
    same = jnp.broadcast_to(x[:1, :1], x.shape)
    for inputs in (x, same):
        assert_used_close(run(gather, inputs, seq).y, run(dense, inputs, seq).y, seq)


@tiers.often("gather")
@pytest.mark.parametrize("impl", ["dense", "gather"])
def test_head_that_no_token_takes_has_no_gradient(impl):
    """Rows of W_O of a head that is off are exactly 0 in the gradient, and those of the others are not."""
    module = make(shared=1, active=2, impl=impl)
    x, seq = packed()
    x = jnp.abs(x)
    kernel = module.router.routed.kernel
    kernel[...] = kernel[...].at[:, 1].set(-50.0)  # x is positive: never among the two
    graphdef, params = cases.split(module)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(x, seq).y))))(params)
    rows = np.asarray(gradient["core"]["out"]["kernel"][...]).reshape(4, -1)
    off = moh.shared_and_routed(module.config)[1][1]
    np.testing.assert_array_equal(rows[off], 0.0)
    assert np.all(np.abs(np.delete(rows, off, axis=0)).max(-1) > 1e-3)


@tiers.often("norm_hard-gather")
@pytest.mark.parametrize("router, impl", [
    ("norm", "gather"), ("norm", "dense"), ("norm_dense", "dense"), ("norm_hard", "gather"), ("norm_hard", "dense"),
])  # fmt: skip
def test_norm_router_zeroes_heads_and_passes_gradients_straight_through(router, impl):
    """Forward the core with heads set to 0; backward the gradient of the weights p, of all heads or of those taken, or
    of none."""
    module = make(shared=1, active=2, router=router, impl=impl)
    x, _ = packed()
    seq = mixers.Sequence.whole(*x.shape[:2])
    shared, routed = moh.shared_and_routed(module.config)
    norm = jnp.linalg.norm(module.core.queries(x)[:, :, np.asarray(routed)], axis=-1)  # before RoPE
    taken = route.top_k_mask(norm, 2)
    mask = jnp.ones((2, cases.LENGTH, 4)).at[:, :, np.asarray(routed)].set(taken)
    heads = heads_of(module.core, x, seq)
    np.testing.assert_allclose(run(module, x, seq).y, module.core.combine(heads * mask[..., None], x), atol=1e-12)

    graphdef, params = cases.split(module)
    upstream = jnp.cos(jnp.arange(x.size, dtype=jnp.float64)).reshape(x.shape)
    got = jax.jit(jax.grad(lambda p: jnp.sum(upstream * nnx.merge(graphdef, p)(x, seq).y)))(params)

    def expected(p):
        """The heads on are weighted by p for the gradient of p, and by their mask for that of all else."""
        m = nnx.merge(graphdef, p)
        norm = jnp.linalg.norm(m.core.queries(x)[:, :, np.asarray(routed)], axis=-1)
        prob = jax.nn.softmax(norm / jnp.std(norm, axis=-1, ddof=1, keepdims=True), axis=-1)
        o = m.core.heads(x, seq).y
        through = jnp.sum(jax.lax.stop_gradient(_to_heads(m, upstream)) * jax.lax.stop_gradient(o), axis=-1)
        through = through[:, :, np.asarray(routed)]
        if router == "norm":
            through = jnp.where(taken, through, 0)
        if router == "norm_hard":
            through = jnp.zeros_like(through)
        return jnp.sum(upstream * m.core.combine(o * mask[..., None], x)) + jnp.sum(through * prob)

    want = jax.jit(jax.grad(expected))(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)  # no epsilon there


def _to_heads(module, dy):
    """Gradient of the heads' outputs, given that of y."""
    kernel = module.core.out.kernel[...]
    return (dy @ kernel.T).reshape(*dy.shape[:2], module.config.heads, -1)


def test_norm_router_does_not_see_positions():
    """RoPE keeps norms: other positions, the same heads on."""
    module = make(shared=1, active=2, router="norm")
    x, _ = packed()
    seq = mixers.Sequence.whole(*x.shape[:2])
    graphdef, params = cases.split(module)

    @jax.jit
    def routing(seq):
        found = nnx.merge(graphdef, params)._routed_heads(x, seq, None, None)[1]
        return found.p, found.taken

    still, moved = (routing(mixers.Sequence(p)) for p in (seq.positions, 7 * seq.positions + 1000))
    np.testing.assert_allclose(still[0], moved[0], atol=1e-12)
    np.testing.assert_array_equal(still[1], moved[1])


@pytest.mark.parametrize("K", [1, 3])
def test_load_balance_of_uniform_and_of_collapsed_routing(K):
    """Uniform probabilities and loads give K; the same K heads with p = 1 / K each give E."""
    E = 6
    turns = jnp.stack([jnp.roll(jnp.arange(E) < K, t) for t in range(E)])[None]
    uniform = jnp.full((1, E, E), 1 / E)
    np.testing.assert_allclose(route.load_balance(uniform, turns), K, atol=1e-14)
    same = jnp.broadcast_to(jnp.arange(E) < K, (1, E, E))
    np.testing.assert_allclose(route.load_balance(same / K, same), E, atol=1e-14)


@tiers.parametrize("norm, factor", [("code", 1), ("paper", 1 / 3)], often=[("code", 1)])
def test_loss_and_metrics_are_of_used_positions(norm, factor):
    module = make(balance=0.5, gate_norm=norm)
    x, seq = packed()
    out = run(module, x, seq)
    used = np.asarray(seq.segments) > 0
    routing = module.router(x)
    loads = np.asarray(routing.taken)[used].mean(0)
    expected = 3 * np.sum(loads * np.asarray(routing.p)[used].mean(0))
    np.testing.assert_allclose(out.losses["moh_balance_loss"], 0.5 * factor * expected, atol=1e-14)
    np.testing.assert_allclose([out.metrics[f"moh_load_{e}"] for e in range(3)], loads, atol=1e-14)
    np.testing.assert_allclose(out.metrics["moh_load_max"], loads.max(), atol=1e-14)
    assert not run(make(balance=0.0), x, seq).losses


@tiers.parametrize("kv_heads, shared, reads", [(None, 2, 4), (4, 2, 3), (2, 4, 2)], often=[(4, 2, 3)])
def test_decoding_reads_the_key_heads_that_are_on(kv_heads, shared, reads):
    """A step's output does not change when the values of key heads that it has no use for are NaN."""
    config = mixers.get("moh").Config(heads=8, shared=shared, active=2, core={"kv_heads": kv_heads, "head_width": 2})
    assert moh.key_heads_read(config) == reads
    module = cases.module(config, jnp.float64)
    x, _ = packed()
    seq = mixers.Sequence.whole(2, cases.LENGTH)
    whole = run(module, x, seq).y
    graphdef, params = cases.split(module)
    extend = jax.jit(lambda x, seq, state: nnx.merge(graphdef, params).extend(x, seq, state))
    x, positions = np.asarray(x), np.asarray(seq.positions)
    before, stream = cases.placed(mixers.Stream.start(2), mixers.Sequence(positions[:, :-1]))
    begin = jax.jit(lambda: module.init_state(2, cases.LENGTH, jnp.float64))
    state = extend(x[:, :-1], before, begin()).state
    K, cache = kv_heads or 8, state.carried
    on = np.asarray(gates_of(module, x[:, -1:]) != 0).reshape(2, K, -1).any(-1)
    v = np.asarray(cache.v).reshape(2, K, *cache.v.shape[1:])
    if reads < K:
        assert not on.all()
    # Only where the fixed number of reads is that of the heads on: a key head too many may be read besides.
    spare = reads - on.sum(-1)
    off = ~on & (spare == 0)[:, None]
    cache = dataclasses.replace(cache, v=np.where(off[..., None, None], np.nan, v).reshape(cache.v.shape))
    state = dataclasses.replace(state, carried=cache)
    last, _ = cases.placed(stream, mixers.Sequence(positions[:, -1:]))
    np.testing.assert_allclose(extend(x[:, -1:], last, state).y[:, 0], whole[:, -1], atol=1e-12)
    assert off.any() or reads == K


@pytest.mark.parametrize("heads, shared, kv_heads", [(8, 2, None), (16, 4, None), (32, 16, 8), (8, 4, 2), (12, 3, 1)])
def test_shared_heads_are_spread(heads, shared, kv_heads):
    """Devices that hold neighbouring key heads hold as many shared heads each, where the numbers allow it."""
    config = mixers.get("moh").Config(heads=heads, shared=shared, core={"kv_heads": kv_heads})
    always, routed = moh.shared_and_routed(config)
    assert len(always) == shared and sorted((*always, *routed)) == list(range(heads))
    K = kv_heads or heads
    G = heads // K
    for devices in (2, 4):
        if K % devices == 0 and shared % (devices * G) == 0:
            counts = np.bincount(np.asarray(always) * devices // heads, minlength=devices)
            np.testing.assert_array_equal(counts, shared // devices)
    assert len({h // G for h in always}) == -(-shared // G)


def test_defaults_have_three_quarters_on():
    for heads in (4, 8, 12, 16, 32):
        config = mixers.get("moh").Config(heads=heads)
        assert (config.always, config.always + config.taken) == (heads // 4, 3 * heads // 4)


def test_declared_cost_counts_the_heads_that_are_on():
    cls = mixers.get("moh")
    fields = {"heads": 8, "shared": 2, "active": 2}
    dense, gather = (cls.cost(cls.Config(impl=impl, **fields), 64, 128) for impl in ("dense", "gather"))
    assert gather.flops["attention"] == dense.flops["attention"] / 2 and gather.span == dense.span / 2
    assert dense.flops["router"] == 2 * 64 * (6 + 2 + 2)


@pytest.mark.parametrize("platform, kind, length, core, picked", [
    ("cpu", "cpu", 128, {}, "gather"), ("tpu", "TPU v6e", 4096, {}, "dense"),
    ("tpu", "TPU v6e", 131072, {}, "gather"), ("tpu", "TPU v6e", 131072, {"window": 1024}, "dense"),
    ("tpu", "TPU v6e", 28672, {}, "gather"), ("tpu", "TPU v6e", 28672, {"kv_heads": 2}, "dense"),
    ("tpu", "TPU v99", 131072, {}, "dense"), ("gpu", "NVIDIA H100", 131072, {}, "dense"),
])  # fmt: skip
def test_auto_gathers_where_it_saves(platform, kind, length, core, picked, monkeypatch):
    """On TPU by the recorded schedules: moving rows costs by position, attention by what a position sees. Kernels move
    the rows of a key head's query heads together, while all of these stand in fast memory; else it is dear."""
    monkeypatch.setattr(partition, "platform", lambda: platform)
    monkeypatch.setattr(partition, "device_kind", lambda: kind)
    config = mixers.get("moh").Config(heads=16, core={"name": "softmax", **core})
    assert moh.ROUTED_HEADS.pick(moh.RoutingSpec.of(config, length, 128)) == picked


def test_a_config_names_the_kernel():
    """`gather_impl` is the routed heads' op, `core.impl` that of the shared ones."""
    config = mixers.get("moh").Config(heads=4, impl="gather", gather_impl="routed", core={"impl": "definition"})
    module, (x, seq) = cases.module(config, jnp.float32), cases.inputs(jnp.float32)
    with dispatch.interpreted(), dispatch.recording() as chosen:
        jax.eval_shape(lambda x: module(x, seq).y, x)
    found = {op: set(names.values()) for op, names in chosen.table().items()}
    assert found == {"moh": {"gather"}, "attention": {"definition"}, "gathered_attention": {"routed"}}


@tiers.often("lightning")
@tiers.parametrize("core", CORES, often=["softmax", "lightning"])
def test_any_core_is_weighted_head_by_head(core):
    """y = sum of weight times head, whatever the heads are; and a stream of it equals the whole."""
    module = make(core=core)
    assert module.core.name == core and module.core.config.heads == 4
    x, seq = packed()
    y = run(module, x, seq).y
    expected = module.core.combine(heads_of(module.core, x, seq) * gates_of(module, x)[..., None], x)
    assert_used_close(y, expected, seq)
    assert np.abs(y - run(module.core, x, seq).y).max() > 1e-3

    graphdef, params = cases.split(module)
    extend = jax.jit(lambda x, seq, state: nnx.merge(graphdef, params).extend(x, seq, state))
    state = module.init_state(2, cases.LENGTH, jnp.float64)
    streamed, _ = cases.streamed(extend, state, x, seq, (6, cases.LENGTH - 6))
    assert_used_close(streamed, y, seq, atol=1e-10)


@tiers.often("fields0")
@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"gate_norm": "paper", "core": {"name": "lightning", "norm_over": "head", "chunk": 4}},
               {"router": "norm_dense"}]
)  # fmt: skip
def test_what_cannot_be_gathered_keeps_the_laws(fields):
    """The battery's laws where `gather` does not serve: a linear core, and gradients of heads that are off."""
    config = mixers.get("moh").Config(**fields)
    x, seq = packed()
    variants = (dataclasses.replace(config, impl=impl) for impl in ("dense", "definition"))
    other, expected = (
        battery.value_and_gradients(*cases.split(cases.module(c, jnp.float64)), x, seq) for c in variants
    )
    battery.assert_close(other, expected, 1e-10)
    battery.test_split_anywhere(config, None)
    battery.test_causality(config, None)
    test_contract_declared.test_cost(config)


def test_core_from_nodes_and_the_command_line():
    """Overrides reach the core; a config written down is read back the same."""
    tree = {"mixer": {"name": "moh", "heads": 8}}
    config_lib.apply_overrides(tree, ["mixer.core.kv_heads=2", "mixer.core.name=gated"])
    config = mixers.config_from_node(tree["mixer"])
    assert (config.core.node_name, config.core.kv_heads, config.core.heads) == ("gated", 2, 8)
    assert mixers.config_from_node(config_lib.to_dict(config)) == config
    tree = {"mixer": {"name": "moh"}}
    config_lib.apply_overrides(tree, ["mixer.core=gated"])
    assert mixers.config_from_node(tree["mixer"]).core.node_name == "gated"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shared": 5}, "shared = 5.*0 to heads"),
        ({"shared": 2, "active": 3}, "active = 3.*1 to heads - shared"),
        ({"active": 0}, "active = 0"),
        ({"shared": 4, "active": 1}, "active = 1"),
        ({"core": {"heads": 2}}, "core.heads = 2"),
        ({"core": "moh"}, "core.name = 'moh'"),
        ({"core": {"kv_heads": 3}}, "core.kv_heads = 3"),
        ({"core": {"windo": 3}}, "did you mean 'window'"),
        ({"router": "norm", "shared": 3}, "one norm has no spread"),
        ({"router": "norm", "core": {"qk_norm": True}}, "qk_norm"),
        ({"router": "norm_hard", "core": {"qk_norm": "layer"}}, "core.qk_norm = 'layer'"),
        ({"router": "norm", "gate_norm": "paper"}, "gate_norm"),
        ({"router": "norm_dense", "impl": "gather"}, "impl = 'gather'.*heads that are off"),
        ({"impl": "sparse"}, "auto, definition, dense, gather"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "moh", **fields})


def test_bidirectional_does_not_stream():
    with pytest.raises(UnsupportedPattern, match="does not stream"):
        make(causal=False).init_state(1, 4)
