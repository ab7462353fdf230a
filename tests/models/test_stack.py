"""What a stack tells its layers: their numbers, what it began from, what layers before hand on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.mixers import base
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.models.transformer import StackConfig, Transformer, extend, mixer_table
from tests import tiers
from tests.mixers.cases import POSITIONS, SEGMENTS
from tests.models import drawn

LAYERS, WIDTH = 6, 8


@dataclasses.dataclass(frozen=True)
class ToldConfig(HeadConfig):
    impl: str = base.knob("definition", "one", other=("definition",), choices=("definition",))


@pytest.fixture(scope="module")
def told():
    """A mixer that reads all of it: y_t = (v of the first such layer + number * v + embedding), no position mixed."""

    @base.register("told")
    class Told(HeadMixer):
        Config, implementations, stack_reads = ToldConfig, ("definition",), ("layer", "embedding")

        def __init__(self, config, *, width, rngs, dtype=jnp.float32):
            super().__init__(config, width=width, rngs=rngs, dtype=dtype)
            make = Projections(config, width, rngs=rngs, dtype=dtype)
            self.value, self.out = make.qkv(width), make.out(width)

        def init_carried(self, batch, max_length, dtype):
            return ()

        def init_shared(self, batch, length):
            return {"v_first": jnp.zeros((batch, length, self.config.heads, self.head_dim), self.dtype)}

        def heads(self, x, seq, carried=None):
            v = split_heads(self.value(x), self.head_dim)
            first = jnp.where(seq.layer == 1, v, seq.shared["v_first"])
            y = first + seq.layer * v + split_heads(seq.embedding, self.head_dim)
            return mixers.MixerOutput(y, carried, shared={"v_first": first})

        @classmethod
        def flops(cls, config, width, length):
            return {"projections": 4.0 * width * width}, None

    yield
    del base.MIXERS.classes["told"]


def config(pattern, **fields):
    table = {"S": {"name": "softmax", "heads": 2}, "T": {"name": "told", "heads": 2}}
    table = mixer_table({letter: table[letter] for letter in pattern}, "m")
    fields = {"dtype": "float64"} | fields
    return StackConfig(width=WIDTH, layers=LAYERS, mixers=table, pattern=pattern, mlp_width=0, **fields)


def by_hand(stack, x, seq):
    """Layer by layer: softmax from the stack's own blocks, the other written out."""
    h, first = x, 0.0
    blocks = [block for period in stack.unstacked() for block in period.blocks]
    for number, block in enumerate(blocks):
        (sublayer,) = block.sublayers
        if sublayer.branch.name == "softmax":
            h = sublayer(h, seq.derived()).y
            continue
        v = sublayer.norm(h) @ sublayer.branch.value.kernel[...]
        first = v if number == 1 else first
        h = h + (first + number * v + x) @ sublayer.branch.out.kernel[...] * (seq.segments > 0)[..., None]
    return h


@pytest.mark.parametrize("fields", [{"unroll": 1, "remat": "full"}, {}], ids=["scanned", "unrolled"])
def test_layers_know_their_number_the_embedding_and_the_first(told, fields):
    """In a scan with remat, unrolled, and over a stream in pieces: the layers written out."""
    with jax.enable_x64(True):
        stack = drawn.module(lambda: Transformer(config("ST", **fields), rngs=nnx.Rngs(0)))
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 11, WIDTH)))
        seq = mixers.Sequence(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
        expected, found = jax.jit(lambda stack, x, seq: (by_hand(stack, x, seq), stack(x, seq).y))(stack, x, seq)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        if fields:
            return
        state, parts, periods = stack.init_state(2, 11), [], stack.unstacked()
        step = jax.jit(lambda periods, x, seq, state: extend(periods, x, seq, state))
        for piece in (slice(0, 5), slice(5, 11)):
            part = mixers.Sequence(seq.positions[:, piece], seq.segments[:, piece])
            y, state = step(periods, x[:, piece], part, state)
            parts.append(y)
        used = np.asarray(SEGMENTS) > 0
        np.testing.assert_allclose(np.concatenate(parts, 1)[used], np.asarray(expected)[used], atol=1e-12)


def test_layers_that_read_nothing_are_told_nothing(told):
    """No number runs through the scan, and no embedding is kept, where no mixer of the stack asks."""
    stack = drawn.module(lambda: Transformer(config("S", dtype="float32"), rngs=nnx.Rngs(0)))
    seen = []
    for sublayer in stack.periods.blocks[0].sublayers:
        kept = type(sublayer.branch).__call__
        type(sublayer.branch).__call__ = lambda self, x, seq: seen.append(seq) or kept(self, x, seq)
    try:
        jax.eval_shape(lambda x: stack(x, mixers.Sequence.whole(1, 4)).y, jnp.zeros((1, 4, WIDTH)))
    finally:
        type(sublayer.branch).__call__ = kept
    assert seen and all(seq.layer is None and seq.embedding is None and not seq.shared for seq in seen)


@tiers.parametrize(
    "name, one, other",
    DIFFER := [
        ("residual_attention", {"heads": 4}, {"heads": 2}),
        ("residual_attention", {"heads": 4, "kv_heads": 2}, {"heads": 4, "kv_heads": 1}),
        ("residual_attention", {"head_width": 4}, {"head_width": 2}),
        ("residual_attention", {}, {"earlier": "first"}),
        ("rwkv7", {"heads": 4}, {"heads": 2}),
        ("hgrn2", {"bound_layers": 3}, {"bound_layers": 3, "key_width": 3}),
        ("hgrn2", {"bound_layers": 3, "heads": 4}, {"bound_layers": 3, "heads": 2, "key_width": 4}),
    ],
    often=[DIFFER[0], *DIFFER[4:6]],
    ids=str,
)
def test_layers_that_differ_hand_nothing_to_each_other(name, one, other):
    """Two letters of one kind that differ in what is handed on: the stack is traced, and names are of each alone."""
    table = mixer_table({"A": {"name": name} | one, "B": {"name": name} | other}, "m")
    both = StackConfig(width=WIDTH, layers=LAYERS, mixers=table, pattern="AB", mlp_width=0)
    stack = nnx.eval_shape(lambda: Transformer(both, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(stack)
    run = lambda params, x: nnx.merge(graphdef, params)(x, mixers.Sequence.whole(1, 4)).y
    assert jax.eval_shape(run, params, jnp.zeros((1, 4, WIDTH))).shape == (1, 4, WIDTH)
    a, b = (block.sublayers[0].branch for block in stack.periods.blocks)
    assert a.init_shared(1, 4) and not a.init_shared(1, 4).keys() & b.init_shared(1, 4).keys()
