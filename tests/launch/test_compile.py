"""Compiling for TPUs that are not here: the whole report on a tiny run, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from attnlab import config as config_lib
from attnlab.errors import ConfigError, UserError
from attnlab.launch import compile as compile_lib
from attnlab.launch import describe, search
from attnlab.models.cost import model_cost
from attnlab.ops import Mask, attention, mask_from_segments, partition
from attnlab.train import sharding
from attnlab.train.config import RunConfig
from attnlab.train.hardware import CHIPS
from tests.train import runs

# The suite keeps compiled programs, and those for absent devices cannot be read back.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def config(**overrides) -> RunConfig:
    """A model whose heads and lengths are those of the TPU kernel."""
    small = {
        "data__length": 128,
        "model__width": 128,
        "model__layers": 3,
        "model__mlp_width": 256,
        "model__dtype": "bfloat16",
        "mesh": {"data": 1, "fsdp": -1},
    }
    return config_lib.build(RunConfig, runs.tree("stdlib", **(small | overrides)))


@pytest.fixture(scope="module")
def target():
    compile_lib.prepare()
    return compile_lib.Target.of("v5e:2x2")


@pytest.fixture(scope="module")
def report(target):
    return compile_lib.compile_step(config(), target)


@needs_libtpu
def test_report_of_a_tiny_run(report):
    """Memory is that of the sharded state, attention runs in the kernel, and the weights are gathered."""
    c = config()
    cost = model_cost(c.model, c.data.length)
    assert report["devices"] == 4 and report["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert report["parameters"] == cost.parameters
    memory = report["memory"]
    # Parameters and two moments in fp32, a quarter each; the rest is the batch, scalars and padding.
    assert 0.95 < memory["arguments"] / (12 * cost.parameters / 4) < 1.3
    assert memory["aliased"] > 0.9 * 12 * cost.parameters / 4  # the state is donated
    assert memory["fits"] and memory["temporaries"] > 0
    assert set(report["implementations"]["attention"].values()) == {"splash"}
    assert report["kernels"] == {
        f"splash_mha_{part}_residuals": 3 for part in ("fwd_segmented", "dq_segmented_no", "dkv_segmented_no")
    }
    assert report["collectives"]["all-gather"]["bytes"] > 0
    assert report["unknown_loops"] == 0
    assert report["bound"] in report["floor_seconds"] and 0 < report["mfu_at_most"] <= 1


@needs_libtpu
def test_products_of_the_program_are_the_declared_ones(report):
    """Without rematerialisation the products outside kernels are those of three forward passes, in every layer."""
    c = config()
    flops = model_cost(c.model, c.data.length).flops
    tokens = c.data.batch * c.data.length / 4
    expected = 3 * tokens * sum(value for part, value in flops.items() if part != "softmax.attention")
    assert report["flops"]["compiler"] == pytest.approx(expected, rel=0.01)
    # The kernels for the backward pass repeat the scores, and the product for dp: 1 + 1.5 + 2 forward passes, not 3.
    assert report["flops"]["kernels"] == pytest.approx(4.5 * tokens * flops["softmax.attention"])
    assert report["flops"]["compiler_loops_once"] < 0.7 * expected


@needs_libtpu
def test_a_report_can_be_printed(report):
    """In words and in JSON."""
    text = "\n".join(describe.program(report))
    for part in ("v5e:2x2", "splash", "arguments", "all-gather", "bound by"):
        assert part in text
    json.dumps(report)


@needs_libtpu
def test_a_program_that_does_not_fit(target):
    """The compiler's refusal is a report, with what the program would need."""
    large = config(model__vocab=16_000_000, model__layers=1, train__loss_chunk=16_000_000)
    report = compile_lib.compile_step(large, target)
    memory = report["memory"]
    assert not memory["fits"] and memory["peak"] > memory["hbm"] and memory["spare"] < 0
    assert "does not fit" in "\n".join(describe.program(report))


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "v5e:banana", "h100:8", "v9:2x2", "cpu:8"])
def test_unknown_topologies_are_refused(name):
    """The message says what is allowed."""
    compile_lib.prepare()
    with pytest.raises(UserError, match=r"v5p:4x4x4"):
        compile_lib.Target.of(name)


