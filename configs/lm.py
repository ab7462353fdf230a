"""Language models. `--config configs/lm.py:mixer=NAME,size=SIZE,pattern=LETTERS,optimizer=NAME,recipe=RECIPE`

Letters of a pattern: M is the mixer, S softmax attention, W softmax attention over a window of 128 keys.
`pattern=MMMS` puts softmax attention in every fourth layer.

Recipes: `paper` is the layer as its paper has it; `lm` adds what tells it order in language models, where nothing does.
"""

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


def with_heads(mixer, heads):
    """A mixer's node, with the size's number of heads if it has heads, and its core as a node whose keys can be set."""
    fields = mixers.get(mixer).Config.__dataclass_fields__ if mixer in mixers.names() else {}
    node = {"name": mixer} | ({"heads": heads} if "heads" in fields else {})
    return node | ({"core": {"name": fields["core"].default}} if "core" in fields else {})


def get_config(arg=None):
    a = config.parse_arg(arg, mixer="softmax", size="nano", pattern="M", optimizer="adamw", recipe="paper")
    config.require_choice("size", a.size, list(SIZES))
    config.require(bool(a.pattern) and set(a.pattern) <= set("MSW"), "pattern", a.pattern, "one or more of M, S and W")
    config.require_choice("recipe", a.recipe, ["paper", "lm"])
    layers, width, heads, length, batch, rate, steps = SIZES[a.size]
    small = a.size in BYTES
    letters = {
        "M": with_heads(a.mixer, heads) | (LM.get(a.mixer, {}) if a.recipe == "lm" else {}),
        "S": {"name": "softmax", "heads": heads},
        "W": {"name": "softmax", "heads": heads, "window": 128},
    }

    c = ConfigDict()
    c.seed = 0
    c.data = {"source": "stdlib", "tokenizer": "bytes", "length": length, "batch": batch}
    c.model = {
        "vocab": 272 if small else 32_768,
        "width": width,
        "layers": layers,
        "pattern": a.pattern,
        "mixers": {k: node for k, node in letters.items() if k in a.pattern},
        "dtype": "float32" if small else "bfloat16",
        "remat": "none" if small else "minimal",
        "tied": False,
    }
    config.require_choice("optimizer", a.optimizer, list(RATES))
    c.optimizer = {
        "name": a.optimizer,
        "learning_rate": rate * RATES[a.optimizer],
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
