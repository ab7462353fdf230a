"""Claim: chunks of 16 reach the loss of attention (Wei et al. 2025, RAT, arXiv:2507.04416), and are faster.

Softmax, RAT with chunks of 4, 16 and 64, and RAT of 16 with softmax in every other layer, at equal parameters and
tokens.

In loss, supported if chunks of 16 are equivalent within the margin, 2 % of a loss of 1.5, or better; refuted if worse
by more. "Reproduced" in speed only at 5 times softmax's tokens a second on long rows of an accelerator; else the ratio
is what there is to tell. Written before any run.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    a = config.parse_arg(arg, size="micro")
    base = f"{ROOT}/configs/lm.py:size={a.size}"
    heads = config.read_file(base)["model"]["mixers"]["M"]["heads"]
    rat = lambda chunk: {"name": "rat", "heads": heads, "chunk": chunk}
    hybrid = {"model.pattern": "MS", "model.mixers.M": rat(16), "model.mixers.S": {"name": "softmax", "heads": heads}}
    return {
        "question": "Does averaging inside chunks keep the loss of attention?",
        "base": base,
        "arms": {"softmax": {}, **{f"rat{n}": {"model.mixers.M": rat(n)} for n in (4, 16, 64)}, "hybrid": hybrid},
        "seeds": (0, 1, 2, 3, 4),
        "equal": {"what": "parameters"},
        "metrics": {
            "heldout_loss": {"primary": True, "margin": 0.03},
            "tokens_per_second": {"direction": "higher"},
        },
    }
