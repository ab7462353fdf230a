"""The bytes that bits per byte divides by are those of the text, whatever the tokenizer makes of it."""

import itertools
import json
import pickle
import re

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from attnlab import data
from attnlab.data import sources
from attnlab.data.loader import open_store
from attnlab.data.packing import split_documents
from attnlab.data.tokenizers import HuggingFaceTokenizer
from tests import tiers

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    " leading and trailing spaces  ",
    "emoji 👩‍👩‍👧 and 😀😀, flags 🇩🇪",
    "lines\r\nof\r\n\r\nDOS,\tand\ttabs\t",
    "combining e\u0301 a\u0308o\u0308, ligatures ﬁ ﬀ, ½ ① Ａｂｃ",
    "四十二 is forty-two; кириллица; naïve café",
    "a code token: <keep> , <keep><keep>  <keep>\n  then",
    "   \t  \n",
    "unknownwordthatnobodyhasseen xyzzy plugh \u200d\ufeff",
    "</s> is a text here, and so is <|endoftext|>, to be sure",
] * 2
TRAIN = ["the quick brown fox and the lazy dog", "a text and tabs and lines, to be sure is then"] * 4


def _trained(tokenizer, trainer):
    tokenizer.train_from_iterator(TRAIN, trainer)
    return tokenizer


def _byte_level(prefix=False, normalizer=None):
    tokenizer = hf.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False))


def _byte_fallback(space):
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"abcdefghijklmnop", *(["\u2581"] if space else []), "th"]
    tokenizer = hf.Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [("t", "h")][:0], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return tokenizer


def _word_piece():
    tokenizer = hf.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]"], show_progress=False))


def _word_level():
    tokenizer = hf.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(tokenizer, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))


def _unigram():
    tokenizer = hf.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    return _trained(tokenizer, trainer)


def _stripping():
    tokenizer = _byte_level()
    tokenizer.add_tokens([hf.AddedToken("<keep>", lstrip=True, rstrip=True)])
    return tokenizer


KINDS = {
    "byte-level": _byte_level,
    "byte-level with a prefix space": lambda: _byte_level(prefix=True),
    "byte fallback": lambda: _byte_fallback(space=True),
    "byte fallback without a space token": lambda: _byte_fallback(space=False),
    "WordPiece": _word_piece,
    "word level": _word_level,
    "Unigram": _unigram,
    "added tokens that strip": _stripping,
    "NFKC": lambda: _byte_level(normalizer=normalizers.NFKC()),
    "bytes": None,
}
BY_TABLE = ("byte-level", "bytes")


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    files = {}
    for kind, make in KINDS.items():
        if make is None:
            files[kind] = "bytes"
            continue
        tokenizer = make()
        if tokenizer.token_to_id("<|endoftext|>") is None:
            tokenizer.add_special_tokens(["<|endoftext|>"])
        files[kind] = str(root / f"{len(files)}.json")
        tokenizer.save(files[kind])
    return files


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return f"jsonl:{path}"


def ends_of(kind, file, text):
    """Bytes of text up to the end of each token, from the library alone."""
    if kind == "bytes":
        return list(range(1, len(text.encode()) + 1))
    backend = hf.Tokenizer.from_file(file)
    backend.encode_special_tokens = True
    backend.post_processor = None  # it would cut spaces off the offsets of tokens that have them
    encoding = backend.encode(text, add_special_tokens=False)
    if kind in BY_TABLE:
        return list(itertools.accumulate(len(token) for token in encoding.tokens))
    ends = itertools.accumulate((end for _, end in encoding.offsets), max)
    return [len(text[:end].encode()) for end in ends]


def prefix_bytes(documents, ends):
    """Bytes of text of the first 0, 1, 2, .. positions of the packed stream: tokens, then end-of-document."""
    told = [0]
    for text, document_ends in zip(documents, ends, strict=True):
        start = told[-1]
        told += [start + end for end in document_ends] + [start + len(text.encode())]
    return told


def check_every_cut(config, tokenizer, expected, every=1):
    whole = data.heldout_loader(config, tokenizer)
    assert whole.bytes == whole.summary()["heldout_bytes"] == expected[-1]
    step = config.length * config.batch
    for batches in range(1, len(whole) + 1, every):
        shares = (None, [0], [1]) if batches % 8 == 1 else (None,)
        told = {data.heldout_loader(config, tokenizer, batches=batches, rows=rows).bytes for rows in shares}
        assert told == {expected[min(batches * step, len(expected) - 1)]}, batches
        assert all(isinstance(number, int) for number in told)


