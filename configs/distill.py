"""A trained model with other mixers, learning of it, in stages. Each is a run:

    attnlab train --config configs/distill.py:teacher=V,mixer=gla,stage=layers --workdir W1 --init-from V
    attnlab train --config configs/distill.py:teacher=V,mixer=gla,stage=logits --workdir W2 --init-from W1

`layers`: the new mixers alone, each fed what the teacher's is. `logits`: the whole model, by the distribution of the
next token. What is not said is as in the teacher's config.json: data, model, optimizer, batch. Not taken over is what a
stage cannot have (`train.z_loss`, `train.loss_impl`), what was said of the teacher's parameters (`optimizer.rates`) and
of its one run (`train.profile`, `train.on_config_change`, `cluster`).

Letters of a pattern: L is the mixer, T what the teacher has in that layer. `pattern=LLLT`, the default, keeps every
fourth layer. The mixer's heads, their width and its key/value heads are the teacher's where it has such knobs; others
are fields of its node, `--config.model.mixers.L.FIELD`. `share` says how many of the teacher's steps the stage does.

Learning rates are the teacher's peak for `layers` and a quarter of it for `logits`; say others
(`--config.optimizer.learning_rate`) where the teacher was imported.
"""

import dataclasses
import math

from attnlab import config, mixers
from attnlab.models import config_from_node

STAGES = {"layers": ("layers", 1.0), "logits": ("logits", 0.25)}  # what is matched, and the rate against the teacher's

NOT_TAKEN = ("z_loss", "loss_impl", "profile", "on_config_change")  # of the teacher's `train`


def get_config(arg=None):
    a = config.parse_arg(arg, teacher="", mixer="gla", pattern="LLLT", stage="layers", share=0.1)
    config.require(bool(a.teacher), "teacher", a.teacher, "the workdir of a trained run")
    config.require_choice("mixer", a.mixer, mixers.names())
    config.require_choice("stage", a.stage, list(STAGES))
    config.require(
        "L" in a.pattern and set(a.pattern) <= set("LT"), "pattern", a.pattern, "letters L and T, an L or more"
    )
    config.require(0 < a.share, "share", a.share, "above 0")
    c = config.read_file(f"{a.teacher.rstrip('/')}/config.json")
    new = c["model"]["pattern"] = swapped(c["model"], a.pattern, a.mixer)
    match, rate = STAGES[a.stage]
    train, optimizer = c["train"], c["optimizer"]
    train["distill"] = {"teacher": a.teacher, "match": match}
    train["steps"] = max(1, round(a.share * train["steps"]))
    for key in ("eval_every", "save_every"):
        train[key] = min(train[key], train["steps"])
    optimizer["learning_rate"] = rate * optimizer["learning_rate"]
    optimizer["warmup"] = 0.1
    for node, keys in ((optimizer, ("rates",)), (train, NOT_TAKEN), (c, ("cluster",))):
        for key in keys:
            node.pop(key, None)
    if a.stage == "layers":  # all but the new mixers stays as it is
        learns = [f"transformer.periods.blocks.{i}.sublayers.0.*=1" for i, letter in enumerate(new) if letter == "L"]
        optimizer["rates"] = ["*=0", *learns]
    return c


def swapped(model, pattern, mixer):
    """The pattern of a model with other mixers, whose table gets the new one as L."""
    kept = config_from_node(model, "model")
    count = math.lcm(len(kept.blocks), len(pattern))
    config.require(
        kept.layers % count == 0, "pattern", pattern, f"one whose length divides model.layers ({kept.layers})"
    )
    names = {"L": "K"} if "L" in kept.mixers else {}  # the teacher's own L
    config.require("K" not in kept.mixers or not names, "pattern", kept.pattern, "a teacher without mixers L and K")
    blocks = ["+".join(names.get(letter, letter) for letter in kept.blocks[i % len(kept.blocks)]) for i in range(count)]
    blocks = ["L" if pattern[i % len(pattern)] == "L" else block for i, block in enumerate(blocks)]
    config.require(
        all(len(block) == 1 for block in blocks), "pattern", kept.pattern, "a teacher with one mixer a block"
    )
    gone = [kept.blocks[i % len(kept.blocks)][0] for i, block in enumerate(blocks) if block == "L"]
    first, gated = gone[0], {letter in kept.gated for letter in gone}
    allowed = "one that replaces only gated mixers, or only others (model.gated)"
    config.require(len(gated) == 1, "pattern", pattern, allowed)
    replaced, known = model["mixers"][first], {field.name for field in dataclasses.fields(mixers.get(mixer).Config)}
    own = {key: replaced[key] for key in ("heads", "kv_heads", "head_width") if key in known and key in replaced}
    table = {names.get(letter, letter): node for letter, node in model["mixers"].items()}
    model["mixers"] = {letter: node for letter, node in table.items() if letter in blocks}
    model["mixers"]["L"] = {"name": mixer, **own}
    still = [names.get(letter, letter) for letter in kept.gated if names.get(letter, letter) in blocks]
    model["gated"] = "".join(still) + ("L" if gated == {True} else "")  # the gate of a block's MLP stays where it was
    return "".join(blocks)
