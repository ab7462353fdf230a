"""What libtpu schedules for the linear recurrence on TPUs that are not here.

The unit is bundles per position and head, of a whole step of the grid: what runs once for a sequence is left out (the
first step's tables, the last step's state). A bundle takes a cycle where nothing stalls. Beside it stands how many
cycles the device's memory takes for the bytes that the kernel moves.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from attnlab.launch import llo
from attnlab.launch.schedules import grid
from attnlab.ops.feature_maps import Taylor
from attnlab.ops.recurrence_kernel import kernel_features
from kernels_pallas import tuning
from kernels_pallas.linear_recurrence import Sizes, default_sizes, linear_recurrence


@dataclasses.dataclass(frozen=True)
class Case:
    """Of a call; `decay`: constant, or, with its gradient, data: a number per position, or channels: one for each."""

    decay: str = "constant"
    packed: bool = False
    value_width: int = 128
    features: Taylor | None = None  # of queries and keys, whose width is then its own
    shared: bool = False  # queries and keys by all heads

    @property
    def key_width(self) -> int:
        """Of queries and keys as they lie."""
        return WIDTH if self.features is None else self.features.width


NAME = "linear_recurrence"
BATCH, LENGTH, HEADS, WIDTH = 4, 4096, 16, 128
CASES = {
    "constant": Case(),
    "data, documents": Case("data", True),
    "data, values of 64": Case("data", value_width=64),
    "data, values of 64, queries and keys of all heads": Case("data", value_width=64, shared=True),
    "constant, a column of ones": Case(value_width=129),
    "Taylor features, a column of ones": Case(value_width=129, features=Taylor(16)),
    "channels": Case("channels"),
    "channels, documents": Case("channels", True),
}
PARTS = ("forward", "backward")


def compile_case(case: Case, target: Any, chip: str, sizes: Sizes) -> None:
    """Forward and backward for a chip; what is scheduled is in the dump."""
    placed = SingleDeviceSharding(target.devices[0])
    of = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    rows = BATCH, LENGTH, HEADS
    keys = of(*rows[:2], 1 if case.shared else HEADS, case.key_width)
    arrays = {"q": keys, "k": keys, "u": of(*rows, case.value_width)}
    fixed = {"starts": of(*rows[:2], dtype=jnp.int32)} if case.packed else {}
    decays = {"constant": (HEADS,), "data": rows, "channels": (*rows, WIDTH)}[case.decay]
    (fixed if case.decay == "constant" else arrays)["log_decay"] = of(*decays, dtype=jnp.float32)

    def loss(arrays, fixed):
        with tuning.device_kind(chip):
            o, _ = linear_recurrence(**arrays, **fixed, features=kernel_features(case.features), sizes=sizes)
        return jnp.sum(o.astype(jnp.float32))

    jax.jit(jax.grad(loss)).lower(arrays, fixed).compile()


def facts(root: llo.Region, chip: str, work: int) -> dict[str, Any]:
    """Of a kernel whose step is `work` positions times heads; "again": of what is a loop in it, if there is one, which
    runs now and then."""
    step = grid(root)
    within = lambda r, others: any(o is not r and o.start <= r.start and r.end <= o.end for o in others)
    loops = [r for r in step.walk() if r.kind == "loop" and r is not step]
    again = [r for r in loops if not within(r, loops)]
    first_or_last = lambda r: not r.inside and not r.own["products"] and r.own["VST"] > 16 and not within(r, again)
    once = [r for r in step.walk() if first_or_last(r)]
    count = lambda name, regions: sum(r.total()[name] for r in regions)
    left = lambda name: step.total()[name] - count(name, again) - count(name, once)
    return {
        "bundles": round(left("bundles") / work, 3),
        "matrix": round(left("products") * llo.CYCLES[chip] / llo.UNITS[chip] / work, 3),
        "once": count("bundles", once),
        **({"again": count("bundles", again)} if again else {}),
        "spills": left("SPILL"),
        "kernel_bundles": root.total()["bundles"],
    }


def both(
    kernel: str, sizes: Sizes, chip: str, folder: pathlib.Path, compile_both: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Facts of a kernel's two directions, by direction. The dump goes to `folder` (`llo.arguments`)."""
    llo.clear(folder)
    started = time.process_time()
    compile_both()
    seconds = round(time.process_time() - started, 1)
    found = {}
    for part, heads in zip(PARTS, (sizes.forward_heads, sizes.backward_heads)):
        (root,) = llo.kernels(folder, f"{kernel}_{part}", chip)
        found[part] = facts(root, chip, sizes.chunk * sizes.chunks * heads) | {
            "vmem": llo.vmem(folder, f"{kernel}_{part}"),
            "sizes": dataclasses.asdict(sizes),
            "compile_cpu_seconds": seconds,
        }
    return found


def measure(name: str, chip: str, folder: pathlib.Path, target: Any, sizes: Sizes | None = None):
    """See `both`, of a case."""
    case = CASES[name]
    of = lambda width, heads: jax.ShapeDtypeStruct((BATCH, LENGTH, heads, width), "bfloat16")
    features, channels = kernel_features(case.features), case.decay == "channels"
    keys, values = of(case.key_width, 1 if case.shared else HEADS), of(case.value_width, HEADS)
    sizes = sizes or default_sizes(keys, values, chip, features, channels)
    kernel = NAME + "_channels" * channels
    return both(kernel, sizes, chip, folder, lambda: compile_case(case, target, chip, sizes))
