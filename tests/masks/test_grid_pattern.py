"""The grid of a residue."""

import jax
import numpy as np

from attnlab import masks
from attnlab.mixers.sequence import Sequence
from attnlab.ops.mask_algebra import permuted
from attnlab.ops.masks import Mask
from tests.masks.laws import held_to_the_laws


def sees(config, n):
    t, s = np.ogrid[:n, :n]
    return ((s - config.phase - t) % config.stride == 0) | (np.abs(t - s) < config.local)


def test_laws():
    held_to_the_laws(
        "grid_pattern", sees, {"stride": 4}, {"stride": 3, "phase": 1, "local": 2}, {"stride": 40, "local": 1}
    )


def test_sorted_by_residue_it_is_packed_documents():
    """Keys and rows in the order of their residues: each residue is a document, and within it mixing is causal."""
    n, stride = 22, 4
    builder = masks.build({"name": "grid_pattern", "stride": stride})
    seen = builder.mask(Sequence.whole(1, n), causal=True).visible(n, n)[0, 0]
    order = np.argsort(np.arange(n) % stride, kind="stable")
    residue = np.arange(n)[order] % stride
    packed = (residue[:, None] == residue) & np.tri(n, dtype=bool)
    np.testing.assert_array_equal(seen[order][:, order], packed)
    grid = builder.mask(Sequence.whole(1, n), causal=False)
    free = jax.tree.map(lambda x: x, Mask(axes=grid.axes))
    np.testing.assert_array_equal(permuted(free, order[None]).visible(n, n), free.visible(n, n)[..., order])
