"""The linear recurrence by the TPU's compiler, with no TPU: every generation, every feature, forward and backward."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from attnlab.launch import hlo, targets
from attnlab.launch.schedules import TOPOLOGIES
from kernels_pallas import tuning
from kernels_pallas.linear_recurrence import Sizes, linear_recurrence
from tests import tiers

# The suite keeps compiled programs, and those for absent devices cannot be read back.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Error reading persistent"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
# Per generation: B, T, H, d, e, decay, features, sizes.
CASES = {
    "v5e": [(1, 300, 2, 128, 128, "constant", {"packed": True, "wanted": True}, Sizes(128, 2, 2, 1)),
            (2, 7, 3, 20, 17, "data", {"state": True, "dtype": "float32"}, None)],
    "v5p": [(1, 256, 3, 64, 129, "data", {"packed": True, "state": True}, Sizes(128, 1, 2, 3)),
            (1, 70, 1, 128, 128, "channels", {"packed": True, "state": True}, Sizes(32, 2, 1, 1)),
            (1, 512, 2, 2048, 256, "data", {"dtype": "float32"}, None)],  # the widest state that default_sizes admits
    "v6e": [(1, 130, 2, 128, 129, "data", {"packed": True, "state": True}, Sizes(64, 1, 1, 2)),
            (1, 256, 2, 153, 128, "none", {}, Sizes(128, 2, 1, 1))],
    "tpu7x": [(1, 256, 2, 128, 65, "constant", {"packed": True, "state": True, "wanted": True}, Sizes(128, 1, 2, 2)),
              (1, 256, 1, 128, 128, "none", {"dtype": "float32"}, Sizes(128, 1, 1, 1))],
}  # fmt: skip
EACH = [(chip, case) for chip, cases in CASES.items() for case in cases]
OFTEN = [EACH[i] for i in (0, 5)]


@tiers.parametrize("chip, case", EACH, often=OFTEN)
def test_compiles(chip, case):
    """Forward and backward become one call of a kernel each, under their own names."""
    targets.prepare()
    B, T, H, d, e, decay, features, sizes = case
    placed = SingleDeviceSharding(targets.Target.of(TOPOLOGIES[chip]).devices[0])
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    dtype = features.get("dtype", "bfloat16")
    arrays = {name: of(B, T, H, w, dtype=dtype) for name, w in (("q", d), ("k", d), ("u", e))}
    fixed = {"starts": of(B, T, dtype=jnp.int32)} if features.get("packed") else {}
    if features.get("state"):
        arrays["state"] = of(B, H, d, e)
    if decay != "none":
        wanted = decay != "constant" or features.get("wanted")
        shape = {"constant": (H,), "data": (B, T, H), "channels": (B, T, H, d)}[decay]
        (arrays if wanted else fixed)["log_decay"] = of(*shape)

    def loss(arrays, fixed):
        with tuning.device_kind(chip):
            o, end = linear_recurrence(**arrays, **fixed, sizes=sizes)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(end)

    text = jax.jit(jax.value_and_grad(loss)).lower(arrays, fixed).compile().as_text()
    name = "linear_recurrence" + "_channels" * (decay == "channels")
    assert hlo.analyse(text).kernels == {f"{name}_forward": 1, f"{name}_backward": 1}
