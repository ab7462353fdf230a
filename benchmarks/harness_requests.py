"""What lm-evaluation-harness asks, answered by attnlab and by its own `--model hf` on the exported folder.

    pip install -e '.[bench,lm-eval]' transformers accelerate && python -m benchmarks.interchange --harness [CASE ...]

A model is exported, imported as a workdir, exported from it again, and asked two dozen requests of each kind:
continuations (some the likeliest ones, some of contexts longer than the model reads), whole texts of lengths about its
own, and generations with stop strings. Of whole texts the tokenizer's first token is left out there: the harness's
prefix is that token already.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np

from attnlab.evaluate.generate import Sampling
from attnlab.interchange import evaluating, exporting, importing
from attnlab.train import restore
from attnlab.train.program import Program
from benchmarks import remote_code

LENGTH = 32
COUNTS = (1, LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH, 3 * LENGTH + 5)
VOCAB = 257  # bytes, and the token that ends a document
BOUND = 1e-3
# One that transformers has, and one that comes with its own code.
CASES = {
    "llama": {"mixers": {"M": {"name": "softmax", "heads": 4, "kv_heads": 2}}},
    "hybrid": remote_code.CASES["hybrid"],
}


def workdir(name: str, directory: pathlib.Path) -> pathlib.Path:
    """A run of the case's model, imported; its folder, exported again, is beside it."""
    config = remote_code.config(CASES[name] | {"vocab": VOCAB})
    params = remote_code.drawn(Program.of(config, jax.devices()[:1], batches=False))
    first, run, folder = (directory / f"{name}-{part}" for part in ("from", "run", "to"))
    quiet = lambda text: None
    exporting.write_model(first, config, params, remote_code=True, say=quiet)
    overrides = [f"data.length={LENGTH}", "data.batch=4", f"data.source=text:{__file__}", "mesh.data=1"]
    importing.run(importing.plan(first, run, None, overrides), run, quiet)
    exporting.run(run, folder, remote_code=True, say=quiet)
    return run


def asked(scorer: Any) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of the requests, by kind."""
    source = pathlib.Path(__file__).read_text()
    texts = [source[i : i + n] for i, n in zip(range(0, 2400, 100), (5, 13, 20, 29, 44, 90) * 4)]
    pairs = [(text[:-4], text[-4:]) for text in texts[:16]] + [("ends in spaces  ", "and goes on"), ("", "nothing")]
    likeliest = scorer.generate([np.asarray([256, *text.encode()]) for text in texts], Sampling(1, temperature=0.0))
    pairs += [(text, chr(ids[0])) for text, ids in zip(texts, likeliest) if ids[0] < 128]
    stops = [{"until": ["e", "\n\n"], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 8, "do_sample": False}]
    return {
        "loglikelihood": pairs,
        "loglikelihood_rolling": [(source[100 * i : 100 * i + n],) for i in range(4) for n in COUNTS],
        "generate_until": [(text, stops[i % 2]) for i, text in enumerate(texts)],
    }


def compared(name: str, directory: pathlib.Path) -> dict[str, Any]:
    """Largest differences of log-likelihoods in nats, and how many flags and generations differ, of how many."""
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from attnlab.interchange import harness

    run = workdir(name, directory)
    trained = restore.load(run)
    scorer = evaluating.scorer_of(trained.program, trained.params)
    adapter = harness.Adapter(scorer, trained.data.tokenizer, 0, print)
    folder = directory / f"{name}-to"
    model, _ = remote_code.loaded(folder)
    # Its config is read again, code and all: asked of nobody, as a terminal would be.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    theirs = HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=LENGTH, backend="causal", batch_size=3, add_bos_token=True
    )
    found: dict[str, Any] = {}
    for kind, arguments in asked(scorer).items():
        requests = [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]
        theirs.add_bos_token = kind != "loglikelihood_rolling"
        ours, other = (getattr(lm, kind)(requests) for lm in (adapter, theirs))
        if kind == "generate_until":
            found[kind] = {"differ": sum(a != b for a, b in zip(ours, other)), "of": len(ours)}
            continue
        if kind == "loglikelihood":
            found["greedy"] = {"differ": sum(a[1] != b[1] for a, b in zip(ours, other)), "of": len(ours),
                               "true": sum(a[1] for a in ours)}  # fmt: skip
            ours, other = ([a for a, _ in side] for side in (ours, other))
        found[kind] = {"largest": float(np.abs(np.subtract(ours, other)).max()), "of": len(ours)}
    return found


def good(found: dict[str, Any]) -> bool:
    """Whether it is what is asked for."""
    near = all(found[kind]["largest"] <= BOUND for kind in ("loglikelihood", "loglikelihood_rolling"))
    return near and not found["greedy"]["differ"] and not found["generate_until"]["differ"]
