"""Test-time regression: what attention layers predict when keys and values are samples of a function.

    python -m benchmarks.regression [--seeds 5] [--length 512] [--width 8] [--json FILE]

Exits with 1 unless local linear attention is at least as good as linear attention on the linear stream, and better than
both linear and softmax attention on the piecewise linear ones.

A stream of T pairs (k_t, v_t) is cut into n equal segments (n = 1 is the linear stream, n = 2 and 4 the piecewise
linear ones). All of it is drawn from the standard normal distribution unless said otherwise:

    directions  c_1 .. c_n, orthonormal, at random
    maps        W_1 .. W_n, [d, d], entries with variance 1 / d
    keys        of segment i: uniform on the part of the unit sphere where c_i . k is the largest of c_1 . k .. c_n . k;
                n = 1: on the whole sphere
    values      v_t = W_i k_t + 0.1 * noise

so that v is one function of k, linear in every region, and the stream is not stationary: every segment brings keys from
a region that it alone visits. At every t > 1 a predictor is given all earlier pairs and k_t, and is charged
|prediction - W_i k_t|^2 / d, noise not counted. The figure of a stream is the mean over all t > 1, the beginnings of
segments included; beside it stands the mean over the last quarter of every segment. A predictor of 0 has about 1 / d.

Predictors: linear attention, `a sum_j (k_j . k) v_j / t`; linear attention with the least-squares solution of what it
has seen, `(sum v k^T)(sum k k^T + r)^-1 k`, as MesaNet computes it; softmax attention, logits `s k_j . k`; local linear
attention with the same logits and ridge r (`attnlab.ops.local_linear`, by conjugate gradients). Each predictor's scale
(a or s) and ridge are chosen, for each n, among the same few values, by the mean over all t > 1 on streams of other
seeds than those reported.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from attnlab.ops import Mask, attention
from attnlab.ops.local_linear import local_linear

SEGMENTS = (1, 2, 4)
NOISE = 0.1
SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
FIRST_TUNING_SEED = 1000

Predictor = Callable[[jax.Array, jax.Array, float, float], jax.Array]


def stream(seed: int, segments: int, length: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys [T, d], values [T, d] and the values without noise [T, d] of one stream; see the module's docstring."""
    if length % segments or width < segments:
        raise SystemExit(f"{segments} segments need a multiple of {segments} positions and a width of as much or more")
    rng = np.random.default_rng([seed, segments])
    directions = np.linalg.qr(rng.standard_normal((width, width)))[0][:segments]
    maps = rng.standard_normal((segments, width, width)) / np.sqrt(width)
    keys = np.concatenate([_keys_of_region(rng, directions, i, length // segments) for i in range(segments)])
    clean = np.einsum("tij,tj->ti", np.repeat(maps, length // segments, axis=0), keys)
    return keys, clean + NOISE * rng.standard_normal(clean.shape), clean


def _keys_of_region(rng: np.random.Generator, directions: np.ndarray, region: int, count: int) -> np.ndarray:
    """`count` keys of one region, by drawing of the whole sphere until there are enough."""
    found: list[np.ndarray] = []
    while sum(map(len, found)) < count:
        keys = rng.standard_normal((4 * count, directions.shape[1]))
        keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
        found.append(keys[(keys @ directions.T).argmax(-1) == region])
    return np.concatenate(found)[:count]


def linear_attention(keys: jax.Array, values: jax.Array, scale: float, ridge: float) -> jax.Array:
    sums = jnp.cumsum(values[:, :-1, :, None] * keys[:, :-1, None, :], axis=1)
    count = jnp.arange(1, keys.shape[1])[:, None]
    return scale * jnp.einsum("btij,btj->bti", sums, keys[:, 1:]) / count


def linear_regression(keys: jax.Array, values: jax.Array, scale: float, ridge: float) -> jax.Array:
    sums = jnp.cumsum(values[:, :-1, :, None] * keys[:, :-1, None, :], axis=1)
    squares = jnp.cumsum(keys[:, :-1, :, None] * keys[:, :-1, None, :], axis=1) + ridge * jnp.eye(keys.shape[-1])
    return jnp.einsum("btij,btj->bti", sums, jnp.linalg.solve(squares, keys[:, 1:, :, None])[..., 0])


def softmax_attention(keys: jax.Array, values: jax.Array, scale: float, ridge: float) -> jax.Array:
    q, k, v = keys[:, 1:, None] * scale, keys[:, :-1, None], values[:, :-1, None]
    return attention(q, k, v, Mask(causal=True), scale=1.0)[:, :, 0]


def local_linear_attention(keys: jax.Array, values: jax.Array, scale: float, ridge: float) -> jax.Array:
    """The scale is in the logits only: queries and keys stay in one space."""
    q, k, v = keys[:, 1:, None], keys[:, :-1, None], values[:, :-1, None]
    o, _ = local_linear(q, k, v, Mask(causal=True), ridge, scale=scale, iterations=3 * keys.shape[-1])
    return o[:, :, 0]


# By name: the function, and whether it has a scale and a ridge.
PREDICTORS: dict[str, tuple[Predictor, bool, bool]] = {
    "linear attention": (linear_attention, True, False),
    "linear attention, least squares": (linear_regression, False, True),
    "softmax attention": (softmax_attention, True, False),
    "local linear attention": (local_linear_attention, True, True),
}


def errors(predictor: Predictor, streams: tuple[jax.Array, ...], scale: float, ridge: float) -> np.ndarray:
    """Squared error per channel [seeds, T - 1]."""
    keys, values, clean = streams
    return np.asarray(_compiled(predictor, scale)(keys, values, clean, ridge))


@functools.cache
def _compiled(predictor: Predictor, scale: float) -> Callable[..., jax.Array]:
    def run(keys, values, clean, ridge):
        return ((predictor(keys, values, scale, ridge) - clean[:, 1:]) ** 2).mean(-1)

    return jax.jit(run)


def streams(first: int, seeds: int, segments: int, length: int, width: int) -> tuple[jax.Array, ...]:
    """Keys, values and clean values [seeds, T, d] in float64."""
    made = [stream(first + seed, segments, length, width) for seed in range(seeds)]
    return tuple(jnp.asarray(np.stack(part)) for part in zip(*made, strict=True))


def measure(seeds: int, length: int, width: int, segments: tuple[int, ...] = SEGMENTS) -> list[dict[str, Any]]:
    """One row for each number of segments and predictor: mean squared error and its deviation over seeds."""
    rows = []
    for n in segments:
        tuning, reported = (streams(first, seeds, n, length, width) for first in (FIRST_TUNING_SEED, 0))
        for name, (predictor, has_scale, has_ridge) in PREDICTORS.items():
            grid = list(itertools.product(SCALES if has_scale else SCALES[:1], RIDGES if has_ridge else RIDGES[:1]))
            tuned = {point: errors(predictor, tuning, *point).mean() for point in grid}
            best = min(tuned, key=tuned.get)
            found = errors(predictor, reported, *best)
            per_seed = found.mean(1)
            segment, within = np.divmod(np.arange(1, length), length // n)
            rows.append(
                {
                    "segments": n,
                    "predictor": name,
                    "scale": best[0] if has_scale else None,
                    "ridge": best[1] if has_ridge else None,
                    "mse": float(per_seed.mean()),
                    "deviation": float(per_seed.std(ddof=1)) if seeds > 1 else None,
                    "settled": float(found[:, within >= 0.75 * (length // n)].mean()),
                    "by_segment": [float(found[:, segment == i].mean()) for i in range(n)],
                    "per_seed": per_seed.tolist(),
                }
            )
    return rows


def ordering(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """The claims about the mean squared errors, and whether they hold."""
    mse = {(row["segments"], row["predictor"]): row["mse"] for row in rows}
    local = lambda n: mse[n, "local linear attention"]
    claims = {}
    for n in dict.fromkeys(row["segments"] for row in rows):
        if n == 1:
            claims["1 segment: local linear <= linear"] = local(n) <= mse[n, "linear attention"]
            continue
        for other in ("linear attention", "softmax attention"):
            claims[f"{n} segments: local linear < {other.split()[0]}"] = local(n) < mse[n, other]
    return claims


def main() -> int:
    """0, or 1 where the ordering is another."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regression", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="streams reported, and as many others to tune on")
    parser.add_argument("--length", type=int, default=512, help="T, a multiple of 4")
    parser.add_argument("--width", type=int, default=8, help="d of keys and values, 4 or more")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures, per seed and segment, to this file")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    rows = measure(args.seeds, args.length, args.width)
    table = rich.table.Table(title=f"test-time regression, T {args.length}, d {args.width}, {args.seeds} seeds")
    for name in ("segments", "predictor", "scale", "ridge", "mean squared error", "+-", "last quarters"):
        table.add_column(name, justify="left" if name == "predictor" else "right")
    for row in rows:
        numbers = [row["scale"], row["ridge"]]
        shown = ["" if x is None else f"{x:g}" for x in numbers]
        shown += [f"{row[name] or 0:.5f}" for name in ("mse", "deviation", "settled")]
        table.add_row(str(row["segments"]), row["predictor"], *shown, end_section=row["predictor"] == [*PREDICTORS][-1])
    rich.console.Console(width=110, highlight=False).print(table)
    claims = ordering(rows)
    for claim, holds in claims.items():
        print(f"{claim}: {'yes' if holds else 'no'}")
    if args.json:
        facts = {"length": args.length, "width": args.width, "seeds": args.seeds, "jax": jax.__version__}
        args.json.write_text(json.dumps(facts | {"ordering": claims, "rows": rows}, indent=1))
    return int(not all(claims.values()))


if __name__ == "__main__":
    sys.exit(main())
