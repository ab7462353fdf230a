"""Imported and exported models against transformers': logits of tiny random checkpoints of every family, both ways.

    pip install -e '.[bench]' transformers && python -m benchmarks.interchange [FAMILY ...]
    python -m benchmarks.interchange --remote-code [CASE ...]    # models with PyTorch code of their own
    python -m benchmarks.interchange --harness [CASE ...]        # lm-evaluation-harness, also needs lm_eval, accelerate
    python -m benchmarks.interchange --read-gib 2                # speed and memory of reading; needs nothing more

A checkpoint is made by transformers, every parameter moved off its first value, and imported; its logits are compared
at 64 positions with those of transformers' eager attention, in float32, as is what attnlab exports again. The bound is
1e-5 of the largest logit or, where float32 itself errs by more, three times what theirs are from attnlab's in float64:
of the delta rule random layers magnify rounding.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import mixers
from attnlab.interchange import exporting, importing
from attnlab.train import restore
from attnlab.train.program import Program
from benchmarks import reading, remote_code

LENGTH, BOUND = 64, 1e-5
SIZES = {
    "vocab_size": 263, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
          "head_dim": 16}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
# name: class of transformers without its ending, keys beside SIZES.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": PLAIN}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": PLAIN, "head_dim": None}),
    "mistral": ("Mistral", {"sliding_window": 9, "rope_parameters": PLAIN}),
    "mistral_whole": ("Mistral", {"sliding_window": None, "rope_parameters": PLAIN}),
    "qwen2": ("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen2_windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"rope_parameters": YARN}),
    "qwen3_windows": ("Qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2,
                                "attention_bias": True}),
    "gemma2": ("Gemma2", {"sliding_window": 9, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 1.5}),
    "gemma3": ("Gemma3Text", {
        "sliding_window": 9, "query_pre_attn_scalar": 20, "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0}},
    }),
    "qwen3_next": ("Qwen3Next", {**LINEAR, "num_experts": 0, "num_hidden_layers": 4}),
    "qwen3_5": ("Qwen3_5Text", {**LINEAR, "layer_types": ["linear_attention", "full_attention"] * 2}),
}  # fmt: skip


def made(name: str, folder: pathlib.Path) -> Any:
    """The model of transformers, saved."""
    import torch
    import transformers

    cls, keys = CASES[name]
    config = getattr(transformers, f"{cls}Config")(**{**SIZES, **keys}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{cls.removesuffix('Text')}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("A_log"):  # sums of large log decays over a chunk would leave float32 few digits
                parameter.sub_(4)
            scale = 0.3 if parameter.ndim < 2 else 1 / parameter.shape[-1] ** 0.5
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def theirs(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of a model of transformers."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def ours(workdir: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of a workdir's model."""
    trained = restore.load(workdir, evaluating=False)
    return computed(trained.program.model.merge(trained.params), tokens)


def exact(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of a folder's model in float64."""
    with jax.enable_x64(True):
        plan = importing.plan(folder, None, None, ["data.tokenizer=bytes", "mesh.data=1", "model.dtype=float64"])
        program = Program.of(plan.config, batches=False)
        return computed(program.model.merge(importing.parameters(plan, program, lambda count: None)), tokens)


def computed(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of a model."""
    hidden = model.hidden(jnp.asarray(tokens), mixers.Sequence.whole(*tokens.shape)).y
    return np.asarray(model.logits(hidden))


def tokenized(folder: pathlib.Path) -> bool:
    """Whether AutoTokenizer gives the ids of bytes, end-of-document in front, for 200 texts."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    source = pathlib.Path(__file__).read_text()
    texts = ["", " ", "\n\n", "é 🙂 漢字\t", "\x00", *(source[i : i + 37] for i in range(0, 7000, 36))]
    plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    return all(tokenizer(t)["input_ids"] == [256, *t.encode()] and plain(t) == list(t.encode()) for t in texts)


def compared(name: str, directory: pathlib.Path) -> dict[str, float]:
    """Differences relative to the largest logit: of the import in float32, of its float64 and of the export, read by
    transformers, from transformers' logits; and of the import in float32 from its float64."""
    import transformers

    folder, workdir, back = (directory / part for part in (f"{name}-from", f"{name}-run", f"{name}-to"))
    model = made(name, folder)
    tokens = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, LENGTH))
    wanted = theirs(model, tokens)
    overrides = ["data.tokenizer=bytes", "data.length=64", f"data.source=text:{__file__}", "mesh.data=1"]
    quiet = lambda text: None
    importing.run(importing.plan(folder, workdir, None, overrides), workdir, quiet)
    exporting.run(workdir, back, say=quiet)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        back, output_loading_info=True, attn_implementation="eager"
    )
    assert tokenized(back)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    error = lambda got: float(np.abs(got - wanted).max() / np.abs(wanted).max())
    mine, wide = ours(workdir, tokens), exact(folder, tokens)
    own = float(np.abs(mine - wide).max() / np.abs(wide).max())
    return {"imported": error(mine), "float64": error(wide), "ours_float64": own,
            "exported": error(theirs(again.eval(), tokens))}  # fmt: skip


def families(names: list[str]) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Whether each case is as good as it must be, and its figures."""
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as directory:
            errors = compared(name, pathlib.Path(directory))
        good = errors["imported"] <= max(BOUND, 3 * errors["float64"]) and errors["exported"] <= BOUND
        yield good, {"case": name, **errors}


def own_code(names: list[str]) -> Iterator[tuple[bool, dict[str, Any]]]:
    """As `families`, of models with PyTorch code of their own."""
    for name in names or remote_code.CASES:
        with tempfile.TemporaryDirectory() as directory:
            found = remote_code.compared(name, pathlib.Path(directory))
        yield remote_code.good(found), {"case": name, **found}


def asked(names: list[str]) -> Iterator[tuple[bool, dict[str, Any]]]:
    """As `families`, of lm-evaluation-harness."""
    from benchmarks import harness_requests

    for name in names or harness_requests.CASES:
        with tempfile.TemporaryDirectory() as directory:
            found = harness_requests.compared(name, pathlib.Path(directory))
        yield harness_requests.good(found), {"case": name, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--remote-code", action="store_true", help="models with PyTorch code of their own")
    kinds.add_argument("--harness", action="store_true", help="requests of lm-evaluation-harness")
    kinds.add_argument("--read-gib", type=float, metavar="N", help="read a checkpoint of so many GiB")
    parser.add_argument("--dir", help="for that checkpoint, on the disk that is to be measured; default: temporary")
    parser.add_argument("names", nargs="*", metavar="CASE", help="default: all")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.read_gib:
        found = [(True, reading.measured(args.read_gib, args.dir))]
    else:
        found = (own_code if args.remote_code else asked if args.harness else families)(args.names)
    good = True
    for fine, figures in found:
        good &= fine
        print(json.dumps(figures), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
