"""The core six against softmax attention at equal parameters and tokens, each at its own learning rate.

`attnlab ablate --config configs/ablations/core_six.py:size=nano --workdir runs/core_six`; sizes are those of
configs/lm.py. Five seeds: enough for a claim about a difference of 1.7 deviations of paired differences. `--dry-run`
tells the price.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARMS = ("softmax", "gated", "moh", "agent", "flow", "local_linear", "titans")


def get_config(arg=None):
    a = config.parse_arg(arg, size="nano")
    base = f"{ROOT}/configs/lm.py:size={a.size}"
    tree = config.read_file(base)
    heads, middle = tree["model"]["mixers"]["M"]["heads"], tree["optimizer"]["learning_rate"]
    return {
        "question": "Which of six changes of attention lowers the held-out loss at equal parameters and tokens?",
        "base": base,
        "arms": {name: {"model.mixers.M": {"name": name, "heads": heads}} for name in ARMS},
        "baseline": "softmax",
        "seeds": (0, 1, 2, 3, 4),
        "equal": {"what": "parameters"},
        "metrics": {
            "heldout_loss": {"direction": "lower", "primary": True, "margin": 0.01},
            "tokens_per_second": {"direction": "higher"},
        },
        "tuning": {"rates": (middle / 2, middle, middle * 2), "seeds": (1000,), "share": 0.5},
    }
