"""A first look, in minutes: four mixers against softmax attention, on Python's standard library and in recall.

Text is read as bytes, at equal parameters; recall is mqar, where a window of 4 before every mixer looks one token back
and no block has an MLP.

`attnlab ablate --config configs/ablations/quick.py --workdir runs/quick`; with `:steps=800` runs are longer. Three
seeds are a look, not a claim.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARMS = ("softmax", "gated", "moh", "flow", "lightning")


def get_config(arg=None):
    a = config.parse_arg(arg, steps=300, recall=800)  # steps on text, and in recall
    text = {
        "base": f"{ROOT}/configs/lm.py:size=nano",
        "model.width": 64,
        "model.layers": 2,
        "data.length": 128,
        "data.batch": 16,
        "train.eval_batches": 32,
        "train.log_every": 10,
        "train.sample_tokens": 64,
        "optimizer.learning_rate": 4e-3,
        "mesh.data": 1,
    }
    recall = {"base": f"{ROOT}/configs/tasks.py:task=mqar"}
    length = lambda steps: {"train.steps": steps, "train.eval_every": max(steps // 4, 1), "train.save_every": 100}
    return {
        "question": "Does any of four changes of softmax attention read Python better, or recall better?",
        "tasks": {"text": {**text, **length(a.steps)}, "mqar": {**recall, **length(a.recall)}},
        "arms": {name: {"model.mixers.M": {"name": name, "heads": 4}} for name in ARMS},
        "baseline": "softmax",
        "seeds": (0, 1, 2),
        "equal": {"what": "parameters", "multiple": 2, "tasks": {"mqar": "steps"}},
        "metrics": {
            "text/heldout_loss": {"direction": "lower", "primary": True, "margin": 0.02},
            "mqar/heldout_accuracy": {"direction": "higher", "primary": True, "margin": 0.02},
            "text/heldout_bits_per_byte": {"direction": "lower"},
            "text/tokens_per_second": {"direction": "higher"},
        },
    }