@tiers.often(
    "bytes", "byte-level with a prefix space", "byte fallback", "WordPiece", "Unigram", "added tokens that strip"
)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_text(texts, tokenizer_files, tmp_path, kind):
    """Of all that is held out, and of every part that is scored; tokenised now or ahead of time."""
    tokenizer = data.load_tokenizer(tokenizer_files[kind])
    assert (tokenizer.byte_lengths() is not None) == (kind in BY_TABLE)
    config = data.DataConfig(
        source=texts, tokenizer=tokenizer_files[kind], length=3, batch=2, heldout=0.6, shuffle=False
    )
    _, heldout = split_documents(open_store(config, tokenizer).corpus, config)
    documents = [TEXTS[i] for i in heldout]
    assert len({*documents}) >= 8
    store = open_store(config, tokenizer)
    copy = pickle.loads(pickle.dumps(store))  # as worker processes get it
    assert (copy.token_bytes(0, 0, 3) is None) == (kind in BY_TABLE)
    np.testing.assert_array_equal(copy.token_bytes(0, 0, 3), store.token_bytes(0, 0, 3))
    expected = prefix_bytes(documents, [ends_of(kind, tokenizer_files[kind], text) for text in documents])
    check_every_cut(config, tokenizer, expected)
    data.apply_tokenizer(config, str(tmp_path / "out"), shards=3)
    written = data.DataConfig(source=f"array_record:{tmp_path}/out/*", length=3, batch=2, heldout=0.6, shuffle=False)
    check_every_cut(written, tokenizer, expected, every=5)
    batch, same = (
        next(iter(data.heldout_loader(config, tokenizer))),
        next(iter(data.heldout_loader(written, tokenizer))),
    )
    for name in batch:
        np.testing.assert_array_equal(batch[name], same[name])


@pytest.mark.parametrize("kind", ["WordPiece", "byte-level"])
@pytest.mark.parametrize("written", [False, True])
def test_a_document_in_pieces(texts, tokenizer_files, tmp_path, monkeypatch, kind, written):
    """What a piece leaves behind its last token is the next one's; no piece may end its document."""
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 7)
    monkeypatch.setattr("attnlab.data.records.RECORD_TOKENS", 5)
    tokenizer = data.load_tokenizer(tokenizer_files[kind])
    fields = {"tokenizer": tokenizer_files[kind], "length": 3, "batch": 2, "heldout": 0.6, "shuffle": False}
    config = data.DataConfig(source=texts, **fields)
    _, heldout = split_documents(open_store(config, tokenizer).corpus, config)
    ends = []
    for text in (TEXTS[i] for i in heldout):
        begin, document = 0, []
        for piece in sources.in_pieces([text]):
            document += [begin + end for end in ends_of(kind, tokenizer_files[kind], piece)]
            begin += len(piece.encode())
        ends.append(document)
    if written:
        data.apply_tokenizer(config, str(tmp_path / "out"), shards=2)
        config = data.DataConfig(source=f"array_record:{tmp_path}/out/*", **fields)
    check_every_cut(config, tokenizer, prefix_bytes([TEXTS[i] for i in heldout], ends))


def test_a_token_of_more_bytes_than_are_kept_for_one(tmp_path, tokenizer_files):
    """The rest goes on to the next tokens, then to end-of-document."""
    text = "the " + "x" * 150_000 + " the the"
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(text)
    tokenizer = data.load_tokenizer(tokenizer_files["word level"])
    config = data.DataConfig(source=f"text:{tmp_path}/*.txt", length=1, batch=1, heldout=0.5)
    told = [data.heldout_loader(config, tokenizer, batches=i).bytes for i in range(1, 6)]
    assert told == [3, 3 + 65535, 3 + 2 * 65535, len(text), len(text)]


