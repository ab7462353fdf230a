"""Radial attention, written out position by position and shrunk to blocks."""

import functools

import numpy as np

from attnlab import masks
from tests.masks.laws import held_to_the_laws


def band(config, i, j):
    """What frame i sees of frame j, bool [s, s]."""
    s, block, apart = config.frame, config.block, abs(i - j)
    distance = np.abs(np.subtract.outer(np.arange(s), np.arange(s)))
    if j == 0 or apart == 0 or (apart == 1 and config.near == "whole"):
        return np.ones((s, s), bool)
    if apart == 1:
        return distance <= s // 2
    length = 2 ** s.bit_length() / 2 ** apart.bit_length()
    if length < block and apart % int(block / length):
        return np.zeros((s, s), bool)
    return distance <= max(block, length * config.decay)


@functools.cache
def blocks(config, n):
    """The table of blocks of documents of n positions, the last block filled up."""
    s, size = config.frame, config.block
    count = -(-n // size)
    frames = -(-count * size // s)
    frames = frames if config.frames is None else min(frames, config.frames)
    out = np.zeros((count, count), bool)
    room = max(-(-frames * s // size) + 1, count) * size
    for i in range(frames):
        for j in range(frames):
            pairs = np.zeros((room, room), bool)
            pairs[i * s : (i + 1) * s, j * s : (j + 1) * s] = band(config, i, j)
            share = pairs.reshape(-1, size, room // size, size)[:count, :, :count].sum(1) / size  # of columns of tiles
            some, many = (share > 0).sum(-1), (share > 1 / 3).sum(-1)
            out |= (some > 0) & (many / np.maximum(some, 1) > 0.6)
    if config.frames is not None:
        border = config.frames * s // size
        out[border:], out[:, border:] = True, True
    return out


def sees(config, n):
    block = np.arange(n) // config.block
    return blocks(config, n)[block[:, None], block]


def test_laws():
    held_to_the_laws(
        "radial",
        sees,
        {"frame": 6, "block": 2},
        {"frame": 8, "block": 3, "near": "half", "decay": 0.3},
        {"frame": 4, "block": 3, "frames": 5, "decay": 1.0},
        {"frame": 2, "block": 1, "near": "half"},
    )


def seen(frames, **knobs):
    """Blocks of so many frames."""
    builder = masks.build({"name": "radial", "frame": 32, "block": 4, **knobs})
    return builder.table(frames * 8).reshape(frames, 8, frames, 8).swapaxes(1, 2)


def test_its_limits():
    """Two frames are dense, and so are all where the band is wide; frames see each other alike but for the first."""
    assert seen(2).all() and seen(8, decay=100.0).all()
    table = seen(16)
    np.testing.assert_array_equal(table[1:, 1:], table[1:, 1:].swapaxes(0, 1).swapaxes(2, 3))
    assert table[:, 0].all() and not table[0, 15].all() and not table.all()
    share = lambda frames: seen(frames).mean()
    assert share(256) < 0.63 * share(128) and share(128) < 0.66 * share(64)  # of n log n pairs half, in the end


def test_text_sees_all():
    table = masks.build({"name": "radial", "frame": 32, "block": 4, "frames": 16}).table(130)
    assert table[128:].all() and table[:, 128:].all()
    np.testing.assert_array_equal(table[:128, :128].reshape(16, 8, 16, 8).swapaxes(1, 2), seen(16))
