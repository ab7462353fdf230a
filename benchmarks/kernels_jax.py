"""What jax computes in `benchmarks.kernels`: ceilings, parity, and the attentions that are compared."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from benchmarks.kernels_cases import Case
from benchmarks.kernels_recurrences import Recurrence, in_jax
from kernels_pallas import hopper, masks
from kernels_pallas.flash_attention import definition, flash_attention

# What a dry run lowers for.
_H100 = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
)


class Jax:
    """Answers the requests of `benchmarks.kernels`, on a GPU, or, `dry`, on whatever is here and in small."""

    def __init__(self, dry: bool):
        self.dry = dry
        self.peers = {"ours": _ours, "cudnn": _cudnn, "tokamax": _tokamax, "xla": _xla}

    def about(self) -> dict[str, Any]:
        device = jax.devices()[0]
        import jaxlib

        absent = [name for name in ("tokamax",) if importlib.util.find_spec(name) is None]
        facts = {
            "chip": device.device_kind, "platform": device.platform, "jax": jax.__version__,
            "jaxlib": jaxlib.__version__, "peers": [name for name in self.peers if name not in absent],
        }  # fmt: skip
        if self.dry:
            facts["kernels_run_as"] = hopper.missing_interpreter() or "interpreted"
        return facts | {"runtime": str(getattr(device.client, "platform_version", "")).replace("\n", " ")}

    def ceilings(self) -> dict[str, float]:
        """The rates that nothing here can beat: bf16 products of 8192 x 8192, in TFLOP/s, and a copy, in TB/s."""
        n, size = (64, 1 << 12) if self.dry else (8192, 1 << 30)
        a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in (0, 1))
        product = timed(jax.jit(lambda a, b: a @ b), (a, b), self.dry)
        x = jax.random.normal(jax.random.key(2), (size,), jnp.float32)
        copy = timed(jax.jit(lambda x: -x), (x,), self.dry)
        if self.dry:
            return {}
        return {"matmul_tflops": 2 * n**3 / product["ms"] / 1e9, "copy_tbs": 8 * size / copy["ms"] / 1e9}

    def parity(self, case: Case | Recurrence) -> dict[str, Any]:
        """Errors of ours, values and gradients, against the float32 definition: no more than twice those of what XLA
        makes of the formula in the same dtype, and a rounding; and whether what should be the same bits in two runs is.
        """
        if isinstance(case, Recurrence):
            return recurrence_parity(self.dry, case)
        case = case.tiny() if self.dry else case
        arrays, rest = _arrays(case), _rest(case)
        wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
        exact, xla = _both(definition, rest)(wide), _both(_eager, rest)(arrays)
        run = _both(_kernel(self.dry, case), rest)
        ours, again = run(arrays), run(arrays)
        errors, failed = compared(exact, xla, ours)
        repeatable = ("o", "lse", *(exact if case.deterministic else ()))
        differing = [name for name in repeatable if not jnp.array_equal(ours[name], again[name])]
        return {"errors": errors, "failed": failed, "differ_between_runs": differing}

    def time(self, case: Case | Recurrence, peer: str) -> dict[str, Any]:
        """Milliseconds of a forward pass, and of forward and backward; or why not. Dry: both are lowered for a GPU."""
        if isinstance(case, Recurrence):
            by_name = in_jax(case, {"ours": "pallas", "xla": "chunked"}[peer])
            attend = lambda arrays: by_name(**arrays)
        else:
            attend = self.peers[peer](self.dry, case)
        if isinstance(attend, str):
            return {"unsupported": attend}
        forward = jax.jit(lambda arrays, do: attend(arrays))
        both = jax.jit(lambda arrays, do: (lambda o, vjp: (o, vjp(do)))(*jax.vjp(attend, arrays)))
        arrays = _specs(case) if self.dry else _arrays(case)
        do = arrays.pop("do")
        if self.dry:
            if peer != "ours" and isinstance(case, Case):  # what ours is held to in `parity`
                small = case.tiny()
                check_same_attention(small, jax.jit(self.peers[peer](True, small))(_arrays(small)))
            with use_abstract_mesh(_H100), _as_if_on_h100():
                for run in (forward, both):
                    run.trace(arrays, do).lower(lowering_platforms=("cuda",))
            return {"lowered": True}
        return {"forward": timed(forward, (arrays, do), False), "both": timed(both, (arrays, do), False)}


def compared(exact: Any, xla: Any, ours: Any) -> tuple[dict[str, float], list[str]]:
    """Errors as a share of the largest, and those of ours that are more than twice XLA's and a rounding."""
    errors, failed = {}, []
    for name, value in exact.items():
        a, b, c = (np.asarray(x.astype(jnp.float32)) for x in (ours[name], value, xla[name]))
        live = np.isfinite(b)
        off, allowed = (np.abs(x - b)[live].max(initial=0) for x in (a, c))
        scale = np.abs(b[live]).max(initial=0)
        errors[name] = float(off / max(scale, 1e-30))
        if not (np.isfinite(a) == live).all() or not off <= 2 * allowed + 0.004 * scale:
            failed.append(name)
    return errors, failed


