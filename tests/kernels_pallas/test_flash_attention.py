"""Flash attention, interpreted: against its definition in float64, and the laws of masks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks, tuning
from kernels_pallas.flash_attention import definition, flash_attention
from kernels_pallas.tuning import BackwardBlocks, Blocks, ForwardBlocks
from tests import tiers
from tests.kernels_pallas import pairwise

TILES = {
    "keys in parts": Blocks(ForwardBlocks(128, 256, 128, 128, True), BackwardBlocks(256, 128, 128, 128)),
    "rows in parts": Blocks(ForwardBlocks(256, 128, 128, 128, False), BackwardBlocks(128, 256, 128, 128)),
    "default": None,
}
KERNELS = {name: functools.partial(flash_attention, interpret=True, blocks=blocks) for name, blocks in TILES.items()}
AXES = {
    "mask": ["all", "causal", "window", "packed", "anything"],
    "length": [256, 130, 64, 7, 1],
    "widths": [(64, 40), (96, 96), (128, 128), (192, 128), (256, 256)],
    "heads": [(1, 2, 2), (3, 3, 1), (2, 6, 3)],  # B, H, K
    "dtype": ["float32", "bfloat16"],
    "tiles": list(TILES),
    "key_blocks": [False, True],
    "sinks": [False, True],
    "gate": [False, True],
    "bias": [None, "keys", "keys of heads"],
    "cap": [None, 2.0, 90.0],
}
# Two row tiles, of each of which the second half of the rows sees the last key tile alone.
HALVED = dict(mask="causal", length=400, widths=(64, 40), heads=(1, 2, 1), dtype="float32", tiles="rows in parts",
              key_blocks=False, sinks=True, gate=True, bias=None, cap=None)  # fmt: skip
# A row tile in which some rows see all of a block of keys, and others, of the next document, nothing of it.
APART = dict(mask="packed", length=400, widths=(64, 40), heads=(1, 2, 1), dtype="float32", tiles="keys in parts",
             key_blocks=True, sinks=False, gate=False, bias=None, cap=None)  # fmt: skip
# Every value of every axis; the laws below are tried with the second, of whose program they are.
OFTEN = [dict(zip(AXES, values)) for values in (
    ("all", 130, (96, 96), (3, 3, 1), "bfloat16", "rows in parts", True, True, True, "keys", 2.0),
    ("packed", 256, (64, 40), (1, 2, 2), "float32", "keys in parts", False, False, True, "keys of heads", None),
    ("causal", 64, (192, 128), (2, 6, 3), "float32", "default", True, False, True, None, 90.0),
    ("window", 1, (128, 128), (3, 3, 1), "float32", "default", False, False, False, None, 2.0),
    ("anything", 7, (256, 256), (1, 2, 2), "float32", "keys in parts", False, True, False, "keys", None),
)]  # fmt: skip
CASES = pairwise.cases(AXES)
CASES += [case for case in (*OFTEN, HALVED, APART) if case not in CASES]
KEYS = 300  # of masks whose queries are not the keys


def intervals(mask: str, batch: int, T: int) -> dict[str, np.ndarray]:
    t, rng = np.arange(T)[None], np.random.default_rng(T)
    if mask == "all":
        return {}
    if mask == "causal":
        return {"ends": t + 1}
    if mask == "window":
        return {"starts": t - 40, "ends": t + 1}
    if mask == "packed":  # two documents a row, padding behind them, whose rows see nothing
        cut = rng.integers(1, T + 1, (batch, 1))
        start = np.where(t < cut, 0, cut)
        return {"starts": np.where(t < T - T // 5, start, t + 1), "ends": np.minimum(t + 1, T - T // 5)}
    starts, ends = np.sort(rng.integers(0, KEYS + 1, (2, batch, T)), 0)
    ends[:, 0] = starts[:, 0]  # the first row sees nothing
    return {"starts": starts, "ends": ends}


def inputs(case: dict) -> tuple[dict, dict]:
    """What is differentiated, and what is not; numpy, float32 that the case's dtype can say."""
    rng = np.random.default_rng(0)
    (B, H, K), (d, e), T = case["heads"], case["widths"], case["length"]
    S = KEYS if case["mask"] in ("all", "anything") else T
    normal = lambda *shape: np.asarray(jnp.asarray(rng.normal(size=shape), case["dtype"]).astype(jnp.float32))
    arrays = {"q": normal(B, T, H, d) * 2, "k": normal(B, S, K, d), "v": normal(B, S, K, e)}
    if case["sinks"]:
        arrays["sinks"] = normal(H)
    if case["gate"]:
        arrays["gate"] = normal(B, T, H, e)
    if case["bias"]:
        arrays["key_bias"] = normal(B, S) if case["bias"] == "keys" else normal(B, K, S)
    rest = intervals(case["mask"], B, T)
    if case["cap"]:
        rest["soft_cap"] = case["cap"]
    return arrays, rest


