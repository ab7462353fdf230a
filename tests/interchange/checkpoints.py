"""Tiny random checkpoints of every family, as folders, and what each is to compute, stated by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np

D, F, V, H, K, d, LAYERS, WINDOW = 16, 24, 48, 4, 2, 6, 2, 5
EPS, BASE = 3e-3, 50.0
KINDS = {"float32": ("F32", np.float32), "bfloat16": ("BF16", jnp.bfloat16), "float16": ("F16", np.float16)}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a family computes, as `reference.forward` reads it.

    Attributes:
      windows: per layer; None: all.
      ropes: per layer: base, channels that turn, divisor of frequencies.
      shift: of norms: x (shift + w).
      four: whether branches are normed, too.
      scale: on q . k.
      gate: none; heads: q_proj has d queries and d gates of each head; groups, groups_headwise: of each group of heads.
      deltas: layers that are the delta rule.
      fused: whether its projections lie key head by key head.
    """

    windows: tuple[int | None, ...] = (None,) * LAYERS
    ropes: tuple[tuple[float, int, float], ...] = ((BASE, d, 1.0),) * LAYERS
    shift: float = 0.0
    four: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    scale: float = d**-0.5
    cap: float | None = None
    output_cap: float | None = None
    gate: str = "none"
    deltas: tuple[int, ...] = ()
    fused: bool = False
    delta: tuple[int, int, int, int] = (2, 4, 4, 6)  # key heads, value heads, their widths


BASIC = {
    "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": H,
    "num_key_value_heads": K, "head_dim": d, "vocab_size": V, "rms_norm_eps": EPS, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.57.0", "eos_token_id": 2,
    "bos_token_id": 1, "use_cache": True, "initializer_range": 0.02, "attention_dropout": 0.0,
}  # fmt: skip
THETA = {"rope_theta": BASE}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": BASE, "partial_rotary_factor": 0.5,
                        "mrope_section": [1, 1, 0]},
}  # fmt: skip
HYBRID = {"shift": 1.0, "gate": "heads", "deltas": (0,), "scale": 8**-0.5, "ropes": ((BASE, 4, 1.0),) * LAYERS}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 9, "sliding_window": WINDOW}
GEMMA_FACTS = {"shift": 1.0, "four": True, "activation": "gelu_tanh", "embedding_scale": math.sqrt(D), "scale": 1 / 3}

CASES: dict[str, tuple[dict[str, Any], Facts]] = {
    "llama": ({"model_type": "llama", **THETA, "attention_bias": True, "mlp_bias": True}, Facts()),
    "mistral": ({"model_type": "mistral", **THETA, "sliding_window": WINDOW}, Facts(windows=(WINDOW,) * LAYERS)),
    "qwen2": (
        {
            "model_type": "qwen2", **THETA, "tie_word_embeddings": True, "use_sliding_window": True,
            "sliding_window": WINDOW, "max_window_layers": 1, "rope_scaling": {"type": "linear", "factor": 2.0},
        },
        Facts(windows=(None, WINDOW), ropes=((BASE, d, 2.0),) * LAYERS),
    ),
    "qwen3": ({"model_type": "qwen3", **THETA, "use_sliding_window": False, "sliding_window": None}, Facts()),
    "gemma2": (
        {"model_type": "gemma2", **THETA, **GEMMA, "tie_word_embeddings": True, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 1.5},
        Facts(**GEMMA_FACTS, windows=(WINDOW, None), cap=2.0, output_cap=1.5),
    ),
    "gemma3_text": (
        {"model_type": "gemma3_text", **GEMMA, "tie_word_embeddings": True, "sliding_window_pattern": 2,
         "rope_theta": 900.0, "rope_local_base_freq": BASE, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
         "attn_logit_softcapping": None, "final_logit_softcapping": None},
        Facts(**GEMMA_FACTS, windows=(WINDOW, None), ropes=((BASE, d, 1.0), (900.0, d, 4.0))),
    ),
    "gated_qwen3": (
        {"model_type": "qwen3", **THETA, "elementwise_attn_output_gate": True, "headwise_attn_output_gate": False,
         "use_qk_norm": True},
        Facts(gate="groups"),
    ),
    "gated_qwen3_headwise": (
        {"model_type": "qwen3", **THETA, "elementwise_attn_output_gate": True, "headwise_attn_output_gate": True,
         "use_qk_norm": False},
        Facts(gate="groups_headwise"),
    ),
    "qwen3_next": ({"model_type": "qwen3_next", **LINEAR, "num_experts": 0}, Facts(**HYBRID, fused=True)),
    "qwen3_5_text": ({"model_type": "qwen3_5_text", **LINEAR}, Facts(**HYBRID)),
}  # fmt: skip


