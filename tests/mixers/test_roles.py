"""What every parameter of every mixer and of the language model is, and where the parts of fused kernels lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.mixers import describe
from attnlab.mixers.base import Mixer, MixerConfig
from attnlab.mixers.parts import Linear
from attnlab.mixers.roles import Fused, Role, drawn, normal, param, usages
from attnlab.mixers.titans import TitansConfig
from attnlab.mixers.titans_memory import Memory, unit
from attnlab.models.lm import LanguageModelConfig
from attnlab.models.transformer import mixer_table
from attnlab.train.state import Model
from tests.mixers import cases, stated


def by_name(params):
    """Usages by dotted path, without `.kernel` of matrices and `.scale` of norms."""
    leaves = jax.tree_util.tree_leaves_with_path(usages(params))
    names = {jax.tree_util.keystr(path, simple=True, separator="."): usage for path, usage in leaves}
    ending = {Role.MATRIX: ".kernel", Role.OUTPUT: ".kernel", Role.SCALE: ".scale"}
    return {name.removesuffix(ending.get(usage.role, "")): usage for name, usage in names.items()}


@pytest.mark.parametrize("name", mixers.names())
def test_roles_of_every_parameter(name):
    """In all its configs together a mixer has the parameters that its tests state, each of one role."""
    found, fused = {}, set()
    for config, _ in cases.configs(name).values():
        module = nnx.eval_shape(lambda c=config: mixers.build(c, width=cases.WIDTH, rngs=nnx.Rngs(0)))
        for parameter, usage in by_name(nnx.state(module, nnx.Param)).items():
            if parameter.endswith(".bias"):
                assert usage.role is Role.BIAS
                continue
            found.setdefault(usage.role.value, set()).add(parameter)
            fused |= {parameter} if usage.fused else set()
    expected = {role: set(names.split()) for role, names in stated.of(name, "ROLES").items()}
    if any(getattr(config, "input_conv", 1) > 1 for config, _ in cases.configs(name).values()):
        expected.setdefault("taps", set()).add("input_taps")
    assert found == expected
    assert fused == set(stated.of(name, "FUSED", ()))


@pytest.mark.parametrize("name", mixers.names())
def test_matrices_begin_as_matrices(name):
    """A matrix has full rank at first: what begins as a constant, or as one row for all heads, is something else."""
    with cases.drawn_by_numpy():
        module = mixers.build({"name": name}, width=cases.WIDTH, rngs=nnx.Rngs(0))
    params = nnx.state(module, nnx.Param)
    for (path, usage), value in zip(jax.tree_util.tree_leaves_with_path(usages(params)), jax.tree.leaves(params)):
        if usage.role is Role.MATRIX:
            assert np.linalg.matrix_rank(np.asarray(value)) == min(value.shape), jax.tree_util.keystr(path)


@pytest.mark.parametrize("tied", [False, True])
def test_roles_of_the_language_model(tied):
    """Embedding and output projection are no matrices; the SwiGLU's are, and norms are scales."""
    layers = mixer_table({"M": {"name": "softmax"}}, "mixers")
    model = Model.of(LanguageModelConfig(vocab=20, width=16, layers=2, mixers=layers, tied=tied))
    found = {name: usage.role for name, usage in by_name(model.shapes).items()}
    block = "transformer.periods.blocks.0.sublayers"
    matrices = {f"{block}.0.branch.{n}" for n in "q k v out".split()}
    matrices |= {f"{block}.1.branch.{n}" for n in ("gate", "up", "down")}
    expected = dict.fromkeys(matrices, Role.MATRIX)
    expected |= dict.fromkeys(["norm", f"{block}.0.norm", f"{block}.1.norm"], Role.SCALE)
    expected |= {"embedding": Role.EMBEDDING} | ({} if tied else {"head": Role.OUTPUT})
    assert found == expected


def test_parts_of_the_memory_are_what_they_are_called():
    """Titans' q, k, v and its gates, computed from the parts of the fused kernels alone."""
    config = TitansConfig(heads=2, conv=0, momentum=True, forgetting=True, stability="none")
    memory = Memory(config, 8, ("embed", "heads"), 4, rngs=nnx.Rngs(0), dtype=jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 8)), jnp.float32)
    q, k, v, log_keep, log_eta, theta = jax.jit(lambda x: memory.inputs(x, None, None, None)[0])(x)
    part = lambda linear: dict(zip(dict(linear.kernel.fused.parts), linear.kernel.fused.split(linear.kernel[...])))
    qkv, gates = part(memory.qkv), part(memory.gates)
    x, sigmoid = np.asarray(x), lambda z: 1 / (1 + np.exp(-z))
    activated = {
        name: (z * sigmoid(z)).reshape(1, 3, 2, 4) for name, z in ((n, x @ np.asarray(y)) for n, y in qkv.items())
    }
    np.testing.assert_allclose(q, unit(jnp.asarray(activated["q"])), atol=1e-5)
    np.testing.assert_allclose(k, unit(jnp.asarray(activated["k"])), atol=1e-5)
    np.testing.assert_allclose(v, activated["v"], atol=1e-5)
    bias = dict(zip(gates, memory.gate_bias[...].T))
    gate = {name: sigmoid(x @ np.asarray(kernel) + np.asarray(bias[name])) for name, kernel in gates.items()}
    np.testing.assert_allclose(np.exp(log_keep), 1 - gate["alpha"], atol=1e-5)
    np.testing.assert_allclose(np.exp(log_eta), gate["eta"], atol=1e-5)
    np.testing.assert_allclose(theta, config.theta_max * gate["theta"], atol=1e-5)


