"""Language-model data: sources, tokenizers, packing, and batches that are addressed by seed and step."""

from attnlab.data.bpe import train_tokenizer
from attnlab.data.config import DataConfig
from attnlab.data.loader import HeldoutLoader, Loader, describe, heldout_loader, train_loader
from attnlab.data.records import apply_tokenizer
from attnlab.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "DataConfig",
    "HeldoutLoader",
    "Loader",
    "Tokenizer",
    "apply_tokenizer",
    "describe",
    "heldout_loader",
    "load_tokenizer",
    "train_loader",
    "train_tokenizer",
]
