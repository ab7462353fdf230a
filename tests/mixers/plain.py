"""Parts of layers in NumPy, for formulas written out: each operation of jax on another shape is compiled."""

import numpy as np


def rope(x: np.ndarray, base: float, positions: np.ndarray | None = None) -> np.ndarray:
    """RoPE of [T, H, d], by complex numbers, at positions 0, 1, ... or those given."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x)) if positions is None else np.asarray(positions)
    turn = np.exp(1j * angles[:, None, None] * base ** (-np.arange(half) / half))
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)
