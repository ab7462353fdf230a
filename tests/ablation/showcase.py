"""Made-up results with every part that a report can show."""

from __future__ import annotations

import math

import numpy as np

from attnlab.ablation import statistics
from attnlab.ablation.compare import compare
from attnlab.ablation.results import Arm, Cost, Metric, Plan, Results, Run


def results(seed: int = 0) -> Results:
    """Made-up results with every part that a report can show, compared: for looking at the page."""
    rng, seeds = np.random.default_rng(seed), range(5)
    truth = {"softmax": (2.31, 1 << 20, 9.1e5), "gated": (2.24, 1 << 20, 9.9e5), "lightning": (2.305, 1 << 14, 7.2e5),
             "based": (2.42, 1 << 16, 8.0e5)}  # fmt: skip
    steps = np.arange(10, 801, 10)
    common, runs = 0.02 * rng.normal(size=len(seeds)), []
    for arm, (end, state, flops) in truth.items():
        for i in seeds:
            failed = arm == "based" and i == 4
            final = end + common[i] + 0.006 * rng.normal()
            loss = final + 3.2 * (steps / 10.0) ** -0.9 + 0.01 * rng.normal(size=len(steps)) * np.exp(-steps / 400)
            rate = 9000.0 * 8e5 / flops * (1 + 0.02 * rng.normal())
            tokens = steps * 4096.0
            curve = {"step": steps, "tokens": tokens, "flops": 3 * flops * tokens, "seconds": tokens / rate}
            curve = {name: column.tolist() for name, column in curve.items()} | {"heldout_loss": loss.tolist()}
            ends = {"heldout_loss": float(loss[-1]), "heldout_bits_per_byte": float(loss[-1] / math.log(2))}
            runs.append(Run(
                arm, i, f"arms/{arm}/seed{i}", "failed" if failed else "done",
                reason="gradients were not finite for 10 steps in a row" if failed else None, device="cpu",
                seconds=float(tokens[-1] / rate), tokens=int(tokens[-1]), curve=curve,
                final={} if failed else ends,
                cost=Cost(1_200_000, 1_130_000, flops, state, rate), impl={"attention": "xla"},
            ))  # fmt: skip
    curve = lambda best: [[lr, best + 0.04 * math.log2(lr / 4e-3) ** 2, 0.008, 2] for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
    arms = {
        arm: Arm({"model.mixers.M": arm}, {} if arm == "softmax" else {"model.mixers.M.name": ["softmax", arm]},
                 4e-3, curve(end)) for arm, (end, *_) in truth.items()
    }  # fmt: skip
    metrics = [
        Metric("heldout_loss", unit="nats per token"),
        Metric("heldout_bits_per_byte", primary=False, unit="bits"),
    ]
    plan = Plan("Made-up numbers: which mixer has the lowest held-out loss?", "softmax", arms, list(seeds), metrics,
                statistics.stopping([5]), "0f3a", {"heldout_loss": 0.02})  # fmt: skip
    return compare(Results(plan, runs))
