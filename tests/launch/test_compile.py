"""Compiling for TPUs and GPUs that are not here: the whole report on a tiny run, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json

import jax
import jax.numpy as jnp
import jaxlib
import pytest
from jax.sharding import SingleDeviceSharding

from attnlab import config as config_lib
from attnlab.errors import ConfigError, UserError
from attnlab.launch import compile as compile_lib
from attnlab.launch import describe, search, targets
from attnlab.models.cost import model_cost
from attnlab.models.transformer import REMAT
from attnlab.ops import Mask, attention, mask_from_segments
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig, RunConfig
from attnlab.train.hardware import CHIPS
from tests import tiers
from tests.train import runs

# The suite keeps compiled programs, and those for absent devices cannot be read back.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent")
needs_cuda = pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="no CUDA compiler here")
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
    targets.prepare()
    return targets.Target.of("v5e:2x2")


@pytest.fixture(scope="module")
def report(target):
    return compile_lib.compile_step(config(), target)


def test_report_of_any_program():
    """What is told of a program that fits, here one for this machine's devices: its state, products and collectives."""
    target = targets.Target("here", tuple(jax.devices()[:2]), CHIPS["v5e"])
    c = config(data__length=16, model__width=32, model__mlp_width=64, model__layers=2)
    report = compile_lib.compile_step(c, target)
    cost = model_cost(c.model, c.data.length)
    assert (report["devices"], report["parameters"]) == (2, cost.parameters)
    assert report["mesh"] == c.mesh.sizes() | {"fsdp": 2}
    assert 0.95 < report["memory"]["arguments"] / (12 * cost.parameters / 2) < 1.3 and report["memory"]["fits"]
    assert report["collectives"]["all-gather"]["bytes"] > 0 == report["unknown_loops"] == report["network_bytes"]
    tokens, attention = c.data.batch * c.data.length / 2, cost.flops["softmax.attention"]
    products = 3 * tokens * (sum(cost.flops.values()) - attention)
    assert products + tokens * attention < report["flops"]["compiler"] < products + 12 * tokens * attention
    assert report["bound"] in report["floor_seconds"] and 0 < report["mfu_at_most"] <= 1
    text = "\n".join(describe.program(json.loads(json.dumps(report))))
    for part in ("here", "arguments", "all-gather", "bound by"):
        assert part in text


@tiers.exhaustive
@needs_libtpu
def test_report_of_a_tiny_run(report):
    """Memory is that of the sharded state, attention runs in the kernel, and the weights are gathered."""
    c = config()
    cost = model_cost(c.model, c.data.length)
    assert report["devices"] == 4 and report["mesh"] == c.mesh.sizes() | {"fsdp": 4}
    assert report["parameters"] == cost.parameters
    memory = report["memory"]
    # Parameters and two moments in fp32, a quarter each; the rest is the batch, scalars and padding.
    assert 0.95 < memory["arguments"] / (12 * cost.parameters / 4) < 1.3
    assert memory["aliased"] > 0.9 * 12 * cost.parameters / 4  # the state is donated
    assert memory["fits"] and memory["temporaries"] >= 0  # none: they are so small that they stay in fast memory
    assert set(report["implementations"]["attention"].values()) == {"flash"}
    assert report["kernels"] == {"flash_forward": 3, "flash_backward": 3}
    assert report["collectives"]["all-gather"]["bytes"] > 0
    assert report["unknown_loops"] == 0
    assert report["bound"] in report["floor_seconds"] and 0 < report["mfu_at_most"] <= 1


@tiers.exhaustive
@needs_libtpu
def test_products_of_the_program_are_the_declared_ones(report):
    """Without rematerialisation the products outside kernels are those of three forward passes, in every layer."""
    c = config()
    flops = model_cost(c.model, c.data.length).flops
    tokens = c.data.batch * c.data.length / 4
    expected = 3 * tokens * sum(value for part, value in flops.items() if part != "softmax.attention")
    assert report["flops"]["compiler"] == pytest.approx(expected, rel=0.01)
    # The kernel for the backward pass repeats the scores: 1 + 2.5 forward passes, not 3.
    assert report["flops"]["kernels"] == pytest.approx(3.5 * tokens * flops["softmax.attention"])
    assert report["flops"]["compiler_loops_once"] < 0.7 * expected