def test_a_corpus_written_before_bytes_were_kept(texts, tokenizer_files, tmp_path, monkeypatch, as_version_1):
    """Whole documents are exact; of the one that is cut, bytes go by tokens."""
    tokenizer = data.load_tokenizer(tokenizer_files["WordPiece"])
    fields = {"tokenizer": tokenizer_files["WordPiece"], "length": 3, "batch": 1, "heldout": 0.6, "shuffle": False}
    config = data.DataConfig(source=texts, **fields)
    with monkeypatch.context() as patch:  # written as if ids told their bytes: without these
        patch.setattr(HuggingFaceTokenizer, "byte_lengths", lambda self: np.zeros(self.vocab_size, np.int32))
        data.apply_tokenizer(config, str(tmp_path / "out"), shards=2)
    as_version_1(tmp_path / "out")
    store = open_store(config, tokenizer)
    _, heldout = split_documents(store.corpus, config)
    expected = [0]
    for i in heldout:
        start, length, size = expected[-1], int(store.corpus.lengths[i]), len(TEXTS[i].encode())
        expected += [start + size * k // length for k in range(1, length + 1)] + [start + size]
    written = data.DataConfig(source=f"array_record:{tmp_path}/out/*", **fields)
    for batches in range(1, (len(expected) - 1) // 3 + 1):
        assert data.heldout_loader(written, tokenizer, batches=batches).bytes == expected[batches * 3]


def test_a_table_that_is_wrong_for_a_document_is_not_used(texts, tokenizer_files, monkeypatch):
    tokenizer = data.load_tokenizer("bytes")
    monkeypatch.setattr(type(tokenizer), "byte_lengths", lambda self: np.full(257, 7, np.int32))
    config = data.DataConfig(source=texts, length=4, batch=1, heldout=0.6, shuffle=False)
    assert data.heldout_loader(config, tokenizer, batches=1).bytes == 4
    assert (
        data.heldout_loader(config, tokenizer).bytes
        == data.heldout_loader(config, tokenizer).summary()["heldout_bytes"]
    )


def edited(spec, path, value):
    node = spec
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value


@pytest.mark.parametrize(
    "path, value, exact",
    [
        ((), None, True),
        (("pre_tokenizer",), {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}, True),
        (("pre_tokenizer",), {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Removed", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}, False),
        (("pre_tokenizer",), {"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}, False),
        (("pre_tokenizer",), None, False),
        (("pre_tokenizer", "add_prefix_space"), True, False),
        (("normalizer",), {"type": "NFC"}, False),
        (("normalizer",), {"type": "Strip", "strip_left": True, "strip_right": False}, False),
        (("model", "end_of_word_suffix"), "</w>", False),
        (("model", "vocab", "Ā"), None, False),  # byte 0 is not in the vocabulary
        (("added_tokens", 0, "special"), False, True),
        (("added_tokens", 0, "rstrip"), True, True),  # a special token is not looked for
    ],
)  # fmt: skip
def test_which_tables_are_exact(tokenizer_files, tmp_path, path, value, exact):
    """A table is given exactly where the text's bytes are the sum over its ids; decided from the file's JSON."""
    with open(tokenizer_files["byte-level"]) as file:
        spec = json.load(file)
    if path == ("model", "vocab", "Ā"):
        spec["model"]["vocab"]["other"] = spec["model"]["vocab"].pop("Ā")
    elif path:
        edited(spec, path, value)
    (tmp_path / "edited.json").write_text(json.dumps(spec))
    tokenizer = data.load_tokenizer(str(tmp_path / "edited.json"))
    table = tokenizer.byte_lengths()
    assert (table is not None) == exact
    for text in [*TEXTS, "\0\x7f" * 3]:
        ids = tokenizer.encode(text)
        if exact:
            assert table[ids].sum() == len(text.encode())
        pairs = tokenizer.encode_batch_with_ends([text, "", text])
        for again, ends in (pairs[0], pairs[2]):
            np.testing.assert_array_equal(again, ids)
            assert len(ends) == len(ids) and (np.diff(ends) >= 0).all() and (ends <= len(text.encode())).all()
        assert len(pairs[1][0]) == len(pairs[1][1]) == 0


def test_end_of_document_that_merges_lead_to(tmp_path):
    """Where a text may become end-of-document the id is dropped: its bytes are the next token's."""
    tokenizer = _byte_level()
    spec = json.loads(tokenizer.to_str())
    spec["model"]["vocab"]["</"] = len(spec["model"]["vocab"])
    spec["model"]["merges"] = [["<", "/"]]
    (tmp_path / "a.json").write_text(json.dumps(spec))
    loaded = data.load_tokenizer(f"{tmp_path}/a.json?eod=</")
    assert loaded.byte_lengths() is None and data.load_tokenizer(f"{tmp_path}/a.json?eod=a").byte_lengths() is None
    [(ids, ends)] = loaded.encode_batch_with_ends(["é </b</"])
    assert (
        loaded.eod_id not in ids and ends[-1] == len("é </b</".encode()) and re.fullmatch("é </b</", loaded.decode(ids))
    )
