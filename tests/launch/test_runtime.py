"""Settings of the process."""

from __future__ import annotations

import importlib.metadata
import os

import jax
import pytest

from attnlab.launch import runtime
from attnlab.train import executables


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


@pytest.mark.parametrize("given, version, expected", [
    ("", "0.10.2", "{flag}=LIBRARY_FUSION_TYPE_DOT,"),
    ("--a=1", "0.10.2", "--a=1 {flag}=LIBRARY_FUSION_TYPE_DOT,"),
    ("{flag}=x", "0.10.2", "{flag}=x"),
    ("--a=1", "0.12.0", "--a=1"),
])  # fmt: skip
def test_unsound_programs_of_cpus_are_left_out(monkeypatch, given, version, expected):
    """Of the version that makes them; what the user says of it stands, and other versions do not know the flag."""
    flag = "--xla_cpu_experimental_ynn_fusion_type"
    monkeypatch.setenv("XLA_FLAGS", given.format(flag=flag))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(runtime, "_keep_freed_memory", lambda: None)
    runtime.configure()
    found = os.environ["XLA_FLAGS"]
    assert found.startswith(expected.format(flag=flag)) and "REDUCE" not in found and "ELTWISE" not in found
    runtime.configure()
    assert os.environ["XLA_FLAGS"] == found


def test_steps_are_kept_whole_on_a_disk_alone(tmp_path, nowhere, monkeypatch):
    """Beside what jax keeps, for who asks; where that is in a bucket, nowhere."""
    told = []
    monkeypatch.setattr(executables, "keep_in", told.append)
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    runtime.keep_compiled(tmp_path, whole=True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "kept"))
    runtime.keep_compiled(tmp_path)
    assert told == []
    runtime.keep_compiled(tmp_path, whole=True)
    assert told == [tmp_path / "kept" / "steps"]
