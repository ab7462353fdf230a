"""The program of a run: shared between runs that compute the same, and what is restored and traced for its mesh."""

from __future__ import annotations

import json
import shutil
import threading
import types

import jax
import numpy as np
import pytest

from attnlab import data as data_lib
from attnlab import memory, mixers
from attnlab.errors import Damaged, UserError
from attnlab.evaluate import generate as generate_lib
from attnlab.evaluate.generate import Sampling, generate
from attnlab.train.checkpoints import Checkpoints
from attnlab.train.loop import train
from attnlab.train.program import Program
from tests import tiers
from tests.train import runs

SHORT = {"train__steps": 3, "train__eval_every": 3, "train__save_every": 0, "train__sample_tokens": 0}


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """A workdir, and what its training came to."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(runs.config(source, **SHORT), workdir)


def test_only_what_is_computed_tells_programs_apart(source):
    """Seeds, names, paths and how often is logged do not; sizes, the optimizer, the mesh and whether there is a
    teacher do; the number of steps where the rate depends on it."""
    program = Program.of(runs.config(source))
    for same in ({"seed": 9}, {"train__log_every": 7}, {"train__keep": 4}, {"data__source": "stdlib"}):
        assert Program.of(runs.config(source, **same)) is program
    for other in (
        {"train__z_loss": 0.1}, {"train__accumulate": 2}, {"data__length": 16},
        {"model__width": 32}, {"optimizer__learning_rate": 1.0}, {"mesh": {"data": 2}}, {"model__norm_epsilon": 1e-5},
        {"train__distill": {"teacher": "v"}},
    ):  # fmt: skip
        assert Program.of(runs.config(source, **other)) is not program
    made = lambda **more: Program.of(runs.config(source, **more))
    assert made() is made(train__steps=13) is not made(optimizer__warmup=0.5)
    for schedule in ({"optimizer__warmup": 0.5}, {"optimizer__schedule": "cosine"}, {"optimizer__schedule": "wsd"}):
        assert made(**schedule) is not made(**schedule, train__steps=24)
    Program.forget()
    assert Program.of(runs.config(source)) is not program


def test_seeds_share_what_was_compiled(source, tmp_path, capfd, caplog):
    """Three quiet runs of one process: one compilation, results that differ by the seed and not by what ran before."""
    sampled, before = SHORT | {"train__sample_tokens": 2}, generate_lib._kept_program.cache_info().misses
    results = [train(runs.config(source, **sampled, seed=seed), tmp_path / str(i)) for i, seed in enumerate((3, 4, 3))]
    assert generate_lib._kept_program.cache_info().misses - before <= 1
    assert all((tmp_path / str(i) / "samples.txt").read_text() for i in range(3))
    program = Program.of(runs.config(source, **SHORT))
    for compiled in (program.train_step, program.eval_step):
        assert compiled._cache_size() == 1
    assert runs.lines(tmp_path / "0") == runs.lines(tmp_path / "2") != runs.lines(tmp_path / "1")
    assert results[0].evaluation.loss == results[2].evaluation.loss != results[1].evaluation.loss
    assert capfd.readouterr() == ("", "")
    with jax.log_compiles():  # the losses differ by the data anyway
        drawn = [
            np.asarray(program.first_state(seed).params["embedding"]) for seed in (3, 4, 3)
        ]  # the data differ anyway
    assert "Finished XLA" not in caplog.text
    assert (drawn[0] == drawn[2]).all() and (drawn[0] != drawn[1]).any()
    for i in range(3):
        assert '"attention"' in (tmp_path / str(i) / "config.json").read_text()  # chosen while the first was traced


def test_the_level_of_a_first_state(source, monkeypatch):
    """Low, as it is compiled for one call, but where XLA_FLAGS say at which level all is compiled."""
    program, told = Program(runs.config(source, **SHORT)), []
    compiled = types.SimpleNamespace(compile=lambda *options: told.append(options) or (lambda seed: None))
    program.__dict__["init"] = program.__dict__["train_step"] = types.SimpleNamespace(lower=lambda *_: compiled)
    program.once = {"xla_backend_optimization_level": 1}
    for flags in ("", "--xla_backend_optimization_level=2"):
        monkeypatch.setenv("XLA_FLAGS", flags)
        program._compiled_init = program._step = None
        program.first_state(0)
    assert sorted(map(str, told)) == sorted(map(str, [(program.once,), (), (None,), ()]))


def test_a_result_says_what_the_workdir_does(source, trained):
    """Step, tokens, last line and figures; of a run that is complete, that it is."""
    workdir, result = trained
    last = runs.lines(workdir)[-1]
    assert (result.step, result.tokens, result.stopped) == (3, last["tokens"], None)
    assert result.metrics["loss"] == last["loss"] and result.evaluation.loss == last["heldout_loss"]
    again = train(runs.config(source, **SHORT), workdir)
    assert (again.step, again.tokens, again.metrics, again.evaluation) == (3, last["tokens"], {}, None)


def test_runs_in_a_thread(source, tmp_path):
    """Where no signal can be heard."""
    found = []
    thread = threading.Thread(target=lambda: found.append(train(runs.config(source, **SHORT), tmp_path / "run")))
    thread.start()
    thread.join(timeout=300)
    assert found and found[0].step == 3


def test_parameters_alone_are_restored(source, trained):
    """Bit for bit those of the whole state, on any mesh, in the memory of themselves alone."""
    workdir, _ = trained
    checkpoints, program = Checkpoints(workdir), Program.of(runs.config(source, **SHORT))
    state, host = checkpoints.restore(3, program.state)
    for mesh in ({"data": 1}, {"data": 2, "fsdp": 4}):
        like = Program.of(runs.config(source, **SHORT, mesh=mesh)).params
        before = sum(a.nbytes for a in jax.live_arrays())
        params, same = checkpoints.restore_params(3, like)
        assert sum(a.nbytes for a in jax.live_arrays()) - before <= 1.01 * memory.size(like)
        assert same == host
        for a, b, s in zip(*map(jax.tree.leaves, (params, state.params, like)), strict=True):
            assert a.sharding == s.sharding
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("how", ["another shape", "one too many", "one too few", "damage"])
def test_parameters_that_do_not_fit_are_refused(source, trained, tmp_path, how):
    """As with the whole state."""
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    like = dict(Program.of(runs.config(source, **SHORT)).params)
    rows = like["embedding"]
    if how == "another shape":
        like["embedding"] = jax.ShapeDtypeStruct(
            (rows.shape[0] + 1, *rows.shape[1:]), rows.dtype, sharding=rows.sharding
        )
    elif how == "one too many":
        like["more"] = rows
    elif how == "one too few":
        del like["norm"]
    else:
        largest = max((workdir / "checkpoints" / "3").rglob("*"), key=lambda p: p.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    message = "is damaged|SHA|digest|not what was written" if how == "damage" else "though its files are whole"
    with pytest.raises(Damaged if how == "damage" else UserError, match=message):
        Checkpoints(workdir).restore_params(3, like)


STREAMING = [name for name in mixers.names() if mixers.get(name).capabilities.streaming]


@tiers.often("softmax")
@tiers.parametrize("name", STREAMING, often=["softmax", "gated_deltanet"])
def test_generation_is_that_of_one_device(source, name):
    """Traced under the rules of a mesh of eight devices, every axis split that can be, tokens are those of one."""
    prompts = [np.arange(1, 12, dtype=np.int32), np.array([3, 1, 4], np.int32)]
    found = []
    split = mixers.get(name).sequence_parallel_of(mixers.get(name).Config())
    eight = {"data": 1, "fsdp": 2, "tensor": 2} | ({"context": 2} if split else {"data": 2})
    for mesh in ({"data": 1}, eight):
        mixer = {"name": name, "heads": 2} | ({"kv_heads": 1} if name == "softmax" else {})
        config = runs.config(source, model__mixers={"M": mixer}, model__layers=1, mesh=mesh)
        program = Program(config, batches=False)
        params = jax.device_put(runs.drawn(program.model), jax.tree.map(lambda a: a.sharding, program.params))
        sampling = Sampling(tokens=6, temperature=0)
        found.append(generate(program.model.merge, params, prompts, sampling, program.streamed).tokens)
    np.testing.assert_array_equal(*found)


def test_keys_that_came_later_are_at_their_defaults(source, tmp_path):
    """A workdir from before a key existed goes on under it; one that set it otherwise does not."""
    train(runs.config(source, **SHORT), tmp_path)
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    for group, key in (("model", "name"), ("model", "norm_epsilon"), ("data", "name")):
        del described["config"][group][key]
    path.write_text(json.dumps(described))
    assert train(runs.config(source, **SHORT), tmp_path).step == 3
    with pytest.raises(UserError, match="model.norm_epsilon: 1e-06 -> 1e-05"):
        train(runs.config(source, **SHORT, model__norm_epsilon=1e-5), tmp_path)


def test_opened_data_is_that_of_the_config(source):
    """Micro-batches are the same data in other rows; nothing is opened again."""
    data = data_lib.open_data(runs.config(source).data)
    small = data.resized(2)
    assert (small.config.batch, data.config.batch) == (2, 8) and small.tokenizer is data.tokenizer
