"""Generated tasks. `--config configs/tasks.py:task=NAME,mixer=NAME,pattern=LETTERS`

Letters of a pattern: M is the mixer, S softmax attention.
"""

from ml_collections import ConfigDict

from attnlab import config, mixers

TASKS = ("icl_regression",)
D, EXAMPLES = 5, 40


def get_config(arg=None):
    a = config.parse_arg(arg, task="icl_regression", mixer="softmax", pattern="M")
    config.require_choice("task", a.task, TASKS)
    config.require(bool(a.pattern) and set(a.pattern) <= set("MS"), "pattern", a.pattern, "one or more of M and S")
    heads = {"heads": 4}
    fields = mixers.get(a.mixer).Config.__dataclass_fields__ if a.mixer in mixers.names() else {}
    letters = {"M": {"name": a.mixer} | (heads if "heads" in fields else {}), "S": {"name": "softmax"} | heads}

    c = ConfigDict()
    c.seed = 0
    c.data = {"name": a.task, "d": D, "examples": EXAMPLES, "noise": 0.1, "batch": 32}
    c.model = {
        "name": "regression",
        "inputs": D + 1,
        "width": 64,
        "layers": 2,
        "pattern": a.pattern,
        "mixers": {k: node for k, node in letters.items() if k in a.pattern},
    }
    c.optimizer = {"name": "adamw", "learning_rate": 4e-3, "schedule": "cosine", "warmup": 0.05}
    c.train = {"steps": 1000, "log_every": 50, "eval_every": 500, "save_every": 250}
    return c
