"""Claim: local linear attention beats linear and softmax attention in test-time regression, and adapts to shifts (Zuo
et al. 2025, Local Linear Attention, arXiv:2510.01450, section 5.1).

Trained layers on `test_time_regression`: one linear map, two, or four, visited one after the other, each with keys from
a region of its own. Local linear, softmax and linear attention (features elu(x) + 1), every arm's learning rate tuned
on each, at equal parameters and steps. What the same three predict without training, scale and ridge tuned, is
`python -m benchmarks.regression`.

Supported if local linear attention's mean error is below the better of the other two on all three, by more than one
deviation of the paired differences to it; refuted if either of the others has the lower mean on two or four maps; else
inconclusive. Written before any run.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    a = config.parse_arg(arg, length=64, steps=600, rate=4e-3)
    task = {
        "base": f"{ROOT}/configs/tasks.py:task=test_time_regression",
        "data.length": a.length,
        "data.d": 4,
        "data.batch": 16,
        "model.inputs": 8,
        "model.outputs": 4,
        "model.width": 32,
        "train.steps": a.steps,
        "train.eval_every": a.steps,
        "train.save_every": a.steps,
        "train.eval_batches": 64,
        "train.log_every": 50,
    }
    linear = {"name": "flow", "feature": "elu", "competition": False, "allocation": False}
    mixer = lambda node: {"model.mixers.M": {"heads": 2, **node}}
    return {
        "question": "Does local linear attention fit a function that changes better than softmax and linear attention?",
        "tasks": {f"maps{n}": {**task, "data.segments": n} for n in (1, 2, 4)},
        "arms": {
            "local_linear": mixer({"name": "local_linear"}),
            "softmax": mixer({"name": "softmax"}),
            "linear": mixer(linear),
        },
        "baseline": "local_linear",
        "seeds": (0, 1, 2),
        "equal": {"what": "parameters", "multiple": 1},
        "metrics": {f"maps{n}/heldout_loss": {"primary": True} for n in (1, 2, 4)},
        "tuning": {"rates": (a.rate / 2, a.rate, a.rate * 2), "share": 0.25, "most": 4},
    }
