"""Blocks by a table that is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import masks, mixers
from attnlab.errors import ConfigError, UserError
from attnlab.mixers.sequence import Sequence
from tests.masks.laws import held_to_the_laws, packed_rows
from tests.mixers import cases


@pytest.fixture
def path(tmp_path):
    table = np.random.default_rng(0).random((12, 12)) < 0.4
    np.save(tmp_path / "blocks.npy", table)
    return str(tmp_path / "blocks.npy")


def sees(config, n):
    block = np.arange(n) // config.block
    return np.load(config.path)[block[:, None], block]


def test_laws(path):
    held_to_the_laws("static_blocks", sees, {"path": path, "block": 3}, {"path": path, "block": 5})


def test_documents_may_be_as_long_as_the_table(path):
    """Rows of several documents and caches may be longer: packed and in a stream they see what the table says."""
    builder = masks.build({"name": "static_blocks", "path": path, "block": 2})  # 24 positions; rows have 30
    for causal in (True, False):
        law = lambda n, causal=causal: np.tril(sees(builder.config, n)) if causal else sees(builder.config, n)
        packed_rows(builder, law, causal)
    assert builder.span(500, causal=True) == builder.span(24, causal=True)


def test_a_longer_document_is_refused_where_that_is_known(path):
    builder = masks.build({"name": "static_blocks", "path": path, "block": 2})
    segments = np.array([[1] * 25 + [2] * 5], np.int32)
    for seq in (Sequence.whole(1, 25), Sequence(0 * segments, segments).derived()):
        with pytest.raises(UserError, match="13 blocks of 2 positions.* has 12"):
            builder.mask(seq, causal=True)
    assert builder.lost(Sequence.whole(1, 25), 25, causal=True) is None


@pytest.mark.parametrize("causal, routed", [(True, False), (False, False), (True, True)], ids=["causal", "both", "moh"])
def test_a_longer_document_gives_nan_where_only_a_run_tells(path, causal, routed):
    """From where the table ends, or the whole document where it sees ahead; others, and padding, give what they give
    alone. In a stream, too."""
    node = {"name": "softmax", "mask": {"name": "static_blocks", "path": path, "block": 1}}
    node = {"name": "moh", "causal": causal, "core": node} if routed else {"causal": causal, **node}
    module = cases.module(mixers.config_from_node(node), jnp.float32)
    segments = np.array([[1] * 5 + [2] * 14 + [0] * 3 + [3] * 12, [7] * 34], np.int32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 34, cases.WIDTH)), jnp.float32)
    run = jax.jit(lambda x, segments: module(x, mixers.Sequence(0 * segments, segments)).y)
    y, offset = np.asarray(run(x, segments)), np.where(segments == 7, np.arange(34), np.arange(34) - 5)
    of_long = (segments == 2) | (segments == 7)
    lost = of_long & (offset >= 12) if causal else of_long
    np.testing.assert_array_equal(np.isnan(y), np.broadcast_to(lost[..., None], y.shape))
    graphdef, params = cases.split(module)

    def counted(params, x, segments):
        y = nnx.merge(graphdef, params)(x, mixers.Sequence(0 * segments, segments)).y
        return jnp.sum(jnp.where(lost[..., None], 0, y) ** 2)

    grads = jax.jit(jax.grad(counted, argnums=(0, 1)))(params, x, segments)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    short = run(x, np.where(lost, 0, segments))
    np.testing.assert_allclose(y[~lost], np.asarray(short)[~lost], atol=1e-6)
    if causal:
        state = module.init_state(2, 40, jnp.float32)
        pieces, _ = cases.streamed(jax.jit(module.extend), state, x, mixers.Sequence(0 * segments, segments), [17, 17])
        np.testing.assert_allclose(pieces[segments > 0], y[segments > 0], atol=1e-6)


def test_refusals(path, tmp_path):
    """A file that is none, is no table, or is too small for the row; each by its name."""
    with pytest.raises(ConfigError, match=r"path = 'x.txt'.*\.npy"):
        masks.build({"name": "static_blocks", "path": "x.txt"})
    with pytest.raises(ConfigError, match="none.npy' cannot be read"):
        masks.build({"name": "static_blocks", "path": str(tmp_path / "none.npy")})
    np.save(tmp_path / "wrong.npy", np.ones((2, 3), bool))
    with pytest.raises(ConfigError, match=r"bool \(2, 3\); allowed: bool \[n, n\]"):
        masks.build({"name": "static_blocks", "path": str(tmp_path / "wrong.npy")})
    with pytest.raises(UserError, match="13 blocks of 2 positions.* has 12"):
        masks.build({"name": "static_blocks", "path": path, "block": 2}).table(13)
