"""Claim: one layer of tensor attention solves Match3, one layer of softmax attention does not, whatever its heads
(Sanford et al. 2023, arXiv:2306.02896; Alman and Song 2023, arXiv:2310.04064).

One layer and its MLP as a token classifier, on rows of 6 numbers modulo 31, a prime: half of the positions match.
Softmax attention with 1, 2, 4 and 8 heads, without positions, against tensor attention with 2 heads; equal data, steps
and, by the MLP's width, parameters.

j and k need not differ from i or from each other, so that 11 of a row's 21 pairs are of two numbers (x_i + 2 x_j or
2 x_i + x_j is 0): pairwise attention may find these. Who finds them all and nothing else is right at 0.800 of the
positions (of 120,000 drawn): that, not the commonest answer's half, is what softmax attention is held against.

Supported if tensor's mean accuracy is 0.95 or more and no softmax arm's is above 0.85, 0.05 above what pairs tell;
refuted if a softmax arm reaches 0.95; else inconclusive.

Not covered: the theorem, which is of any weights and of rows that grow. Rows of 6 in 64 channels are few: softmax
attention has room for all that is in the row, and its MLP could in principle work it out. A look of one seed set
the rows, the optimizer and the steps. Written before any run of this plan.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    a = config.parse_arg(arg, length=6, modulus=31, steps=2000)
    tree = config.read_file(f"{ROOT}/configs/tasks.py:task=match3")
    tree["data"] |= {"length": a.length, "modulus": a.modulus, "batch": 128}
    tree["optimizer"] |= {"name": "muon"}
    tree["train"] |= {"steps": a.steps, "eval_every": max(a.steps // 4, 1), "save_every": 500, "sample_tokens": 0}
    softmax = lambda heads: {"name": "softmax", "heads": heads, "causal": False, "rope_base": None}
    tensor = {"name": "tensor", "heads": 2, "causal": False, "scale": "root"}
    return {
        "question": "Does one layer of attention to pairs find triples, and no layer of softmax attention?",
        "base": tree,
        "arms": {
            **{f"softmax{heads}": {"model.mixers.M": softmax(heads)} for heads in (1, 2, 4, 8)},
            "tensor": {"model.mixers.M": tensor},
        },
        "seeds": (0, 1, 2),
        "equal": {"what": "parameters", "multiple": 2},
        "metrics": {"heldout_accuracy": {"direction": "higher", "primary": True, "margin": 0.05}},
    }
