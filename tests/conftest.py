"""Settings of the whole suite: CPU with eight devices, and compiled programs kept between runs."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compiling programs that run once: LLVM's optimisations cost more than they give.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from attnlab.launch import runtime  # noqa: E402

runtime.configure()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True)
def few_programs():
    """Drops compiled programs before they are too many: each is memory maps, and Linux ends a process with 65,530."""
    yield
    global _tests
    _tests += 1
    maps = pathlib.Path("/proc/self/maps")
    if _tests % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


_tests = 0
