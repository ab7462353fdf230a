"""Claim: flow attention is linear in the length and does not degenerate as linear attention does: competition among
sources and allocation to sinks are what it takes (Wu et al. 2022, Flowformer, arXiv:2202.06258, sections 3 and 4).

Sequential pixels: flow attention, the same without competition and without allocation, softmax attention, and
linear attention with the features elu(x) + 1, at equal parameters and steps. Time against length is not
this plan's: `python -m benchmarks.layers --flat --mixers flow --lengths 1024,2048,4096,8192,16384,32768` tells the
power of the length by which the time of a row grows.

Supported if flow's mean accuracy is above linear attention's by more than one deviation of the paired differences, both
flows that lack one part are below flow in the mean, and time grows as a power of 0.9 to 1.2; refuted if linear
attention's mean is equal or better, or the power is outside 0.9 to 1.2; else inconclusive. Written before any run.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    a = config.parse_arg(arg, steps=600)
    flow = lambda **knobs: {"model.mixers.M": {"name": "flow", "heads": 4, **knobs}}
    return {
        "question": "Do competition and allocation make linear attention better?",
        "tasks": {
            "pixels": {
                "base": f"{ROOT}/configs/tasks.py:task=pixels",
                "data.split": "test",
                "model.width": 32,
                "train.steps": a.steps,
                "train.eval_every": a.steps,
                "train.save_every": a.steps,
            }
        },
        "arms": {
            "flow": flow(),
            "no_competition": flow(competition=False),
            "no_allocation": flow(allocation=False),
            "linear": flow(competition=False, allocation=False, feature="elu"),
            "softmax": {"model.mixers.M": {"name": "softmax", "heads": 4}},
        },
        "baseline": "flow",
        "seeds": (0, 1, 2),
        "equal": {"what": "parameters"},
        "metrics": {
            "pixels/heldout_accuracy": {"direction": "higher", "primary": True, "margin": 0.01},
            "pixels/heldout_loss": {},
        },
    }
