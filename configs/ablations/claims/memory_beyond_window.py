"""Claim: a neural memory recalls what no window sees any more (Behrouz et al. 2025, Titans, arXiv:2501.00663).

A needle at the beginning of 256 positions, asked for at their end: 8 windows of 32 away, and two layers of window
attention reach 2. Window attention alone; the same window with a Titans memory in its three places (mag, mal, mac),
with the gated delta rule, and with a linear memory (Based).

Supported if the best Titans variant has an accuracy of 0.2 or more a digit (chance is 0.1) and at least that of the
linear memory less 0.02, and window attention alone is below 0.13; refuted if no Titans variant is better than window
attention alone by more than 0.02; inconclusive if window attention alone is at 0.13 or above (it leaks), and else.
`:windows=16` puts the needle 16 windows away (then in 512 positions).

Not covered: text, sizes at which the paper compares, memories of equal bytes (`--dry-run` prints each arm's state).
Written before any run.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]
WINDOW = 32


def get_config(arg=None):
    a = config.parse_arg(arg, windows=8, steps=1500)
    window = {"name": "softmax", "heads": 4, "window": WINDOW}
    titans = lambda variant: {"name": "titans", "heads": 4, "variant": variant, "window": WINDOW, "expansion": 2}
    beside = lambda memory: {
        "model.pattern": "WM+S",
        "model.mixers.M": {"name": memory, "heads": 4},
        "model.mixers.S": window,
    }
    tree = config.read_file(f"{ROOT}/configs/tasks.py:task=needle")
    tree["data"] |= {"length": a.windows * WINDOW, "depth": "0"}
    tree["train"] |= {"steps": a.steps, "eval_every": max(a.steps // 4, 1)}
    return {
        "question": "Is what lies many windows back recalled from a memory?",
        "base": tree,
        "arms": {
            "window": {"model.mixers.M": window},
            **{variant: {"model.mixers.M": titans(variant)} for variant in ("mag", "mal", "mac")},
            "delta": beside("gated_deltanet"),
            "linear": beside("based"),
        },
        "seeds": (0, 1, 2),
        "metrics": {"heldout_accuracy": {"direction": "higher", "primary": True, "margin": 0.02}},
    }