def test_without_the_compiler_it_is_named(monkeypatch):
    """A missing libtpu is said, with what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        compile_lib.Target.of("v5e:2x2")


@needs_libtpu
def test_a_mesh_that_does_not_fit_the_topology(target):
    with pytest.raises(ConfigError, match="mesh.fsdp = 3"):
        compile_lib.compile_step(config(mesh={"data": 1, "fsdp": 3, "tensor": -1}), target)


@needs_libtpu
def test_figures_of_a_device_that_is_half_a_chip():
    compile_lib.prepare()
    target = compile_lib.Target.of("tpu7x:2x2x1")
    assert len(target.devices) == 8 and target.chip.peak == CHIPS["tpu7x"].peak / 2


@needs_libtpu
@pytest.mark.parametrize("documents", [False, True])
def test_splash_compiles_for_a_tpu(target, documents):
    """Forward and backward become the kernel's calls."""
    mesh = sharding.make_mesh(config().mesh, 1, target.devices[:1])
    arrays = [jax.ShapeDtypeStruct((1, 256, h, 64), jnp.bfloat16, sharding=SingleDeviceSharding(target.devices[0]))
              for h in (4, 2, 2)]  # fmt: skip

    def loss(q, k, v):
        segments = jnp.arange(256)[None] // 100 if documents else None
        mask = mask_from_segments(segments, 256, causal=True) if documents else Mask(causal=True)
        return jnp.sum(attention(q, k, v, mask, impl="splash").astype(jnp.float32))

    traced = partition.traced(jax.grad(loss, (0, 1, 2)), mesh, sharding.ACTIVATION_RULES)
    text = jax.jit(traced).lower(*arrays).compile().as_text()
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}{'_segmented' if documents else ''}" in text


# The search, with reports made up.


def made_up(config, target):
    """A report whose memory shrinks with micro-batches and rematerialisation, and whose time grows."""
    strength = search._REMAT.index(config.model.remat)
    rows = config.data.batch // config.train.accumulate
    needed = (1 + strength) * rows * 2.0**30 / config.mesh.tensor
    seconds = (4 - strength) * (1 + 0.1 * config.train.accumulate) * config.mesh.tensor
    return {
        "memory": {"fits": needed <= target.chip.hbm, "peak": needed, "total": needed},
        "floor_seconds": {"compute": seconds, "memory": 0.1},
        "bound": "compute",
        "mfu_at_most": 1 / seconds,
        "compile_seconds": 0.0,
    }


def fake_search(monkeypatch, **kwargs):
    tried = []

    def compiled(c, target):
        tried.append((c.mesh, c.train.accumulate, c.model.remat))
        return made_up(c, target)

    monkeypatch.setattr(search, "compile_step", compiled)
    chip = dataclasses.replace(CHIPS["v5e"], hbm=8 * 2.0**30)
    target = compile_lib.Target("fake", tuple(jax.devices()[:2]), chip)
    lines = []
    reports = search.search(config(), target, **({"seconds": 60, "count": 99} | kwargs), say=lines.append)
    return tried, reports, lines


def test_search_ranks_what_fits(monkeypatch):
    """Those that fit come first, the fastest of them first; what must need more than one refused is not tried."""
    tried, reports, _ = fake_search(monkeypatch)
    fits = [r["memory"]["fits"] for r in reports]
    assert fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
    times = [max(r["floor_seconds"].values()) for r in reports if r["memory"]["fits"]]
    assert times == sorted(times)
    assert len(tried) == len(set(tried))
    assert "--config.model.remat=none" in reports[0]["overrides"]


def test_search_stops(monkeypatch):
    """At the number of compiles, and at the time."""
    assert len(fake_search(monkeypatch, count=3)[1]) == 3
    tried, reports, lines = fake_search(monkeypatch, seconds=-1)
    assert not tried and not reports and "stopped after 0" in lines[-1]


@needs_libtpu
@pytest.mark.slow
def test_command_line(tmp_path):
    """The verb, in a process of its own."""
    path = tmp_path / "c.py"
    path.write_text(f"def get_config(arg=None):\n    return {config_lib.to_dict(config())!r}\n")
    done = runs.attnlab("compile", "--config", str(path), "--topology", "v5e:2x2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["memory"]["fits"]
    done = runs.attnlab("compile", "--config", str(path), "--topology", "v5e:7")
    assert done.returncode == 2 and "v5e:16x16" in done.stderr
