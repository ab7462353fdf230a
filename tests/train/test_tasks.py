"""Tasks of tokens under the commands of every run: what metrics.jsonl has of them, meshes, evaluation, presets."""

from __future__ import annotations

import copy
import json
import runpy

import jax
import numpy as np
import pytest

from attnlab import config as config_lib
from attnlab import data as data_lib
from attnlab import mixers, tasks
from attnlab.errors import ConfigError
from attnlab.train.config import RunConfig
from attnlab.train.program import Program
from tests import tiers
from tests.train import runs

PRESETS = runpy.run_path(str(runs.ROOT / "configs/tasks.py"))["PRESETS"]


GROUP = {"name": "group", "group": "S3", "length": 8, "shortest": 3, "batch": 8, "heldout": 20}


LM = {"name": "lm", "vocab": 6, "width": 16, "layers": 1, "mixers": {"M": {"name": "softmax", "heads": 2}}}


def config(data=GROUP, model=LM, **overrides):
    tree = {
        "data": dict(data),
        "model": copy.deepcopy(model),
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "warmup": 2},
        "train": {"steps": 4, "log_every": 1, "eval_every": 2, "save_every": 4},
        "mesh": {"data": 1},
    }
    flat = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return config_lib.build(RunConfig, config_lib.apply_overrides(tree, flat))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, runs.run(config(), workdir)


