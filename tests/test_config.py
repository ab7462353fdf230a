"""Configs: what is refused and how it is said, what is accepted, and that a config survives its JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from attnlab import config as config_lib
from attnlab import mixers
from attnlab.config import Override
from attnlab.errors import ConfigError, UserError
from attnlab.train import config as run_config
from attnlab.train import metadata, optimizers
from attnlab.train.config import RunConfig
from tests.train import runs

ROOT = runs.ROOT
LM = str(ROOT / "configs" / "lm.py")


def build(*overrides: str) -> RunConfig:
    return config_lib.build(RunConfig, config_lib.apply_overrides(runs.tree("stdlib"), overrides))


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as info:
        build(*overrides)
    message = str(info.value)
    assert 1 <= len(message.splitlines()) <= 3 and "Override" not in message, message
    return message


BEYOND = ["9" * 30, "9" * 400, "9" * 5000]

# Override, and what its message must hold: the key, the value, what is allowed or the nearest key.
REFUSED = [
    ("trian.steps=3", ["'trian'", "did you mean 'train'", "data, model, optimizer, train, mesh, cluster, seed"]),
    ("data.lenght=3", ["'data.lenght'", "'3'", "did you mean 'length'", "allowed in data:"]),
    ("model.widht=3", ["'model.widht'", "did you mean 'width'", "allowed in model:"]),
    ("model.mixers.M.haeds=2", ["'model.mixers.M.haeds'", "did you mean 'heads'", "allowed in model.mixers.M:"]),
    ("optimizer.learning_rat=1", ["'optimizer.learning_rat'", "did you mean 'learning_rate'", "allowed in optimizer:"]),
    ("train.step=3", ["'train.step'", "did you mean 'steps'", "allowed in train:"]),
    ("mesh.dat=2", ["'mesh.dat'", "did you mean 'data'", "data, fsdp, context, tensor, slices"]),
    ("model.mixers.M=gatd", ["model.mixers.M.name = 'gatd'", "did you mean 'gated'"]),
    ("model.mixers.M.name=", ["model.mixers.M.name = ''", ", ".join(mixers.names())]),
    ("model.mixers=softmax", ["model.mixers = 'softmax'", "letters"]),
    ("model.mixers.QQ=softmax", ["model.mixers.QQ", "one letter"]),
    ("model.mixers.Q=softmax", ["model.mixers.Q", "'M' does not name it"]),
    ("optimizer=sgd", ["optimizer.name = 'sgd'", "adafactor, adamw, lion, muon"]),
    ("train=4", ["train = '4'", "group of keys"]),
    ("seed.x=3", ["'seed.x'", "seed is a single value, 3"]),
    ("model.width.x=3", ["'model.width.x'", "model.width is a single value, 16"]),
    *[
        (f"train.steps={text}", [f"train.steps = '{text[:90]}", "an integer"])
        for text in ("abc", "1.5", "True", "", "nan", "inf", "1e400", "None", "[3]", "(" * 60, "1e18", *BEYOND)
    ],
    ("train.steps=0", ["train.steps = 0", "1 or more"]),
    ("train.steps=-3", ["train.steps = -3", "1 or more"]),
    *[
        (f"optimizer.learning_rate={text}", [f"optimizer.learning_rate = '{text}'", "a finite number"])
        for text in ("nan", "inf", "-inf", "1e400", "1j", "true", "", "1e39", "1e-40")
    ],
    ("optimizer.learning_rate=0", ["optimizer.learning_rate = 0.0", "above 0"]),
    ("optimizer.clip=nan", ["optimizer.clip = 'nan'", "a finite number that float32 holds or none"]),
    ("optimizer.schedule=cos", ["optimizer.schedule = 'cos'", "did you mean 'cosine'", "wsd"]),
    ("optimizer.warmup=1.5", ["optimizer.warmup = 1.5", "a share below 1 of train.steps, or a whole number of steps"]),
    ("optimizer.warmup=-1", ["optimizer.warmup = -1", "0 or more"]),
    ("model.tied=1", ["model.tied = '1'", "true or false"]),
    ("model.width=0", ["model.width = 0", "1 or more"]),
    ("model.width=15", ["in model.mixers.M (model.width = 15): heads = 2", "even head widths"]),
    ("model.mixers.M.heads=3", ["in model.mixers.M", "heads = 3"]),
    ("model.mixers.M.heads=0", ["model.mixers.M.heads = 0", "1 or more"]),
    ("model.mixers.M.window=0", ["model.mixers.M.window = 0", "1 or more, or none"]),
    ("model.mixers.M.kv_heads=3", ["model.mixers.M.kv_heads = 3", "divisors of heads (2)"]),
    ("model.mixers.M.causal=false", ["model.mixers.M.causal = False", "true in a language model"]),
    ("model.mixers.M.impl=fast", ["model.mixers.M.impl = 'fast'", "definition"]),
    ("model.pattern=MX", ["model.pattern = 'MX'", "'X'", "allowed: M"]),
    ("model.pattern=", ["model.pattern = ''", "(M)"]),
    ("model.pattern=MMM", ["model.layers = 2", "'MMM' (3)"]),
    ("model.dtype=float16", ["model.dtype = 'float16'", "did you mean 'bfloat16'"]),
    ("model.remat=some", ["model.remat = 'some'", "minimal"]),
    ("model.dropout=1", ["model.dropout = 1.0", "below 1"]),
    ("data.batch=0", ["data.batch = 0", "at least 1"]),
    ("data.length=-1", ["data.length = -1", "at least 1"]),
    ("data.source=", ["data.source = ''"]),
    ("data.source=txt:/x", ["data.source = 'txt:/x'", "text:GLOB"]),
    ("data.heldout=1", ["data.heldout = 1.0", "below 1"]),
    ("train.accumulate=3", ["train.accumulate = 3", "divisors of data.batch (8)"]),
    ("train.profile=abc", ["train.profile = 'abc'", "FIRST:LAST"]),
    ("train.profile=5:3", ["train.profile = '5:3'", "FIRST:LAST"]),
    (f"train.profile={'9' * 5000}:3", ["train.profile", "FIRST:LAST"]),
    ("data.length=2e9", ["data.length = 2000000000", "below 2^31 tokens a step", "data.batch = 8"]),
    ("train.profile=0:3", ["train.profile = '0:3'", "from 1"]),
    ("train.profile=13:15", ["train.profile = '13:15'", "train.steps (12)"]),
    ("train.on_config_change=go", ["train.on_config_change = 'go'", "stop, continue"]),
    ("mesh.data=0", ["mesh.data = 0", "-1 for the rest"]),
    ("seed=-1", ["seed = -1", "0 to 2^31 - 1"]),
    *[
        (text, [f"--config.{text}: expected --config.any.field=value"])
        for text in ("a", "=3", ".a=3", "model.=3", "model..width=3")
    ],
]  # fmt: skip


@pytest.mark.parametrize("override, parts", REFUSED, ids=[o[:40] for o, _ in REFUSED])
def test_refused_with_key_value_and_what_is_allowed(override, parts):
    """Every bad override names the key, the value and what is allowed, in one to three lines."""
    message = refused(override)
    for part in parts:
        assert part in message, message


def test_one_axis_takes_the_rest():
    """Two axes cannot both be all that is left."""
    assert "-1 for one axis only" in refused("mesh.data=-1", "mesh.fsdp=-1")


def test_an_override_given_twice_is_refused():
    """Neither of two values is silently dropped."""
    assert "--config.train.steps is given twice: '3' and '4'" in refused("train.steps=3", "train.steps=4")


@pytest.mark.parametrize(
    "value",
    [10**400, 10**5000, float("nan"), float("inf"), np.float64("-inf"), "3e-3", True, None, 1j],
    ids=config_lib.show,
)
def test_bad_numbers_of_a_config_file(value):
    """Numbers from Python are checked as those that are typed."""
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate = .* wrong type; allowed: a finite number"):
        runs.config("stdlib", optimizer__learning_rate=value)


def test_a_long_value_is_shortened():
    """A message stays readable whatever was given."""
    assert len(refused("train.steps=" + "x" * 10_000)) < 250
    assert len(refused("model.pattern=M\n" + "X" * 50).splitlines()) == 1


@pytest.mark.parametrize(
    "override, read, value",
    [
        ("train.steps=2e3", lambda c: c.train.steps, 2000),
        ("train.steps=1_000", lambda c: c.train.steps, 1000),
        ("optimizer.learning_rate=1e-3", lambda c: c.optimizer.learning_rate, 1e-3),
        ("optimizer.learning_rate=1", lambda c: c.optimizer.learning_rate, 1.0),
        ("optimizer.clip=none", lambda c: c.optimizer.clip, None),
        ("optimizer.clip=0.5", lambda c: c.optimizer.clip, 0.5),
        ("model.tied=true", lambda c: c.model.tied, True),
        ("model.tied=False", lambda c: c.model.tied, False),
        ("model.mlp_width=None", lambda c: c.model.mlp_width, None),
        ("model.mixers.M.window=5", lambda c: c.model.mixers["M"].window, 5),
        ("model.mixers.M=gated", lambda c: (c.model.mixers["M"].node_name, c.model.mixers["M"].heads), ("gated", 2)),
        ("model.mixers.M.name=gated", lambda c: c.model.mixers["M"].node_name, "gated"),
        ("optimizer=lion", lambda c: (c.optimizer.node_name, c.optimizer.learning_rate), ("lion", 1e-2)),
        ("train.profile=2:4", lambda c: c.train.profile_steps, (2, 4)),
        ("data.cache=none", lambda c: c.data.cache, None),
        ("data.source=text:a=b/*.py, c/**", lambda c: c.data.globs, ("a=b/*.py", "c/**")),
        ("data.tokenizer=t.json?eod=</s>", lambda c: c.data.tokenizer, "t.json?eod=</s>"),
    ],
)
def test_accepted_overrides(override, read, value):
    """Every type of value as people write it; commas and equal signs belong to the value."""
    found = read(build(override))
    assert found == value and type(found) is type(value)


def test_numpy_numbers_of_a_config_file_become_pythons():
    """What a config file computes with numpy is a number, and JSON can hold it."""
    config = runs.config("stdlib", data__length=np.int64(24), optimizer__learning_rate=np.float32(0.5))
    json.dumps(config_lib.to_dict(config))
    assert type(config.data.length) is int and type(config.optimizer.learning_rate) is float


@pytest.mark.parametrize("overrides", [[], ["model.mixers.M=gated", "optimizer=muon", "train.profile=2:3"]])
def test_a_config_survives_its_json(overrides):
    """`to_dict` through JSON gives the same config back."""
    config = build(*overrides)
    tree = config_lib.to_dict(config)
    assert config_lib.build(RunConfig, json.loads(json.dumps(tree))) == config
    assert config_lib.difference(tree, json.loads(json.dumps(tree))) == []


def test_difference_names_keys_and_values():
    """Changed, new and missing keys, dotted."""
    old, new = {"a": {"b": 1, "c": 2}, "d": {}}, {"a": {"b": 3}, "e": 4, "d": {}}
    assert config_lib.difference(old, new) == [("a.b", 1, 3), ("a.c", 2, "-"), ("e", "-", 4)]


def test_override_of_a_group_that_the_file_leaves_out():
    """A group of defaults can be set by override alone."""
    tree = runs.tree("stdlib")
    del tree["mesh"], tree["train"]
    config = config_lib.build(RunConfig, config_lib.apply_overrides(tree, ["mesh.tensor=2", "train.steps=50"]))
    assert config.mesh.tensor == 2 and config.train.steps == 50
    assert isinstance(tree["mesh"]["tensor"], Override)


def test_missing_key():
    """A key without a default has to be there."""
    tree = runs.tree("stdlib")
    del tree["optimizer"]
    with pytest.raises(ConfigError, match="optimizer is missing"):
        config_lib.build(RunConfig, tree)


GET = "def get_config(arg=None):\n    "
FILES = [
    ("syntax.py", "def get_config(:\n", ["syntax.py", "SyntaxError"]),
    ("empty.py", "", ["empty.py", "defines no function get_config(arg)"]),
    ("number.py", "get_config = 3\n", ["defines no function get_config(arg)"]),
    ("imports.py", "import no_such_module\n", ["imports.py, line 1", "no_such_module"]),
    (
        "raises.py",
        GET + "raise RuntimeError('one\\ntwo\\nthree\\nfour')\n",
        ["raises.py, line 2: RuntimeError: one two"],
    ),
    ("key.py", GET + "return {}['b']\n", ["key.py, line 2: KeyError: 'b'"]),
    ("divides.py", "1 / 0\n", ["divides.py, line 1: ZeroDivisionError"]),
    ("exits.py", "import sys\nsys.exit(3)\n", ["exits.py, line 2: SystemExit: 3"]),
    ("noarg.py", "def get_config():\n    return {}\n", ["noarg.py", "TypeError", "0 positional arguments"]),
    ("none.py", GET + "pass\n", ["none.py gives None; expected a tree of keys"]),
    ("list.py", GET + "return [1]\n", ["list.py gives [1]; expected"]),
    ("binary.py", bytes(range(256)), ["binary.py"]),
    ("text.txt", "hello", ["text.txt is not a Python file (.py)"]),
    ("cut.json", "{", ["cut.json is not a run's config.json"]),
    ("list.json", "[]", ["list.json is not a run's config.json"]),
    ("number.json", '{"config": 3}', ["number.json gives 3"]),
    ("latin.json", b"\xff\xfe", ["latin.json is not a run's config.json"]),
]


@pytest.mark.parametrize("name, text, parts", FILES, ids=[f[0] for f in FILES])
def test_a_bad_config_file_is_named(tmp_path, name, text, parts):
    """Whatever a config file does, the message names file, line and exception; nothing is left beside it."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as info:
        run_config.load(str(path), [])
    assert str(info.value).startswith("--config: ") and len(str(info.value).splitlines()) == 1
    for part in parts:
        assert part in str(info.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "spec, parts",
    [
        ("", ["'' is not there", "PATH[:arg=value,...]"]),
        ("/no/such.py", ["'/no/such.py' is not there"]),
        (str(ROOT), ["is a directory"]),
        ("a" * 300, ["is not there"]),
        (f"{LM}:mixr=gated", ["'mixr=gated'", "did you mean 'mixer'", "mixer=softmax, size=nano, pattern=M"]),
        (f"{LM}:mixer", ["'mixer' must be written mixer=VALUE"]),
        (f"{LM}:mixer=", ["model.mixers.M.name = ''", "softmax"]),
        (f"{LM}:mixer=gated,mixer=softmax", ["mixer is given twice"]),
        (f"{LM}:mixer=sofmax", ["'sofmax'", "did you mean 'softmax'"]),
        (f"{LM}:size=huge", ["size = 'huge'", "nano"]),
        (f"{LM}:pattern=", ["pattern = ''", "M, S and W"]),
        (f"{LM}:pattern=MX", ["pattern = 'MX'", "M, S and W"]),
        (f"{LM}:pattern=MMM", ["model.layers = 4", "(3)"]),
        (f"{LM}:pattern=M,S", ["unknown config argument 'S'"]),
    ],
)
def test_bad_config_argument(spec, parts):
    """PATH and its arguments are refused by name."""
    with pytest.raises(ConfigError) as info:
        run_config.load(spec, [])
    for part in parts:
        assert part in str(info.value)
    assert len(str(info.value).splitlines()) <= 3


