"""Models that no architecture of transformers holds, exported with their own PyTorch code, against attnlab's logits.

    python -m benchmarks.interchange --remote-code [CASE ...]

Parameters are drawn and moved off their first values, so that norms and biases are not neutral. Logits of transformers'
`AutoModelForCausalLM` are compared at 64 positions in float32 with attnlab's, and so are greedy continuations of its
`generate`. Where float32 itself errs by more than the bound, that is what attnlab's own are from float64's.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import config as config_lib
from attnlab import mixers
from attnlab.interchange import exporting
from attnlab.train.config import RunConfig
from attnlab.train.program import Program

LENGTH, BOUND = 64, 1e-5
VOCAB, PROMPT, WRITTEN, LEAD = 263, 9, 12, 1e-5
DELTA = {"name": "gated_deltanet", "heads": 4}
# name: the node `model` beside the sizes.
CASES: dict[str, dict[str, Any]] = {
    "softmax_sinks": {
        "mixers": {
            "M": {"name": "softmax", "heads": 4, "kv_heads": 2, "window": 9, "sinks": True, "soft_cap": 3.0,
                  "qk_norm": True, "qk_epsilon": 1e-3, "rope_width": 4, "head_width": 12, "bias": "all",
                  "rope_scaling": {"name": "yarn", "factor": 4.0, "original_length": 16}},
            "L": {"name": "softmax", "heads": 4, "sinks": True, "qk_norm": "layer", "input_conv": 3,
                  "rope_base": 300.0, "query_scale": 0.2},
        },
        "pattern": "ML", "tied": True, "embedding_scale": 5.0, "logit_cap": 2.0, "norm_after": True,
        "mlp_gate": "gelu_tanh", "mlp_bias": True, "norm_epsilon": 1e-3,
    },
    "softmax_cosine": {
        "mixers": {"M": {"name": "softmax", "heads": 4, "qk_norm": "cosine", "window": 20, "rope_width": 2}},
        "gated": "M", "mlp_gate": "gelu",
    },
    "gated": {
        "mixers": {
            "A": {"name": "gated", "heads": 4, "position": "G2", "granularity": "headwise", "sharing": "shared"},
            "B": {"name": "gated", "heads": 4, "position": "G3", "activation": "silu", "kv_heads": 2},
            "C": {"name": "gated", "heads": 4, "position": "G4", "operation": "additive", "qk_norm": True},
            "D": {"name": "gated", "heads": 4, "position": "G5", "activation": "ns_sigmoid", "bias": "qkv"},
            "E": {"name": "gated", "heads": 4, "input_dependent": False, "sinks": True},
            "F": {"name": "gated", "heads": 4, "granularity": "headwise", "activation": "identity"},
        },
        "pattern": "ABCDEF", "layers": 6,
    },
    "moh": {
        "mixers": {
            "A": {"name": "moh", "heads": 8, "core": {"name": "softmax", "kv_heads": 4}},
            "B": {"name": "moh", "heads": 8, "shared": 3, "active": 2, "gate_norm": "paper",
                  "core": {"name": "gated", "kv_heads": 4, "sinks": True, "window": 9, "impl": "definition"}},
            "C": {"name": "moh", "heads": 8, "shared": 0, "active": 3, "core": "lightning", "balance": 0.0},
            "D": {"name": "moh", "heads": 8, "shared": 5, "active": 1, "router": "norm",
                  "core": {"name": "softmax", "kv_heads": 2, "qk_norm": False}},
            "E": {"name": "moh", "heads": 8, "shared": 8, "active": 0, "core": "gla"},
        },
        "pattern": "ABCDE", "layers": 5,
    },
    "lightning": {
        "mixers": {
            "A": {"name": "lightning", "heads": 4, "norm": "layernorm", "norm_over": "head", "decay_scale": 0.5},
            "B": {"name": "lightning", "heads": 7, "head_width": 6, "slopes": "interleaved", "norm": "rmsnorm",
                  "gate_rank": 5, "norm_epsilon": 1e-3},
            "C": {"name": "lightning", "heads": 4, "activation": "identity", "decay_scale": 0.0, "bias": "all"},
        },
        "pattern": "ABC", "layers": 3,
    },
    "gla": {
        "mixers": {
            "A": {"name": "gla", "heads": 4, "temperature": 2.0, "chunk": 16},
            "B": {"name": "gla", "heads": 4, "key_heads": 2, "key_width": 6, "rank": 3, "gate": False, "bias": "qkv"},
        },
        "pattern": "AB",
    },
    "gated_deltanet": {
        "mixers": {
            "A": {**DELTA, "norm_epsilon": 1e-3},
            "B": {**DELTA, "key_heads": 2, "expand": 1.5, "query_scale": None, "conv": 2, "bias": "all"},
            "C": {**DELTA, "conv": 1, "gate": False, "decay": False},
        },
        "pattern": "ABC", "layers": 3,
    },
    "flow": {
        "mixers": {
            "A": {"name": "flow", "heads": 4, "bias": "all", "chunk": 16},
            "B": {"name": "flow", "heads": 4, "feature": "elu", "clip": None, "form": "averages"},
            "C": {"name": "flow", "heads": 4, "feature": "relu", "competition": False, "input_conv": 3},
            "D": {"name": "flow", "heads": 4, "allocation": False, "clip": 1.0, "epsilon": 1e-2},
        },
        "pattern": "ABCD", "layers": 4,
    },
    "agent": {
        "mixers": {
            "A": {"name": "agent", "heads": 4, "agents": 5, "bias": "all", "chunk": 16},
            "B": {"name": "agent", "heads": 2, "agents": 16, "conv": False, "head_width": 12},
        },
        "pattern": "AB",
    },
    "local_linear": {
        "mixers": {
            "A": {"name": "local_linear", "heads": 4, "kv_heads": 2, "max_iterations": 64, "tolerance": 1e-7},
            "B": {"name": "local_linear", "heads": 2, "ridge": 0.3, "blocks": 2, "window": 20, "qk_norm": "layer",
                  "max_iterations": 64, "tolerance": 1e-7},
            "C": {"name": "local_linear", "heads": 4, "qk_norm": False, "rope_width": 2, "ridge_min": 0.1,
                  "max_iterations": 64, "tolerance": 1e-7},
        },
        "pattern": "ABC", "layers": 3,
    },
    "titans": {
        "mixers": {
            "A": {"name": "titans", "heads": 4, "chunk": 8, "window": 24, "persistent": 3, "bias": "all"},
            "B": {"name": "titans", "heads": 2, "variant": "mal", "depth": 1, "chunk": 16, "window": 20, "conv": 0},
            "C": {"name": "titans", "heads": 4, "variant": "mac", "chunk": 8, "window": 24, "persistent": 2},
            "D": {"name": "titans", "heads": 2, "variant": "lmm", "depth": 3, "expansion": 2, "activation": "gelu",
                  "grad_at": "decayed", "read_after_write": False, "norm_scale": True, "norm_epsilon": 1e-3,
                  "theta_max": 0.5},
            "E": {"name": "titans", "heads": 4, "variant": "lmm", "depth": 1, "momentum": False, "forgetting": False,
                  "residual_norm": True, "rope_base": None},
        },
        "pattern": "ABCDE", "layers": 5,
    },
    "hybrid": {
        "mixers": {
            "M": {**DELTA}, "S": {"name": "moh", "heads": 4, "core": {"name": "gated", "kv_heads": 2}},
            "X": {"name": "gla", "heads": 2}, "L": {"name": "lightning", "heads": 4},
        },
        "pattern": "MS+XL", "gated": "X", "layers": 6,
    },
    "no_mlp": {"mixers": {"M": {"name": "softmax", "heads": 2}}, "mlp_width": 0, "norm": "none"},
}  # fmt: skip


def config(case: dict[str, Any], dtype: str = "float32") -> RunConfig:
    """The run of a model of `CASES`."""
    model = {"vocab": VOCAB, "width": 32, "layers": 2, "mlp_width": 48, "dtype": dtype} | case
    data = {"source": "stdlib", "length": 128, "batch": 1}
    optimizer = {"name": "adamw", "learning_rate": 1e-3}
    tree = {"data": data, "model": model, "optimizer": optimizer, "mesh": {"data": 1}, "train": {"steps": 1}}
    return config_lib.build(RunConfig, tree)


def drawn(program: Program, seed: int = 0) -> Any:
    """Parameters moved off their first values, float32."""
    rng = np.random.default_rng(seed)

    def moved(path: Any, leaf: jax.Array) -> np.ndarray:
        kernel = jax.tree_util.keystr(path, simple=True).endswith("kernel")
        spread = leaf.shape[-2] ** -0.5 if kernel else 0.3
        return np.asarray(leaf + spread * rng.standard_normal(leaf.shape), np.float32)

    return jax.tree_util.tree_map_with_path(moved, program.model.init(seed))


def logits(config: RunConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Attnlab's, [B, T, V]."""
    model = Program.of(config, jax.devices()[:1], batches=False).model.merge(params)
    return np.asarray(model.logits(model.hidden(jnp.asarray(tokens), mixers.Sequence.whole(*tokens.shape)).y))


