"""The neural memory's Hopper kernels with no GPU: run by jax's GPU interpreter where there is one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.ops.documents import document_index, positions_in_documents
from attnlab.ops.memory_frame import MemorySpec, forward, initial_state
from attnlab.ops.neural_memory import neural_memory
from kernels_pallas.neural_memory import call, gpu, gpu_norm, gpu_numbers
from kernels_pallas.neural_memory import neural_memory as kernel
from tests import tiers
from tests.kernels_pallas.test_flash_gpu import needs_interpreter
from tests.kernels_pallas.test_neural_memory import SEGMENTS, unit

INPUTS = "q", "k", "v", "log_keep", "log_eta", "theta"
RATE, SEEN = 0.5, 128


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of the documents of `SEGMENTS`; `carried`: the first goes on, from a state after `SEEN` positions; `deep`:
    the memory has two layers; `exact`: products are in float32, which the kernels do not serve."""

    length: int
    chunk: int
    carried: bool = False
    read_after_write: bool = True
    grad_at: str = "prev"
    width: int = 64
    norm: bool = False
    deep: bool = False
    exact: bool = False

    @property
    def spec(self):
        return MemorySpec(
            self.chunk, self.norm, self.rates, read_after_write=self.read_after_write, grad_at=self.grad_at
        )

    @property
    def rates(self):
        return (RATE, RATE / 2)[: 1 + self.deep]

    @property
    def tolerance(self):
        """Of the largest number; two layers round more often."""
        return 1e-4 if self.exact else 0.03 if self.deep else 0.015

    def layers(self, normal):
        return tuple(normal(1, 1, self.width, self.width) * self.width**-0.5 for _ in self.rates)

    def documents(self):
        return jnp.asarray(SEGMENTS[:1, : self.length] + (not self.carried), jnp.int32)

    def positions(self):
        return positions_in_documents(self.documents(), jnp.full(1, SEEN * self.carried, jnp.int32))


CASES = [
    Case(100, 16, norm=True),
    Case(130, 64, carried=True, read_after_write=False, grad_at="decayed", width=128),
    Case(100, 16),
    Case(130, 64, carried=True, norm=True),
    Case(100, 32, carried=True, norm=True, deep=True, exact=True),
    Case(130, 16, read_after_write=False, grad_at="decayed", deep=True, exact=True),
    Case(100, 16, carried=True, read_after_write=False, grad_at="decayed", norm=True, deep=True),
    Case(130, 64, deep=True),
]
OFTEN = CASES[0], CASES[1], CASES[4]


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Rows of tests have several segments."""
    monkeypatch.setattr(call, "_SEGMENT", 64)


def inputs(case, seed=0):
    """`INPUTS` of one row of one head, and weights and momentum of each layer, float64; q, k, v: bfloat16 numbers."""
    rng, d = np.random.default_rng(seed), case.width
    normal = lambda *shape: rng.standard_normal(shape)
    rows = (1, case.length, 1)
    narrow = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    q, k, v = narrow(unit(normal(*rows, d))), narrow(unit(normal(*rows, d))), narrow(normal(*rows, d))
    keep, eta = (-rng.exponential(scale, rows) for scale in (0.05, 0.5))
    return q, k, v, keep, eta, rng.uniform(0, 0.1, rows), *case.layers(normal), *case.layers(normal)


def cotangents(case):
    rng, d = np.random.default_rng(1), case.width
    shapes = (1, case.length, 1, d), *[(1, 1, d, d)] * (2 * len(case.rates))
    return [rng.standard_normal(shape) for shape in shapes]


def with_gradients(run, case, args, dtypes):
    """y, W and S of layers after the last position, and gradients, by name; the layers of W come first."""
    weights = [jnp.asarray(x) for x in cotangents(case)]

    def loss(*args):
        out = run(*args)
        return sum(jnp.sum(a * b.astype(a.dtype)) for a, b in zip(out, weights)), out

    args = [jnp.asarray(x, dtype) for x, dtype in zip(args, dtypes)]
    grads, out = jax.jit(jax.grad(loss, tuple(range(len(args))), has_aux=True))(*args)
    layers = [f"{name} {n}" for name in ("weights", "momentum") for n in range(len(case.rates))]
    found = dict(zip(("y", *layers), out)) | {f"d {name}": x for name, x in zip((*INPUTS, *layers), grads)}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def of_layers(layers):
    """Weights, momentum."""
    half = len(layers) // 2
    return tuple(layers[:half]), tuple(layers[half:])


def carried_from(weights, momentum):
    """W and S that a row goes on from; others than the initial ones."""
    return tuple(0.5 * w for w in weights), tuple(-s for s in momentum)


def defined(case, args):
    """By the op's definition in float64."""

    def run(q, k, v, keep, eta, theta, *layers):
        weights, momentum = of_layers(layers)
        start = dataclasses.replace(initial_state(tuple(w[0] for w in weights), 1, True), momentum=momentum)
        carried, position = carried_from(weights, momentum), jnp.full(1, SEEN, jnp.int32)
        state = dataclasses.replace(
            start, weights=carried[0], momentum=carried[1], start=carried[0], position_B=position
        )
        y, end = neural_memory(
            q, k, v, keep, eta, theta, start, case.spec, documents_BT=case.documents(),
            state=state if case.carried else None, impl="definition",
        )  # fmt: skip
        return y, *end.weights, *end.momentum

    with jax.enable_x64(True):
        return with_gradients(run, case, args, [jnp.float64] * len(args))


