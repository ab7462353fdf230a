"""Claim: a sigmoid gate after attention lowers the loss and tolerates larger rates (Qiu et al. 2025, arXiv:2505.06708).

No gate, one number a head, one a channel; four learning rates each, on bytes of Python at equal parameters.

Supported if the best gated arm's loss at its own rate is better, and at the largest rate of the grid it loses less
against its best than softmax does; refuted if both gated arms are worse. What it says of attention sinks is not tested
here. Written before any run.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    a = config.parse_arg(arg, size="nano")
    base = f"{ROOT}/configs/lm.py:size={a.size}"
    tree = config.read_file(base)
    heads, rate = tree["model"]["mixers"]["M"]["heads"], tree["optimizer"]["learning_rate"]
    gated = lambda kind: {"model.mixers.M": {"name": "gated", "heads": heads, "granularity": kind}}
    return {
        "question": "Does a gate lower the loss, and does it stand larger learning rates?",
        "base": base,
        "arms": {"none": {}, "headwise": gated("headwise"), "elementwise": gated("elementwise")},
        "seeds": (0, 1, 2, 3, 4),
        "equal": {"what": "parameters"},
        "metrics": {"heldout_loss": {"primary": True, "margin": 0.02}},
        "tuning": {"rates": (rate / 2, rate, rate * 2, rate * 4), "seeds": (1000, 1001)},
    }
