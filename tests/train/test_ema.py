"""Averaged weights: the recursion written out, and that they are kept, restored and used."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from attnlab import cli
from attnlab.errors import ConfigError, UserError
from attnlab.train import loop, restore
from attnlab.train.program import Program
from attnlab.train.state import flat
from tests.interchange import checkpoints
from tests.train import runs

SMALL = {"train__ema": 0.4, "train__steps": 5, "train__eval_every": 0, "train__save_every": 2, "train__keep": 9,
         "train__sample_tokens": 0, "optimizer__schedule": "constant", "model__mlp_width": 32}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("ema") / "run"
    loop.train(runs.config(source, **SMALL), path)
    return path


def arrays(path, step, ema):
    return {name: np.asarray(x) for name, x in flat(restore.load(path, str(step), ema=ema).params).items()}


def test_it_is_the_recursion(source):
    """w <- w + (1 - min(b, (1 + t)/(10 + t))) (p - w), in float64 beside it; steps of infinite gradients pass it by."""
    config = runs.config(source, **SMALL)
    program, rng = Program.of(config), np.random.default_rng(0)
    state = program.first_state(0)
    wanted = {name: np.asarray(x, np.float64) for name, x in flat(jax.device_get(state.params)).items()}
    for name, x in flat(state.ema).items():
        np.testing.assert_array_equal(x, wanted[name], err_msg=name)
    for t in range(8):  # the decay is the bound from t = 5 on
        tokens = rng.integers(0, 257, (8, 33)).astype(np.int32)
        ones = np.ones((8, 32), np.int32)
        positions = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32))
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": ones, "positions": positions}
        state, _ = program.train_step(state, program.put(batch))
        decay = min(0.4, (1 + t) / (10 + t))
        params = flat(jax.device_get(state.params))
        wanted = {name: decay * w + (1 - decay) * params[name] for name, w in wanted.items()}
        for name, x in flat(jax.device_get(state.ema)).items():
            np.testing.assert_allclose(x, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert max(np.abs(x - params[name]).max() for name, x in flat(jax.device_get(state.ema)).items()) > 1e-3
    broken = np.asarray(state.params["norm"]["scale"]) * np.nan
    state.params["norm"]["scale"] = jax.device_put(broken, state.params["norm"]["scale"].sharding)
    before = jax.device_get(state.ema)
    state, metrics = program.train_step(state, program.put(batch))
    assert metrics["nonfinite"] == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.ema))


def test_it_is_restored_bit_for_bit(source, unbroken, tmp_path, monkeypatch):
    """A run that is broken off after a save ends with the averages of one that was not."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = loop._Run._finish

        def finish(self, step, *args, **kwargs):
            if step > 3:
                raise KeyboardInterrupt
            return real(self, step, *args, **kwargs)

        patch.setattr(loop._Run, "_finish", finish)
        loop.train(runs.config(source, **SMALL), tmp_path / "w")
    loop.train(runs.config(source, **SMALL), tmp_path / "w")
    for ema in (True, False):
        found, wanted = arrays(tmp_path / "w", 5, ema), arrays(unbroken, 5, ema)
        for name, x in wanted.items():
            np.testing.assert_array_equal(found[name], x, err_msg=name)
    assert any(np.any(x != wanted[name]) for name, x in arrays(unbroken, 5, True).items())


def test_verbs_use_it(unbroken, capsys):
    """`eval` and `generate` tell that they do; the loss is that of these weights."""
    losses = {}
    for flags in ((), ("--ema",)):
        assert cli.main(["eval", "--workdir", str(unbroken), "--batches", "1", "--json", *flags]) == 0
        told = json.loads(capsys.readouterr().out)
        assert ("of the averaged weights (train.ema = 0.4)" in told["notes"]) == bool(flags)
        losses[flags] = told["heldout_loss"] if "heldout_loss" in told else told["loss"]
    assert losses[()] != losses[("--ema",)]
    trained = restore.load(unbroken, "best", ema=True)
    assert restore.evaluate_heldout(trained, 1)[0].loss == losses[("--ema",)]
    args = ["--prompt", "def", "--tokens", "2", "--json", "--ema"]
    assert cli.main(["generate", "--workdir", str(unbroken), *args]) == 0
    assert "of the averaged weights (train.ema = 0.4)" in json.loads(capsys.readouterr().out)["notes"]


def test_export_takes_it(source, unbroken, tmp_path, attnlab):
    """The folder has the averages, and says so; of a run without them it is refused, and there is none."""
    to = lambda *args: attnlab("export", "--workdir", unbroken, "--checkpoint", "4", "--json", "--to", *args)
    found = {}
    for flags in ((), ("--ema",)):
        code, out, err = to(tmp_path / f"to{len(flags)}", *flags)
        assert code == 0, err
        noted = "of the averaged weights (train.ema = 0.4)" in json.loads(out)["notes"]
        (scale,) = [a for f in (tmp_path / f"to{len(flags)}").glob("*.safetensors")
                    for name, a in checkpoints.read_file(f).items() if name == "model.norm.weight"]  # fmt: skip
        np.testing.assert_array_equal(scale, arrays(unbroken, 4, bool(flags))["norm.scale"])
        assert noted == bool(flags)
        found[flags] = scale
    assert np.any(found[()] != found[("--ema",)])


def test_without_it_there_is_none(source, unbroken, tmp_path):
    """Off is no array; asked for it is an error, and so is turning it on or off midway."""
    less = {**SMALL, "model__mlp_width": 0, "model__layers": 1}
    off = {**less, "train__steps": 3, "train__save_every": 3, "train__ema": 0}
    config = runs.config(source, **off)
    assert Program.of(config).shapes.ema is None
    loop.train(config, tmp_path / "w")
    with pytest.raises(
        UserError, match="checkpoint 3 in .* has no averaged weights; allowed: one of a run with train.ema"
    ):
        restore.load(tmp_path / "w", ema=True)
    on = runs.config(source, **less, train__on_config_change="continue")
    with pytest.raises(UserError, match="(?s)ema.* was not there, is float32.*train.ema, or use another workdir"):
        loop.train(on, tmp_path / "w")
    with pytest.raises(ConfigError, match="train.ema = 1.0 is not possible; allowed: 0 .none. or more, below 1"):
        runs.config(source, train__ema=1.0)
