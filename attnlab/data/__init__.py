"""Data: text and generated tasks, as batches that are addressed by seed and step.

Adding a file registers the data that it defines (attnlab/registry.py).
"""

from attnlab.data.base import Data, config_from_node, names, names_other, open_data, register
from attnlab.data.bpe import train_tokenizer
from attnlab.data.config import DataConfig
from attnlab.data.loader import HeldoutLoader, Loader, describe, heldout_loader, train_loader
from attnlab.data.records import apply_tokenizer
from attnlab.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Data",
    "DataConfig",
    "HeldoutLoader",
    "Loader",
    "Tokenizer",
    "apply_tokenizer",
    "config_from_node",
    "describe",
    "heldout_loader",
    "load_tokenizer",
    "names",
    "names_other",
    "open_data",
    "register",
    "train_loader",
    "train_tokenizer",
]
