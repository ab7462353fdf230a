"""Generated tasks. `--config configs/tasks.py:task=NAME,mixer=NAME,pattern=LETTERS`

`attnlab list tasks` says what each tests, docs/tasks.md what to expect. A preset is a task with the sizes that two CPU
cores train in minutes; `match2`, `parity`, `s3`, `gcog_cross` and the like are tasks with other fields.

`bags` pools instances as they are; with a mixer or a pattern they go through one layer of it before.

Letters of a pattern: M is the mixer, S softmax attention, W softmax attention over a window of 4 keys, X the mixer
reading the context, where the task has one. Without a pattern it is the preset's. In recall tasks every mixer gets a W
before it, which can look one token back: else the task measures who can shift a sequence.
"""

import dataclasses

from ml_collections import ConfigDict

from attnlab import config, data, mixers, tasks  # noqa: F401  (tasks registers its data)

WIDTH, HEADS, BATCH, RATE, STEPS = 64, 4, 32, 4e-3, 1000

# By preset: the data's node where it is more than the name, and what else differs: pattern, layers, batch, rate, steps,
# mlp (None: the usual width; 0: blocks have none).
RECALL = {"pattern": "WM", "mlp": 0}
PRESETS = {
    "bags": {"layers": 0, "steps": 500},
    "common_words": {"steps": 1500},
    "copy": {"data": {"length": 64}, "steps": 1500},
    "frequent_words": {"steps": 1500},
    "gcog": {"data": {"distractors": (0, 5)}, "steps": 1500},
    "gcog_cross": {"data": {"name": "gcog", "form": "cross"}, "pattern": "MX", "steps": 1500},
    "group": {"data": {"group": "S3", "length": 24}, "steps": 2000},
    "icl_classes": {"steps": 3000, "rate": 1e-3, "batch": 64},
    "icl_regression": {"data": {"d": 5, "examples": 40, "noise": 0.1}},
    "induction": {"steps": 1500},
    "khop": {"layers": 4, "steps": 1500},
    "listops": {"layers": 3, "steps": 2000, "rate": 1e-3},
    "mad_compress": {"steps": 1500},
    "mad_fuzzy_recall": {"steps": 1500},
    "mad_memorise": {"data": {"length": 32}},
    "mad_noisy_recall": {"steps": 1500},
    "mad_recall": {"steps": 1500},
    "mad_selective_copy": {"data": {"length": 128, "items": 8}, "steps": 1500},
    "match2": {"data": {"name": "match3", "order": 2, "length": 16}, "layers": 1},
    "match3": {"data": {"length": 16}, "layers": 1, "steps": 2000},
    "mqar": {"data": {"length": 64, "pairs": 8}, **RECALL},
    "mqar_separating": {"data": {"name": "mqar", "length": 128, "pairs": 32}, "steps": 1200, **RECALL},
    "needle": {"data": {"length": 256}, "steps": 1500, "pattern": "WM"},
    "parity": {"data": {"name": "group", "group": "Z2", "length": 64, "shortest": 2}, "steps": 1500},
    "periodic_recall": {"data": {"length": 256}, "batch": 16, **RECALL},
    "pixels": {"steps": 1500},
    "regions": {"pattern": "X", "layers": 1},
    "retrieve": {"pattern": "X", "layers": 1},
    "s3": {"data": {"name": "group", "group": "S3", "length": 24}, "steps": 2000},
    "selective_copy": {"data": {"length": 128}, "steps": 1500},
    "test_time_regression": {"data": {"length": 128}},
    "transcribe": {"pattern": "X", "layers": 1},
    "variables": {"steps": 1500, "pattern": "WM"},
    "visual_question": {"data": {"length": 32, "images": 1, "symbols": 16}, "steps": 1500},
}


# What sees both ways by another knob than `causal`.
BOTH_WAYS = {"gaussian_adaptive": {"axis": "positions"}}


def node(mixer, **more):
    """A mixer's node with those of these fields that it has."""
    more |= {} if more.get("causal", True) else BOTH_WAYS.get(mixer, {})
    fields = {f.name for f in dataclasses.fields(mixers.get(mixer).Config)} if mixers.known(mixer) else set()
    return {"name": mixer} | {key: value for key, value in more.items() if key in fields}


def get_config(arg=None):
    a = config.parse_arg(arg, task="icl_regression", mixer="", pattern="")
    config.require_choice("task", a.task, list(PRESETS))
    preset = {"data": {}, "pattern": "M", "layers": 2, "batch": BATCH, "rate": RATE, "steps": STEPS, "mlp": None}
    preset |= PRESETS[a.task]
    pattern, mixer = a.pattern or preset["pattern"], a.mixer or "softmax"
    layers = len(pattern) * max(1, preset["layers"] // len(pattern))
    if preset["layers"] == 0 and not (a.mixer or a.pattern):
        pattern, layers = "", 0
    config.require(set(pattern) <= set("MSWX"), "pattern", a.pattern, "one or more of M, S, W and X")
    made = data.config_from_node({"name": a.task, **preset["data"]}, "data")
    fitting = made.fitting()
    causal = fitting["name"] not in ("classifier", "bags")
    mask = {"mask": {"name": "region_cross", "regions": made.regions}} if a.task == "regions" else {}
    letters = {
        "M": node(mixer, heads=HEADS, causal=causal),
        "S": node("softmax", heads=HEADS, causal=causal),
        "W": node("softmax", heads=HEADS, window=4),
        "X": node(mixer, heads=HEADS, source="context", rope_context=a.task == "transcribe", **mask),
    }

    c = ConfigDict()
    c.seed = 0
    c.data = {"name": a.task, **preset["data"], "batch": preset["batch"]}
    c.model = fitting | {
        "width": WIDTH,
        "layers": layers,
        "pattern": pattern or "M",
        "mixers": {k: node for k, node in letters.items() if k in pattern},
        "mlp_width": preset["mlp"],
    }
    c.optimizer = {"name": "adamw", "learning_rate": preset["rate"], "schedule": "cosine", "warmup": 0.05}
    c.train = {"steps": preset["steps"], "log_every": 50, "eval_every": preset["steps"] // 4, "save_every": 250}
    return c