def recurrence_parity(dry: bool, case: Recurrence) -> dict[str, Any]:
    """As `Jax.parity`. Dry: XLA's form in place of ours, whose own tests interpret it."""
    case = case.tiny() if dry else case
    run = lambda impl: _gradients(in_jax(case, impl))
    arrays, ours = _arrays(case), run("chunked" if dry else "pallas")
    wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    found, again = ours(arrays), ours(arrays)
    errors, failed = compared(run("definition")(wide), run("chunked")(arrays), found)
    differing = [name for name in found if not jnp.array_equal(found[name], again[name])]
    return {"errors": errors, "failed": failed, "differ_between_runs": differing}


def _gradients(attend: Callable[..., Any]) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """o and its gradients for do, compiled."""

    @jax.jit
    def run(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        inputs = {name: x for name, x in arrays.items() if name != "do"}
        o, vjp = jax.vjp(lambda inputs: attend(**inputs), inputs)
        return {"o": o} | {f"d{name}": x for name, x in vjp(arrays["do"].astype(o.dtype))[0].items()}

    return run


def timed(run: Callable[..., Any], arguments: tuple[Any, ...], dry: bool) -> dict[str, float]:
    """Milliseconds a call: median and quartiles of 20 samples, each of as many calls as take 20 ms, after 5 others."""
    call = lambda: jax.block_until_ready(run(*arguments))
    begin = time.perf_counter()
    call()
    compiled = time.perf_counter() - begin
    if dry:
        return {"ms": 1e3 * compiled, "low": 0.0, "high": 0.0, "samples": 1, "first_call_s": compiled}
    for _ in range(5):
        call()
    begin = time.perf_counter()
    call()
    repeat = max(1, round(0.02 / (time.perf_counter() - begin)))
    samples = []
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(repeat):
            out = run(*arguments)  # in the queue of the device; what the call before gave is freed
        jax.block_until_ready(out)
        samples.append(1e3 * (time.perf_counter() - begin) / repeat)
    low, median, high = statistics.quantiles(samples, n=4)
    return {"ms": median, "low": low, "high": high, "samples": 20 * repeat, "first_call_s": compiled}


def check_same_attention(case: Case, o: Any) -> None:
    """Raises ValueError where a peer's output is not that of the definition, bfloat16 apart."""
    inputs = {name: jnp.asarray(x) for name, x in case.arrays().items() if name != "do"}
    off = np.abs(np.asarray(o, np.float32) - np.asarray(definition(**inputs, **_rest(case))[0])).max()
    if not off < 0.05:
        raise ValueError(f"it computes another attention: off by {off}")


def _as_if_on_h100() -> Any:
    """What is traced inside picks implementations for an H100: a mesh of one, as far as tracing asks."""
    from attnlab.parallel import partition

    device = types.SimpleNamespace(platform="gpu", device_kind=_H100.abstract_device.device_kind)
    return partition.use(types.SimpleNamespace(size=1, devices=np.asarray([device])), {})


def _specs(case: Case | Recurrence) -> dict[str, jax.ShapeDtypeStruct]:
    bf16 = ("q", "k", "u", "v", "probe", "gate", "do")
    return {n: jax.ShapeDtypeStruct(x, "bfloat16" if n in bf16 else "float32") for n, x in case.shapes().items()}


def _arrays(case: Case | Recurrence) -> dict[str, jax.Array]:
    """What is differentiated, and do."""
    return {name: jnp.asarray(x, _specs(case)[name].dtype) for name, x in case.arrays().items()}


def _rest(case: Case) -> dict[str, Any]:
    """The intervals and the cap."""
    bounds = {} if case.mask == "all" else dict(zip(("starts", "ends"), map(jnp.asarray, case.bounds())))
    return bounds | {"soft_cap": case.soft_cap}


def _both(attend: Callable[..., Any], rest: dict[str, Any]) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """o, lse and the gradients of o for do, compiled."""

    @jax.jit
    def run(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        inputs = {name: x for name, x in arrays.items() if name != "do"}
        (o, lse), vjp = jax.vjp(lambda inputs: attend(**inputs, **rest), inputs)
        grads = vjp((arrays["do"].astype(o.dtype), jnp.zeros_like(lse)))[0]
        return {"o": o, "lse": lse} | {f"d{name}": x for name, x in grads.items()}

    return run


def _eager(q, k, v, *, starts, ends, soft_cap, sinks=None, gate=None, key_bias=None):
    """The formula as one would write it for XLA: products in the dtype of q, a softmax in float32."""
    group = lambda x, axis: jnp.repeat(x, q.shape[2] // k.shape[2], axis)
    s = jnp.einsum("bthd,bshd->bhts", q, group(k, 2), preferred_element_type=jnp.float32) * q.shape[3] ** -0.5
    s = s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)
    s = s if key_bias is None else s + group(key_bias, 1)[:, :, None]
    s = jnp.where(masks.visible(starts, ends, *s.shape[2:])[:, None], s, -1e30)
    if sinks is not None:
        s = jnp.concatenate([s, jnp.broadcast_to(sinks[:, None, None], (*s.shape[:3], 1))], -1)
    lse = jax.nn.logsumexp(s, -1)
    p = jnp.exp(s - lse[..., None])[..., : k.shape[1]].astype(q.dtype)
    o = jnp.einsum("bhts,bshe->bthe", p, group(v, 2), preferred_element_type=jnp.float32)
    o = o if gate is None else o * jax.nn.sigmoid(gate.astype(jnp.float32))
    return o.astype(q.dtype), lse.swapaxes(1, 2)


def _kernel(dry: bool, case: Case) -> Callable[..., Any]:
    """Our kernel; in a dry run interpreted, or, where jax cannot, the definition in its place."""
    if not dry:
        return functools.partial(flash_attention, platform="cuda", deterministic=case.deterministic)
    if hopper.missing_interpreter():
        return definition
    return functools.partial(flash_attention, platform="cuda", deterministic=case.deterministic, interpret=True)


# Each of these gives attention of a case as a function of its arrays, or says why not.


def _ours(dry: bool, case: Case) -> Callable[..., Any] | str:
    kernel, rest = _kernel(False, case), _rest(case)
    return lambda arrays: kernel(**arrays, **rest)[0]


def _plain(case: Case, what: str, masks: tuple[str, ...], *, capped: bool = False) -> str | None:
    if extras := [x for x in case.extras if x != "cap" or not capped]:
        return f"{what} has no {' and no '.join(extras)}"
    if case.mask not in masks:
        return f"{what} has no mask {case.mask!r}"
    return f"{what} promises no order" if case.deterministic else None


def _local(case: Case) -> dict[str, Any]:
    return {"is_causal": case.mask != "all", "local_window_size": case.window and (case.window - 1, 0)}


def _cudnn(dry: bool, case: Case) -> Callable[..., Any] | str:
    if reason := _plain(case, "cuDNN, as jax calls it,", ("all", "causal", "window")):
        return reason
    if case.d != case.e:
        return "cuDNN, as jax calls it, has no values of another width than keys"
    attend = functools.partial(
        jax.nn.dot_product_attention, implementation="xla" if dry else "cudnn", **_local(case)
    )  # fmt: skip
    return lambda arrays: attend(arrays["q"], arrays["k"], arrays["v"])


def _tokamax(dry: bool, case: Case) -> Callable[..., Any] | str:
    if reason := _plain(case, "tokamax on GPUs", ("all", "causal", "window"), capped=True):
        return reason
    import tokamax

    attend = functools.partial(
        tokamax.dot_product_attention,
        implementation="xla" if dry else "mosaic", logits_soft_cap=case.soft_cap, **_local(case),
    )  # fmt: skip
    return lambda arrays: attend(arrays["q"], arrays["k"], arrays["v"])


def _xla(dry: bool, case: Case) -> Callable[..., Any] | str:
    from attnlab.ops import Mask, attention

    if set(case.extras) & {"gate", "bias"}:
        return "XLA's form of the op has no gate and no bias"
    bounds = [] if case.mask == "all" else [jnp.asarray(x) for x in case.bounds()]
    mask = {"causal": Mask(causal=True), "window": Mask(causal=True, window=case.window)}.get(case.mask, Mask(*bounds))
    return lambda arrays: attention(
        arrays["q"], arrays["k"], arrays["v"], mask,
        sinks_H=arrays.get("sinks"), soft_cap=case.soft_cap, impl="xla",
    )  # fmt: skip