def loaded(folder: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """The folder's model by transformers, in float32, and what it says of loading."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype="float32"
    )
    return model.eval(), {key: value for key, value in info.items() if value}


def compared(name: str, directory: pathlib.Path) -> dict[str, Any]:
    """Differences relative to the largest logit: of the folder's model from attnlab's, and of both from float64.

    Returns:
      exported, ours_float64, theirs_float64, and `greedy`: whether `generate` takes attnlab's likeliest tokens.
    """
    import torch

    plan = config(CASES[name])
    params = drawn(Program.of(plan, jax.devices()[:1], batches=False))
    exporting.write_model(directory / name, plan, params, remote_code=True, say=lambda text: None)
    model, info = loaded(directory / name)
    assert not info, info
    tokens = np.random.default_rng(0).integers(3, VOCAB - 10, (2, LENGTH))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
        written = model.generate(
            torch.tensor(tokens[:, :PROMPT]), max_new_tokens=WRITTEN, do_sample=False, eos_token_id=VOCAB + 1
        ).numpy()
    ours = logits(plan, params, tokens)
    with jax.enable_x64(True):
        exact = logits(config(CASES[name], "float64"), jax.tree.map(np.float64, params), tokens)
    largest = np.abs(exact).max()
    error = lambda a, b: float(np.abs(a - b).max() / largest)
    greedy = all(_follows(plan, params, row, largest) for row in written)
    return {"exported": error(theirs, ours), "ours_float64": error(ours, exact),
            "theirs_float64": error(theirs, exact), "greedy": greedy}  # fmt: skip


def _follows(plan: RunConfig, params: Any, row: np.ndarray, largest: float) -> bool:
    """Whether each token that was written is the likeliest one, or as likely."""
    given = logits(plan, params, row[None])[0, PROMPT - 1 : -1]
    behind = given.max(-1) - np.take_along_axis(given, row[PROMPT:, None], -1)[:, 0]
    return len(behind) == WRITTEN and bool((behind <= LEAD * largest).all())


def good(found: dict[str, Any]) -> bool:
    """Whether the figures of a case are as they must be."""
    near = found["exported"] <= max(BOUND, 3 * found["ours_float64"])
    right = found["theirs_float64"] <= max(BOUND, 2 * found["ours_float64"])
    return near and right and found["greedy"]
