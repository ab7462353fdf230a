"""Every family: an imported model computes what the published tensors say, and gives them back bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import config as config_lib
from attnlab import mixers
from attnlab.errors import UserError
from attnlab.interchange import exporting, importing
from attnlab.interchange.families import families
from attnlab.interchange.pieces import Table
from attnlab.interchange.safetensors import DTYPES
from attnlab.train.config import RunConfig
from attnlab.train.program import Program
from attnlab.train.state import flat
from tests import tiers
from tests.interchange import checkpoints, reference

T = 11
OVERRIDES = ["data.tokenizer=bytes", "mesh.data=1"]
TOKENS = np.random.default_rng(1).integers(0, checkpoints.V, T)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> a folder of it, in three files."""
    above = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda name, **changes: checkpoints.write(above / name, name, files=3, **changes))


def planned(folder, *overrides, as_=None):
    return importing.plan(folder, None, as_, [*OVERRIDES, "model.dtype=float64", *overrides])


@functools.cache
def _program(config):
    return Program.of(config, jax.devices()[:1], batches=False)


@functools.cache
def _logits(model):
    """Compiled once for each config: mutants of parameters share it."""

    @jax.jit
    def run(params, tokens):
        module = _program_of[model].model.merge(params)
        return module.logits(module.hidden(tokens, mixers.Sequence.whole(1, T)).y)

    return run


_program_of = {}


def logits(plan):
    """[T, V], by attnlab."""
    program = _program(plan.config)
    _program_of[plan.config.model] = program
    params = importing.parameters(plan, program, lambda count: None)
    return np.asarray(_logits(plan.config.model)(params, jnp.asarray(TOKENS)[None]))[0]


@functools.cache
def wanted(name):
    tree, facts = checkpoints.config(name), checkpoints.CASES[name][1]
    return reference.forward(tree, facts, checkpoints.tensors(name), TOKENS)


def error(got, name):
    return np.abs(got - wanted(name)).max() / np.abs(wanted(name)).max()


@pytest.mark.parametrize("name", checkpoints.CASES)
def test_logits_are_those_of_the_published_formulas(folders, name):
    """In float64, position by position, norms and epsilons away from neutral, heads of a width of their own."""
    assert error(logits(planned(folders(name))), name) < 1e-10


@pytest.mark.parametrize("name", checkpoints.CASES)
def test_round_trip(folders, name):
    """What is read goes out as the same tensors and, read again, gives the same bits; config.json likewise."""
    with jax.enable_x64(False):
        plan = importing.plan(folders(name), None, None, OVERRIDES)
        params = flat(importing.parameters(plan, _program(plan.config), lambda count: None))
        family, tree = exporting.choose(plan.config, plan.family.name)
    assert family.name == plan.family.name
    assert config_lib.build(RunConfig, json.loads(json.dumps(config_lib.to_dict(plan.config)))) == plan.config
    table, stored = Table(list(family.pieces(plan.config.model))), checkpoints.tensors(name)
    assert table.shapes == checkpoints.shapes(name)
    for key, pieces in table.parts().items():
        array = exporting._made(key, pieces, params, "F32").make()
        if pieces[0].shift:
            np.testing.assert_allclose(array, stored[key], rtol=0, atol=2e-7)
        else:
            np.testing.assert_array_equal(array, stored[key])
        for piece in pieces:
            leaf = params[piece.leaf] if piece.repeat is None else params[piece.leaf][piece.repeat]
            again = np.empty(piece.here, np.float32)
            for task in piece.reading(array, tuple(slice(None) for _ in piece.here), again):
                task()
            np.testing.assert_array_equal(again, leaf)
    again = family.read(json.loads(json.dumps(tree)), "config.json")
    first = family.read(checkpoints.config(name), "config.json")
    canonical = lambda node: exporting.canonical(importing.models.config_from_node(node, "model"))
    assert [d for d in config_lib.difference(canonical(first), canonical(again)) if not exporting._equal(*d[1:])] == []


def moved(plan, change):
    """The plan with pieces changed: `change(piece)` gives another, or None for the same."""
    pieces = [change(piece) or piece for piece in plan.table.pieces]
    return dataclasses.replace(plan, table=Table(pieces, plan.table.filled))


def permuted(piece, order):
    """The piece whose columns here come from other rows there."""
    rows = np.arange(piece.shape[0]) if piece.rows is None else piece.rows
    return dataclasses.replace(piece, rows=rows[order(len(rows))])


def interleaved(n, width=checkpoints.d):
    """Pairs (2i, 2i + 1) of each head in place of (i, i + d / 2)."""
    one = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
    return (np.arange(n).reshape(-1, width)[:, one]).reshape(-1)


def heads_turned(n, width=checkpoints.d):
    """Heads of keys in the other order."""
    return np.arange(n).reshape(-1, width)[::-1].reshape(-1)


