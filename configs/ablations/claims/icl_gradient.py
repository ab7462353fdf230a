"""Claim: softmax attention trained on linear regression in context does a debiased step of gradient descent (He et al.
2025, In-Context Linear Regression Demystified, arXiv:2503.12734).

One layer of 1, 2 or 4 heads of width d + 1 on 40 examples of 5 numbers, without norm, MLP and positions, as in the
paper; besides, the query sees itself, and a residual goes round the layer. `python -m benchmarks.in_context gradient
WORKDIR` reads the matrices off the trained models, and evaluates them at 4 times the examples.

Five parts, each told alone, by means over seeds: the query-key product is diagonal with a share above 0.9 (2 and 4
heads); the heads' output-value entries sum to less than 0.05 of their norm (2 and 4 heads); the risk of 2 heads is
below that of 1 under every seed; it is within 5 % of one step's on the same rows, whose expectation is 0.240; from 40
examples to 160 the risk of 2 heads falls by a larger factor than linear attention's. A part is supported if so, refuted
if not; a part that holds under some seeds only says so. Written before any run.
"""

from attnlab import config


def get_config(arg=None):
    a = config.parse_arg(arg, steps=3000, rate=1e-2, batch=32)
    base = {
        "data": {
            "name": "icl_regression",
            "d": 5,
            "examples": 40,
            "noise": 0.1,
            "queries": "last",
            "batch": a.batch,
            "heldout": 4096,
            "split": "test",
        },
        "model": {
            "name": "regression",
            "inputs": 6,
            "width": 6,
            "layers": 1,
            "mlp_width": 0,
            "norm": "none",
            "mixers": {"M": {"name": "softmax", "head_width": 6, "rope_base": None}},
        },
        "optimizer": {"name": "adamw", "learning_rate": a.rate, "schedule": "cosine", "weight_decay": 0.0},
        "train": {
            "steps": a.steps,
            "log_every": 100,
            "eval_every": a.steps // 4,
            "eval_batches": 4096 // a.batch,
            "save_every": a.steps,
        },
    }
    return {
        "question": "Does softmax attention trained on linear regression do a debiased step of gradient descent?",
        "base": base,
        "arms": {f"heads{n}": {"model.mixers.M.heads": n} for n in (1, 2, 4)},
        "seeds": (0, 1, 2),
        "metrics": {"heldout_loss": {"primary": True, "margin": 0.012}, "heldout_step_loss": {}},
    }
