"""Steps that a later process loads whole: the same numbers, and never another code's."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from attnlab import cli, ops
from attnlab import data as data_lib
from attnlab.train import executables, goodput, program
from attnlab.train.program import Program
from tests.train import runs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Steps are kept here; jax's own cache is empty, and the code older than this process."""
    monkeypatch.setattr(executables, "_unchanged", lambda: True)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    compilation_cache.reset_cache()
    executables.keep_in(tmp_path / "steps")
    yield tmp_path / "steps"
    executables.keep_in(None)
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def made(source, **overrides):
    """A program that nothing was compiled of, and what its first step gives."""
    jax.clear_caches()  # jax would not compile what this process has compiled
    program = Program(runs.config(source, model__layers=1, **overrides))
    loader = data_lib.open_data(program.config.data).training(seed=0)
    batch = program.put(next(loader))
    loader.close()
    with ops.recording() as traced:
        state = program.first_state(3)
        _, metrics = program.step(state, batch)
    program.keep()
    for thread in executables.threads():
        thread.join()
    return program, {name: np.asarray(value) for name, value in metrics.items()}, traced.choices


def test_a_later_process_loads_what_was_compiled(source, folder, caplog):
    """Bit for bit the same, with nothing traced, and the record of what was chosen; another config's is not taken,
    and a damaged one is said and made anew."""
    program, first, traced = made(source)
    assert traced and program.chosen and sorted(path.stem.split("-")[0] for path in folder.iterdir()) == [
        "init", "train_step",
    ]  # fmt: skip
    again, second, traced = made(source)
    assert not traced and again.chosen == program.chosen and again.step is not again.train_step
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
    step = next(folder.glob("train_step*"))
    step.write_bytes(step.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING):
        assert Program(program.config)._executables.load("train_step") is None and not step.exists()
    assert f"{step} cannot be used (ValueError: its digest is another's): compiled anew" in caplog.text
    other = Program(runs.config(source, model__layers=1, optimizer__learning_rate=3e-3))
    assert other._executables._key != program._executables._key
    assert other._executables.load("train_step") is None


def test_the_command_line_keeps_them_in_a_process_of_its_own(source, folder, tmp_path, monkeypatch, attnlab):
    """Where code is what its files say: the second run, and one that goes on, load what the first compiled, and their
    losses are its. What calls `cli.main` may have changed objects, and keeps nothing."""
    executables.keep_in(None)
    loaded, load, make, traced = [], executables.Executables.load, program.make_train_step, []
    monkeypatch.setattr(executables.Executables, "load", lambda *args: loaded.append(load(*args)) or loaded[-1])
    monkeypatch.setattr(program, "make_train_step", lambda *args: traced.append(1) or make(*args))
    fields = {"train__steps": 3, "train__eval_every": 0, "train__save_every": 1, "train__sample_tokens": 0}
    config = runs.write_config(tmp_path / "c.py", source, model__layers=1, **fields)
    kept = tmp_path / "jax" / "steps"

    def train(name, own):
        Program.forget()
        jax.clear_caches()
        loaded.clear()
        traced.clear()
        command = ["train", "--config", config, "--workdir", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["attnlab", *command])
        assert (cli.main() if own else attnlab(*command)[0]) == 0
        for thread in executables.threads():
            thread.join()
        return sum(found is not None for found in loaded), len(traced)

    assert train("called", own=False) == (0, 1) and not kept.exists()
    compilation_cache.reset_cache()
    shutil.rmtree(tmp_path / "jax")  # what jax took from there is not kept
    assert train("first", own=True) == (0, 1) and len(list(kept.iterdir())) == 2
    assert train("second", own=True) == (2, 0)
    shutil.rmtree(tmp_path / "second" / "checkpoints" / "3")
    assert train("second", own=True) == (1, 0)
    first, second = (runs.lines(tmp_path / name) for name in ("first", "second"))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]


def test_other_code_flags_and_versions_are_another_key(source, folder, tmp_path, monkeypatch):
    """Also a file that was imported from anywhere; attnlab's own that was not imported yet; a table of kernels."""
    program = Program(runs.config(source))
    key = lambda: executables.Executables("p", program.mesh.devices.ravel())._key
    before, seen = key(), set()

    def differs():
        assert key() not in seen | {before}
        seen.add(key())

    own = tmp_path / "own.py"
    own.write_text("a = 1")
    module = types.ModuleType("own")
    module.__file__ = str(own)
    monkeypatch.setitem(sys.modules, "own", module)
    differs()
    own.write_text("a = 2")
    differs()
    monkeypatch.delitem(sys.modules, "own")
    assert key() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--other")
        differs()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "t.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNLAB_KERNEL_TABLES", str(tmp_path / "tables"))
        differs()
        (tmp_path / "tables" / "t.json").write_text("[]")
        differs()
    (tmp_path / "site" / "other-1.0.dist-info").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "site"))
        differs()
    with jax.enable_x64(True):
        differs()
    assert key() == before
    assert any(path.name == "tpu_forward.py" for path in executables._sources())


def test_what_may_be_other_code_is_neither_kept_nor_read(source, folder, tmp_path, monkeypatch):
    """A file newer than the process; what was imported while it was traced; what jax took from its cache; no folder."""
    program = Program(runs.config(source))
    devices = program.mesh.devices.ravel()
    lowered = jax.jit(lambda x: x + 1).lower(1.0)

    def kept(between=lambda: None):
        entry = executables.Executables("p", devices)
        between()
        entry.made("f", lowered.compile())
        entry.keep()
        for thread in executables.threads():
            thread.join()
        there = folder.exists() and any(folder.glob("f-*"))
        for path in folder.glob("f-*"):
            path.unlink()
        return there

    assert kept()
    assert not kept(lambda: executables._heard("/jax/compilation_cache/cache_hits"))
    module = types.ModuleType("late")
    module.__file__ = str(tmp_path / "late.py")
    (tmp_path / "late.py").write_text("")
    assert not kept(lambda: monkeypatch.setitem(sys.modules, "late", module))
    monkeypatch.undo()
    old = max(path.stat().st_mtime for path in executables._sources())
    monkeypatch.setattr(goodput, "process_began", lambda: old + 1)
    assert kept()
    monkeypatch.setattr(goodput, "process_began", lambda: old - 1)
    assert not kept()
    monkeypatch.setattr(goodput, "process_began", lambda: old + 1)
    executables.keep_in(None)
    assert not kept()


def test_the_longest_unused_go(source, folder, monkeypatch):
    """A folder holds so many entries; one that is loaded is used."""
    monkeypatch.setattr(executables, "MOST", 2)
    devices = Program(runs.config(source)).mesh.devices.ravel()
    compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
    for at, name in enumerate("abc"):
        entry = executables.Executables("p", devices)
        entry.made(name, compiled)
        entry.keep()
        for thread in executables.threads():
            thread.join()
        for path in folder.glob(f"{name}-*"):
            os.utime(path, (at, at))
        if name == "b":
            loaded, _ = executables.Executables("p", devices).load("a")
            assert float(loaded(1.0)) == 2.0
    assert sorted(path.name[0] for path in folder.iterdir()) == ["a", "c"]
