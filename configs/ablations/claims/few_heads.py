"""Claim: a few heads do the retrieving (Wu et al. 2024, Retrieval Head, arXiv:2404.15574).

The part that needs no intervention in a trained model: how many heads a model must have to find a needle. Four layers
of 8, 4, 2 or 1 heads of the same width, 32 to 4 heads in all, on needles among needles that nobody asks for; equal
steps, and equal parameters by wider MLPs.

Supported if 4 heads, an eighth of 32, are at most 5 points of accuracy below 32; refuted if 16 are more than 20 points
below; else inconclusive. The rule presupposes that 32 heads find needles, which it should have asked for: in 1,500
steps they do not (docs/claims.md), so whoever repeats it wants more, `:steps=N`.

Not covered: the claim itself, which is causal and of one trained model. Its heads are ranked by how much they attend to
what they copy, and the tenth or so that rank highest, against as many at random, are switched off. That needs attention
maps and switches inside a trained model, which attnlab does not have yet. Written before any run.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    a = config.parse_arg(arg, steps=1500)
    tree = config.read_file(f"{ROOT}/configs/tasks.py:task=needle,pattern=M")
    tree["data"] |= {"length": 128, "haystack": "needle"}
    tree["model"] |= {"layers": 4}
    tree["train"] |= {"steps": a.steps, "eval_every": max(a.steps // 4, 1)}
    heads = lambda count: {"model.mixers.M": {"name": "softmax", "heads": count, "head_width": 8}}
    return {
        "question": "How many heads does a model need to find a needle?",
        "base": tree,
        "arms": {f"heads{4 * count}": heads(count) for count in (8, 4, 2, 1)},
        "seeds": (0, 1, 2),
        "equal": {"what": "parameters"},
        "metrics": {"heldout_accuracy": {"direction": "higher", "primary": True, "margin": 0.05}},
    }
