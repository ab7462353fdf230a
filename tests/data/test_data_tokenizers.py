"""Tokenizers: round trips, bytes per id, training, and files that are none."""

import json
import os

import numpy as np
import pytest
import tokenizers as hf

from attnlab import data
from attnlab.data.tokenizers import HuggingFaceTokenizer
from attnlab.errors import ConfigError, UserError

TEXTS = [
    "plain text",
    "naïve café, 四十二, \U0001f600\u200d",
    "tabs\t\tand\r\n\n\n    indents",
    " leading",
    "",
    "a page on <|endoftext|> and </s> tokens",
    "\0\x7f\ufffd",
]


@pytest.fixture
def trained(corpus, tmp_path):
    out = tmp_path / "bpe.json"
    summary = data.train_tokenizer(data.DataConfig(source=corpus), 300, str(out))
    assert summary["vocab_size"] <= 300 and summary["path"] == str(out)
    return data.load_tokenizer(str(out))


def check_round_trip(tokenizer, texts):
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths[tokenizer.eod_id] == 0
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1 and tokenizer.eod_id not in ids
        assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.eod_id, *ids, tokenizer.eod_id]) == text
        assert lengths[ids].sum() == len(text.encode())
    for one, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(tokenizer.encode(one), ids)


def test_bytes():
    tokenizer = data.load_tokenizer("bytes")
    check_round_trip(tokenizer, TEXTS)
    assert tokenizer.vocab_size == 257 and tokenizer.eod_id == 256
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([97, 0xC3]) == "a\ufffd"
    with pytest.raises(UserError, match="0 to 256"):
        tokenizer.decode([300])


def test_trained_bpe(trained, corpus):
    check_round_trip(trained, TEXTS)
    assert len(trained.encode("naïve café naïve café")) < 12
    assert trained.decode(trained.encode("é")[:1]) in ("\ufffd", "é")
    config = data.DataConfig(source=corpus, length=8, batch=2)
    loader = data.train_loader(config, trained, seed=0)
    summary = loader.summary()
    assert summary["tokens"] < summary["bytes"]
    assert data.heldout_loader(config, trained).bytes == summary["heldout_bytes"]


def test_training_is_deterministic_and_leaves_out_what_is_held_out(corpus, tmp_path):
    config = data.DataConfig(source=corpus, heldout=0.4)
    outs = [tmp_path / f"{i}.json" for i in range(2)]
    summaries = [data.train_tokenizer(config, 290, str(out)) for out in outs]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    expected = data.train_loader(
        data.DataConfig(source=corpus, heldout=0.4, length=8, batch=1), data.load_tokenizer("bytes"), seed=0
    ).summary()
    assert summaries[0]["documents"] == expected["train_documents"] < expected["documents"]
    assert summaries[0]["bytes"] == expected["train_bytes"]
    assert sorted(os.listdir(tmp_path)) == ["0.json", "1.json", "cache", "text"]


def test_training_refuses(corpus, tmp_path):
    config = data.DataConfig(source=corpus)
    with pytest.raises(ConfigError, match="vocab_size = 256.*at least 257"):
        data.train_tokenizer(config, 256, str(tmp_path / "a.json"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        data.train_tokenizer(config, 300, str(tmp_path / "file" / "a.json"))
    (tmp_path / "text" / "zz.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="zz.txt is not UTF-8"):
        data.train_tokenizer(config, 300, str(tmp_path / "a.json"))
    assert not list(tmp_path.glob("a.json*"))


def test_fingerprints_differ(trained, corpus, tmp_path):
    data.train_tokenizer(data.DataConfig(source=corpus), 280, str(tmp_path / "other.json"))
    other = data.load_tokenizer(str(tmp_path / "other.json"))
    again = data.load_tokenizer(str(tmp_path / "bpe.json"))
    assert again.fingerprint() == trained.fingerprint()
    assert len({trained.fingerprint(), other.fingerprint(), data.load_tokenizer("bytes").fingerprint()}) == 3


def save(tmp_path, tokenizer):
    path = str(tmp_path / "hf.json")
    tokenizer.save(path)
    return path


def test_end_of_document_is_found_or_named(tmp_path):
    tokenizer = hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1, "[END]": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    path = save(tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"\?eod=TOKEN"):
        data.load_tokenizer(path)
    with pytest.raises(UserError, match="names '<end>'"):
        data.load_tokenizer(f"{path}?eod=<end>")
    assert data.load_tokenizer(f"{path}?eod=[END]").eod_id == 2
    for name in ("</s>", "<eos>", "<|end_of_text|>", "<|eod|>", "<|endoftext|>"):
        tokenizer = hf.Tokenizer(hf.models.WordLevel({"a": 0, name: 7}, unk_token="a"))
        loaded = data.load_tokenizer(save(tmp_path, tokenizer))
        assert loaded.eod_id == 7 and loaded.vocab_size == 8  # ids have holes


def test_settings_of_the_file_that_would_change_documents_are_off(trained, tmp_path):
    spec = json.loads((tmp_path / "bpe.json").read_text())
    backend = hf.Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens(["<|user|>"])
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.post_processor = hf.processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = HuggingFaceTokenizer(save(tmp_path, backend))
    check_round_trip(tokenizer, [*TEXTS, "a text on <|user|> tokens"])
    assert backend.token_to_id("<|user|>") not in tokenizer.encode("<|user|>")


def test_a_text_cannot_end_itself(tmp_path):
    """An end-of-document that is an ordinary piece of the vocabulary, as in some SentencePiece models."""
    pieces = [("<unk>", 0.0), ("</s>", -0.1), ("<", -2.0), ("/", -2.0), ("s", -2.0), (">", -2.0), ("a", -2.0)]
    path = save(tmp_path, hf.Tokenizer(hf.models.Unigram(pieces, unk_id=0)))
    tokenizer = data.load_tokenizer(path)
    ids = tokenizer.encode("a</s>a</s></s>")
    assert tokenizer.eod_id == 1 and 1 not in ids
    [(again, ends)] = tokenizer.encode_batch_with_ends(["a</s>a</s></s>"])
    np.testing.assert_array_equal(again, ids)
    assert ends.tolist() == list(range(1, len("a</s>a</s></s>") + 1))


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe", b"[1]", b'{"model": {"type": "X"}}'])
def test_files_that_are_no_tokenizer(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a tokenizer"):
        data.load_tokenizer(str(path))


def test_missing_tokenizers(tmp_path):
    for spec in ("gpt2", str(tmp_path / "none.json"), str(tmp_path)):
        with pytest.raises(UserError, match="No such file.*'bytes'"):
            data.load_tokenizer(spec)


def test_a_text_that_cannot_be_encoded_is_told(tmp_path):
    """The library's own exception names the tokenizer; dropout draws nothing."""
    words = hf.Tokenizer(hf.models.WordLevel({"hello": 0, "<|endoftext|>": 1}))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match="words.json: a text cannot be encoded: .*UNK"):
        data.load_tokenizer(str(tmp_path / "words.json")).encode("unheard of")
    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "abab": 4}
    pairs = hf.Tokenizer(hf.models.BPE(vocab, [("a", "b"), ("ab", "ab")], dropout=0.5))
    pairs.save(str(tmp_path / "pairs.json"))
    tokenizer = data.load_tokenizer(str(tmp_path / "pairs.json"))
    assert {tuple(tokenizer.encode("abababab")) for _ in range(20)} == {(4, 4)}
