"""`attnlab import` and `attnlab export`: workdirs that every verb takes, folders that others read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from attnlab import cli
from attnlab import config as config_lib
from attnlab.data.tokenizers import load_tokenizer
from attnlab.errors import UserError
from attnlab.interchange import exporting, importing, tokens
from attnlab.interchange.safetensors import Tensor
from attnlab.train.checkpoints import Checkpoints
from attnlab.train.config import RunConfig
from tests import tiers
from tests.interchange import checkpoints
from tests.train import runs

PLACE = ["--config.mesh.data=1"]
VOCAB = 272


def folder(path, source, **changes):
    """A checkpoint of Llama's that reads bytes, in four files of bfloat16."""
    made = checkpoints.write(path, "llama", dtype="bfloat16", files=4, vocab_size=VOCAB, **changes)
    wide = np.random.default_rng(2).standard_normal((2, VOCAB, checkpoints.D)).astype(checkpoints.KINDS["bfloat16"][1])
    for file in made.glob("*.safetensors"):
        arrays = checkpoints.read_file(file)
        for i, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
            if name in arrays:
                arrays[name] = 0.3 * wide[i]
        checkpoints.write_file(file, {name: a.astype(wide.dtype) for name, a in arrays.items()})
    return made


def data(source):
    return [f"--config.data.{k}={v}" for k, v in
            {"source": source, "tokenizer": "bytes", "length": 32, "batch": 8}.items()]  # fmt: skip


def arrays(path):
    """All tensors of a folder."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= checkpoints.read_file(file)
    return found


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The folder, and the workdir made of it."""
    path = tmp_path_factory.mktemp("verbs")
    source = runs.corpus(path / "text")
    given = folder(path / "from", source)
    train = [f"--config.train.{k}={v}" for k, v in {"steps": 2, "eval_every": 2, "eval_batches": 1}.items()]
    args = ["import", "--from", given, "--workdir", path / "run", *data(source), *train, *PLACE]
    assert cli.main([str(a) for a in args]) == 0
    return given, path / "run"


def test_check_reads_headers_alone(attnlab, tmp_path, monkeypatch):
    """The table of all tensors, and nothing is written or mapped."""
    given = folder(tmp_path / "from", "")
    monkeypatch.setattr(Tensor, "mapped", lambda self: pytest.fail("a tensor was read"))
    code, out, err = attnlab("import", "--from", given, "--check", "--json", "--config.data.tokenizer=bytes")
    assert code == 0, err
    found = json.loads(out)
    assert found["family"] == "llama" and found["tensors"] == len(found["table"]) == len(checkpoints.shapes("llama"))
    rows = {row["tensor"]: row for row in found["table"]}
    row = rows["model.layers.1.self_attn.o_proj.weight"]
    assert row["becomes"] == "transformer.periods.blocks.0.sublayers.0.branch.out.kernel[1]" and row["dtype"] == "BF16"
    assert "texts began with token 1" in found["notes"][0]
    assert [p.name for p in tmp_path.iterdir()] == ["from"]
    code, _, err = attnlab("import", "--from", given)
    assert (code, err.strip()) == (2, "attnlab import: --workdir W is needed, or --check")


