"""A run that learns of another one: what is matched, what is not touched, what is refused."""

from __future__ import annotations

import functools
import io
import json
import shutil

import jax
import numpy as np
import pytest
import rich.console

from attnlab import config as config_lib
from attnlab.errors import ConfigError, UserError
from attnlab.models.distillation import Matching
from attnlab.train import distill, loop, restore
from attnlab.train import source as source_lib
from attnlab.train.program import Program, open_data
from attnlab.train.state import flat
from attnlab.train.teaching import Teaching
from tests import tiers
from tests.train import runs
from tests.train.test_step import ragged_batch

SOFTMAX = {"name": "softmax", "heads": 2}
HYBRID = {"model__pattern": "ML", "model__mixers": {"M": SOFTMAX, "L": {"name": "lightning", "heads": 2}}}
FROZEN = ("*=0", "transformer.periods.blocks.1.sublayers.0.*=1")
LAYERS = {"match": "layers"}


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """The workdir of a teacher."""
    path = tmp_path_factory.mktemp("trained") / "v"
    loop.train(
        runs.config(source, train__steps=2, train__eval_every=0, train__sample_tokens=0, train__save_every=1), path
    )
    return path


def student(source, teacher, matching, **overrides):
    """The config of a student whose second layer is linear."""
    given = {"seed": 5, "train__steps": 4, "train__eval_every": 0, "train__save_every": 2, "train__sample_tokens": 0,
             "train__distill": {"teacher": str(teacher), **matching}, **HYBRID, **overrides}  # fmt: skip
    if matching.get("match") == "layers":
        given.setdefault("optimizer__rates", FROZEN)
    return runs.config(source, **given)


def arrays(tree):
    return {name: np.asarray(leaf) for name, leaf in flat(tree).items()}


def taught(config, teacher_model, params):
    """Metrics of three steps of a program, and the state after them."""
    matching = config.train.distill.resolved(config.model, teacher_model.config)
    program = Program.of(config, teaching=Teaching(teacher_model, matching))
    placed = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params, program.teacher[0])
    state, found = runs.first(program), []
    for _ in range(3):
        state, metrics = program.train_step(state, program.put(ragged_batch()), placed)
        found.append(jax.device_get(metrics))
    return found, state, placed


MESHES = ({"data": 1, "fsdp": 2, "context": 2, "tensor": 2},)


@tiers.often("logits")
@pytest.mark.parametrize("matching", [{"temperature": 2.0, "cross_entropy": 0.25}, LAYERS], ids=["logits", "layers"])
def test_meshes_and_accumulation_change_nothing(matching):
    """Three steps on eight devices, in two micro-batches, have one device's losses; the teacher is split and stays."""
    teacher = Program.of(runs.config("stdlib"))
    params = runs.drawn(teacher.model, 1)
    plain = {} if matching == LAYERS else {"model__pattern": "M", "model__layers": 1, "model__mixers": {"M": SOFTMAX}}
    make = functools.partial(student, "stdlib", "v", matching, optimizer__clip=0.5, **plain)
    whole, state, _ = taught(make(), teacher.model, params)
    for mesh in MESHES:
        split, _, placed = taught(make(mesh=mesh, train__accumulate=2), teacher.model, params)
        for a, b in zip(split, whole, strict=True):
            assert a.keys() == b.keys() and any(name.startswith("distill_") for name in a)
            for name in a:
                np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=2e-5, err_msg=name)
        assert len(placed["embedding"].sharding.device_set) == 8
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), params)
    if matching == LAYERS:
        first, last = arrays(runs.drawn(Program.of(make()).model)), arrays(state.params)
        moved = {name for name in first if np.any(first[name] != last[name])}
        assert moved and all(name.startswith("transformer.periods.blocks.1.sublayers.0.") for name in moved)


def saved(workdir, step):
    """Names and shapes of all arrays in a checkpoint."""
    tree = json.loads((workdir / "checkpoints" / str(step) / "state" / "_METADATA").read_text())["tree_metadata"]
    known = {tuple(part["key"] for part in x["key_metadata"]): x["value_metadata"] for x in tree.values()}
    return {".".join(path): tuple(x["write_shape"]) for path, x in known.items() if x["value_type"] == "jax.Array"}


def shapes(config):
    """Names and shapes of the arrays of a run that has no teacher."""
    leaves = jax.tree_util.tree_leaves_with_path(Program(config).shapes)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