@pytest.mark.parametrize("size", ["nano", "micro", "60m", "125m", "350m", "1b", "7b"])
def test_every_size_of_the_example_config(size):
    """configs/lm.py makes a valid config at each of its sizes."""
    config = run_config.load(f"{LM}:size={size},mixer=gated,pattern=MMMS", ["model.layers=8"])
    assert [config.model.mixers[k].node_name for k in "MS"] == ["gated", "softmax"]


def test_a_runs_config_json_is_a_config(tmp_path):
    """`--config RUN/config.json` repeats a run, takes overrides, and no arguments."""
    path = tmp_path / "config.json"
    config = build()
    path.write_text(json.dumps({"config": config_lib.to_dict(config), "git": None}))
    assert run_config.load(str(path), []) == config
    assert run_config.load(str(path), ["model.mixers.M=gated"]).model.mixers["M"].node_name == "gated"
    with pytest.raises(ConfigError, match="takes no arguments"):
        run_config.load(f"{path}:mixer=gated", [])


def test_a_changed_config_file_is_read_anew(tmp_path):
    """No bytecode of an earlier version is used, however soon the file changes."""
    path = tmp_path / "c.py"
    for value in (1, 2):
        path.write_text(f"def get_config(arg):\n    return {{'a': {value}}}\n")
        assert config_lib.read_file(str(path)) == {"a": value}


@pytest.mark.parametrize("size, warmup", [("nano", 20), ("micro", 40), ("125m", 200), ("7b", 2000)])
def test_warm_up_of_the_sizes_follows_the_steps(tmp_path, size, warmup):
    """Each size warms up for its own number of steps; steps alone can be set; a workdir that has the number goes on."""
    config = run_config.load(f"{LM}:size={size}", [])
    assert optimizers.warmup_steps(config.optimizer.warmup, config.train.steps) == warmup
    few = run_config.load(f"{LM}:size={size}", ["train.steps=10"])
    assert optimizers.warmup_steps(few.optimizer.warmup, few.train.steps) == 0
    old = config_lib.to_dict(config)
    old["optimizer"]["warmup"] = warmup
    metadata.check_same(tmp_path, old, config, saved=False)
    old["optimizer"]["warmup"] = warmup + 1
    with pytest.raises(UserError, match="optimizer.warmup"):
        metadata.check_same(tmp_path, old, config, saved=False)