@tiers.exhaustive
@needs_libtpu
def test_a_report_can_be_printed(report):
    """In words and in JSON."""
    text = "\n".join(describe.program(report))
    for part in ("v5e:2x2", "flash", "arguments", "all-gather", "bound by"):
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
@pytest.mark.parametrize("name", ["v5e", "v5e:8", "v5e:3x3", "v5e:banana", "0*v5e:2x2", "v9:2x2", "cpu:8", "a100-80:8"])
def test_unknown_topologies_are_refused(name):
    """The message says what is allowed."""
    targets.prepare()
    with pytest.raises(UserError, match=r"v5p:4x4x4"):
        targets.Target.of(name)


def test_without_the_compiler_it_is_named(monkeypatch):
    """A missing compiler is said, with what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        targets.Target.of("v5e:2x2")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UserError, match=f"pip install jax-cuda13-plugin=={jaxlib.__version__}"):
        targets.Target.of("h100:8")


def test_a_compiler_of_another_version_is_refused(monkeypatch):
    """jax's CUDA plugin goes with one jaxlib."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    with pytest.raises(UserError, match=rf"0\.1\.0 does not go with jaxlib {jaxlib.__version__}"):
        targets.Target.of("h100:8")


@pytest.mark.parametrize("name", ["h100:16", "h100:2x16", "h100:0x8", "h200:2x2x2", "2*h100:8"])
def test_gpus_that_cannot_be_are_refused(name):
    """More on a host than NVLink joins, none, or a TPU's words."""
    with pytest.raises(UserError, match=r"1 to 8 GPUs a host, e.g. h100:8"):
        targets.Target.of(name)


