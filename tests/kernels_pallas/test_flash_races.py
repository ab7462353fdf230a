"""Flash attention under the simulation of a TPU: no race, no read of what was not written or is out of bounds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.decode import decode_attention
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.routed_attention import routed_attention
from kernels_pallas.tuning import BackwardBlocks, Blocks, ForwardBlocks
from tests import tiers
from tests.mixers import precision

TILES = Blocks(ForwardBlocks(256, 128, 128, 128, True), BackwardBlocks(128, 128, 128, 128))
HALVED = dataclasses.replace(TILES, backward=BackwardBlocks(256, 128, 128, 128))  # the last tile is of half of the rows
T, B, H, K, d = 256, 1, 2, 1, 64
t = np.arange(T)[None]
CASES = {
    "causal": {"ends": t + 1, "blocks": HALVED},
    "window, sinks, gate": {"starts": t - 60, "ends": t + 1, "sinks": (H,), "gate": (B, T, H, d)},
    "all, bias, cap": {"key_bias": (B, K, T), "soft_cap": 3.0},
}


@tiers.parametrize("name", CASES, often=["causal"])
def test_no_races(name, capfd):
    """Two cores share the parallel axes of the grid; nothing is read or written beyond an array. Results are those of
    the kernel interpreted as XLA operations."""
    rng = np.random.default_rng(0)
    normal = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    given = {"q": (B, T, H, d), "k": (B, T, K, d), "v": (B, T, K, d), "blocks": TILES} | CASES[name]
    arrays = {n: normal(x) for n, x in given.items() if isinstance(x, tuple)}
    rest = {n: jnp.asarray(x, jnp.int32) for n, x in given.items() if isinstance(x, np.ndarray)}
    rest |= {n: x for n, x in given.items() if isinstance(x, (float, Blocks))}
    kernel = functools.partial(flash_attention, **rest)

    def run(interpret):
        def loss(arrays):
            o, lse = kernel(**arrays, interpret=interpret)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(lse)), (o, lse)

        return jax.jit(jax.grad(loss, has_aux=True))(arrays)

    simulated = run(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    jax.block_until_ready(simulated)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6, rtol=2e-6), simulated, run(True))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_windows_that_data_place_are_checked():
    """On the device, as a wrong length or head would read elsewhere; those that the grid alone places need not be."""
    x, rows = jnp.ones((B, T, K, d)), jnp.ones((B, T, d))
    ends, heads = jnp.ones((B, T), jnp.int32), jnp.zeros((B, 2), jnp.int32)
    gradient = lambda fn: jax.grad(lambda *args: jnp.sum(fn(*args)[0]))
    routed = lambda q, k: routed_attention(q, k, k, ends, ends, heads, platform="tpu")
    found = {}
    for fn, args in (
        (gradient(lambda q: flash_attention(q, q, q, ends=ends, platform="tpu")), (x,)),
        (gradient(routed), (rows, x)),
        (lambda k: decode_attention(x[:, :1], k, k, ends=ends[:, :1], platform="tpu"), (x.swapaxes(1, 2),)),
    ):
        for eqn in precision.equations(jax.make_jaxpr(fn)(*args).jaxpr):
            if eqn.primitive.name == "pallas_call":
                found[eqn.params["name"]] = not eqn.params["compiler_params"].disable_bounds_checks
    assert found == {
        "flash_forward": False, "flash_backward": False, "routed_forward": True, "routed_backward": True,
        "decode_attention": True,
    }  # fmt: skip
