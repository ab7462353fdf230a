"""The analyser of compiled programs: programs whose products, collectives and loops are known."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from attnlab.launch import hlo, hlo_text


def analyse(f, *shapes, dtype=jnp.float32):
    arguments = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
    return hlo.analyse(jax.jit(f).lower(*arguments).compile().as_text())


def test_products_are_counted():
    """2 n m k for each product, batches too; a gradient has two more of the same size."""
    assert analyse(lambda a, b: a @ b, (16, 32), (32, 8)).flops == 2 * 16 * 32 * 8
    batched = lambda a, b: jnp.einsum("bhtd,bhsd->bhts", a, b)
    assert analyse(batched, (2, 3, 16, 4), (2, 3, 8, 4)).flops == 2 * 2 * 3 * 16 * 8 * 4
    gradient = jax.grad(lambda a, b: jnp.sum(jnp.sin(a @ b)), (0, 1))
    assert analyse(gradient, (16, 32), (32, 8)).flops == 3 * 2 * 16 * 32 * 8


def test_loops_count_as_often_as_they_run():
    """A scan's body counts for each turn, nested ones as often as they run in all; XLA's own count is of one turn."""

    def f(x, ws):
        inner = lambda x, w: (jnp.tanh(x @ w), None)
        outer = lambda _, x: jax.lax.scan(inner, x, ws)[0]
        return jax.lax.fori_loop(0, 3, outer, x)

    costs = analyse(f, (16, 32), (5, 32, 32))
    assert costs.flops == 3 * 5 * 2 * 16 * 32 * 32
    assert not costs.unknown_loops


def test_loops_that_data_ends_are_named():
    """Their body counts once."""
    f = lambda x, w: jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x @ w, x)
    costs = analyse(f, (16, 16), (16, 16))
    assert costs.flops == 2 * 16**3 and len(costs.unknown_loops) == 1


@pytest.mark.parametrize("padding, expected", [("VALID", 6 * 3), ("SAME", 8 * 3 - 2)])
def test_convolutions_leave_padding_out(padding, expected):
    """Pairs of a position and a window element that fall on padding multiply nothing."""
    f = lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), padding, dimension_numbers=("NWC", "WIO", "NWC"))
    assert analyse(f, (2, 8, 5), (3, 5, 7)).flops == 2 * 2 * 5 * 7 * expected


@pytest.mark.parametrize(
    "name, collective, payload, sent",
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "i"), 4096, 2 * 4096 * 7 / 8),
        ("all-gather", lambda x: jax.lax.all_gather(x, "i"), 8 * 4096, 4096 * 7),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "i", tiled=True), 4096, 4096 * 7 / 8),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "i", 0, 0, tiled=True), 4096, 4096 * 7 / 8),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "i", [(i, (i + 1) % 8) for i in range(8)]), 4096, 4096),
    ],
)
def test_collectives_in_a_loop(name, collective, payload, sent):
    """Five turns, each with one collective of known size."""
    mesh = Mesh(np.array(jax.devices()), "i")
    spec = PartitionSpec("i")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    def f(x):
        def turn(x, _):
            y = collective(jnp.sin(x))
            return x + jnp.sum(y), None

        return jax.lax.scan(turn, x, None, length=5)[0]

    costs = analyse(f, (8 * 1024,))
    assert costs.count == {name: 5}
    assert costs.payload[name] == 5 * payload and costs.sent[name] == 5 * sent


# What the TPU compiler writes and the one for CPU does not.

_TPU = """\
HloModule jit_f, is_scheduled=true

%fused.1 (p0: f32[4,256,128,1], p1: f32[4,64,128,1]) -> f32[4,256,4,64] {
  %p0 = f32[4,256,128,1]{2,1,3,0:T(8,128)} parameter(0)
  %p1 = f32[4,64,128,1]{2,1,0,3:T(8,128)S(1)} parameter(1)
  ROOT %convolution.1 = f32[4,256,4,64]{3,1,2,0:T(8,128)} convolution(%p0, %p1), \
window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f
}

%condition (state: (s32[], bf16[8,4])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %constant.9 = s32[]{:T(128)} constant(7)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.9), direction=LT
}

%body (state.1: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state.1 = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %get-tuple-element.2 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %get-tuple-element.3 = bf16[8,4]{1,0} get-tuple-element(%state.1), index=1
  %constant.2 = s32[]{:T(128)} constant(2)
  %add.1 = s32[]{:T(128)} add(%get-tuple-element.2, %constant.2)
  %all-gather-start.1 = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%get-tuple-element.3), \
channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  %all-gather-done.1 = bf16[32,4]{1,0} all-gather-done(%all-gather-start.1)
  %slice.1 = bf16[8,4]{1,0} slice(%all-gather-done.1), slice={[0:8], [0:4]}
  %kernel.3 = bf16[8,4]{1,0} custom-call(%slice.1), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%add.1, %kernel.3)
}

