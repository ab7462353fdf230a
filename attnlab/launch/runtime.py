"""Settings of the process, made once before jax makes an array."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import pathlib
import platform
import re
import signal
from collections.abc import Iterator
from typing import Any

_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds"
_FUSED = "--xla_cpu_experimental_ynn_fusion_type"
_SOUND = ("DOT", "INDIVIDUAL_DOT", "INDIVIDUAL_CONVOLUTION")
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -4, -1, -8  # malloc.h


def quiet() -> None:
    """Has XLA print errors, not information; call it before jax is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def seldom_collect() -> None:
    """Has Python look for garbage seldom: a tenth of start-up would go into modules and jaxprs, which are in use."""
    gc.set_threshold(200_000, 50, 50)


def configure() -> None:
    """Sets what the command line's programs run under; call it before anything touches a device.

    On CPU: freed memory is kept by the process (activations are large blocks that the allocator would otherwise give
    back and fault in again at every step), and programs are dispatched one after the other (two with collectives in
    flight at once can starve each other where several CPU devices are simulated).
    """
    quiet()
    # Other versions' XLA might end at flags that it does not know.
    of_0_10 = importlib.metadata.version("jaxlib").startswith("0.10.")
    if of_0_10 and _FUSED not in os.environ.get("XLA_FLAGS", ""):
        # Reductions and chains of elementwise operations that its CPU compiler gives to YNNPACK write beyond their
        # arrays (gradients of the recurrence of rwkv7); products, which do not, stay there.
        kinds = ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in _SOUND)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FUSED}={kinds}".strip()
    simulated = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if simulated:
        # Simulated devices wait for each other in threads of one pool, by default one per core: with more devices than
        # cores, those that wait can keep those they wait for from running, and XLA ends the process after a minute. A
        # loaded machine is slow, not stuck: it gets ten.
        if of_0_10 and _PATIENCE not in os.environ["XLA_FLAGS"]:
            os.environ["XLA_FLAGS"] += f" {_PATIENCE}=600"
        os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, 8 * int(simulated[1]))))
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # read when the CPU's client is made
    if jax.default_backend() == "cpu":
        _keep_freed_memory()


def keep_compiled(workdir: pathlib.Path, whole: bool = False) -> None:
    """Keeps compiled programs in a workdir, for whoever goes on there, unless jax has a place for them already.

    One process's programs for a CPU are of its host alone, whose instructions another may lack. Of several processes
    jax has one write for all. With `whole` the steps of runs are kept there as `attnlab.train.executables` says: for
    processes whose code is what its files say.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        _keep_in(workdir)
    folder = jax.config.jax_compilation_cache_dir
    if whole and "://" not in folder:
        from attnlab.train import executables

        executables.keep_in(pathlib.Path(folder) / "steps")


def _keep_in(workdir: pathlib.Path) -> None:
    import jax

    folder = workdir / "compiled"
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        folder /= os.uname().nodename
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process as an exception does, so that what is half written goes."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    old = {n: signal.signal(n, end) for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _keep_freed_memory() -> None:
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_ARENA_MAX, 1)
