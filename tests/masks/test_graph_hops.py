"""Windows of hops in a graph, by a search written anew."""

import jax
import numpy as np
import pytest

from attnlab import masks
from attnlab.errors import ConfigError
from attnlab.mixers.sequence import Sequence
from tests.masks.nodes import held_to_the_laws

NODES = 40  # more than 32: several words of bits


@pytest.fixture
def path(tmp_path):
    """A directed ring with some chords."""
    table = np.zeros((NODES, NODES), bool)
    for i in range(NODES):
        table[i, (i + 1) % NODES] = True
    table[3, 20] = table[20, 31] = True
    np.save(tmp_path / "graph.npy", table)
    return str(tmp_path / "graph.npy")


def distance(table, first):
    """Edges from a node to each other one, by breadth."""
    found, now = {first: 0}, [first]
    while now:
        nearer, now = now, []
        for i in nearer:
            for j in np.flatnonzero(table[i]).tolist():
                if j not in found:
                    found[j] = found[i] + 1
                    now.append(j)
    return found


def sees(config, q, k):
    if not (0 <= q <= NODES and 0 <= k <= NODES):
        return False
    return 0 in (q, k) or distance(np.load(config.path), q - 1).get(k - 1, NODES) <= config.hops


@pytest.mark.parametrize("hops", [0, 2, 7])
def test_laws(path, hops):
    held_to_the_laws("graph_hops", sees, {"path": path, "hops": hops}, NODES + 1)


@pytest.mark.parametrize("first, hops", [(1, 4), (3, 3), (0, 1000)], ids=["grows", "stands", "is full"])
def test_hops_grow(path, first, hops):
    """Evenly from `first` to `hops`, in one program; without a step it is the last. No more is kept than differs."""
    knobs, grow = {"name": "graph_hops", "path": path}, 10
    builder = masks.build({**knobs, "first": first, "hops": hops, "grow": grow})
    node = np.random.default_rng(0).integers(0, NODES + 1, (1, 25)).astype(np.int32)
    of = lambda builder, **fields: builder.mask(Sequence(0 * node, node=node, **fields), causal=False)
    at = jax.jit(lambda step: of(builder, step=step))
    for step in (0, 1, 3, 4, 7, 9, 10, 11, 2**31 - 1):
        grown = first + (hops - first) * min(step, grow) // grow
        expected = of(masks.build({**knobs, "hops": grown})).visible(25, 25)
        np.testing.assert_array_equal(jax.tree.map(np.asarray, at(step)).visible(25, 25), expected)
    assert of(builder).known()
    np.testing.assert_array_equal(of(builder).visible(25, 25), expected)


def test_its_limits(path, tmp_path):
    """No hop is the own node; as many as the graph is wide are all; without directions the mask has none."""
    of = lambda hops, path=path: masks.build({"name": "graph_hops", "path": path, "hops": hops}).table()[1:, 1:]
    np.testing.assert_array_equal(of(0), np.eye(NODES, dtype=bool))
    widest = max(max(distance(np.load(path), i).values()) for i in range(NODES))
    assert of(widest).all() and not of(widest - 1).all()
    np.save(tmp_path / "both.npy", np.load(path) | np.load(path).T)
    both = of(3, str(tmp_path / "both.npy"))
    np.testing.assert_array_equal(both, both.T)
    assert not np.array_equal(of(3), of(3).T)


def test_refusals(path, tmp_path):
    with pytest.raises(ConfigError, match="first = 1.*0 where grow is 0"):
        masks.build({"name": "graph_hops", "path": path, "first": 1})
    with pytest.raises(ConfigError, match="first = 2.*at most hops, 1"):
        masks.build({"name": "graph_hops", "path": path, "first": 2, "grow": 5})
    with pytest.raises(ConfigError, match="graph_hops: path = 'none.npy' cannot be read"):
        masks.build({"name": "graph_hops", "path": "none.npy"})
    for wrong in ({}, {"path": "graph.txt"}):
        with pytest.raises(
            ConfigError, match=rf"path = '{wrong.get('path', '')}' is not possible; allowed: a .npy file"
        ):
            masks.build({"name": "graph_hops", **wrong})
    at = tmp_path / "wrong.npy"
    for table, found in (
        (np.ones((2, 2)), r"float64 \(2, 2\)"),
        (np.ones((0, 0), bool), r"bool \(0, 0\)"),
        (True, r"bool \(\)"),
    ):
        np.save(at, table)
        with pytest.raises(ConfigError, match=rf"wrong.npy' holds {found}; allowed: bool \[n, n\], n 1 or more"):
            masks.build({"name": "graph_hops", "path": str(at)})
    at.write_bytes(b"")
    with pytest.raises(ConfigError, match="wrong.npy' cannot be read"):
        masks.build({"name": "graph_hops", "path": str(at)})
    np.savez(tmp_path / "several.npz", np.ones((2, 2), bool))
    with pytest.raises(ConfigError, match="holds several arrays; allowed"):
        masks.build({"name": "graph_hops", "path": str((tmp_path / "several.npz").rename(at))})