def by_kernels(case, args, interpret):
    def run(q, k, v, keep, eta, theta, *layers):
        weights, momentum = of_layers(layers)
        carried = carried_from(weights, momentum) if case.carried else None
        y, w, s, _ = kernel(
            q, k, v, keep, eta, theta, weights=weights, momentum=momentum, chunk=case.chunk,
            residual_norm=case.norm, rates=case.rates, read_after_write=case.read_after_write,
            decayed=case.grad_at == "decayed", positions=case.positions(), carried=carried, platform="cuda",
            interpret=interpret,
        )  # fmt: skip
        return y, *w, *s

    narrow = jnp.float32 if case.exact else jnp.bfloat16
    return with_gradients(run, case, args, [narrow] * 3 + [jnp.float32] * (len(args) - 3))


@needs_interpreter
@tiers.parametrize(
    "case", CASES, often=OFTEN, ids=lambda case: f"chunk{case.chunk}{' norm' * case.norm}{' deep' * case.deep}"
)
def test_equals_the_definition(monkeypatch, case):
    """Values, states and every gradient of packed rows, whose documents begin inside chunks and at their edges; nothing
    is read or written that barriers do not put in order."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    if case.exact:
        monkeypatch.setattr(gpu, "unsupported", lambda *_: None)
    args = inputs(case)
    found = by_kernels(case, args, plgpu.InterpretGPUParams(detect_races=True))
    for name, expected in defined(case, args).items():
        tolerance = case.tolerance * np.abs(expected).max()
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=tolerance, err_msg=name)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("chunk, read_after_write, decayed", [(16, True, False), (16, False, True)])
def test_numbers_of_positions(chunk, read_after_write, decayed):
    """What is left of the group's weights, and of each other step, is what the recurrence leaves, position by position,
    for documents that begin anywhere."""
    rng, T = np.random.default_rng(0), SEGMENTS.shape[1]
    documents = document_index(jnp.asarray(SEGMENTS[:1], jnp.int32))
    positions, first = positions_in_documents(documents), jnp.zeros(1, jnp.int32)
    at = jax.jit(lambda *x: gpu_numbers.layout(*x, chunk, 64))(positions, first)
    log_keep, log_eta, theta = (jnp.asarray(-rng.exponential(0.3, (1, T, 1)), jnp.float32) for _ in range(3))
    rules = gpu_numbers.Rules(chunk < 64, read_after_write, decayed)
    x = jax.jit(lambda *x: gpu_numbers.numbers(rules, at, *x))(log_keep, log_eta, theta)
    x = np.asarray(x, np.float64)[0, 0]
    origin, end = np.asarray(at.origin)[0], np.asarray(at.end)[0]
    first_of_chunk = np.asarray(at.chunk)[0]
    keep, eta = (np.exp2(np.asarray(g, np.float64)[0, :, 0]) for g in (log_keep, log_eta))

    def after(s, t, beta, rho, h):
        """Shares of W, and of a step or S in W and S, at t, of those before s."""
        for i in range(s, t + 1):
            h, beta = eta[i] * h, keep[i] * beta
            rho = keep[i] * rho + h
        return beta, rho, h

    for t in range(T):
        beta, rho, h = after(origin[t], t, 1.0, 0.0, 1.0)
        found = np.exp2(x[gpu_numbers.KEPT, t]), x[gpu_numbers.RHO, t], np.exp2(x[gpu_numbers.MOVED, t])
        np.testing.assert_allclose(found, (beta, rho, h), rtol=1e-4)
        read = (beta, rho) if read_after_write else after(origin[t], t - 1, 1.0, 0.0, 1.0)[:2]
        np.testing.assert_allclose((np.exp2(x[gpu_numbers.READ, t]), x[gpu_numbers.RHO_READ, t]), read, rtol=1e-4)
        early = after(origin[t], first_of_chunk[t] - 1, 1.0, 0.0, 1.0)[:2]
        forgotten = np.prod(keep[first_of_chunk[t] : t + 1]) if decayed else 1.0
        found = np.exp2(x[gpu_numbers.EARLY, t]), x[gpu_numbers.RHO_EARLY, t]
        np.testing.assert_allclose(found, np.multiply(early, forgotten), rtol=1e-4)
        last = end[t] - 1
        _, kappa, left = after(t + 1, last, 0.0, 1.0, 1.0) if origin[last] == origin[t] else (0, 0.0, 0.0)
        found = x[gpu_numbers.LAST_KAPPA, t], x[gpu_numbers.LAST_MOVED, t]
        np.testing.assert_allclose(found, (kappa, left), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    "widths, chunk, dtype, norm, says",
    [
        ((64, 256, 64), 16, "bfloat16", True, "64 hidden units: W and S of layers 64x256x64 take 256 KiB in float32"),
        ((128, 64, 128), 16, "bfloat16", False, "heads of two layers are 64 wide, not 128"),
        ((64, 64, 64, 64), 16, "bfloat16", False, "one layer or two, not 3"),
        ((64, 64), 16, "float32", False, "bfloat16, not float32"),
        ((128, 128), 16, "bfloat16", True, "heads with a norm are 64 wide, not 128"),
        ((96, 96), 16, "bfloat16", False, "64 or 128 wide, not 96"),
        ((64, 64), 48, "bfloat16", False, "chunk is 16, 32, 64, not 48"),
    ],
)
def test_what_the_kernels_cannot_do(widths, chunk, dtype, norm, says):
    """Said before anything is compiled, with what is allowed."""
    assert says in gpu.unsupported(widths, chunk, dtype, norm)
    q = jax.ShapeDtypeStruct((1, 64, 1, widths[0]), dtype)
    gate = jax.ShapeDtypeStruct((1, 64, 1), jnp.float32)
    layers = tuple(jax.ShapeDtypeStruct((1, 1, i, o), jnp.float32) for i, o in zip(widths, widths[1:]))
    run = lambda q, gate, layers: kernel(
        q, q, q, gate, gate, gate, weights=layers, momentum=layers, chunk=chunk, residual_norm=norm,
        rates=(1.0,) * len(layers), platform="cuda",
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"neural_memory on cuda: .*{says}"):
        jax.eval_shape(run, q, gate, layers)


def test_gradients_of_the_norm():
    """What the matrix says of keys gets what differentiating the loss gives, once and twice; as it says of queries."""
    epsilon = 1e-2
    spec = MemorySpec(16, True, (RATE,), epsilon=epsilon)

    @jax.jit
    def both(z, k, v, u):
        says = lambda z: forward(spec, (jnp.eye(8),), z) - z  # the norm alone
        error = jax.grad(lambda z: 0.5 * jnp.sum((k + says(z) - v) ** 2))
        x, inverse = gpu_norm.normalized(z, epsilon)
        w, slope = gpu_norm.slopes(x, inverse, k + x - v, u)
        found = x, gpu_norm.pulled(x, inverse, k + x - v), gpu_norm.pulled(x, inverse, u), w, slope
        _, along = jax.jvp(says, (z,), (u,))
        return found, (says(z), error(z), along, along, jax.jvp(error, (z,), (u,))[1])

    with jax.enable_x64(True):
        for a, b in zip(*both(*np.random.default_rng(0).standard_normal((4, 3, 8))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
