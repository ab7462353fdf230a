"""What cannot be read is refused by name, in a sentence, before a number is read."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.interchange import importing
from attnlab.interchange.fields import Fields, rotary
from attnlab.interchange.safetensors import Folder, read_header
from tests.interchange import checkpoints

OVERRIDES = ["data.tokenizer=bytes"]


def refused(folder, said, *overrides, as_=None):
    with pytest.raises(UserError) as error:
        importing.plan(folder, None, as_, [*OVERRIDES, *overrides])
    text = str(error.value)
    assert said in text and len(text.splitlines()) <= 2, text


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"model_type": "phi9"}, "model_type = 'phi9' is not read; allowed: "),
        ("llama", {"clip_qkv": 8.0}, "not known of this family: clip_qkv = 8.0"),
        ("llama", {"sliding_window": 5}, "sliding_window = 5"),
        ("llama", {"num_local_experts": 8}, "num_local_experts = 8: mixtures of experts"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"kv_lora_rank": 512}, "latent attention (MLA) is not read"),
        ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu' is not read; allowed: silu"),
        ("llama", {"hidden_size": None}, "has no hidden_size"),
        ("llama", {"num_attention_heads": 3}, "divisors of hidden_size"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic' is not read"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mystery": 1}}, "linear: mystery is not known"),
        ("llama", {"rope_scaling": {"type": "llama3"}}, "llama3: factor is missing"),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("llama", {"vocab_size": 47}, "'model.embed_tokens.weight' is [48, 16], config.json makes it [47, 16]"),
        ("llama", {"intermediate_size": 25}, "is [24, 16], config.json makes it [25, 16]"),
        ("llama", {"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight"),
        ("llama", {"num_hidden_layers": 1}, "not known: model.layers.1.input_layernorm.weight"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' is not read; allowed: true or false"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0 is not read"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gated_qwen3", {"qkv_bias": True}, "qkv_bias = True is not read; allowed: False"),
        ("qwen3_next", {"num_experts": 512}, "num_experts = 512: mixtures of experts"),
        ("qwen3_next", {"num_experts": None}, "missing: "),
    ],
)
def test_config_json(tmp_path, name, changes, said):
    if changes == {"num_experts": None}:  # null is what the file does not say: there would be experts
        tree = checkpoints.config(name)
        del tree["num_experts"]
        folder = checkpoints.write(tmp_path, name)
        (folder / "config.json").write_text(json.dumps(tree))
        return refused(folder, "num_experts")
    return refused(checkpoints.write(tmp_path, name, **changes), said)


def test_folders(tmp_path):
    """Nothing there, pickles alone, no tokenizer, SentencePiece alone."""
    refused(tmp_path, "it has no config.json")
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.config("llama")))
    refused(tmp_path, "holds neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    refused(tmp_path, "pytorch_model.bin is a pickle, which is never opened")
    folder = checkpoints.write(tmp_path / "whole", "llama")
    with pytest.raises(UserError, match="has no tokenizer.json"):
        importing.plan(folder, None)
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="SentencePiece tokenizer.model and no tokenizer.json"):
        importing.plan(folder, None)
    refused(folder, "the model's parameter embedding is [64, 16], what", "model.vocab=64")
    refused(folder, "the checkpoint has nothing for the model's parameter", "model.mixers.S.sinks=true")
    refused(folder, "--as = 'nothing'", as_="nothing")


def header(folder, change):
    """Rewrites the header of a folder's file by `change(header)`, or the bytes where that returns some."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    tree = json.loads(raw[8 : 8 + length])
    text = change(tree) or json.dumps(tree).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["lm_head.weight"].update(shape=[48, 17]), "of shape [48, 17] and dtype F32 has 3072 bytes"),
        (lambda t: t["lm_head.weight"].update(data_offsets=[4, 3076]), "does not begin where the one before it ends"),
        (lambda t: t["lm_head.weight"].update(shape=[-48, -16]), "shape or offsets of 'lm_head.weight'"),
        (lambda t: t.pop("lm_head.weight") and None, "does not begin where"),
        (lambda t: b'{"a": {}, "a": {}}', "a name stands there twice"),
        (lambda t: b"[1]", "its header is not that of a safetensors file"),
        (lambda t: b"\x80\x02cos", "its header is not that of a safetensors file"),
    ],
)
def test_damaged_headers(tmp_path, change, said):
    folder = checkpoints.write(tmp_path, "llama")
    header(folder, change)
    refused(folder, said)


