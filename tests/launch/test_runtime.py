"""Settings of the process."""

from __future__ import annotations

import os

import jax
import pytest

from attnlab.launch import runtime


@pytest.fixture
def nowhere():
    """jax keeps nothing; what it is told in a test is forgotten."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("count, within", [(1, "/" + os.uname().nodename), (2, "")])
def test_programs_are_kept_in_the_workdir(tmp_path, monkeypatch, nowhere, count, within):
    """By host where a CPU's programs are one process's, in one place for several; else where jax says."""
    monkeypatch.setattr(jax, "process_count", lambda: count)
    runtime.keep_compiled(tmp_path)
    assert jax.config.jax_compilation_cache_dir == f"{tmp_path}/compiled{within}"
    runtime.keep_compiled(tmp_path / "other")
    assert jax.config.jax_compilation_cache_dir == f"{tmp_path}/compiled{within}"