def test_a_run_goes_on_bit_for_bit(source, trained, tmp_path, monkeypatch):
    """Broken off, it ends as an unbroken one, with its first teacher, though that trained on or has moved."""
    plain = {"model__pattern": "M", "model__layers": 1, "model__mixers": {"M": SOFTMAX}}
    learner = functools.partial(student, **plain)
    config = learner(source, trained, {"cross_entropy": 0.5}, train__log_every=1)
    said = runs.run(config, tmp_path / "unbroken")
    assert f"learns of {trained} at step 2: logits at temperature 1, and 0.5 of cross-entropy" in said
    assert saved(tmp_path / "unbroken", 4) == shapes(config)
    assert all(f"{part} " in said.partition("step 1/4")[2].partition("\n")[0] for part in ("kl", "cross entropy"))
    lines = runs.lines(tmp_path / "unbroken")
    for line in lines:
        np.testing.assert_allclose(
            line["loss"], 0.5 * line["distill_kl"] + 0.5 * line["distill_cross_entropy"], rtol=1e-5
        )
    moved = shutil.copytree(trained, tmp_path / "moved")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = loop._Run._finish

        def finish(self, step, *args, **kwargs):
            if step > 2:
                raise KeyboardInterrupt
            return real(self, step, *args, **kwargs)

        patch.setattr(loop._Run, "_finish", finish)
        loop.train(config, tmp_path / "w")
    known = json.loads((tmp_path / "w" / distill.RECORD).read_text())
    assert (known["teacher"], known["step"]) == (str(trained), 2) and len(known["digest"]) == 64
    shutil.copytree(moved / "checkpoints" / "2", moved / "checkpoints" / "3")  # a newer one, which is not looked at
    loop.train(learner(source, moved, {"cross_entropy": 0.5}, train__log_every=1), tmp_path / "w")
    assert runs.lines(tmp_path / "w") == lines
    found, wanted = (arrays(restore.load(tmp_path / name, "4").params) for name in ("w", "unbroken"))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    other = learner(source, tmp_path / "unbroken", {"cross_entropy": 0.5}, train__log_every=1, train__steps=5,
                    train__on_config_change="continue")  # fmt: skip
    said = (
        f"learns of {moved} at step 2 .digest {known['digest'][:12]}.; .*unbroken has another checkpoint of that step"
    )
    with pytest.raises(UserError, match=said):
        loop.train(other, tmp_path / "w")
    more = {"train__steps": 5, "train__on_config_change": "continue"}
    said = r"train.distill.step = 1 is not possible: .* learns of \S+ at step 2; allowed: 2, none, or another"
    with pytest.raises(UserError, match=said):
        loop.train(learner(source, moved, {"cross_entropy": 0.5, "step": 1}, **more), tmp_path / "w")
    record = tmp_path / "w" / distill.RECORD
    record.rename(tmp_path / "kept.json")
    with pytest.raises(UserError, match="distill.json, which says at which step, is lost; allowed: that file restored"):
        loop.train(learner(source, moved, {"cross_entropy": 0.5}, **more), tmp_path / "w")
    known_again = learner(source, moved, {"cross_entropy": 0.5, "step": 2}, **more)
    before = config_lib.to_dict(config)
    with distill.opened(known_again, tmp_path / "w", None, print, before=before) as teacher:
        assert teacher.digest == known["digest"]
    (tmp_path / "kept.json").rename(record)
    shutil.rmtree(moved / "checkpoints" / "2")
    gone = learner(source, moved, {"cross_entropy": 0.5}, train__steps=5, train__on_config_change="continue")
    with pytest.raises(UserError, match="has no checkpoint of step 2; allowed: 1, 3"):
        loop.train(gone, tmp_path / "w")


WIDE = {"model__width": 32}


