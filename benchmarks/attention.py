"""Time and memory of softmax attention, forward and backward, beside torch's `scaled_dot_product_attention`.

    python -m benchmarks.attention [--lengths 1024 4096] [--rounds 7] [--json FILE]

Each round runs torch and then every attnlab case once, so that both meet the same machine; medians over the
rounds. Torch runs eager, `is_causal=True`, on contiguous [B, H, T, d]; attnlab on [B, T, H, d], as a model
holds them. Every ratio is to torch's plain causal attention of the same length: packed documents and windows
do less work than that. The peak memory of one long forward and backward is the maximum resident set of a
process of its own, the interpreter and libraries included.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from attnlab.ops import Mask, attention, mask_from_segments

BATCH, HEADS, WIDTH = 4, 8, 64
WINDOW = 256
MEMORY_LENGTH = 16384


def main() -> None:
    description = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=description)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="T of the timed cases")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; the median is reported")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    parser.add_argument("--memory-only", action="store_true", help="print this process's peak and stop")
    args = parser.parse_args()
    if args.memory_only:
        print(json.dumps(peak_memory()))
        return
    try:
        import torch
    except ImportError:
        sys.exit("benchmarks.attention: torch, the peer, is not installed; `pip install torch==2.13.0`")
    console = Console(width=None if sys.stdout.isatty() else 110)
    # First, while this process is small: a child's peak begins at the peak of the process that started it.
    command = [sys.executable, "-m", "benchmarks.attention", "--memory-only"]
    memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    timings = [row for length in args.lengths for row in time_length(torch, length, args.rounds)]
    shape = f"B{BATCH} H{HEADS} d{WIDTH}, {jax.default_backend()}"
    table = Table(title=f"attention, forward + backward, float32, {shape}")
    for name in ("T", "case", "median ms", "min ms", "to torch", "compile s"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in timings:
        columns = {"median_ms": ".1f", "min_ms": ".1f", "ratio": ".2f", "compile_s": ".1f"}
        cells = ("" if row[name] is None else format(row[name], spec) for name, spec in columns.items())
        table.add_row(str(row["length"]), row["case"], *cells)
    console.print(table)
    console.print(
        f"peak memory of forward + backward at T={memory['length']}, B1 H{HEADS} d{WIDTH} causal: "
        f"{memory['peak_mb']:.0f} MB (the whole process)"
    )
    if args.json:
        versions = {"jax": jax.__version__, "torch": torch.__version__}
        figures = {"versions": versions, "timings": timings, "memory": memory}
        args.json.write_text(json.dumps(figures, indent=1))


def forward_and_backward(q, k, v, do, mask: Mask):
    o, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)
    return o, vjp(do)


def random_inputs(batch: int, length: int, kv_heads: int = HEADS, dtype=jnp.float32) -> list[jax.Array]:
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, length, h, WIDTH), np.float32), dtype) for h in heads]


def random_documents(batch: int, length: int, mean: int) -> jax.Array:
    """Segments of documents whose lengths are exponentially distributed."""
    rng = np.random.default_rng(0)
    out = np.zeros((batch, length), np.int32)
    for row in out:
        ends = np.cumsum(rng.exponential(mean, size=length).astype(int) + 1)
        row[:] = 1 + np.searchsorted(ends, np.arange(length), side="right")
    return jnp.asarray(out)


def cases(length: int) -> dict[str, tuple[list[jax.Array], Mask]]:
    plain = random_inputs(BATCH, length)
    documents = random_documents(BATCH, length, length // 8)
    one_document = jnp.ones((BATCH, length), jnp.int32)
    return {
        "causal": (plain, Mask(causal=True)),
        f"causal, documents of {length // 8}": (plain, mask_from_segments(documents, length, causal=True)),
        "causal, one document a row": (plain, mask_from_segments(one_document, length, causal=True)),
        f"causal, window {WINDOW}": (plain, Mask(causal=True, window=WINDOW)),
        "causal, 2 kv heads": (random_inputs(BATCH, length, 2), Mask(causal=True)),
        "causal, bfloat16": (random_inputs(BATCH, length, dtype=jnp.bfloat16), Mask(causal=True)),
    }


def time_length(torch, length: int, rounds: int) -> list[dict]:
    """One row for torch and one for each case: median and least milliseconds, and the ratio of medians to
    torch."""
    samples: dict[str, list[float]] = {}
    compile_s: dict[str, float | None] = {"torch causal": None}
    calls: dict[str, Callable[[], object]] = {"torch causal": torch_call(torch, length)}
    for name, (inputs, mask) in cases(length).items():
        begin = time.perf_counter()
        compiled = jax.jit(forward_and_backward).lower(*inputs, mask).compile()
        compile_s[name] = time.perf_counter() - begin
        calls[name] = lambda f=compiled, x=(*inputs, mask): jax.block_until_ready(f(*x))
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            samples.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))
    median = {name: statistics.median(times) for name, times in samples.items()}
    return [
        {
            "length": length,
            "case": name,
            "median_ms": median[name],
            "min_ms": min(times),
            "ratio": median[name] / median["torch causal"],
            "compile_s": compile_s[name],
        }
        for name, times in samples.items()
    ]


def torch_call(torch, length: int) -> Callable[[], object]:
    q, k, v = (torch.randn(BATCH, HEADS, length, WIDTH, requires_grad=True) for _ in range(3))
    do = torch.randn(BATCH, HEADS, length, WIDTH)

    def call():
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(o, (q, k, v), do)

    return call


def peak_memory() -> dict[str, float]:
    inputs = random_inputs(1, MEMORY_LENGTH)
    jax.block_until_ready(jax.jit(forward_and_backward)(*inputs, Mask(causal=True)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"length": MEMORY_LENGTH, "peak_mb": peak / (2**20 if sys.platform == "darwin" else 2**10)}


if __name__ == "__main__":
    main()