def plain(q, k, v, *, starts=None, ends=None, sinks=None, gate=None, key_bias=None, soft_cap=None, seen=None):
    """The form that one would write for XLA in the dtype of q: products of it, a softmax in float32.

    seen: bool [B, H, T, S], where the mask is more than starts and ends.
    """
    (T, H, d), (S, K) = q.shape[1:], k.shape[1:3]
    f32, heads = jnp.float32, lambda x: jnp.repeat(x, H // K, 2)
    logits = jnp.einsum("bthd,bshd->bhts", q, heads(k), preferred_element_type=f32, precision="highest") * d**-0.5
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if key_bias is not None:
        logits += (key_bias[:, None] if key_bias.ndim == 2 else jnp.repeat(key_bias, H // K, 1))[:, :, None]
    seen = masks.visible(starts, ends, T, S)[:, None] if seen is None else seen
    some = seen.any(-1, keepdims=True)
    logits = jnp.where(seen, logits, -1e30)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks[:, None, None], (*logits.shape[:3], 1)).astype(f32)
        lse = jax.nn.logsumexp(jnp.concatenate([logits, sinks], -1), -1, keepdims=True)
    else:
        lse = jax.nn.logsumexp(logits, -1, keepdims=True)
    p = jnp.where(seen, jnp.exp(logits - lse), 0).astype(q.dtype)
    o = jnp.einsum("bhts,bshe->bthe", p, heads(v), preferred_element_type=f32, precision="highest")
    if gate is not None:
        o *= jax.nn.sigmoid(gate.astype(f32))
    lse = jnp.where(some, lse, -jnp.inf if sinks is None else sinks)[..., 0].swapaxes(1, 2)
    return o.astype(q.dtype), lse


@functools.lru_cache
def program(fn, soft_cap, key_blocks):
    """One for all arrays of the same shapes, whatever they hold. key_blocks: whether fast memory is patched."""

    def loss(arrays, bounds, do, dlse):
        o, lse = fn(**arrays, **bounds, soft_cap=soft_cap)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(o.astype(lse.dtype) * do) + jnp.sum(finite * dlse), {"o": o, "lse": lse}

    return jax.jit(jax.grad(loss, has_aux=True))


def results(fn, arrays: dict, rest: dict, until: int = 10**6, key_blocks: bool = False) -> dict[str, np.ndarray]:
    """o, lse and all gradients, for one cotangent of both, which is 0 from a position on."""
    rng = np.random.default_rng(1)
    (B, T, H), e = arrays["q"].shape[:3], arrays["v"].shape[3]
    do, dlse = rng.normal(size=(B, T, H, e)), rng.normal(size=(B, T, H))
    do[:, until:], dlse[:, until:] = 0, 0
    bounds = {name: x for name, x in rest.items() if name in ("starts", "ends")}
    grads, out = program(fn, rest.get("soft_cap"), key_blocks)(arrays, bounds, do, dlse)
    found = out | {f"d{name}": x for name, x in grads.items()}
    return {name: np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for name, x in found.items()}


def typed(arrays: dict, dtype: str) -> dict:
    """Arrays of the products in a dtype, the rest in float32."""
    return {n: jnp.asarray(x, dtype if n in ("q", "k", "v", "gate") else jnp.float32) for n, x in arrays.items()}


@tiers.parametrize(
    "case",
    CASES,
    often=OFTEN,
    ids=lambda c: "-".join(str(x) for x in c.values()).replace(" ", ""),
)
def test_equals_the_definition(case, monkeypatch):
    """Values and gradients err at most twice as much as XLA's form of the same dtype, and nowhere far more.

    Logits of bfloat16 have an error of their own, as the scaled queries are rounded once more: that of lse.
    """
    if case["key_blocks"]:  # fast memory for 256 keys at a time, or one tile of them
        monkeypatch.setattr(tuning, "resident_keys", lambda kind, each, keys, tile, rest: max(tile, 256))
    arrays, rest = inputs(case)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in arrays.items()}
        exact = results(definition, wide, rest)
    xla = results(plain, typed(arrays, case["dtype"]), rest)
    ours = results(KERNELS[case["tiles"]], typed(arrays, case["dtype"]), rest, key_blocks=case["key_blocks"])
    assert set(ours) == set(exact)
    eps = float(jnp.finfo(case["dtype"]).eps)
    for name, value in exact.items():
        finite = np.isfinite(value)
        np.testing.assert_array_equal(np.isfinite(ours[name]), finite)
        off, xla_off = (np.abs(x[name][finite] - value[finite]) for x in (ours, xla))
        # Of a few keys all but rounding cancels in some gradients: that of float32 sums of so many products.
        slack = eps / 4 * np.max(np.abs(value[finite]), initial=0) + 64 * np.finfo(np.float32).eps
        if name == "lse" and case["dtype"] == "bfloat16":
            slack = 2 * eps
        mean = lambda x: np.sqrt(np.mean(x**2)) if x.size else 0
        assert mean(off) <= 2 * mean(xla_off) + slack, f"{name}: {mean(off)}, XLA {mean(xla_off)}"
        assert np.max(off, initial=0) <= 3 * np.max(xla_off, initial=0) + 4 * slack, f"{name}: {off.max()}"


def test_cases_are_pairwise():
    """Any two values of two axes meet in a case, and every value is tried often."""
    assert all(value in [case[name] for case in OFTEN] for name, every in AXES.items() for value in every)
    for a in AXES:
        for b in AXES:
            assert a == b or {(str(c[a]), str(c[b])) for c in CASES} >= {
                (str(x), str(y)) for x in AXES[a] for y in AXES[b]
            }


LAWS, T = OFTEN[1], OFTEN[1]["length"]
kernel = KERNELS[LAWS["tiles"]]


def test_what_no_row_sees_changes_nothing():
    """NaN there, of keys, values and biases: results keep their bits; its gradients are 0."""
    arrays, rest = inputs(LAWS)
    hidden = ~np.asarray(masks.visible(rest["starts"], rest["ends"], T, T)).any(1)
    assert hidden.sum() > 50
    poisoned = dict(arrays)
    for name in ("k", "v", "key_bias"):
        poisoned[name] = arrays[name].copy()
        np.moveaxis(poisoned[name], -1 if name == "key_bias" else 1, 1)[hidden] = np.nan
    for a, b in zip(*(results(kernel, typed(x, "float32"), rest).items() for x in (arrays, poisoned)), strict=True):
        np.testing.assert_array_equal(a[1], b[1])
        if a[0] in ("dk", "dv", "dkey_bias"):
            of_keys = np.moveaxis(b[1], -1 if a[0] == "dkey_bias" else 1, 1)
            assert not np.any(of_keys[hidden]) and np.any(of_keys[~hidden])


def test_keys_are_replaced_once():
    """Those that no row sees, for both directions; and not at all where every key is known to be seen."""
    arrays, rest = inputs(LAWS | {"heads": (1, 3, 1), "widths": (64, 64), "gate": False, "bias": None})
    shape = arrays["k"].shape

    def replaced(**known):
        loss = lambda arrays: jnp.sum(kernel(**arrays, **rest, **known)[0])
        text = str(jax.make_jaxpr(jax.grad(loss))(typed(arrays, "float32")))
        array = f"f32[{','.join(map(str, shape))}]"
        return text.count(f":{array} = jit[name=_where")

    assert shape == arrays["v"].shape != arrays["q"].shape
    assert replaced() == 2 and replaced(keys_seen=True) == 0


def test_rows_that_see_nothing():
    """0, an lse of -inf, and no gradient, though their queries are NaN."""
    arrays, rest = inputs(LAWS)
    nothing = rest["starts"] >= rest["ends"]
    assert nothing.any()
    arrays["q"][nothing] = np.nan
    found = results(kernel, typed(arrays, "float32"), rest)
    assert np.all(found["lse"][nothing] == -np.inf)
    for name in ("o", "dq", "dgate"):
        assert not np.any(found[name][nothing])
    assert all(np.isfinite(x).all() for name, x in found.items() if name != "lse")


def test_causality():
    """Changing what comes after a position changes no bit up to it, nor takes it a gradient."""
    arrays, rest = inputs(LAWS)
    cut = 131

    def later(name, x):
        at = np.moveaxis(x.copy(), -1 if name == "key_bias" else 1, 1)
        at[:, cut:] *= -3
        return np.moveaxis(at, 1, -1 if name == "key_bias" else 1)

    changed = {name: later(name, x) for name, x in arrays.items()}
    before, after = (results(kernel, typed(x, "float32"), rest, until=cut) for x in (arrays, changed))
    for name in before:
        a, b = (np.moveaxis(x[name], -1 if name == "dkey_bias" else 1, 1) for x in (before, after))
        np.testing.assert_array_equal(a[:, :cut], b[:, :cut])
        assert np.any(a[:, :cut]) and (name in ("o", "lse") or not np.any(a[:, cut:]))


@pytest.mark.parametrize("change, says", [
    ({"k": (1, 9, 2, 8)}, "do not fit"), ({"q": (1, 5, 3, 4)}, "multiple of K"), ({"starts": (5,)}, "starts"),
    ({"sinks": (3,)}, "one per head"), ({"gate": (1, 5, 4, 3)}, "gate"), ({"key_bias": (1, 5)}, "key_bias"),
    ({"soft_cap": -1.0}, "soft_cap=-1.0"), ({"dtype": "float16"}, "bfloat16, or all float32"),
    ({"platform": "abacus"}, "'abacus'"), ({"blocks": Blocks(ForwardBlocks(100))}, "rows=100"),
    ({"blocks": 3}, "blocks=3"), ({"v": (1, 0, 2, 4), "k": (1, 0, 2, 4)}, "no size may be 0"),
])  # fmt: skip
def test_refusals(change, says):
    """Each names the value and what is allowed."""
    shapes = {"q": (1, 5, 4, 4), "k": (1, 9, 2, 4), "v": (1, 9, 2, 4)} | change
    dtype = shapes.pop("dtype", "float32")
    of = lambda name: jnp.int32 if name == "starts" else dtype
    args = {n: jnp.zeros(x, of(n)) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=says):
        flash_attention(**args, **({} if "platform" in args else {"interpret": True}))
