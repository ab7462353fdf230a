"""Claim: in-context classification is learned abruptly, and needs bursts (Reddy 2023, arXiv:2312.03002; Chan et al.
2022, arXiv:2205.05055).

Rows of 4 items with labels, of 64 and of 2,048 classes. A bursty row has 4/B classes, B times each, and asks for one of
them; B = 0: every item is drawn by itself, and the one asked for is seldom there. What is measured are rows of new
classes, which the context alone tells (of B = 1 where B = 0). `python -m benchmarks.in_context transition WORKDIR`
tells when and how fast their accuracy rises from B/N, which naming any label of the context gives, and `gain`, the
share of what is above that.

Supported if, over the runs with B > 0 that rise, the median width of the rise is at most 0.1 of its middle, and on
2,048 classes the mean gain of B = 2 is above that of B = 0 by more than the larger deviation of the two; refuted if the
median width is above 0.3, or B = 0 gains as much; else, and where fewer than three runs rise, inconclusive. That a
head's attention to the label leads the rise is not tested.

In 32 channels, with AdamW, nothing rose in 2,000 steps (64 classes, seed 0). Two runs of seed 1000 on 2,048 classes,
B = 2, set the width of 64 and the optimizer: there AdamW rose from step 1,500 on, Muon from 600. The rule was written
before any of them.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    a = config.parse_arg(arg, steps=2000, every=50, rate=5e-3)
    task = {
        "base": f"{ROOT}/configs/tasks.py:task=icl_classes",
        "data.batch": 64,
        "data.pairs": 4,
        "data.labels": 16,
        "data.width": 31,
        "data.heldout": 512,
        "data.split": "test",
        "model.inputs": 31,
        "model.vocab": 16,
        "model.width": 64,
        "model.mlp_width": 128,
        "model.mixers.M.heads": 1,
        "optimizer.name": "muon",
        "optimizer.learning_rate": a.rate,
        "optimizer.schedule": "constant",
        "train.steps": a.steps,
        "train.eval_every": a.every,
        "train.save_every": a.steps,
    }
    bursts = lambda b: {"data.burst": b} if b else {"data.burst": 1, "data.p_burst": 0.0}
    counts = (64, 2048)
    new = lambda n: f"classes{n}/heldout_accuracy/set=context_new_classes"
    return {
        "question": "Is classification in context learned abruptly, and do bursts bring it about?",
        "tasks": {f"classes{n}": {**task, "data.classes": n} for n in counts},
        "arms": {f"burst{b}": bursts(b) for b in (0, 1, 2)},
        "baseline": "burst0",
        "seeds": (0, 1, 2),
        "metrics": {new(n): {"direction": "higher", "primary": True} for n in counts},
    }
