"""Claim: recall is governed by the size of the state (Arora et al. 2024, Based, arXiv:2402.18668).

Multi-query recall of 32 pairs in 128 positions, no MLP, a window of 4 before every mixer: Taylor features of 2 to 16
per head, windows of 8 to 64, and a hybrid of both. The state is what differs, so steps are held equal.

Supported if Spearman's correlation of accuracy with state bytes over the arms is above 0.9 and the hybrid is better
than both pure forms of at least its bytes; refuted if the correlation is below 0.5; else inconclusive. Written before
any run.
"""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    based = lambda width: {"name": "based", "heads": 1, "feature_width": width}
    window = lambda keys: {"name": "softmax", "heads": 1, "window": keys}
    arms = {"softmax": {"model.mixers.M": {"name": "softmax", "heads": 1}}}
    arms |= {f"based{n}": {"model.mixers.M": based(n)} for n in (2, 4, 8, 16)}
    arms |= {f"window{n}": {"model.mixers.M": window(n)} for n in (8, 32, 64)}
    arms["hybrid"] = {"model.pattern": "WM+S", "model.mixers.M": based(4), "model.mixers.S": window(32)}
    return {
        "question": "Does the size of the state decide how much is recalled?",
        "base": f"{ROOT}/configs/tasks.py:task=mqar_separating",
        "arms": arms,
        "seeds": (0, 1, 2),
        "metrics": {"heldout_accuracy": {"direction": "higher", "primary": True, "margin": 0.05}},
    }
