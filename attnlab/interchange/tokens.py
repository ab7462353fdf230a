"""Tokenizers on the way in and out, and what a config.json says of their special tokens."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from attnlab import paths, storage
from attnlab.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer, Tokenizer
from attnlab.errors import UserError
from attnlab.train import files

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def require(source: pathlib.Path) -> pathlib.Path:
    """The tokenizer.json of a folder.

    Raises:
      UserError: there is none.
    """
    path = source / "tokenizer.json"
    if path.is_file():
        return path
    if (source / "tokenizer.model").is_file():
        raise UserError(
            f"{source} has a SentencePiece tokenizer.model and no tokenizer.json; make one (AutoTokenizer of "
            "transformers reads the one and saves the other), or name another as data.tokenizer"
        )
    raise UserError(f"{source} has no tokenizer.json; data.tokenizer is to name one, or bytes")


def end_of_document(path: pathlib.Path, tree: Mapping[str, Any]) -> str | None:
    """The token that ends a text by config.json's `eos_token_id`, the usual name first; None: the file does not say."""
    ids = tree.get("eos_token_id")
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    if not ids:
        return None
    try:
        if (usual := HuggingFaceTokenizer(str(path))).eod_id in ids:
            return usual.eod
    except UserError:
        pass  # none of its tokens has a usual name
    from tokenizers import Tokenizer as Backend

    token = Backend.from_file(str(path)).id_to_token(ids[0])
    if token is None:
        raise UserError(f"config.json says that eos_token_id = {ids[0]}, which {path} does not have")
    return token


def copy(source: pathlib.Path, to: pathlib.Path) -> None:
    """Copies a tokenizer's files."""
    to.mkdir(exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, to / name)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Keys of config.json: attnlab begins and ends documents with one token."""
    return {"bos_token_id": tokenizer.eod_id, "eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.eod_id}


def write(spec: str, tokenizer: Tokenizer, folder: pathlib.Path, length: int) -> None:
    """Writes a run's tokenizer so that others give the ids that the model was trained on, end-of-document in front.

    Args:
      spec: the run's `data.tokenizer`.
      tokenizer: that it names.
      length: positions that the model was trained at.
    """
    if isinstance(tokenizer, BytesTokenizer):
        tree, eod = _bytes_tree(), "<|endoftext|>"
    else:
        path = pathlib.Path(paths.expand(storage.local_copy(spec.partition("?eod=")[0])))
        tree = files.read_json(path / "tokenizer.json" if path.is_dir() else path)
        eod = tokenizer.eod
    single = [{"SpecialToken": {"id": eod, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    special = {eod: {"id": eod, "ids": [tokenizer.eod_id], "tokens": [eod]}}
    first = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    # What a file has there else adds begin and end by another rule, which attnlab switches off.
    tree = {**tree, "post_processor": first, "truncation": None, "padding": None}
    _dump(folder / "tokenizer.json", tree)
    named = {"bos_token": eod, "eos_token": eod, "pad_token": eod}
    _dump(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, "add_bos_token": True,
        "clean_up_tokenization_spaces": False, **named,
    })  # fmt: skip
    _dump(folder / "special_tokens_map.json", named)


def _bytes_tree() -> dict[str, Any]:
    """tokenizer.json of byte-level BPE without merges: ids are the bytes, 256 ends a document."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    moved = [byte for byte in range(256) if chr(byte) not in alphabet]
    symbol = {byte: chr(0x100 + i) for i, byte in enumerate(moved)}
    vocab = {symbol.get(byte, chr(byte)): byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return json.loads(backend.to_str())


def _dump(path: pathlib.Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
