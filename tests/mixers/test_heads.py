"""What mixers with heads share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.mixers.heads import HeadConfig, HeadMixer
from tests.mixers import cases

QKV = {"q", "k", "v"}
BIASED = {  # projections of queries, keys and values by mixer, where they are not these three; `out` is everybody's
    "parallax": QKV | {"r"},
    "titans": {"memory.qkv", "attention.q", "attention.k", "attention.v"},
}
FIELDS = {"titans": [({}, BIASED["titans"], {"out"})]}
FIELDS["titans"] += [
    ({"variant": "mal"}, BIASED["titans"], {"out", "between"}),
    ({"variant": "mac"}, {f"mixed.{name}" for name in (*BIASED["titans"], "query", "retrieved")}, {"out"}),
]


def paths(config):
    module = nnx.eval_shape(lambda: mixers.build(config, width=16, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize("name", [n for n in mixers.names() if issubclass(mixers.get(n).Config, HeadConfig)])
def test_projections_that_have_a_bias(name):
    """`bias` adds one to each projection of queries, keys and values, `all` to the output's, as wide as they are."""
    for fields, qkv, out in FIELDS.get(name, [({}, BIASED.get(name, QKV), {"out"})]):
        shapes = {bias: paths(mixers.get(name).Config(bias=bias, **fields)) for bias in ("none", "qkv", "all")}
        for bias, biased in (("qkv", qkv), ("all", qkv | out)):
            new = {path: shape for path, shape in shapes[bias].items() if path not in shapes["none"]}
            assert new == {f"{p}.bias": shapes["none"][f"{p}.kernel"][1:] for p in biased}


@pytest.mark.parametrize("name", [n for n in mixers.names() if issubclass(mixers.get(n), HeadMixer)])
def test_padding_gives_zero(name):
    """Whatever a layer computes there: its output, without a bias, is exactly 0 at padding, of rows and of a stream."""
    module = cases.module(mixers.get(name).Config(), jnp.float32)
    x, seq = cases.inputs(jnp.float32)
    padding = np.asarray(seq.segments) == 0
    y = jax.jit(module)(x, seq).y
    streamed, _ = cases.streamed(jax.jit(module.extend), module.init_state(2, cases.LENGTH), x, seq, [cases.LENGTH])
    for found in (y, streamed):
        np.testing.assert_array_equal(np.asarray(found)[padding], 0)
        assert np.all(np.abs(np.asarray(found)[~padding]).max(-1) > 0)