def config(name: str) -> dict[str, Any]:
    """The config.json of a case."""
    return BASIC | CASES[name][0]


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a case, written down and not asked of the code under test."""
    tree, facts = config(name), CASES[name][1]
    head, found = tree["head_dim"], {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not tree["tie_word_embeddings"]:
        found["lm_head.weight"] = (V, D)
    normed = tree["model_type"] in ("qwen3", "gemma3_text", "qwen3_next", "qwen3_5_text") and tree.get(
        "use_qk_norm", True
    )
    qkv = tree.get("attention_bias") or tree["model_type"] == "qwen2"
    queries = {"none": H * head, "heads": 2 * H * head, "groups": 2 * H * head, "groups_headwise": H * head + H}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if facts.four else []
        found |= {f"{at}{norm}.weight": (D,) for norm in norms}
        for side, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            found[f"{at}mlp.{side}_proj.weight"] = shape
            found |= {f"{at}mlp.{side}_proj.bias": shape[:1]} if tree.get("mlp_bias") else {}
        if layer in facts.deltas:
            found |= delta_shapes(f"{at}linear_attn.", *facts.delta, facts.fused)
            continue
        for side, rows in (("q", queries[facts.gate]), ("k", K * head), ("v", K * head)):
            found[f"{at}self_attn.{side}_proj.weight"] = (rows, D)
            found |= {f"{at}self_attn.{side}_proj.bias": (rows,)} if qkv else {}
        found[f"{at}self_attn.o_proj.weight"] = (D, H * head)
        found |= {f"{at}self_attn.o_proj.bias": (D,)} if tree.get("attention_bias") else {}
        found |= {f"{at}self_attn.{side}_norm.weight": (head,) for side in "qk"} if normed else {}
    return found


def delta_shapes(at: str, keys: int, values: int, dk: int, dv: int, fused: bool) -> dict[str, tuple[int, ...]]:
    channels = 2 * keys * dk + values * dv
    if fused:
        found = {"in_proj_qkvz.weight": (channels + values * dv, D), "in_proj_ba.weight": (2 * values, D)}
    else:
        found = {"in_proj_qkv.weight": (channels, D), "in_proj_z.weight": (values * dv, D)}
        found |= {f"in_proj_{side}.weight": (values, D) for side in "ba"}
    found |= {"conv1d.weight": (channels, 1, 4), "A_log": (values,), "dt_bias": (values,), "norm.weight": (dv,)}
    return {at + name: shape for name, shape in (found | {"out_proj.weight": (D, values * dv)}).items()}


def tensors(name: str, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a case: norms and biases away from neutral, matrices that keep sizes."""
    rng, found = np.random.default_rng(seed), {}
    for key, shape in shapes(name).items():
        scale = 1.0 if len(shape) == 2 and "embed" in key else 0.4 if len(shape) == 1 else 1.5 / math.sqrt(shape[-1])
        off = 1.0 if key.endswith("norm.weight") and "linear_attn" in key else 0.0
        off = 1.0 - CASES[name][1].shift if key.endswith("norm.weight") and not off else off
        found[key] = (off + scale * rng.standard_normal(shape)).astype(KINDS[dtype][1])
    return found


def write_file(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """A safetensors file by the letter of its format."""
    names = {np.dtype(kind): name for name, kind in KINDS.values()}
    header, data = {}, b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": names.get(array.dtype, str(array.dtype).upper().replace("INT", "I")),
            "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)],
        }  # fmt: skip
        data += raw
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, likewise."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    kinds, base = dict(KINDS.values()), 8 + length
    header = json.loads(raw[8:base])
    assert header.pop("__metadata__")["format"] == "pt"
    read = lambda f: np.frombuffer(raw[base + f["data_offsets"][0] : base + f["data_offsets"][1]], kinds[f["dtype"]])
    return {name: read(facts).reshape(facts["shape"]) for name, facts in header.items()}


def write(folder: pathlib.Path, name: str, *, dtype: str = "float32", files: int = 1, **changes: Any) -> pathlib.Path:
    """A folder of a case, its tensors in so many files; `changes` are keys of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = tensors(name, dtype)
    write_config(folder, name, torch_dtype=dtype, **changes)
    if files == 1:
        write_file(folder / "model.safetensors", arrays)
        return folder
    places = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = dict(list(arrays.items())[i::files])
        write_file(folder / file, part)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_config(folder: pathlib.Path, name: str, **changes: Any) -> None:
    """The config.json of a case, with other keys."""
    (folder / "config.json").write_text(json.dumps({**config(name), **changes}))
