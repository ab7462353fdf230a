"""What is read off trained in-context learners."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from attnlab import config as config_lib
from attnlab.errors import UserError
from attnlab.train.config import RunConfig
from attnlab.train.state import Model
from benchmarks import in_context


def run_config(heads: int = 2, **model):
    mixer = {"name": "softmax", "heads": heads, "head_width": 4, "rope_base": None}
    return config_lib.build(
        RunConfig,
        {
            "data": {"name": "icl_regression", "d": 3, "examples": 6, "queries": "last", "batch": 2},
            "model": {
                "name": "regression", "inputs": 4, "width": 5, "layers": 1, "mlp_width": 0, "norm": "none",
                "mixers": {"M": mixer}, "dtype": "float64", **model,
            },
            "optimizer": {"name": "adamw", "learning_rate": 1e-3},
            "train": {"steps": 1},
        },
    )  # fmt: skip


def test_the_matrices_are_the_model():
    """The prediction is the residual's part of the query plus, over heads, a softmax of z_q^T M z_l over OV . z_l."""
    with jax.enable_x64(True):
        c = run_config()
        model = Model.of(c.model)
        params = model.init(0)
        z = np.random.default_rng(0).standard_normal((7, 4))
        y = np.asarray(jax.jit(lambda params, z: model.merge(params)(z).y)(params, z[None]))[0, -1, 0]
        logits, ov = in_context.matrices(c, params)
    scores = np.exp(z[-1] @ logits @ z.T)
    direct = z[-1] @ np.asarray(params["embedding"]["kernel"]) @ np.asarray(params["head"]["kernel"])[:, 0]
    np.testing.assert_allclose(y, direct + ((scores / scores.sum(1, keepdims=True)) * (ov @ z.T)).sum(), rtol=1e-10)


@pytest.mark.parametrize("model", [{"norm": "rms"}, {"layers": 2}, {"mlp_width": 8}])
def test_other_models_have_no_such_matrices(model):
    c = run_config(**model)
    with pytest.raises(UserError, match="one softmax layer"):
        in_context.matrices(c, {})


def test_structure_of_hand_built_heads():
    """Opposed heads of scaled identities are the debiased step; what departs from it shows in the figure for it."""
    logits = np.zeros((2, 4, 4))
    logits[0, :3, :3], logits[1, :3, :3] = 0.3 * np.eye(3), -0.3 * np.eye(3)
    ov = np.zeros((2, 4))
    ov[:, 3] = 2.0, -2.0
    assert in_context.structure(logits, ov) == {"diagonal": pytest.approx(1.0), "sum": 0.0, "outside": 0.0}
    logits[1, 0, 1] = 0.3
    ov[0, 3], ov[1, 0] = 1.0, 1.5
    found = in_context.structure(logits, ov)
    assert found["diagonal"] == pytest.approx(6 / 7) and found["sum"] == pytest.approx(1 / 3)
    assert found["outside"] == pytest.approx(1.5 / 3.5)
    assert in_context.structure(logits[:1], ov[:1])["sum"] is None


def test_a_rise_is_timed_by_its_parts():
    """A step after a plateau is narrow, a ramp is as wide as 1.2 times its middle, no rise has neither."""
    steps = [100, 200, 300, 400, 500]
    abrupt = in_context.rise(steps, [0.25, 0.25, 0.25, 1.0, 1.0], 0.25)
    assert abrupt["middle"] == pytest.approx(350) and abrupt["width"] == pytest.approx(60 / 350)
    ramp = in_context.rise(steps, [0.2, 0.4, 0.6, 0.8, 1.0], 0.0)
    assert ramp == {"middle": pytest.approx(250), "width": pytest.approx(300 / 250)}
    assert in_context.rise(steps, [0.25, 0.3, 0.3, 0.3, 0.34], 0.25) == {"middle": None, "width": None}