def test_damaged_files(tmp_path):
    """Cut off, longer, empty; of an index: an absent file, one elsewhere, other tensors; numbers that are not read."""
    folder = checkpoints.write(tmp_path / "one", "llama")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for raw, said in ((whole[:-1], "cut off"), (whole + b"x", "longer than its tensors"), (b"", "no safetensors file"),
                      (struct.pack("<Q", 2**40) + whole[8:], "its header would take 1099511627776 bytes")):  # fmt: skip
        path.write_bytes(raw)
        refused(folder, said)
    arrays = checkpoints.tensors("llama")
    checkpoints.write_file(path, {**arrays, "lm_head.weight": np.zeros((48, 16), np.int8)})
    refused(folder, "tensor 'lm_head.weight' has dtype I8; allowed: F64, F32, BF16, F16")

    folder = checkpoints.write(tmp_path / "many", "llama", files=2)
    index = folder / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    name = "lm_head.weight"
    for place, said in (("absent.safetensors", "names absent.safetensors, which is not there"),
                        ("../one/model.safetensors", "is not the name of a file beside it")):  # fmt: skip
        index.write_text(json.dumps({"weight_map": tree["weight_map"] | {name: place}}))
        refused(folder, said)
    other = next(file for file in set(tree["weight_map"].values()) if file != tree["weight_map"][name])
    index.write_text(json.dumps({"weight_map": tree["weight_map"] | {name: other}}))
    with pytest.raises(UserError, match="which it does not|does not name"):
        Folder.of(folder)
    index.write_text("{}")
    refused(folder, "no object 'weight_map'")


def test_names_that_are_skipped(tmp_path):
    """Frequencies of old files, images, further heads and a tied head are left out, and counted; others are refused."""
    folder = checkpoints.write(tmp_path, "qwen2")
    arrays = checkpoints.tensors("qwen2")
    more = ["model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.fc.weight", "visual.patch.weight", "lm_head.weight"]
    checkpoints.write_file(folder / "model.safetensors", arrays | {name: np.zeros((3,), np.float32) for name in more})
    plan = importing.plan(folder, None, None, OVERRIDES)
    assert sorted(plan.skipped) == sorted(more) and plan.notes[0].startswith("4 tensors are left out: ")
    assert all(tensor.begin < tensor.end for tensor in read_header(folder / "model.safetensors")[0].values())


def test_text_models_inside_of_others(tmp_path):
    """The text model of one that reads images, too: its part of config.json, its tensors' own prefix."""
    folder = checkpoints.write(tmp_path, "gemma3_text")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": checkpoints.config("gemma3_text"), "vision_config": {}})
    )
    for prefix in ("language_model.model.", "model.language_model."):
        renamed = {prefix + k.removeprefix("model."): v for k, v in checkpoints.tensors("gemma3_text").items()}
        image = {"vision_tower.patch.weight": np.zeros((2,), np.float32)}
        checkpoints.write_file(folder / "model.safetensors", renamed | image)
        plan = importing.plan(folder, None, None, OVERRIDES)
        assert plan.names["model.norm.weight"] == f"{prefix}norm.weight" and plan.skipped == [*image]


YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16, "mscale": 2.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 7e4}, {"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}),
        ({"rope_theta": 7e4, "rope_scaling": {"type": "yarn", **YARN}},
         {"rope_theta": 7e4, "rope_parameters": {"rope_theta": 7e4, "rope_type": "yarn", **YARN}}),
        ({"rope_theta": 7e4, "partial_rotary_factor": 0.5},
         {"rope_parameters": {"rope_theta": 7e4, "rope_type": "default", "partial_rotary_factor": 0.5}}),
        ({"rope_scaling": None}, {"rope_parameters": None}),
    ],
)  # fmt: skip
def test_old_and_new_rotary_keys(old, new):
    """Both say the same; where they stand side by side and differ, that is refused."""
    read = lambda tree: rotary(Fields({"max_position_embeddings": 64, **tree}, "config.json"), 12)
    assert read(old) == read(new)
    for more in ({"rope_theta": 3.0}, {"rope_scaling": {"type": "linear", "factor": 9.0}}):
        if "rope_theta" in old:
            with pytest.raises(UserError, match="rope_theta|rope_scaling"):
                read({**new, **more})


def test_factors_of_yarn():
    """`mscale` and `mscale_all_dim` together are a factor; the original length is the longest where it is not said."""
    tree = {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", **YARN}}
    node = rotary(Fields(tree, "config.json"), 12)["rope_scaling"]
    times = lambda m: 0.1 * m * np.log(4) + 1
    assert node["attention_factor"] == pytest.approx(times(2) / times(1)) and node["original_length"] == 32
    del tree["rope_scaling"]["original_max_position_embeddings"]
    assert rotary(Fields(tree, "config.json"), 12)["rope_scaling"]["original_length"] == 64
