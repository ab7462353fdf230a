"""What MoH's gather leaves out: products of the compiled program, half of the heads on, against dense.

One layer in float32, width 256, 8 heads, causal, batch 1; forward, and forward and backward. Products are counted in
the text of the program that XLA compiled for this machine, loops as often as they run (`attnlab.launch.hlo`). Those of
attention are the program's less those of the projections and the router, which are the same in both forms.

    python -m benchmarks.moh
    python -m benchmarks.moh --lengths 512,4096 --json
    python -m benchmarks.moh --require 0.6      exits with 1 if a ratio is above
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from benchmarks import harness

WIDTH, HEADS = 256, 8
SPLITS = [(2, 2), (0, 4)]  # shared heads, and routed ones that are on: 4 of 8 in all


def main() -> int:
    """0, or 1 where a ratio is above `--require`."""
    args = _parser().parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rows = [
        {"length": T, "shared": shared, "active": active, "pass": name, **ratios(T, shared, active, backward)}
        for T in args.lengths
        for shared, active in SPLITS
        for name, backward in (("forward", False), ("forward + backward", True))
    ]
    if args.json:
        print(json.dumps({"machine": harness.machine(), "rows": rows}))
    else:
        columns = ["T", "heads shared", "of the others on", "pass", "GFLOP dense", "gather", "attention's", "layer's"]
        cells = [
            [str(r["length"]), str(r["shared"]), f"{r['active']} of {HEADS - r['shared']}", r["pass"],
             f"{r['dense'] / 1e9:.3f}", f"{r['gather'] / 1e9:.3f}", f"{r['ratio']:.3f}", f"{r['layer_ratio']:.3f}"]
            for r in rows
        ]  # fmt: skip
        harness.print_table(columns, cells, "attention's products in the compiled program; gather to dense")
    return int(args.require is not None and max(r["ratio"] for r in rows) > args.require)


def ratios(length: int, shared: int, active: int, backward: bool) -> dict[str, float]:
    """FLOPs of attention in both forms, gather's share of dense's, and that of the whole layer's."""
    total, rest = {}, 0.0
    for impl in ("dense", "gather"):
        total[impl], rest = products(length, shared, active, impl, backward)
    attention = {impl: flops - rest for impl, flops in total.items()}
    return attention | {
        "ratio": attention["gather"] / attention["dense"],
        "layer_ratio": total["gather"] / total["dense"],
    }


def products(length: int, shared: int, active: int, impl: str, backward: bool) -> tuple[float, float]:
    """FLOPs of the compiled layer, and how many of them projections and router have."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from attnlab import mixers
    from attnlab.launch import hlo

    config = mixers.get("moh").Config(heads=HEADS, shared=shared, active=active, balance=0.0, impl=impl)
    graphdef, params = nnx.split(mixers.build(config, width=WIDTH, rngs=nnx.Rngs(0)), nnx.Param)
    x, seq = jnp.zeros((1, length, WIDTH)), mixers.Sequence.whole(1, length)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(x, seq).y

    def forward_and_backward(params: Any, x: jax.Array, upstream: jax.Array) -> Any:
        return jax.value_and_grad(lambda *a: jnp.sum(upstream * forward(*a)), argnums=(0, 1))(params, x)

    f, arguments = (forward_and_backward, (params, x, x)) if backward else (forward, (params, x))
    costs = hlo.analyse(jax.jit(f).lower(*arguments).compile().as_text())
    if costs.unknown_loops or costs.kernels:
        raise RuntimeError(f"not countable: loops {costs.unknown_loops}, kernels {sorted(costs.kernels)}")
    declared = mixers.get("moh").cost(config, WIDTH, length).flops
    rest = length * (declared["projections"] + declared["router"]) * (3 if backward else 1)
    return costs.flops, rest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser.add_argument("--lengths", type=numbers, default=[1024, 4096], metavar="T,...", help="positions (1024,4096)")
    parser.add_argument("--require", type=float, metavar="RATIO", help="exit with 1 if attention's ratio is above")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