@needs_cuda
@pytest.mark.parametrize("name, hosts, each", [("h100:8", 1, 8), ("h100:4x8", 4, 8), ("h200:3", 1, 3)])
def test_gpus_by_host(name, hosts, each):
    """As many devices as the name says, each on its host."""
    targets.prepare()
    target = targets.Target.of(name)
    assert target.domains(list(target.devices)) == [i // each for i in range(hosts * each)]
    assert {d.platform for d in target.devices} == {"gpu"}


@tiers.exhaustive
@needs_cuda
def test_report_for_gpus():
    """The same fields as for a TPU; what hosts exchange has a floor of its own."""
    targets.prepare()
    c = config(model__layers=2)
    report = compile_lib.compile_step(c, targets.Target.of("h100:2x2"))
    cost = model_cost(c.model, c.data.length)
    assert report["devices"] == 4 and report["parameters"] == cost.parameters
    assert 0.95 < report["memory"]["arguments"] / (12 * cost.parameters / 4) < 1.3
    assert set(report["implementations"]["attention"].values()) == {"xla"}
    # Weights are gathered over both hosts: each of a host's two devices sends half of what leaves the host.
    assert 0 < report["network_bytes"] == pytest.approx(report["interconnect_bytes"] / 2, rel=0.01)
    assert report["floor_seconds"]["network"] == report["network_bytes"] / CHIPS["h100"].network
    # Without rematerialisation: three forward passes; the attention's products are of whole blocks, masked ones too.
    tokens = c.data.batch * c.data.length / 4
    products = {k: 3 * tokens * v for k, v in cost.flops.items()}
    attention = products.pop("softmax.attention")
    assert sum(products.values()) + attention < report["flops"]["compiler"] < sum(products.values()) + 3.5 * attention
    assert report["unknown_loops"] == 0
    assert "the compiler has no count of its own" in "\n".join(describe.program(report))


@needs_cuda
@tiers.exhaustive
def test_kernels_for_gpus():
    """Asked for, the Hopper kernels run once a layer, forward and backward, and their FLOPs are counted."""
    targets.prepare()
    c = config(model__layers=2, model__mixers__M__impl="flash")
    report = compile_lib.compile_step(c, targets.Target.of("h100:2"))
    assert report["kernels"] == {"flash_forward": 2, "flash_backward": 2}
    attention = c.data.batch * c.data.length / 2 * model_cost(c.model, c.data.length).flops["softmax.attention"]
    assert report["flops"]["kernels"] == pytest.approx(3.5 * attention)


@needs_libtpu
@tiers.exhaustive
def test_slices_are_domains(target):
    """What goes from slice to slice is counted apart: the gradients' sums, with one copy of the model on each."""
    two = targets.Target.of("2*v5e:2x2")
    report = compile_lib.compile_step(config(mesh={"data": 2, "fsdp": 4}), two)
    assert two.domains(list(two.devices)) == [0] * 4 + [1] * 4
    # A device's quarter of the gradients, bf16 or fp32, is sent and comes back summed by halves.
    assert 2 < report["network_bytes"] / (report["parameters"] / 4) < 4.2
    assert report["floor_seconds"]["network"] == report["network_bytes"] / CHIPS["v5e"].network


@needs_libtpu
def test_a_mesh_that_does_not_fit_the_topology(target):
    with pytest.raises(ConfigError, match="mesh.fsdp = 3"):
        compile_lib.compile_step(config(mesh={"data": 1, "fsdp": 3, "tensor": -1}), target)


@needs_libtpu
def test_a_mesh_that_is_no_product_of_the_toruss_sides():
    """16 = 4 x 4, but of 4 x 8 x 8 no sides multiply to it: a side is split."""
    targets.prepare()
    large = targets.Target.of("v5p:4x8x8")
    mesh = sharding.make_mesh(MeshConfig(data=16, fsdp=16), 256, large.devices)
    assert mesh.devices.shape == (16, 16, 1, 1) and len(set(mesh.devices.flat)) == 256


@needs_libtpu
def test_figures_of_a_device_that_is_half_a_chip():
    targets.prepare()
    target = targets.Target.of("tpu7x:2x2x1")
    assert len(target.devices) == 8 and target.chip.peak == CHIPS["tpu7x"].peak / 2


@tiers.often("False")
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


def fake_search(monkeypatch, refuse=lambda mesh: False, **kwargs):
    tried = []

    def compiled(c, target):
        tried.append((c.mesh, c.train.accumulate, c.model.remat))
        if refuse(c.mesh):
            raise UserError("a mixer cannot")
        return made_up(c, target)

    monkeypatch.setattr(search, "compile_step", compiled)
    chip = dataclasses.replace(CHIPS["v5e"], hbm=8 * 2.0**30)
    target = targets.Target("fake", tuple(jax.devices()[:2]), chip)
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


def test_search_goes_over_every_axis(monkeypatch):
    """Each axis is tried at more than 1, and all policies are."""
    tried, _, _ = fake_search(monkeypatch)
    for axis in config().mesh.sizes():
        assert {mesh.sizes()[axis] for mesh, _, _ in tried} == {1, 2}
    assert {remat for _, _, remat in tried} == set(search._REMAT) == set(REMAT)


def test_search_goes_on_after_a_refusal(monkeypatch):
    """A mesh that a mixer cannot be split over is tried once, said, and left."""
    tried, reports, lines = fake_search(monkeypatch, refuse=lambda mesh: mesh.context > 1)
    assert sum(mesh.context > 1 for mesh, _, _ in tried) == 1 == sum("not possible: a mixer cannot" in s for s in lines)
    assert reports and not any("mesh.context=2" in r["overrides"] for r in reports)


def test_search_stops(monkeypatch):
    """At the number of compiles, and at the time."""
    assert len(fake_search(monkeypatch, count=3)[1]) == 3
    tried, reports, lines = fake_search(monkeypatch, seconds=-1)
    assert not tried and not reports and "stopped after 0" in lines[-1]


@tiers.exhaustive
@needs_libtpu
@pytest.mark.slow
def test_command_line(tmp_path, attnlab):
    """The verb, in a process of its own; a topology that there is not, in this one."""
    path = tmp_path / "c.py"
    path.write_text(f"def get_config(arg=None):\n    return {config_lib.to_dict(config(model__layers=1))!r}\n")
    done = runs.attnlab("compile", "--config", str(path), "--topology", "v5e:2x2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["memory"]["fits"]
    code, _, err = attnlab("compile", "--config", path, "--topology", "v5e:7")
    assert code == 2 and "v5e:16x16" in err
