"""What mixers with heads share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.heads import HeadConfig
from tests import tiers
from tests.mixers import cases, stated
from tests.mixers import test_contract as battery


def paths(config):
    module = nnx.eval_shape(lambda: mixers.build(config, width=16, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize("name", [n for n in mixers.names() if issubclass(mixers.get(n).Config, HeadConfig)])
def test_projections_that_have_a_bias(name):
    """`bias` adds one to each projection of queries, keys and values, `all` to the output's, as wide as they are."""
    for fields, qkv, out in stated.of(name, "BIASED", [({}, "q k v", "out")]):
        shapes = {bias: paths(mixers.get(name).Config(bias=bias, **fields)) for bias in ("none", "qkv", "all")}
        for bias, biased in (("qkv", qkv), ("all", f"{qkv} {out}")):
            new = {path: shape for path, shape in shapes[bias].items() if path not in shapes["none"]}
            assert new == {f"{p}.bias": shapes["none"][f"{p}.kernel"][1:] for p in biased.split()}


@tiers.often("softmax")
@pytest.mark.parametrize("name", ["flow", "softmax"])
def test_input_conv_is_a_convolution_of_the_input(name):
    """The layer of x plus its convolution, document by document; streams, packing, overflow and bf16 by the battery."""
    config = mixers.get(name).Config(input_conv=3)
    with jax.enable_x64(True):
        graphdef, params = cases.split(cases.module(config, jnp.float64))
        x, seq = cases.inputs(jnp.float64)
        y = battery.call(graphdef, params, x, seq)
        taps, convolved = np.asarray(params["input_taps"][...]), np.array(x)
        for row, first, end in cases.DOCUMENTS:
            for t in range(first, end):
                convolved[row, t] += sum(taps[2 - i] * x[row, t - i] for i in range(3) if t - i >= first)
        plain, its = cases.split(cases.module(mixers.get(name).Config(), jnp.float64))
        del params["input_taps"]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, its)
        expected = battery.call(plain, params, jnp.asarray(convolved), seq)
        battery.assert_close(y, expected, 1e-12)
        battery.test_split_anywhere(config, None)
        battery.test_packing(config, None)
        battery.test_overflow(config, None)
    battery.test_sums_are_wide(config)


def test_input_conv_looks_back():
    """Where a layer sees both ways, or reads what is not its sequence, it is refused."""
    for fields, allowed in (({"causal": False}, "1 where causal is false"), ({"source": "image"}, "1 where source")):
        with pytest.raises(ConfigError, match=f"input_conv = 3.*{allowed}"):
            mixers.get("softmax").Config(input_conv=3, **fields)
    with pytest.raises(ConfigError, match="core.input_conv = 2"):
        mixers.get("moh").Config(core={"name": "softmax", "input_conv": 2})
