"""Claim: mixture of heads beats multi-head attention with 50 to 90 % of the heads (Jin et al. 2024, arXiv:2410.11842).

Eight heads of which 7, 6 or 4 are on, two of them shared, against all eight; bytes of Python, equal parameters and
tokens, learning rates tuned. `:size=micro` or larger for a claim on an accelerator.

Supported if the arm with 6 on is at most one deviation worse and one of the three is better in the mean; refuted if all
are worse by more than two deviations; else inconclusive. Written before any run.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    a = config.parse_arg(arg, size="nano")
    base = f"{ROOT}/configs/lm.py:size={a.size}"
    rate = config.read_file(base)["optimizer"]["learning_rate"]
    moh = lambda on: {"model.mixers.M": {"name": "moh", "heads": 8, "shared": 2, "active": on - 2}}
    return {
        "question": "Does attention with 50 to 90 % of its heads on reach the loss of all heads?",
        "base": base,
        "arms": {"all": {"model.mixers.M": {"name": "softmax", "heads": 8}}, **{f"on{n}": moh(n) for n in (7, 6, 4)}},
        "seeds": (0, 1, 2, 3, 4),
        "equal": {"what": "parameters"},
        "metrics": {"heldout_loss": {"primary": True, "margin": 0.02}, "tokens_per_second": {"direction": "higher"}},
        "tuning": {"rates": (rate / 2, rate, rate * 2), "share": 0.5},
    }