def test_untrained_it_goes_out_as_it_came(attnlab, imported, tmp_path):
    """Bit for bit, by files of at most the size asked for; imported again it is the same again."""
    given, workdir = imported
    code, out, err = attnlab("export", "--workdir", workdir, "--to", tmp_path / "to", "--shard-size", "9KB", *PLACE)
    assert code == 0, err
    before, after = arrays(given), arrays(tmp_path / "to")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        np.testing.assert_array_equal(before[name].view(np.uint16), after[name].view(np.uint16))
    sizes = [sum(a.nbytes for a in checkpoints.read_file(f).values()) for f in (tmp_path / "to").glob("*.safetensors")]
    assert len(sizes) > 3 and sorted(sizes)[-3] <= 9000 and "llama in bfloat16" in out
    index = json.loads((tmp_path / "to/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys() and index["metadata"]["total_size"] == sum(sizes)
    tree = json.loads((tmp_path / "to/config.json").read_text())
    assert (
        tree["architectures"] == ["LlamaForCausalLM"] and tree["attention_bias"] and tree["torch_dtype"] == "bfloat16"
    )
    code, _, err = attnlab("export", "--workdir", workdir, "--to", tmp_path / "to", *PLACE)
    assert code == 2 and "is there; name a new folder" in err


def test_its_bytes_are_a_tokenizer(attnlab, imported, tmp_path):
    """Ids of bytes, with end-of-document in front, as documents begin in training."""
    assert attnlab("export", "--workdir", imported[1], "--to", tmp_path / "to", *PLACE)[0] == 0
    tokenizer = Tokenizer.from_file(str(tmp_path / "to/tokenizer.json"))
    texts = ["", " ", "  two\n\tlines ", "é 🙂 漢字", "def f(x):\n    return x\n", "\x00\x7f"]
    for text in texts:
        assert tokenizer.encode(text).ids == [256, *text.encode()]
        assert tokenizer.encode(text, add_special_tokens=False).ids == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    named = json.loads((tmp_path / "to/tokenizer_config.json").read_text())
    assert named["bos_token"] == named["eos_token"] == "<|endoftext|>"
    ids = json.loads((tmp_path / "to/config.json").read_text())
    assert [ids[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [256] * 3


def test_every_verb_takes_it(attnlab, imported, tmp_path):
    """It is evaluated, trains from its checkpoint, and what it became is exported."""
    _, workdir = imported
    record = json.loads((workdir / "imported.json").read_text())
    assert record["family"] == "llama" and len(record["files"]) == 4 and record["dtype"] == "bfloat16"
    assert json.loads((workdir / "config.json").read_text())["imported_from"] == record["source"]
    assert Checkpoints(workdir).steps() == [0]
    code, out, err = attnlab("eval", "--workdir", workdir, "--batches", "1", "--json")
    assert code == 0 and json.loads(out)["step"] == 0, err
    before = json.loads(out)
    code, out, err = attnlab("train", "--config", workdir / "config.json", "--workdir", workdir)
    assert code == 0 and "at step 0" in out, err
    code, out, _ = attnlab("eval", "--workdir", workdir, "--batches", "1", "--json")
    after = json.loads(out)
    assert after["step"] == 2 and after["loss"] != before["loss"] and abs(after["loss"] - before["loss"]) < 0.1
    code, out, err = attnlab("export", "--workdir", workdir, "--to", tmp_path / "to", "--dtype", "float32", "--json")
    assert code == 0 and json.loads(out)["step"] == 2, err
    code, _, err = attnlab("import", "--from", imported[0], "--workdir", workdir, "--config.data.tokenizer=bytes")
    assert code == 2 and "holds a run already" in err


@tiers.exhaustive
def test_it_continues_a_text(attnlab, imported):
    """`generate` restores it as `eval` does."""
    code, out, err = attnlab("generate", "--workdir", imported[1], "--prompt", "def ", "--tokens", "3", "--json")
    assert code == 0 and len(json.loads(out)["samples"]) == 1, err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.mixers.M.name=lightning"], "its layers are lightning"),
        (["model.mixers.M.sinks=true"], "layers.0.sinks = True"),
        (["model.mixers.M.rope_base=none"], "no rotary positions"),
        (["model.mlp_width=0"], "has not: "),
    ],
)
def test_what_no_family_has_is_refused(attnlab, tmp_path, overrides, said):
    """By what it has too many of."""
    tree = config_lib.apply_overrides(runs.tree("stdlib", model__mlp_width=64), overrides)
    with pytest.raises(UserError, match="no published family that is known has this model") as error:
        exporting.choose(config_lib.build(RunConfig, tree))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"qk_norm": True}, "qwen3"),
        ({"bias": "qkv"}, "qwen2"),
        ({"window": 8}, "mistral"),
        ({"name": "gated", "qk_norm": True, "granularity": "headwise"}, "gated_qwen3"),
    ],
)
def test_a_model_of_ones_own_finds_its_family(changes, family):
    """The first family, of those that transformers itself has, that says exactly this."""
    mixer = {"name": "softmax", "heads": 2} | changes
    config = runs.config("stdlib", model__mlp_width=64, model__mixers={"M": mixer})
    assert exporting.choose(config)[0].name == family


@pytest.mark.parametrize(
    ("eos", "token"),
    [(257, "<|im_end|>"), ([257, 256], "<|endoftext|>"), ([258, 257], "<|end_of_text|>"), (None, None)],
)
def test_the_token_that_ends_texts(tmp_path, eos, token):
    """By config.json's ids, of several the one of a usual name; the tokenizer's files go along as they are."""
    made = checkpoints.write(tmp_path / "from", "qwen3", eos_token_id=eos)
    backend = Tokenizer.from_str(json.dumps(tokens._bytes_tree()))
    backend.add_special_tokens(["<|im_end|>", "<|end_of_text|>"])
    backend.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text("{}")
    spec = importing.plan(made, tmp_path / "run", None, []).config.data.tokenizer
    path, _, eod = spec.partition("?eod=")
    assert (eod or None) == token and path == str(tmp_path / "run/tokenizer/tokenizer.json")
    tokens.copy(made, tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()
    checkpoints.write_config(made, "qwen3", eos_token_id=999)
    with pytest.raises(UserError, match="eos_token_id = 999, which .* does not have"):
        importing.plan(made, tmp_path / "run")


def test_a_tokenizer_of_a_file_begins_texts_as_training_does(tmp_path):
    """The ids that the model was trained on, end-of-document in front, whatever the file added itself."""
    tree = tokens._bytes_tree() | {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                                                  "stride": 0}}  # fmt: skip
    backend = Tokenizer.from_str(json.dumps(tree))
    backend.add_special_tokens(["<|im_end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    spec = f"{tmp_path}?eod=<|im_end|>"
    tokenizer = load_tokenizer(spec)
    (tmp_path / "to").mkdir()
    tokens.write(spec, tokenizer, tmp_path / "to", 32)
    written = Tokenizer.from_file(str(tmp_path / "to/tokenizer.json"))
    for text in ("", "a b é 漢", "\n\n  x"):
        assert written.encode(text).ids == [257, *tokenizer.encode(text)]
    assert tokens.special_ids(tokenizer) == {f"{kind}_token_id": 257 for kind in ("bos", "eos", "pad")}
