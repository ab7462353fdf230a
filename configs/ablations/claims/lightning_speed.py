"""Claim: lightning attention trains at a constant speed however long rows are (Qin et al. 2024, arXiv:2405.17381).

The same number of tokens a step in ever fewer and longer rows, lightning attention against softmax attention; forward,
backward and update of a whole small model. `:size=125m,longest=65536` for an accelerator, where softmax attention is
its fastest kernel.

Supported if lightning's tokens per second at the longest row are within 15 % of those at the shortest while softmax's
fall by more than that; refuted if lightning's fall by more than 30 %; else inconclusive. The length at which lightning
overtakes softmax is to be told with it. The rule compares lengths within an arm: read it off the figures of
results.json, not off the verdicts, which compare arms. Run it on a machine that does nothing else.

Not covered: the authors' kernels. `python -m benchmarks.layers --flat` measures the same of the layer alone, in rounds
that alternate. Written before any run.
"""

import pathlib

from attnlab import config

ROOT = pathlib.Path(__file__).resolve().parents[3]


def get_config(arg=None):
    a = config.parse_arg(arg, size="nano", longest=8192, steps=20)
    base = f"{ROOT}/configs/lm.py:size={a.size}"
    heads = config.read_file(base)["model"]["mixers"]["M"]["heads"]
    lengths = [n for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536) if n <= a.longest]
    config.require(len(lengths) > 1, "longest", a.longest, "2048 to 65536, a power of two")
    train = {"train.steps": a.steps, "train.log_every": a.steps // 2, "train.sample_tokens": 0, "optimizer.warmup": 2,
             "mesh.data": 1}  # fmt: skip
    rows = {f"t{n}": {"data.length": n, "data.batch": lengths[-1] // n, **train} for n in lengths}
    return {
        "question": "Do tokens per second depend on how long rows are?",
        "base": base,
        "tasks": {name: {**row, "train.eval_every": a.steps, "train.eval_batches": 1} for name, row in rows.items()},
        "arms": {name: {"model.mixers.M": {"name": name, "heads": heads}} for name in ("softmax", "lightning")},
        "seeds": (0, 1, 2),
        "metrics": {f"{name}/tokens_per_second": {"direction": "higher", "primary": True} for name in rows},
    }
