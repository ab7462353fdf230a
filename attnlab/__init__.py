"""attnlab: invent, compare and pretrain attention architectures in JAX."""

__version__ = "0.1.0"