MUTANTS = {
    "interleaved RoPE": ("llama", lambda p: permuted(p, interleaved) if p.leaf.endswith((".q.kernel", ".k.kernel",
                         ".q.bias", ".k.bias")) else None),
    "keys of other heads": ("llama", lambda p: permuted(p, heads_turned) if ".k." in p.leaf else None),
    "gate and up exchanged": ("llama", lambda p: dataclasses.replace(
        p, leaf=p.leaf.replace(".up.", ".x.").replace(".gate.", ".up.").replace(".x.", ".gate."))),
    "no 1 + w": ("gemma2", lambda p: dataclasses.replace(p, shift=0.0)),
    "norms of a layer exchanged": ("gemma3_text", lambda p: dataclasses.replace(p, leaf=p.leaf.replace(
        "1.norm_after", "x").replace("0.norm_after", "1.norm_after").replace("x", "0.norm_after"))
        if "norm_after" in p.leaf else None),
    "1 + w in the delta rule's norm": ("qwen3_5_text", lambda p: dataclasses.replace(p, shift=1.0)
                                       if p.leaf.endswith("branch.norm.scale") else None),
    "taps the other way": ("qwen3_5_text", None),
    "channels of the convolution in the tensor's order": ("qwen3_next", lambda p: dataclasses.replace(p, rows=None)
                                                           if p.form == "taps" else None),
    "decay and strength exchanged": ("qwen3_next", lambda p: dataclasses.replace(p, leaf=p.leaf.replace(
        "beta", "x").replace("log_decay.linear", "beta").replace("x", "log_decay.linear"))
        if "_ba" in p.tensor else None),
    "gates of groups as gates of heads": ("gated_qwen3", lambda p: dataclasses.replace(p, rows=np.arange(
        p.shape[0]).reshape(checkpoints.H, 2, -1)[:, int("gate" in p.leaf)].reshape(-1))
        if p.tensor.endswith("q_proj.weight") else None),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_map_is_seen(folders, mutant, monkeypatch):
    """Each convention that could be taken for another changes the logits."""
    name, change = MUTANTS[mutant]
    plan = planned(folders(name))
    if change is None:
        from attnlab.interchange.pieces import Piece

        reading = Piece.reading
        turned = lambda p, array, index, out: reading(p, array, index, out[:: -1 if p.form == "taps" else 1])
        monkeypatch.setattr(Piece, "reading", turned)
    else:
        plan = moved(plan, change)
    assert error(logits(plan), name) > 1e-4


NUMBERS = [
    ("llama", "model.norm_epsilon=1e-6"),
    ("mistral", f"model.mixers.W.window={checkpoints.WINDOW + 1}"),
    ("qwen3", "model.mixers.S.qk_epsilon=1e-6"),
    ("gemma2", "model.embedding_scale=1.0"),
    ("gemma2", "model.mlp_gate=gelu"),
    ("gemma2", "model.logit_cap=none"),
    ("gemma2", "model.mixers.W.soft_cap=none"),
    ("gemma3_text", "model.mixers.S.rope_scaling=none"),
    ("qwen3_next", "model.mixers.S.rope_width=none"),
    ("qwen3_next", "model.mixers.L.query_scale=1.0"),
    ("qwen3_next", "model.mixers.L.norm_epsilon=1e-6"),
]


@tiers.parametrize("name,override", NUMBERS, often=NUMBERS[:2])
def test_a_wrong_number_is_seen(folders, name, override):
    """So does each number of config.json that a reader could leave out."""
    assert error(logits(planned(folders(name), override)), name) > 1e-6


@pytest.mark.parametrize(("as_", "bound"), [("moh", 1e-12), ("gated", 1e-15), ("sinks", 1e-9)])
def test_continued_as_another_mixer(folders, as_, bound):
    """At first the function is the same; where a gate of 1/2 is undone by powers of two, to the last bit or so."""
    plain, other = (logits(planned(folders("qwen2"), as_=a)) for a in (None, as_))
    assert np.abs(plain - other).max() <= bound * np.abs(plain).max()


def test_moh_llama3_has_no_parameters_of_its_own(folders):
    """Half of the heads always, half of the others by their norms; a function of the same tensors, and another one."""
    plan = planned(folders("llama"), as_="moh_llama3")
    mixer = plan.config.model.mixers["S"]
    assert (mixer.always, mixer.taken, mixer.router, plan.table.filled) == (2, 1, "norm", ())
    assert error(logits(plan), "llama") > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "gemma3_text"])
def test_eight_devices_read_their_own_bytes(folders, name):
    """On 8 devices the arrays are those of one, and each shard is read once, by its slice alone."""
    with jax.enable_x64(False):
        plan = importing.plan(folders(name), None, None, ["data.tokenizer=bytes", "mesh.data=1", "mesh.fsdp=4",
                                                          "mesh.tensor=2"])  # fmt: skip
        program, read = Program.of(plan.config, batches=False), []
        arrays = flat(importing.parameters(plan, program, read.append))
        single = importing.plan(folders(name), None, None, OVERRIDES)
        one = flat(importing.parameters(single, _program(single.config), lambda count: None))
    for leaf, array in arrays.items():
        np.testing.assert_array_equal(array, one[leaf])
    split = [a for a in arrays.values() if a.addressable_shards[0].data.size * 8 == a.size]
    assert len(split) > 5
    kept = sum(a.nbytes for a in arrays.values())
    assert sum(read) == kept  # of devices that hold the same one reads
    assert max(read) <= max(max(s.data.nbytes for s in a.addressable_shards) for a in arrays.values())


def test_float16_that_overflows_is_refused(folders):
    plan = planned(folders("llama"))
    leaves = {piece.leaf: np.full((2, *piece.here), 1e6, np.float32) for piece in plan.table.pieces}
    name, pieces = next((n, p) for n, p in plan.table.parts().items() if p[0].repeat == 1)
    exporting._made(name, pieces, leaves, "BF16").make()
    with (
        pytest.raises(UserError, match=f"float16: {name} has numbers that it does not hold"),
        np.errstate(all="ignore"),
    ):
        exporting._made(name, pieces, leaves, "F16").make()


def test_families_are_all_tried():
    """Each family has a case, and is claimed by its own config.json alone."""
    names = set()
    for case in checkpoints.CASES:
        claimed = [family.name for family in families() if family.claims(checkpoints.config(case))]
        assert len(claimed) == 1
        names |= set(claimed)
    assert names == {family.name for family in families()} - {"attnlab"}  # that one is test_remote_code's
    assert set(DTYPES) == {"F64", "F32", "BF16", "F16"}
