"""Every causal mixer against softmax attention, on text at equal parameters and in recall (mqar).

`attnlab ablate --config configs/ablations/every_mixer.py --workdir runs/every`; the tasks are quick.py's, smaller. Each
mixer has its defaults with four heads, all have one learning rate: a table of where to look, not a ranking. Hours on a
CPU: `--dry-run` tells the price, `:arms=softmax-gla-mamba2` takes some of them.
"""

import pathlib

from attnlab import config, mixers

ROOT = pathlib.Path(__file__).resolve().parents[2]


def get_config(arg=None):
    a = config.parse_arg(arg, steps=300, recall=400, arms="all")  # steps on text, and in recall
    able = [name for name in mixers.names() if mixers.get(name).capabilities.causal]
    chosen = able if a.arms == "all" else a.arms.split("-")
    for name in chosen:
        config.require_choice("arms", name, able)
    config.require("softmax" in chosen, "arms", a.arms, "softmax among them, the baseline")
    quick = config.read_file(f"{ROOT}/configs/ablations/quick.py:steps={a.steps},recall={a.recall}")
    text = {"data.batch": 8, "train.eval_batches": 32, "train.sample_tokens": 0, "train.save_every": 0}
    recall = {"data.length": 32, "data.pairs": 4, "train.save_every": 0}
    node = lambda name: config.read_file(f"{ROOT}/configs/lm.py:mixer={name}")["model"]["mixers"]["M"]
    return quick | {
        "question": "Which mixers read Python as well as softmax attention, and which recall as much?",
        "tasks": {"text": quick["tasks"]["text"] | text, "mqar": quick["tasks"]["mqar"] | recall},
        "metrics": {name: how for name, how in quick["metrics"].items() if name != "text/tokens_per_second"},
        "arms": {name: {"model.mixers.M": node(name)} for name in chosen},
    }
