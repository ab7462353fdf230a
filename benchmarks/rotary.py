"""What RoPE and QK-norm move between memory and a TPU, by the compiler: our kernel against XLA, with no TPU.

One layer of softmax attention, forward, forward again and backward (full remat), 4 x 4096 positions, 16 heads of 128 in
bfloat16; bytes are read from the compiled program. Two minutes of CPU a row.

    python -m benchmarks.rotary
    python -m benchmarks.rotary --chip v5e --rows norm --json
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

B, T, D, H = 4, 4096, 2048, 16
IMPLS = ("none", "xla", "pallas")


def main() -> int:
    """0."""
    from attnlab.launch import targets
    from attnlab.launch.schedules import TOPOLOGIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=list(TOPOLOGIES), default="v6e")
    parser.add_argument("--rows", nargs="+", choices=("plain", "norm"), default=["plain", "norm"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    targets.prepare()
    target = targets.Target.of(TOPOLOGIES[args.chip])
    found: dict[str, dict[str, float]] = {}
    for row in args.rows:
        found[row] = {impl: hbm_bytes(target, impl, row == "norm") / 2**20 for impl in IMPLS}
        if not args.json:
            facts = ", ".join(f"{impl} {mib:,.0f}" for impl, mib in found[row].items())
            print(f"{args.chip}, {row}: MiB of a layer {facts}", flush=True)
    if args.json:
        print(json.dumps({"chip": args.chip, "shape": [B, T, H, D // H], "mib": found}))
    return 0


def hbm_bytes(target: Any, impl: str, norm: bool) -> float:
    """Of a layer whose RoPE runs by `impl`, none: is left out."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, SingleDeviceSharding

    from attnlab.launch import hlo
    from attnlab.ops.attention import attention
    from attnlab.ops.masks import Mask
    from attnlab.ops.norm import rms_norm
    from attnlab.ops.rope import rope
    from attnlab.parallel import partition
    from attnlab.train import sharding
    from attnlab.train.config import MeshConfig

    def placed(y, scale_d, positions):
        if impl == "none":
            return rms_norm(y, scale_d, 1e-6) if norm else y
        return rope(y, positions, impl=impl, **({"scale_d": scale_d} if norm else {}))

    @jax.checkpoint
    def layer(kernels, out, scales, x, positions):
        q, k, v = ((x @ kernels[i]).reshape(B, T, H, D // H) for i in range(3))
        q, k = (placed(y, scale, positions) for y, scale in zip((q, k), scales, strict=True))
        return attention(q, k, v, mask=Mask(causal=True), impl="flash").reshape(B, T, D) @ out

    def step(*arrays):
        loss = lambda *arrays: jnp.sum(layer(*arrays).astype(jnp.float32) ** 2)
        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*arrays)

    device = target.devices[0]
    one = SingleDeviceSharding(device)
    of = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype, sharding=one)
    mesh = Mesh(np.array([device]).reshape([1] * len(MeshConfig().sizes())), tuple(MeshConfig().sizes()))
    arrays = of(3, D, D), of(D, D), of(2, D // H, dtype="float32"), of(B, T, D), of(B, T, dtype="int32")
    lowered = jax.jit(partition.traced(step, mesh, sharding.ACTIVATION_RULES)).lower(*arrays)
    return hlo.analyse(lowered.compile().as_text()).bytes


if __name__ == "__main__":
    sys.exit(main())