def test_parts_are_columns():
    """Group by group, the parts in order; `join` puts them back."""
    fused = Fused((("a", 2), ("b", 1)), groups=2)
    x = jnp.arange(2 * 3 * 6).reshape(2, 3, 6)
    a, b = fused.split(x)
    np.testing.assert_array_equal(a, x[..., [0, 1, 3, 4]])
    np.testing.assert_array_equal(b, x[..., [2, 5]])
    np.testing.assert_array_equal(fused.join([a, b]), x)


def test_a_parameter_without_a_role_is_refused():
    """Where the mixer is built, by its name, before anything runs."""

    class Bare(Mixer):
        def __init__(self, config, *, width, rngs, dtype=jnp.float32):
            self.inner = Linear(width, width, ("embed", "heads"), rngs=rngs, dtype=dtype)
            self.inner.theta = nnx.Param(jnp.zeros(3), axes=("embed",))

        __call__ = flops = None

    class BareConfig(MixerConfig):
        node_name = "bare"

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mixers.base.MIXERS.classes, "bare", Bare)
        patch.setattr(mixers.base, "config_from_node", lambda node: BareConfig())
        with pytest.raises(ValueError, match=r"parameter inner.theta states no role; make it with .*roles.param"):
            mixers.build({"name": "bare"}, width=4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="role"):
        param(jnp.zeros(3), axes=("embed",))


@pytest.mark.parametrize("fields, message", [
    ({"role": "matrix"}, "role 'matrix' .* is unknown; allowed: Role.MATRIX, Role.EMBEDDING"),
    ({"axes": ("embed",)}, r"\[4, 6\] has 2 axes, \('embed',\) names 1"),
    ({"value": jnp.zeros(6), "axes": ("heads",)}, "a matrix has two axes or more"),
    ({"fused": Fused((("a", 3), ("b", 2)))}, "is 5 wide, the parameter .* is not"),
    ({"role": Role.TAPS, "fused": Fused((("a", 6),))}, "only a matrix has fused parts"),
])  # fmt: skip
def test_what_does_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        param(**{"value": jnp.zeros((4, 6)), "axes": ("embed", "heads"), "role": Role.MATRIX} | fields)


def test_listing_of_parameters():
    """What `attnlab list NAME --parameters` prints, of a wrapped mixer and of fused kernels."""
    rows = {row["path"]: row for row in describe.parameters("titans", 32)}
    assert rows["memory.qkv.kernel"] == {
        "path": "memory.qkv.kernel", "shape": [32, 96], "axes": ["embed", "heads"], "role": "matrix",
        "parts": {"q": 8, "k": 8, "v": 8}, "groups": 4, "decayed": True, "optimizer": "muon",
    }  # fmt: skip
    taps = rows["memory.kernel"]
    assert (taps["role"], taps["decayed"], taps["optimizer"], taps["parts"]) == ("taps", False, "adamw", None)
    assert {"core.q.kernel", "router.routed.kernel"} <= {row["path"] for row in describe.parameters("moh", 32)}
    columns, cells = describe.parameter_table(list(rows.values()))
    shown = {line[0]: dict(zip(columns, line)) for line in cells}
    assert shown["memory.qkv.kernel"]["parts"] == "4 times q 8, k 8, v 8"
    assert shown["memory.qkv.kernel"]["shape"] == "32 x 96" and shown["memory.kernel"]["decayed"] == "no"


def test_parameters_draw_by_the_streams_keys():
    """One after the other, as flax would give them; the stream goes on behind them."""
    ours, flax = nnx.Rngs(params=3), nnx.Rngs(params=3)
    draw = lambda: drawn(ours, normal, (4,), "float32", 1.0, axes=("width",), role=Role.BIAS)
    for _ in range(3):
        np.testing.assert_array_equal(draw()[...], normal(flax.params(), (4,), "float32", 1.0))
    assert ours.params.count[...] == flax.params.count[...] == 3