ENTRY %main (a: f32[4,256,128,1], b: f32[4,64,128,1], c: bf16[8,4]) -> f32[4,256,4,64] {
  %a = f32[4,256,128,1]{2,1,3,0:T(8,128)} parameter(0)
  %b = f32[4,64,128,1]{2,1,0,3:T(8,128)S(1)} parameter(1)
  %c = bf16[8,4]{1,0} parameter(2)
  %constant.1 = s32[]{:T(128)} constant(1)
  %tuple.2 = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%constant.1, %c)
  %while.1 = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%tuple.2), condition=%condition, body=%body
  ROOT %fusion.1 = f32[4,256,4,64]{3,1,2,0:T(8,128)} fusion(%a, %b), kind=kOutput, calls=%fused.1
}
"""


def test_text_of_the_tpu_compiler():
    """A loop from 1 in steps of 2 below 7, with an asynchronous gather over 4 and a kernel; a convolution."""
    costs = hlo.analyse(_TPU)
    assert costs.flops == 2 * 4 * 256 * 128 * 4 * 64
    assert costs.count == {"all-gather": 3}
    assert costs.payload == {"all-gather": 3 * 2 * 32 * 4} and costs.sent == {"all-gather": 3 * 2 * 32 * 4 * 3 / 4}
    assert costs.kernels == {"kernel": 3} and not costs.unknown_loops
    # What lies in fast memory, S(1), is not read from HBM.
    fusion = 4 * (4 * 256 * 128 + 4 * 256 * 4 * 64)
    each_turn = 2 * 2 * 8 * 4 + 2 * 2 * 8 * 4
    index = 3 * 4
    assert costs.bytes == fusion + 3 * (each_turn + index)


def test_slices_fetched_ahead():
    """Of an array that comes into fast memory in two slices, each slice is read once, and nothing is written to HBM."""
    text = """HloModule jit_f

ENTRY %main (a: bf16[32,8]) -> bf16[32,8] {
  %a = bf16[32,8]{1,0} parameter(0)
  %slice-start.1 = ((bf16[32,8]{1,0}), bf16[16,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:16], [0:8]}
  %slice-start.2 = ((bf16[32,8]{1,0}), bf16[16,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[16:32], [0:8]}
  %slice-done.1 = bf16[16,8]{1,0:S(1)} slice-done(%slice-start.1)
  %slice-done.2 = bf16[16,8]{1,0:S(1)} slice-done(%slice-start.2)
  ROOT %fusion.1 = bf16[32,8]{1,0:S(1)} fusion(%slice-done.1, %slice-done.2), kind=kLoop, calls=%joined
}

%joined (b: bf16[16,8], c: bf16[16,8]) -> bf16[32,8] {
  %b = bf16[16,8]{1,0} parameter(0)
  %c = bf16[16,8]{1,0} parameter(1)
  ROOT %concatenate.1 = bf16[32,8]{1,0} concatenate(%b, %c), dimensions={0}
}
"""
    assert hlo.analyse(text).bytes == 2 * 32 * 8


def test_reduce_scatter_of_the_tpu_compiler():
    """An all-reduce fused with the slice that a device keeps sends half of what an all-reduce does."""
    text = """HloModule jit_f, num_partitions=4

%all-reduce-scatter.1 (input: f32[32,8]) -> f32[8,8] {
  %input = f32[32,8]{1,0} parameter(0)
  %all-reduce.1 = f32[32,8]{1,0} all-reduce(%input), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %constant.1 = u32[] constant(8)
  ROOT %dynamic-slice.1 = f32[8,8]{1,0} dynamic-slice(%all-reduce.1, %constant.1, %constant.1), dynamic_slice_sizes={8,8}
}

ENTRY %main (a: f32[32,8]) -> f32[8,8] {
  %a = f32[32,8]{1,0} parameter(0)
  ROOT %fusion.1 = f32[8,8]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501
    costs = hlo.analyse(text)
    assert costs.count == {"reduce-scatter": 1} and costs.sent["reduce-scatter"] == 4 * 32 * 8 * 3 / 4
    plain = hlo.analyse(text.replace("all-reduce-scatter", "fused_computation"))
    assert plain.count == {"all-reduce": 1} and plain.sent["all-reduce"] == 2 * 4 * 32 * 8 * 3 / 4


def test_calls_of_libraries_are_named():
    """What cuDNN, or a kernel under its own name, computes is not in the products, and is not hidden; an allocation is
    no kernel."""
    text = """HloModule jit_f

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %buffer = f32[4,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %conv.1 = f32[4,8]{1,0} custom-call(%a), custom_call_target="__cudnn$convForward"
}
"""
    assert hlo.analyse(text).kernels == {"__cudnn$convForward": 1}
    ours = text.replace("__cudnn$convForward", "mosaic_gpu_v2")
    assert hlo.analyse(ours).kernels == {"mosaic_gpu_v2": 1}
    named = ours.replace('gpu_v2"', 'gpu_v2", metadata={op_name="jit(f)/shard_map/flash_forward/mpmd_map"}')
    assert hlo.analyse(named).kernels == {"flash_forward": 1}


@pytest.mark.parametrize(
    "written, expected",
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=3], device_ids=([3,2]T(1,0)) {'b'}", ((0, 1), (2, 3), (4, 5))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", ((3, 1), (2, 0))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("replica_groups={}", ()),
    ],
)
def test_groups_of_devices(written, expected):
    """All ways to write them."""
    assert hlo_text.groups(f", channel_id=1, {written}, dimensions={{0}}") == expected


@pytest.mark.parametrize(
    "domains, crossing",
    [
        ([0] * 8, 0),
        ([0, 0, 0, 0, 1, 1, 1, 1], 2 * 4096 * 7 / 8 / 4),  # four devices share what leaves their host
        ([0, 1, 2, 3, 4, 5, 6, 7], 2 * 4096 * 7 / 8),
    ],
)
def test_what_leaves_a_host(domains, crossing):
    """A ring over all devices leaves each host once; a host's devices share it."""
    mesh = Mesh(np.array(jax.devices()), "i")
    spec = PartitionSpec("i")
    f = jax.shard_map(lambda x: jax.lax.psum(x, "i"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
    text = jax.jit(f).lower(jax.ShapeDtypeStruct((8 * 1024,), jnp.float32)).compile().as_text()
    costs = hlo.analyse(text, domains)
    assert costs.sent["all-reduce"] == 2 * 4096 * 7 / 8 and costs.crossing["all-reduce"] == crossing
