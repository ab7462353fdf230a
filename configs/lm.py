"""Language models. `--config configs/lm.py:mixer=NAME,size=SIZE,pattern=LETTERS,optimizer=NAME,recipe=RECIPE`, or
`--config configs/lm.py:preset=NAME,optimizer=NAME` for a hybrid of the literature at its published widths.

Letters of a pattern: M is the mixer, S softmax attention, W softmax attention over a window of 128 keys.
`pattern=MMMS` puts softmax attention in every fourth layer.

`data=spans` reads rows of ids that say where images, questions and answers lie (docs/tasks.md).

Recipes: `paper` is the layer as its paper has it; `lm` adds what tells it order in language models, where nothing does.
"""

import dataclasses

from ml_collections import ConfigDict

from attnlab import config, mixers

# layers, width, heads, length, batch, learning rate, steps
SIZES = {
    "nano": (4, 128, 4, 256, 16, 4e-3, 800),
    "micro": (6, 256, 4, 512, 8, 2e-3, 2000),
    "60m": (8, 512, 8, 1024, 256, 2e-3, 6_000),
    "125m": (12, 768, 12, 2048, 256, 1e-3, 10_000),
    "350m": (24, 1024, 16, 2048, 512, 6e-4, 10_000),
    "1b": (24, 2048, 16, 2048, 1024, 4e-4, 20_000),
    "7b": (32, 4096, 32, 4096, 1024, 3e-4, 100_000),
}
BYTES = ("nano", "micro")  # these read bytes; the others need a tokenizer of up to 32,768 tokens


RATES = {"adamw": 1.0, "muon": 1.0, "lion": 0.1, "adafactor": 3.0}  # learning rates against AdamW's


# What layers without positions of their own are given: a short convolution, as in Based's models and all later linear
# attention. Layers with RoPE, a decay or a convolution of their own are as they are.
LM = {name: {"input_conv": 4} for name in ("based", "flow", "tensor")}


# Hybrids: the nearest size for what is not of the architecture (rate, batch, steps), the length, and the model. Where a
# model has experts, the MLP is as wide as those that are on.
PRESETS = {
    # Arora et al. 2024, Based, 360M (train/configs/experiment/reference/based-360m.yaml of its code).
    "based_360m": ("350m", 2048, {
        "layers": 27, "width": 1024, "mlp_width": 2048, "vocab": 50_257, "tied": True, "pattern": "CBWCC" * 5 + "CC",
        "mixers": {
            "C": {"name": "short_conv", "expand": 2.0, "bias": "all"},
            "B": {"name": "based", "heads": 16, "feature_width": 16},
            "W": {"name": "softmax", "heads": 16, "window": 129},  # 256 // 2 before a query, and itself
        },
    }),
    # Tao et al. 2025, InfiniteVL: its language model, of Qwen2.5-VL-3B's widths.
    "infinitevl": ("1b", 8192, {
        "layers": 36, "width": 2048, "mlp_width": 11_008, "vocab": 151_936, "tied": True, "pattern": "WMMM",
        "mixers": {
            "W": {"name": "softmax", "heads": 16, "kv_heads": 2, "bias": "qkv", "window": 8192, "rope_base": 1e6},
            "M": {"name": "gated_deltanet", "heads": 16, "head_width": 128, "expand": 2.0, "query_scale": None,
                  "norm_epsilon": 1e-5},
        },
    }),
    # Kimi Team 2025, Kimi Linear 48B-A3B (config.json): 8 of 256 experts and a shared one, 1024 wide.
    "kimi_linear": ("7b", 4096, {
        "layers": 27, "width": 2304, "mlp_width": 9216, "vocab": 163_840, "norm_epsilon": 1e-5,
        "pattern": "KKKL" * 6 + "KKL",
        "mixers": {
            "K": {"name": "kda", "heads": 32, "head_width": 128, "norm_epsilon": 1e-5},
            "L": {"name": "mla", "heads": 32, "head_width": 128, "rank": 512, "rotary_width": 64, "rope_base": None},
        },
    }),
    # Qwen Team 2025, Qwen3-Next 80B-A3B (config.json): 10 of 512 experts and a shared one, 512 wide.
    "qwen3_next": ("7b", 4096, {
        "layers": 48, "width": 2048, "mlp_width": 5632, "vocab": 151_936, "pattern": "MMMG",
        "mixers": {
            "M": {"name": "gated_deltanet", "heads": 32, "key_heads": 16, "head_width": 128, "query_scale": None},
            "G": {"name": "gated", "heads": 16, "kv_heads": 2, "head_width": 256, "qk_norm": True, "rope_base": 1e7,
                  "rope_width": 64},
        },
    }),
}  # fmt: skip


