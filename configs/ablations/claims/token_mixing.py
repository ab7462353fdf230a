"""Claim: mixing tokens is indispensable, its form is not (Deconstructing Attention, arXiv:2510.11602).

Bytes of Python at equal parameters and tokens. In all layers: softmax attention; none (a window of 1: a position sees
itself alone); mean (a soft-cap of 1e-6: the mean of all values so far, whatever queries and keys are); taylor (its
exponential replaced by a polynomial: Based); decay (lightning). And none, mean and taylor in every second layer only.

Supported if both hybrids of none and of mean regain 70 % or more of the loss between none in all layers and softmax in
all; refuted if none or mean in all layers is equivalent to softmax, or if a hybrid regains less than 30 %; else
inconclusive. `:size=micro` or larger for a claim on an accelerator.

Not covered: the paper's static forms, whose queries and keys are made of the input embedding or of a second stream
(random, or of a fixed text), which attnlab does not have yet; softmax over scores of keys alone; models of 70M to 500M.
Written before any run.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    a = config.parse_arg(arg, size="nano")
    base = f"{ROOT}/configs/lm.py:size={a.size}"
    heads = config.read_file(base)["model"]["mixers"]["M"]["heads"]
    softmax = {"name": "softmax", "heads": heads}
    forms = {
        "none": softmax | {"window": 1},
        "mean": softmax | {"soft_cap": 1e-6},
        "taylor": {"name": "based", "heads": heads},
        "decay": {"name": "lightning", "heads": heads},
    }
    hybrid = lambda form: {"model.pattern": "MS", "model.mixers.M": forms[form], "model.mixers.S": softmax}
    return {
        "question": "Must tokens be mixed, and must it be by softmax?",
        "base": base,
        "arms": {
            "softmax": {},
            **{name: {"model.mixers.M": node} for name, node in forms.items()},
            **{f"{name}+softmax": hybrid(name) for name in ("none", "mean", "taylor")},
        },
        "seeds": (0, 1, 2, 3, 4),
        "equal": {"what": "parameters"},
        "metrics": {"heldout_loss": {"primary": True, "margin": 0.02}},
    }
