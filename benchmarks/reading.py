"""How fast a checkpoint becomes parameters, beside how fast its files can be read at all, and how much memory it takes.

    python -m benchmarks.interchange --read-gib 2 [--dir DIR]

A checkpoint of Llama's layout in bfloat16 is written, in files of at most 256 MiB. Its files are read one after the
other in blocks, then by the import; both after the kernel was told to forget them, and again with all in memory.
Memory is what the process holds of its own (files that are mapped are not) beyond what it held before and beyond the
parameters themselves, over eight devices that share them.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

GIB, BLOCK, FILE = 2**30, 2**23, 2**28
WIDTH, HIDDEN, VOCAB, DEVICES = 2048, 8192, 32768, 8
_LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN + 2 * WIDTH


def made(folder: pathlib.Path, gib: float) -> int:
    """Writes the checkpoint; its bytes, about what is asked for."""
    from attnlab.interchange.families.llama import Llama
    from attnlab.interchange.pieces import Table
    from attnlab.interchange.safetensors import DTYPES, Made, write
    from attnlab.models import config_from_node

    layers = max(1, round((gib * GIB / 2 - 2 * VOCAB * WIDTH) / _LAYER))
    mixer = {"name": "softmax", "heads": 16}
    node = {"vocab": VOCAB, "width": WIDTH, "layers": layers, "mlp_width": HIDDEN, "mixers": {"M": mixer}}
    config, family, rng = config_from_node(node, "model"), Llama(), np.random.default_rng(0)
    drawn = rng.standard_normal(2**22).astype(DTYPES["BF16"])
    make = lambda shape: lambda: np.resize(drawn, shape)
    tensors = [Made(name, "BF16", s, make(s)) for name, s in Table(list(family.pieces(config))).shapes.items()]
    folder.mkdir(parents=True)
    write(folder, tensors, FILE, lambda count: None)
    (folder / "config.json").write_text(json.dumps(family.write(config, 1024)))
    return sum(tensor.bytes for tensor in tensors)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: pathlib.Path) -> None:
    """Has the kernel drop the files from memory."""
    for file in files(folder):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(folder: pathlib.Path) -> float:
    """Seconds of reading all bytes in order."""
    block, began = bytearray(BLOCK), time.perf_counter()
    for file in files(folder):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass
    return time.perf_counter() - began


def _held() -> int:
    """Bytes of the process's own."""
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])


def imported(folder: pathlib.Path) -> dict[str, Any]:
    """Of this process: seconds, parameters' bytes, the largest shard's, and the most that was held beyond both."""
    import jax

    from attnlab.interchange import importing
    from attnlab.train.program import Program

    overrides = ["data.tokenizer=bytes", f"mesh.fsdp={DEVICES}", "mesh.data=1", "data.batch=8"]
    plan = importing.plan(folder, None, None, overrides)
    program = Program.of(plan.config, batches=False)
    shard = max(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(program.params)
    )
    before, most, done = _held(), [0], threading.Event()
    placed = [0]

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], _held() - before - placed[0])

    put = jax.device_put

    def counted(value: Any, device: Any) -> Any:
        placed[0] += value.nbytes  # what the device is about to hold
        return put(value, device)

    jax.device_put = counted
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    params = jax.block_until_ready(importing.parameters(plan, program, lambda count: None))
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"seconds": seconds, "parameters": held, "largest_shard": shard, "beyond": most[0]}


def _in_a_process(folder: pathlib.Path) -> dict[str, Any]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    command = [
        sys.executable,
        "-c",
        "import sys; from benchmarks import reading; reading.main(sys.argv[1])",
        str(folder),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main(folder: str) -> None:
    """Prints what `imported` finds."""
    print(json.dumps(imported(pathlib.Path(folder))))


def measured(gib: float, directory: str | None = None) -> dict[str, Any]:
    """Seconds of reading the files and of importing them, forgotten and in memory, and the import's memory."""
    with tempfile.TemporaryDirectory(dir=directory) as above:
        folder = pathlib.Path(above) / "checkpoint"
        size = made(folder, gib)
        found: dict[str, Any] = {"bytes": size}
        for kind in ("forgotten", "in_memory"):
            for name, run in (("files", read_through), ("import", _in_a_process)):
                if kind == "forgotten":
                    forget(folder)
                got = run(folder)
                found[f"{kind}_{name}_seconds"] = got if name == "files" else got.pop("seconds")
        found |= got
        found["of_the_files_speed"] = found["forgotten_files_seconds"] / found["forgotten_import_seconds"]
        found["beyond_in_shards"] = found["beyond"] / found["largest_shard"]
    return found
