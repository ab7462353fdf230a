"""A first look, in minutes: four mixers against softmax attention on Python's standard library, read as bytes.

`attnlab ablate --config configs/ablations/quick.py --workdir runs/quick`; with `:steps=800` runs are longer. Three
seeds are a look, not a claim.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARMS = ("softmax", "gated", "moh", "flow", "lightning")


def get_config(arg=None):
    a = config.parse_arg(arg, steps=300)
    small = {
        "model.width": 64,
        "model.layers": 2,
        "data.length": 128,
        "data.batch": 16,
        "train.steps": a.steps,
        "train.log_every": 10,
        "train.eval_every": max(a.steps // 4, 1),
        "train.eval_batches": 32,
        "train.save_every": 100,
        "train.sample_tokens": 64,
        "optimizer.learning_rate": 4e-3,
        "optimizer.warmup": 0.05,
        "mesh.data": 1,
    }
    return {
        "question": "Does any of four cheap changes beat softmax attention on Python code at equal parameters?",
        "base": f"{ROOT}/configs/lm.py:size=nano",
        "arms": {name: {**small, "model.mixers.M": {"name": name, "heads": 4}} for name in ARMS},
        "baseline": "softmax",
        "seeds": (0, 1, 2),
        "equal": {"what": "parameters", "multiple": 2},
        "metrics": {
            "heldout_loss": {"direction": "lower", "primary": True, "margin": 0.02},
            "heldout_bits_per_byte": {"direction": "lower"},
            "tokens_per_second": {"direction": "higher"},
        },
    }