def with_heads(mixer, heads):
    """A mixer's node, with the size's number of heads if it has heads, and its core as a node whose keys can be set."""
    known = dataclasses.fields(mixers.get(mixer).Config) if mixers.known(mixer) else ()
    fields = {field.name: field for field in known}
    node = {"name": mixer} | ({"heads": heads} if "heads" in fields else {})
    return node | ({"core": {"name": fields["core"].default}} if "core" in fields else {})


def get_config(arg=None):
    plain = {"mixer": "softmax", "size": "nano", "pattern": "M", "recipe": "paper"}
    a = config.parse_arg(arg, **plain, optimizer="adamw", preset="none", data="text")
    config.require_choice("data", a.data, ["text", "spans"])
    config.require_choice("preset", a.preset, ["none", *PRESETS])
    if a.preset != "none":
        for key, value in plain.items():
            config.require(getattr(a, key) == value, key, getattr(a, key), f"{value} beside preset={a.preset}")
        size, length, model = PRESETS[a.preset]
        return assembled(size, model, length, a.optimizer, a.data)
    config.require_choice("size", a.size, list(SIZES))
    config.require(bool(a.pattern) and set(a.pattern) <= set("MSW"), "pattern", a.pattern, "one or more of M, S and W")
    config.require_choice("recipe", a.recipe, ["paper", "lm"])
    layers, width, heads, length, batch, rate, steps = SIZES[a.size]
    letters = {
        "M": with_heads(a.mixer, heads) | (LM.get(a.mixer, {}) if a.recipe == "lm" else {}),
        "S": {"name": "softmax", "heads": heads},
        "W": {"name": "softmax", "heads": heads, "window": 128},
    }

    model = {"layers": layers, "width": width, "pattern": a.pattern}
    model["mixers"] = {k: node for k, node in letters.items() if k in a.pattern}
    return assembled(a.size, model, length, a.optimizer, a.data)


def assembled(size, model, length, optimizer, data):
    """The whole config: what `model` does not say, and all that is not of the architecture, is the size's."""
    *_, batch, rate, steps = SIZES[size]
    small = size in BYTES

    c = ConfigDict()
    c.seed = 0
    c.data = {"source": "stdlib", "tokenizer": "bytes", "length": length, "batch": batch}
    if data == "spans":
        c.data = {"name": "spans", "source": "", "length": length, "batch": batch}
    c.model = {
        "vocab": 272 if small and data == "text" else 32_768,
        "dtype": "float32" if small else "bfloat16",
        "remat": "none" if small else "minimal",
        "tied": False,
        **model,
    }
    config.require_choice("optimizer", optimizer, list(RATES))
    c.optimizer = {
        "name": optimizer,
        "learning_rate": rate * RATES[optimizer],
        "schedule": "cosine",
        "warmup": max(1 / 50, 20 / steps),  # a share of train.steps
    }
    c.train = {
        "steps": steps,
        "accumulate": 1,
        "log_every": 10,
        "eval_every": min(steps // 4, 1000),
        "save_every": 100 if small else 500,
    }
    c.mesh = {"data": -1 if small else 1, "fsdp": 1 if small else -1, "context": 1, "tensor": 1}
    return c
