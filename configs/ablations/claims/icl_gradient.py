"""look"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    a = config.parse_arg(arg, steps=6000)
    softmax = lambda heads: {"model.mixers.M": {"name": "softmax", "heads": heads, "head_width": 6, "rope_base": None}}
    return {
        "question": "Does softmax attention that is trained on linear regression do a debiased step of gradient descent?",
        "base": {
            "data": {"name": "icl_regression", "d": 5, "examples": 40, "noise": 0.1, "queries": "last", "batch": 64,
                     "heldout": 8192, "split": "test"},
            "model": {"name": "regression", "inputs": 6, "outputs": 1, "width": 6, "layers": 1, "mlp_width": 0,
                      "norm": "none", "mixers": {"M": {"name": "softmax"}}},
            "optimizer": {"name": "adamw", "learning_rate": 1e-2, "schedule": "cosine", "warmup": 0.02, "weight_decay": 0.0},
            "train": {"steps": a.steps, "log_every": 100, "eval_every": a.steps // 10, "save_every": 0},
        },
        "arms": {f"heads{n}": softmax(n) for n in (1, 2, 4)},
        "baseline": "heads1",
        "seeds": (0, 1, 2),
        "metrics": {"heldout_loss": {"primary": True, "margin": 0.01}},
    }
