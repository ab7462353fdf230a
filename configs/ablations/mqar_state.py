"""Does Based recall more the larger its state is, over its two sizes? (Arora et al. 2024, arXiv:2402.18668, figure 2)

Multi-query recall of 32 pairs in 128 positions, where softmax attention is perfect: Taylor features of 2 to 16 a head,
in every second layer a window of 4 or 32. Equal steps.

It does if Spearman's correlation of mean accuracy with state bytes over the eight arms of Based is above 0.9. Written
before any run.
"""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
WIDTHS, WINDOWS = (2, 4, 8, 16), (4, 32)


def get_config(arg=None):
    based = lambda width, window: {
        "model.mixers.M": {"name": "based", "heads": 1, "feature_width": width},
        "model.mixers.W.window": window,
    }
    arms = {"softmax": {"model.mixers.M": {"name": "softmax", "heads": 1}}}
    arms |= {f"features{n}_window{w}": based(n, w) for n in WIDTHS for w in WINDOWS}
    return {
        "question": "Does Based recall more the larger its state is, in features and in window?",
        "base": f"{ROOT}/configs/tasks.py:task=mqar_separating",
        "arms": arms,
        "seeds": (0, 1, 2),
        "metrics": {"heldout_accuracy": {"direction": "higher", "primary": True, "margin": 0.05}},
    }
