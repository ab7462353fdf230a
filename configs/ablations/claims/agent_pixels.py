"""Claim: agent attention is near softmax attention at linear cost (Han et al. 2023, arXiv:2312.08874).

Agents 9, 16 and 49 against softmax, at equal parameters: drawn digits read pixel by pixel (`:side=32` is N = 1024; the
default, 8, is 64 positions), and ListOps read at a first token, where every position sees all others as in the paper.

Supported if 49 agents are at most one point of accuracy below softmax on both, and their tokens per second at side 32
are at least a quarter of those at side 8 (`python -m benchmarks.layers --flat --mixers agent` has its own slope);
refuted if 49 agents are more than two points below on either; else inconclusive.

Not covered: the paper's layer works on images (agents pooled over a grid, biases by position, 3 x 3 convolution) in
vision transformers, which attnlab does not have yet. On pixels the agents are the causal form, which is ours. Written
before any run.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    a = config.parse_arg(arg, side=8)
    agents = lambda count: {"model.mixers.M": "agent", "model.mixers.M.agents": count}
    return {
        "question": "Do a few agents between queries and keys keep the accuracy of attention?",
        "tasks": {
            "pixels": {"base": f"{ROOT}/configs/tasks.py:task=pixels", "data.side": a.side},
            "listops": {
                "base": f"{ROOT}/configs/tasks.py:task=listops",
                "data.read": "cls",
                "model.name": "classifier",
                "model.mixers.M.causal": False,
            },
        },
        "arms": {"softmax": {}, **{f"agents{count}": agents(count) for count in (9, 16, 49)}},
        "seeds": (0, 1, 2),
        "equal": {"what": "parameters", "multiple": 2},
        "metrics": {
            "pixels/heldout_accuracy": {"direction": "higher", "primary": True, "margin": 0.01},
            "listops/heldout_accuracy": {"direction": "higher", "primary": True, "margin": 0.01},
            "pixels/tokens_per_second": {"direction": "higher"},
        },
    }
