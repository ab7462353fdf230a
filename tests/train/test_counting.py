"""A loss that hangs on the number of the training step: hops of a graph that grow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.models.distillation import Matching
from attnlab.train.program import Program
from tests.train import runs

NODES, T = 6, 16
GROWING = {"hops": 2, "grow": 8}
HOPS = {0: 0, 3: 0, 4: 1, 7: 1, 8: 2, 1000: 2}  # by step
OPTIONS = {"z_loss": 0.0, "loss_chunk": 100, "loss_impl": "auto"}


@pytest.fixture
def make(tmp_path):
    """Programs of one layer over a ring, by knobs of the mask."""
    np.save(tmp_path / "ring.npy", np.roll(np.eye(NODES, dtype=bool), 1, axis=1))

    def program(**knobs):
        mask = {"name": "graph_hops", "path": str(tmp_path / "ring.npy"), **knobs}
        mixer = {"name": "softmax", "heads": 2, "mask": mask}
        fields = {"model__layers": 1, "model__mixers": {"M": mixer}, "data__length": T, "train__accumulate": 4}
        return Program.of(runs.config("stdlib", **fields))

    return program


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 257, (8, T + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (8, T))
    node = rng.integers(1, NODES + 1, (8, T)).astype(np.int32)
    whole = {"segments": np.ones_like(positions), "positions": positions, "node": node}
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], **whole}


def test_each_step_has_its_hops(make):
    """In micro-batches, and whatever came before: the loss is that of a mask of as many hops, and one program serves
    all steps. Evaluation has the last."""
    growing, losses = make(**GROWING), []
    params = runs.drawn(growing.model)
    for hops in range(3):
        model = make(hops=hops).model
        nll = jax.jit(lambda params, model=model: model.merge(params).token_losses(batch())[0])(params)
        losses.append(float(jnp.mean(nll)))
    assert np.min(np.abs(np.diff(losses))) > 1e-3
    for step, hops in HOPS.items():
        state = dataclasses.replace(runs.first(growing), step=np.int32(step))
        _, metrics = growing.train_step(jax.device_put(state, growing.shardings), batch())
        np.testing.assert_allclose(metrics["loss"], losses[hops], rtol=1e-5)
    assert growing.train_step._cache_size() == 1
    sums = jax.device_get(growing.eval_step(params, batch()))
    np.testing.assert_allclose(sums["nll"].sum() / sums["tokens"].sum(), losses[2], rtol=1e-5)


def test_a_teacher_has_the_last(make):
    """A student that is its teacher differs from it while its hops grow, and no longer."""
    program = make(**GROWING)
    of = lambda **fields: Matching(**fields).resolved(program.config.model, program.config.model)

    @jax.jit
    def found(params, step):
        model, given = program.model.merge(params), OPTIONS | {"step": step}
        learn = functools.partial(model.distill, model, batch(), None, given)
        return learn(of(match="layers", layers=(0,))).total, learn(of()).metrics["distill_kl"]

    params = runs.drawn(program.model)
    assert min(found(params, 4)) > 1e-3
    assert not any(found(params, 8))
