"""One weight per channel, its value and the form of its gradient; projections where quantisers look."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.mixers.roles import Role
from attnlab.models.lm import LanguageModel, LanguageModelConfig
from attnlab.ops.linear import per_channel


@pytest.mark.parametrize("shape", [(1, 5, 3), (2, 5, 3), (1, 4, 2, 3), (3,)])
def test_one_weight_per_channel(shape):
    """w * x; the gradient for w is one sum over all other axes, those of size 1 too, which XLA on CPU needs."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w, x, dy = (jnp.asarray(rng.standard_normal(s)) for s in (shape[-1:], shape, shape))
        np.testing.assert_allclose(per_channel(w, x), np.asarray(w) * np.asarray(x), rtol=1e-15)
        gradient = lambda w: jax.vjp(lambda w: per_channel(w, x), w)[1](dy)[0]
        np.testing.assert_allclose(gradient(w), (np.asarray(x) * dy).reshape(-1, shape[-1]).sum(0), rtol=1e-12)
        sums = [e.params["axes"] for e in jax.make_jaxpr(gradient)(w).eqns if e.primitive.name == "reduce_sum"]
        assert sums == ([tuple(range(len(shape) - 1))] if len(shape) > 1 else [])


def test_projections_go_where_quantisers_look(monkeypatch):
    """Every matrix of a model meets its activations in `jax.lax.dot_general`, called by its public name."""
    config = LanguageModelConfig(vocab=32, width=16, layers=1, mixers={"S": mixers.get("gated").Config()}, pattern="S")
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    seen = []
    product = jax.lax.dot_general

    def replaced(x, w, *args, **kwargs):
        seen.append(w.shape)
        return product(x, w, *args, **kwargs)

    monkeypatch.setattr(jax.lax, "dot_general", replaced)
    jax.eval_shape(lambda: model.logits(model.hidden(jnp.zeros((1, 5), jnp.int32), mixers.Sequence.whole(1, 5)).y))
    roles = jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable))
    matrices = [v.shape[-2:] for v in roles if v.role in (Role.MATRIX, Role.OUTPUT)]
    assert sorted(seen) == sorted(matrices)