def test_what_metrics_have_of_a_task(finished):
    """Figures by name where it was evaluated, what guessing and an oracle score once, and nothing of text."""
    workdir, printed = finished
    lines = runs.lines(workdir)
    known = {"chance_accuracy": 1 / 6, "oracle_accuracy": 1.0}
    assert lines[0].items() >= known.items() and not any(known.keys() & line.keys() for line in lines[1:])
    evaluated = [line for line in lines if "heldout_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    slices = {f"heldout_accuracy/elements={label}" for label in ("1", "2-3", "4-7", "8")}
    assert evaluated[-1].keys() >= {"heldout_accuracy", "heldout_exact", "heldout_accuracy/at=the_end", *slices}
    assert "held-out accuracy 0." in printed and "(chance 0.1667)" in printed and "byte" not in printed
    assert not (workdir / "samples.txt").exists()
    described = json.loads((workdir / "config.json").read_text())["data"]
    assert (described["task"], described["version"], described["group"]) == ("group", 1, "S3")


def one_step(program):
    """Loss and gradient norm of a step, and sums of an evaluation."""
    data = data_lib.open_data(program.config.data)
    state = runs.first(program)
    heldout = next(iter(data.heldout(batches=1)))
    sums = jax.device_get(program.eval_step(state.params, program.put(heldout)))
    state, metrics = program.train_step(state, program.put(data.rows("train", range(8))))
    return [float(metrics[name]) for name in ("loss", "grad_norm", "step_tokens")], sums


def test_meshes_and_micro_batches_change_nothing():
    """The loss is a mean by weights over the whole batch; answers are counted alike, in rows, positions and slices."""
    more = {"train__accumulate": 2, "mesh__data": 2, "mesh__context": 2, "mesh__tensor": 2}
    (ours, sums), (others, again) = one_step(Program.of(config())), one_step(Program(config(**more)))
    np.testing.assert_allclose(ours, others, rtol=2e-5)
    assert sums.keys() == again.keys() >= {"exact", "rows", "correct", "slice_correct"}
    for name in sums:
        np.testing.assert_allclose(sums[name], again[name], rtol=1e-4, atol=1e-5, err_msg=name)


BAGS = {"name": "bags", "length": 16, "shortest": 8, "batch": 8, "heldout": 20}


def test_bags_train():
    """What training hides is the same on every mesh; scores are of one answer a bag. A mixer named goes before."""
    bags = {"data": BAGS, "model": {"name": "bags", "inputs": 32, "classes": 4, "width": 16, "gate_width": 8}}
    (ours, sums), (others, again) = (
        one_step(Program.of(config(**bags))),
        one_step(Program(config(**bags, mesh__data=2, mesh__context=2, mesh__tensor=2))),
    )
    np.testing.assert_allclose(ours, others, rtol=2e-5)
    assert sums["tokens"] == sums["rows"] == 8 and sums["slice_tokens"].sum() == 16
    for name in sums:
        np.testing.assert_allclose(sums[name], again[name], rtol=1e-4, atol=1e-5, err_msg=name)
    program = Program.of(config(**bags))
    rows = program.put(data_lib.open_data(program.config.data).rows("train", range(8)))
    unmasked = program.eval_step(runs.first(program).params, rows)
    assert abs(unmasked["nll"].sum() / unmasked["tokens"].sum() - ours[0]) > 1e-6
    model = lambda more: config_lib.load(RunConfig, f"configs/tasks.py:task=bags{more}").model
    assert (model("").layers, model(",mixer=agent").layers, model(",pattern=SM").layers) == (0, 1, 2)


IMAGES = {"name": "visual_question", "length": 24, "images": 1, "symbols": 10, "questions": 1, "side": 2, "batch": 8}


@tiers.often("isolation")
@pytest.mark.parametrize("mask", ["modality_mutual", "isolation"])
def test_masks_of_layouts_train(mask):
    """Rows say where images lie: what the mask shows changes the loss, a mesh that splits positions nothing."""
    masked = {"data": IMAGES, "model__vocab": 25, "model__mixers__M__mask__name": mask}
    layers = {"isolation": 1, "modality_mutual": 2}[mask]  # what an image sees of itself, answers see a layer later
    masked["model__layers"] = layers
    if mask == "isolation":
        masked["model__mixers__M__mask__background"] = False
    one, split = Program.of(config(**masked)), Program(config(**masked, mesh__data=2, mesh__context=2))
    plain = Program.of(config(data=IMAGES, model__vocab=25, model__layers=layers))
    rows = data_lib.open_data(one.config.data).rows("train", range(8))
    _, metrics = split.train_step(runs.first(split), split.put(rows))
    losses = []
    for program in (one, plain):
        sums = program.eval_step(runs.first(program).params, program.put(rows))
        losses.append(float(sums["nll"].sum() / sums["tokens"].sum()))
    np.testing.assert_allclose(metrics["loss"], losses[0], rtol=2e-5)
    assert np.isfinite(metrics["grad_norm"]) and abs(losses[0] - losses[1]) > 1e-4


BOXES = "model.mixers.M.mask.name=neighborhood"
CELLS = BOXES, "model.mixers.M.mask.window=[3]", "model.mixers.M.mask.shape=[8,8]"


@pytest.mark.parametrize(
    "task, overrides",
    [
        ("match3", (BOXES, "model.mixers.M.mask.window=[3]")),
        ("bags,mixer=softmax", (BOXES,)),
        ("pixels", (*CELLS, "model.mixers.M.mask.causal_axes=[True,True]")),
    ],
)
def test_neighbourhoods_train(task, overrides):
    """Of a line, of bags of any size behind which is padding, and of an image's cells: values differ from those of all
    that a position may see."""
    seen = []
    for more in (overrides, ()):
        c = config_lib.load(RunConfig, f"configs/tasks.py:task={task}", ["data.batch=8", "mesh.data=1", *more])
        program = Program.of(c)
        rows = data_lib.open_data(c.data).rows("train", range(8))
        sums = program.eval_step(runs.first(program).params, program.put(rows))
        seen.append(float(sums["nll"].sum() / sums["tokens"].sum()))
    assert np.isfinite(seen).all() and abs(seen[0] - seen[1]) > 1e-5


@pytest.mark.parametrize("mixer, where", [("softmax", "mask"), ("moh", "core.mask")])
def test_rows_that_are_too_short_for_a_mask_are_refused_before_a_run(mixer, where):
    """With the mixer, the length, the knob and what is allowed."""
    knobs = [f"model.mixers.M.{where}.name=neighborhood", f"model.mixers.M.{where}.window=[17]"]
    with pytest.raises(
        ConfigError, match=r"model\.mixers\.M \(data\.length = 16\): mask\.window = \(17,\).*16 positions"
    ):
        config_lib.load(RunConfig, f"configs/tasks.py:task=match3,mixer={mixer}", knobs)


@pytest.mark.parametrize("mixer, where", [("softmax", "mask"), ("moh", "core.mask")])
def test_costs_say_where_the_count_of_a_mask_is_open(attnlab, mixer, where):
    """What is seen hangs on where images lie; of a mask that lengths alone decide nothing is said."""
    for mask, notes in (("concentric", 1), ("a_shape", 0)):
        spec = f"configs/tasks.py:task=visual_question,mixer={mixer}"
        args = "cost", "--config", spec, f"--config.model.mixers.M.{where}={mask}"
        code, out, _ = attnlab(*args, "--json")
        found = json.loads(out)["notes"]
        assert code == 0 and len(found) == notes
        assert all(note.startswith("model.mixers.M: counted as causal") and note in attnlab(*args)[1] for note in found)


def test_eval_tells_accuracy_beside_chance(attnlab, finished):
    """The figures of the run, by slice; of the test split, without a note; of another task, with one."""
    workdir, _ = finished
    code, out, err = attnlab("eval", "--workdir", workdir, "--checkpoint", "4", "--json")
    found, last = json.loads(out), runs.lines(workdir)[-1]
    assert (code, found["notes"], found["rows"]) == (0, [], 20), err
    for name in ("accuracy", "exact", "loss", "accuracy/at=the_end"):
        np.testing.assert_allclose(found[name], last[f"heldout_{name}"], rtol=1e-6)
    assert found["chance"] == {"accuracy": 1 / 6} and found["oracle"] == {"accuracy": 1.0}
    code, out, _ = attnlab("eval", "--workdir", workdir, "--config.data.split=test")
    assert code == 0 and "accuracy by slice" in out and "note:" not in out and "elements=2-3" in out
    _, out, _ = attnlab("eval", "--workdir", workdir, "--config.data.shortest=2", "--batches", "1")
    assert "note: on other data than it was trained on (data.shortest 3 -> 2)" in out


def test_eval_at_multiples_of_the_length(attnlab, finished):
    """Each with rows of its own length, as many positions a batch; what no mesh or number divides is refused."""
    workdir, _ = finished
    code, out, err = attnlab("eval", "--workdir", workdir, "--lengths", "1,16", "--json")
    found = json.loads(out)
    assert code == 0 and found["trained_length"] == 8, err
    assert [(r["multiple"], r["length"], r["rows"]) for r in found["lengths"]] == [
        (1, 8, 20),
        (16, 128, 3),
    ]
    code, out, _ = attnlab("eval", "--workdir", workdir, "--lengths", "2")
    assert code == 0 and out.splitlines()[1].split() == ["times", "positions", "loss", "accuracy", "exact"]
    code, _, err = attnlab("eval", "--workdir", workdir, "--lengths", "1,x")
    assert code == 2 and "--lengths" in err


def test_generate_refuses_it(attnlab, finished):
    code, _, err = attnlab("generate", "--workdir", finished[0], "--prompt", "a")
    assert code == 2 and "data.name = 'group' has no text" in err


def test_tasks_are_listed(attnlab):
    """All of them, with what guessing scores; one with its fields."""
    found = {row["name"]: row for row in json.loads(attnlab("list", "tasks", "--json")[1])}
    assert sorted(found) == tasks.names() and found["mqar"]["chance"] == {"accuracy": 1 / 128}
    code, out, _ = attnlab("list", "mqar")
    assert code == 0 and "data.pairs" in out and "model.name=lm" in out
    assert "test_time_regression" in attnlab("list", "tasks")[1]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit(preset):
    """Data and model of each fit; every task has one."""
    c = config_lib.load(RunConfig, f"configs/tasks.py:task={preset}")
    assert set(tasks.names()) <= PRESETS.keys()
    assert c.model.node_name == c.data.fitting()["name"]


KINDS = ["bags", "icl_classes", "icl_regression", "mad_compress", "match2", "regions"]


@tiers.parametrize("preset", KINDS, often=[k for k in KINDS if k not in ("bags", "icl_regression")])  # which train
def test_every_kind_of_model_takes_its_batches(preset):
    """The loss and the evaluation can be traced on the arrays that the task yields."""
    c = config_lib.load(RunConfig, f"configs/tasks.py:task={preset}")
    program = Program.of(c)
    batch = {name: jax.ShapeDtypeStruct((2, *field.shape), field.dtype) for name, field in c.data.batch_spec().items()}
    _, metrics = jax.eval_shape(program.train_step, program.shapes, batch)
    assert metrics["loss"].shape == ()
    assert jax.eval_shape(program.eval_step, program.shapes.params, batch)


# Of one pattern, of several, of all.
OFTEN = ["agent", "kda", "short_conv", "softmax", "vmoba"]


@tiers.parametrize("mixer", mixers.names(), often=OFTEN)
def test_every_mixer_is_tried_or_says_why_not(mixer):
    """In the four patterns of attention: a mixer runs the task of a pattern, or its config says who can."""
    can = mixers.get(mixer).capabilities
    for task, able in {"mqar": can.causal, "match2": can.bidirectional, "retrieve": can.cross}.items():
        if able:
            c = config_lib.load(RunConfig, f"configs/tasks.py:task={task},mixer={mixer}")
            assert mixer in [node.node_name for node in c.model.mixers.values()]
        else:
            with pytest.raises(ConfigError, match="allowed: .*softmax"):
                config_lib.load(RunConfig, f"configs/tasks.py:task={task},mixer={mixer}")


def test_a_vocabulary_too_small_is_refused():
    with pytest.raises(
        ConfigError, match="model.vocab = 6 is smaller than the ids of data.name = 'group'; allowed: 24"
    ):
        config(data__group="S4")