@pytest.mark.parametrize("matching, overrides, message", [
    ({}, {"model__vocab": 300}, r"model.vocab = 300 is not possible; allowed: the teacher's, 260 \(train.distill"),
    (LAYERS, WIDE, r"model.width = 32 is not possible; allowed: the teacher's, 16"),
    (LAYERS, {"model__layers": 4}, r"model.layers = 4 is not possible; allowed: the teacher's, 2"),
    (LAYERS, {"model__pattern": "M", "model__mixers": {"M": SOFTMAX}, "optimizer__rates": ()},
     r"model.pattern = 'M' is not possible; allowed: a model with another mixer"),
    ({**LAYERS, "layers": (1, 2)}, {}, r"train.distill.layers = \(1, 2\) is not possible; allowed: below 2"),
    (LAYERS, {"model__pattern": "M+LL"}, r"train.distill.at = 'mixer' .* layer 0 has 2 mixers .* the teacher's 1 "),
    (LAYERS, {"optimizer__rates": ()}, r"to all of transformer.periods.\S+, .*weight_decay = 0.1 would shrink"),
    ({**LAYERS, "layers": (1,)}, {"model__pattern": "L", "model__mixers": {"L": HYBRID["model__mixers"]["L"]},
                                  "optimizer__rates": ("*=0", "*.blocks.0.sublayers.0.*=1")},
     r"(?s)to all of transformer.periods.blocks.0.sublayers.0.\S+, .* or no decay"),
    ({}, {"data__length": 64}, r"data.length = 64 is not possible; allowed: 32 or less, the rows that"),
    ({"step": 7}, {}, r"train.distill.teacher = .* has no checkpoint of step 7; allowed: 1, 2"),
    ({"teacher": "nowhere"}, {}, r"train.distill.teacher = .*nowhere holds no run .*allowed: the workdir of a run"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(source, trained, tmp_path, monkeypatch, matching, overrides, message):
    """Before anything is compiled, naming both; no workdir is left."""
    monkeypatch.setattr(Program, "init", None)
    monkeypatch.setattr(Program, "train_step", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        loop.train(student(source, trained, matching, **overrides), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_what_is_not_decayed_may_move():
    """Norms of other layers get no gradient and no decay, so that nothing moves them."""
    config = student("stdlib", "v", LAYERS, optimizer__rates=(*FROZEN, "*norm*=1"))
    distill._require_frozen(config, Program.of(config).model, Matching(**LAYERS, layers=(1,)))


class Second:
    """The second of two processes, of which the first one saw step 1, and nothing that is damaged."""

    first, index, count = False, 1, 2
    barrier = staticmethod(lambda: None)
    gather = staticmethod(lambda value: ["[1]" if value == "[]" else "", value])


def test_one_process_says_which_checkpoint_it_is(trained):
    """A teacher that trains on has a newer one for who looks later."""
    for processes, step in ((None, 2), (Second(), 1)):
        with source_lib.opened(trained, processes, print) as found:
            assert found.step == step and found.host.tokens


def test_layers_that_stay_as_they_are_drawn_are_named(source, trained, tmp_path, monkeypatch):
    """Layers are matched one by one in a run that begins as no other: what lies between them is told."""
    monkeypatch.setattr(Program, "first_state", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    said = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        loop.train(student(source, trained, LAYERS), tmp_path / "w", rich.console.Console(file=said, width=300))
    assert "without init_from: all but the matched layers learns nothing" in said.getvalue()


def test_another_tokenizer_is_refused(source, trained, tmp_path, monkeypatch):
    """As many ids are not the same ids."""
    monkeypatch.setattr("attnlab.data.tokenizers.BytesTokenizer.fingerprint", lambda self: "bytes-2")
    said = (
        "data.tokenizer = 'bytes' .fingerprint bytes-2. is not that of .*, 'bytes' .fingerprint bytes-1.; allowed: the"
    )
    with pytest.raises(UserError, match=said):
        loop.train(student(source, trained, {}), tmp_path / "w")


REGRESSION = {"name": "regression", "inputs": 5, "width": 16, "layers": 2, "mixers": {"M": SOFTMAX}}


@pytest.mark.parametrize("matching, overrides, message", [
    ({"match": "states"}, {}, "train.distill.match = 'states' is unknown .*; allowed: logits, layers"),
    ({"temperature": 0}, {}, "train.distill.temperature = 0.0 is not possible; allowed: above 0"),
    ({"cross_entropy": 1}, {}, "train.distill.cross_entropy = 1.0 is not possible; allowed: 0 or more, below 1"),
    ({**LAYERS, "temperature": 2}, {}, "train.distill.temperature = 2.0 .* allowed: 1.0 where match = 'layers'"),
    ({"layers": (1,)}, {}, r"train.distill.layers = \(1,\) .* allowed: none where match = 'logits'"),
    ({**LAYERS, "layers": (1, 0)}, {}, "numbers of layers, from 0, rising"),
    ({}, {"train__z_loss": 0.1}, "train.z_loss = 0.1 is not possible; allowed: 0 beside train.distill"),
    ({}, {"train__loss_impl": "pallas"}, "train.loss_impl = 'pallas' .* allowed: auto, definition, chunked beside"),
    ({}, {"model": REGRESSION, "data": {"name": "icl_regression", "d": 4, "examples": 4, "batch": 8}},
     "train.distill.match = 'logits' .* allowed: none: model.name = 'regression' has nothing to match"),
])  # fmt: skip
def test_impossible_configs(matching, overrides, message):
    """Keys that cannot be, whoever the teacher is."""
    model = {} if "model" in overrides else HYBRID
    with pytest.raises(ConfigError, match=message):
        runs.config("stdlib", train__distill={"teacher": "v", **matching}, **model, **overrides)


def test_the_stages_by_name(trained, tmp_path):
    """configs/distill.py: the teacher's config but for the mixers, and nothing that learns nothing is left to decay."""
    spec = f"{runs.ROOT}/configs/distill.py:teacher={trained},mixer=lightning,pattern=LT,share=3"
    with source_lib.opened(trained, None, print) as found:
        for stage, rate in (("layers", 1), ("logits", 0.25)):
            config = config_lib.load(loop.RunConfig, f"{spec},stage={stage}")
            theirs, mixer = found.config, config.model.mixers["L"]
            assert (config.model.pattern, mixer.node_name, mixer.heads) == ("LM", "lightning", 2)
            assert config.data == theirs.data and config.train.steps == 3 * theirs.train.steps
            assert config.optimizer.learning_rate == rate * theirs.optimizer.learning_rate
            matching = config.train.distill.resolved(config.model, theirs.model)
            teacher = distill.Teacher(found, found.digest(), Teaching(found.model, matching))
            teacher.require_fit(config, Program.of(config).model, open_data(config))
            assert (matching.match, matching.layers) == (stage, (0,) if stage == "layers" else None)
    theirs = tmp_path / "config.json"
    tree = runs.tree("stdlib", model__layers=4, model__pattern="ML", model__gated="L", train__z_loss=1e-4,
                     model__mixers={"M": SOFTMAX, "L": SOFTMAX | {"window": 8}}, optimizer__rates=["*=1"],
                     train__profile="9:12", train__loss_impl="pallas", train__on_config_change="continue")  # fmt: skip
    theirs.write_text(json.dumps({"config": config_lib.to_dict(config_lib.build(loop.RunConfig, tree))}))
    for pattern, gated in (("LT", "K"), ("TL", "L"), ("TTLT", "K")):
        for stage in ("layers", "logits"):
            given = f"teacher={tmp_path},mixer=lightning,pattern={pattern},share=0.25,stage={stage}"
            config = config_lib.load(loop.RunConfig, f"{runs.ROOT}/configs/distill.py:{given}")
            assert config.model.gated == gated and config.train.on_config_change == "stop"
            assert bool(config.optimizer.rates) == (stage == "layers") and "*=1" not in config.optimizer.rates
    with pytest.raises(ConfigError, match="only gated mixers, or only others"):
        config_lib.load(loop.RunConfig, f"{runs.ROOT}/configs/distill.py:teacher={tmp_path},pattern=LLLT")
    wrong = {"teacher=": "teacher = '' is not possible", "mixer=lightening": "did you mean 'lightning'",
             "pattern=LLT": "one whose length divides model.layers .2.", "pattern=T": "an L or more"}  # fmt: skip
    for text, said in wrong.items():
        key = text.partition("=")[0]
        given = ",".join([text, *(part for part in spec.partition(":")[2].split(",") if not part.startswith(key))])
        with pytest.raises(ConfigError, match=said):
            config_lib.load(loop.RunConfig, f"{spec.partition(':')[0]}:{given}")


def test_on_the_command_line():
    """Keys below a teacher that the file does not have, and none."""
    tree = runs.tree("stdlib", train__distill=None)
    config_lib.apply_overrides(
        tree, ["train.distill.teacher=v", "train.distill.match=layers", "train.distill.layers=(0,)"]
    )
    config = config_lib.build(loop.RunConfig, tree)
    assert (config.train.distill.teacher, config.train.distill.layers) == ("v", (0,))
    assert config_lib.build(loop.RunConfig, config_lib.to_dict(config)) == config
    config_lib.apply_overrides(tree, ["train.distill=none"])
    assert config_lib.build(loop.RunConfig, tree).train.distill is None
    with pytest.raises(UserError, match="train.distill.teacher = v is opened by `attnlab train` alone"):
        _ = Program(config).train_step
