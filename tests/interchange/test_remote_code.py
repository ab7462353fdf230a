"""Models with PyTorch code of their own: what is written, that it comes back, what is refused, and what it computes."""

from __future__ import annotations

import ast
import json
import os
import re

import jax
import numpy as np
import pytest

from attnlab import config as config_lib
from attnlab.errors import UserError
from attnlab.interchange import exporting, importing
from attnlab.interchange.families import attnlab as own
from attnlab.train.config import RunConfig
from attnlab.train.program import Program
from attnlab.train.state import flat
from benchmarks import remote_code
from tests.train import runs

ONE = jax.devices()[:1]


def written(name, folder):
    """The run's config, its parameters, and their folder."""
    config = remote_code.config(remote_code.CASES[name])
    program, rng = Program.of(config, ONE, batches=False), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), program.params)
    exporting.write_model(folder, config, params, remote_code=True, say=lambda text: None)
    return config, params


@pytest.mark.parametrize("name", ["softmax_cosine", "moh", "hybrid", "no_mlp"])
def test_it_comes_back(name, tmp_path):
    """Imported again it is the same model, bit for bit; the code is Python that needs nothing of attnlab."""
    config, params = written(name, tmp_path / "to")
    plan = importing.plan(tmp_path / "to", None, None, ["mesh.data=1"])
    assert plan.family.name == "attnlab"
    assert exporting.canonical(plan.config.model) == exporting.canonical(config.model)
    again = flat(importing.parameters(plan, Program.of(plan.config, ONE, batches=False), lambda count: None))
    for leaf, array in flat(params).items():
        np.testing.assert_array_equal(again[leaf], array)
    there = {path.stem for path in (tmp_path / "to").glob("*.py")}
    for path in (tmp_path / "to").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in there
            elif isinstance(node, ast.Import | ast.ImportFrom):
                assert not re.search(r"attnlab|jax", ast.unparse(node))


def test_the_folder_names_its_code(tmp_path):
    """config.json says which classes load it, and only the files of its mixers and of what these import are there."""
    written("hybrid", tmp_path / "to")
    tree = json.loads((tmp_path / "to/config.json").read_text())
    for entry in tree["auto_map"].values():
        file, name = entry.split(".")
        code = ast.parse((tmp_path / "to" / f"{file}.py").read_text())
        assert name in {node.name for node in code.body if isinstance(node, ast.ClassDef)}
    parts = {"configuration_attnlab", "modeling_attnlab", "mixers", "parts"}
    mixers = {"gated_deltanet", "moh", "gated", "softmax", "gla", "lightning"}
    assert {path.stem for path in (tmp_path / "to").glob("*.py")} == parts | mixers
    names = re.findall(r'"(\w+)":', (tmp_path / "to/mixers.py").read_text())
    assert set(names) == mixers - {"softmax"}
    assert tree["bos_token_id"] == 256 and (tmp_path / "to/tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("mixer", "said"),
    [
        (
            {"name": "rat"},
            "model.mixers.M is rat, which has no PyTorch code yet; those that have: agent, flow, gated, ",
        ),
        ({"name": "moh", "core": "diff"}, "model.mixers.M.core is diff, which has no PyTorch code"),
        ({"name": "softmax", "mask": {"name": "power_blocks", "block": 2}}, "model.mixers.M.mask = .*has only None"),
        ({"name": "moh", "core": {"name": "softmax", "mask": {"name": "power_blocks"}}}, "model.mixers.M.core.mask = "),
    ],
)
def test_what_has_no_code_is_refused(mixer, said):
    """By where it stands, before any tensor is read."""
    tree = config_lib.apply_overrides(runs.tree("stdlib", model__mlp_width=64), [])
    tree["model"]["mixers"]["M"] = {"heads": 2} | mixer
    with pytest.raises(UserError, match=said):
        exporting.choose(config_lib.build(RunConfig, tree), remote_code=True)


def test_a_knob_that_comes_later_is_not_lost(monkeypatch):
    """One that the form does not read is refused away from its default, and left out at it."""
    form = own.form("lightning")
    less = own.Form(form.text, form.reads - {"decay_scale"}, form.ignored, form.imports)
    monkeypatch.setattr(own, "form", lambda name, real=own.form: less if name == "lightning" else real(name))
    of = lambda scale: runs.config(
        "stdlib", model__mlp_width=64, model__mixers={"M": {"name": "lightning", "decay_scale": scale}}
    )
    assert "decay_scale" not in exporting.choose(of(1.0), remote_code=True)[1]["attnlab"]["mixers"]["M"]
    with pytest.raises(
        UserError, match=r"model.mixers.M.decay_scale = 2.0: the PyTorch code of lightning has only 1.0"
    ):
        exporting.choose(of(2.0), remote_code=True)


def test_it_is_the_last_resort():
    """What transformers itself has goes out as that; what has code elsewhere, as our own; unasked, none of ours."""
    plain = runs.config("stdlib", model__mlp_width=64)
    assert exporting.choose(plain, remote_code=True)[0].name == "llama"
    mixer = {"name": "gated", "heads": 2, "qk_norm": True, "granularity": "headwise"}
    gated = runs.config("stdlib", model__mlp_width=64, model__mixers={"M": mixer})
    assert [exporting.choose(gated, remote_code=r)[0].name for r in (False, True)] == ["gated_qwen3", "attnlab"]
    with pytest.raises(UserError, match="no published family.*remote code may hold it"):
        exporting.choose(runs.config("stdlib", model__mlp_width=64, model__mixers={"M": {"name": "gla", "heads": 2}}))


@pytest.fixture(scope="module")
def torch(tmp_path_factory):
    """The library, with transformers; code that it loads is kept in one place, as Python finds it in no second one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers")
        kept = os.fspath(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", kept)
        yield pytest.importorskip("torch")


@pytest.mark.parametrize("name", remote_code.CASES)
def test_transformers_computes_the_same(torch, name, tmp_path):
    """Logits and greedy continuations, in float32; where float32 itself errs by more than 1e-5, by that."""
    found = remote_code.compared(name, tmp_path)
    assert remote_code.good(found), found


def test_padding_is_no_part_of_a_text(torch, tmp_path):
    """A row's logits are those of its text alone, wherever padding stands; the loss is that of the next tokens."""
    written("hybrid", tmp_path / "to")
    model, _ = remote_code.loaded(tmp_path / "to")
    tokens = torch.arange(3, 27).reshape(2, 12)
    used = torch.ones_like(tokens)
    used[1, :5] = 0
    with torch.no_grad():
        given = model(tokens, attention_mask=used, labels=tokens)
        alone = model(tokens[1:, 5:]).logits
    torch.testing.assert_close(given.logits[1:, 5:], alone)
    wanted = torch.nn.functional.cross_entropy(given.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(given.loss, wanted)
