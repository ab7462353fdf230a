"""Saving on several hosts: processes of one device each that share a state; `benchmarks.checkpoints --hosts`.

The state is one and the same however many processes there are, split over them (`mesh.fsdp`), so that a process's own
part shrinks with their number; on its own disk it writes the part of its neighbour, too.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

ROWS = 1024


def measure(counts: list[int], gigabytes: float, rounds: int, directory: pathlib.Path) -> list[dict[str, Any]]:
    """For each number of processes, of the slowest one: seconds that steps wait for a save, and until it is on disk."""
    return [_together(count, gigabytes, rounds, directory / f"hosts{count}") for count in counts]


def table(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of what `measure` found."""
    columns = ["processes", "MB each writes locally", "local: steps wait, s", "on disk, s", "CPU s of each",
               "workdir: steps wait, s", "on disk, s", "CPU s of each"]  # fmt: skip
    times = ("local_wait", "local_disk", "local_cpu", "workdir_wait", "workdir_disk", "workdir_cpu")
    rows = [[str(f["processes"]), f"{f['megabytes']:,.0f}", *(f"{f[name]:.2f}" for name in times)] for f in found]
    return columns, rows


def _together(count: int, gigabytes: float, rounds: int, directory: pathlib.Path) -> dict[str, Any]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.checkpoint_hosts", str(count), str(port), str(gigabytes), str(rounds)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    workers = [
        subprocess.Popen([*command, str(directory), str(i)], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    try:
        answers = [json.loads(worker.communicate(timeout=600)[0].splitlines()[-1]) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return {"processes": count, **{name: max(a[name] for a in answers) for name in answers[0]}}


def _work(
    count: int, port: int, gigabytes: float, rounds: int, directory: pathlib.Path, index: int
) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
    from attnlab.train.checkpoints import Checkpoints, Host
    from attnlab.train.config import ClusterConfig
    from attnlab.train.local_checkpoints import LocalCheckpoints
    from attnlab.train.pieces import Layout
    from attnlab.train.processes import Processes
    from attnlab.train.state import TrainState

    mesh = jax.make_mesh((count,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    width = max(int(gigabytes * 1e9 / 4 / ROWS / 8), 1)
    make = lambda seed: {f"w{i}": jax.random.normal(jax.random.key(seed + i), (ROWS, width)) for i in range(8)}
    params = jax.jit(make, out_shardings=split)(0)
    zero = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=whole)
    state = TrainState(zero(), params, {}, zero(), zero(), zero())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    processes = Processes(ClusterConfig())
    directory.mkdir(parents=True, exist_ok=True)
    layout = Layout(mesh, like)
    local = LocalCheckpoints(directory / f"disk{index}", directory, layout, processes)
    workdir = Checkpoints(directory, processes=processes)
    found = {"megabytes": layout.bytes_of(index) / 1e6}
    for name, tier in (("local", local), ("workdir", workdir)):
        times = []
        for step in range(1, rounds + 2):
            processes.barrier()
            started, cpu = time.perf_counter(), time.process_time()
            tier.save(step, state, Host(0, {}, {}))
            waited = time.perf_counter()
            tier.wait()
            times.append((waited - started, time.perf_counter() - started, time.process_time() - cpu))
        # The first one compiles what moves the pieces, and opens what writes them.
        for what, each in zip(("wait", "disk", "cpu"), zip(*times[1:])):
            found[f"{name}_{what}"] = statistics.median(each)
    processes.barrier()
    local.close()
    workdir.close()
    processes.close()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for field, kind in (("count", int), ("port", int), ("gigabytes", float), ("rounds", int),
                        ("directory", pathlib.Path), ("index", int)):  # fmt: skip
        parser.add_argument(field, type=kind)
    print(json.dumps(_work(**vars(parser.parse_args()))), flush=True)
