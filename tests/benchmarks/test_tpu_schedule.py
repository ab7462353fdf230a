"""Schedules of TPU kernels: how they are read, and that none has grown."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter

import jax.numpy as jnp
import pytest

from attnlab.launch import llo, schedules, schedules_linear_recurrence, schedules_local_linear, schedules_neural_memory
from benchmarks import tpu_schedule
from kernels_pallas import masks, tuning
from kernels_pallas.local_linear_attention import Blocks
from kernels_pallas.tuning import BackwardBlocks, ForwardBlocks
from tests import tiers

# A loop of four bundles with one in it that a branch goes around; made up, in the compiler's form.
BUNDLES = """\
// comment
     0x0   :  { %1 = sst 0 }
     0x1 LB: > { %2 = vmatmul.bf16.gmra.mxu0 %v1 /* Start region 1 */ }
     0x2   : > { %3 = sbr.rel (%p0) target = $region3
   and more of the same word }
     0x3   : > { %4 = nop }
     0x4   : > { %5 = nop }
     0x5   : > { %6 = nop }
     0x6   : > { %7 = nop }
     0x7 PF: >> { %8 = vmatmul.f32.gmra.mxu1 %v2 }
     0x8   : > { %9 = scmp.ge.s32 %s1, 10 /* loop exit test */ ; Start region 3 }
     0x9   : > { %10 = sbr.rel (!%p1) target = $region1 }
     0xa   :  { }
     0xb   :  { }
     0xc   :  { }
     0xd   :  { }
     0xe   :  { }
"""
USE = "MXU XLU\n 4 3 4 2 1 3 3 1 1 2\n" + "".join(f" {int(i == 7)} 0 2 0 0 0 0 1 {int(i == 1)} 0\n" for i in range(15))


def test_reading():
    """What a branch goes around and back over, with the slots used, products by their rows, and the loop's turns."""
    root = llo.read(BUNDLES, USE, "v6e")
    (loop,) = root.inside
    (when,) = loop.inside
    assert (loop.kind, loop.start, loop.end, loop.trips) == ("loop", 1, 14, 10)
    assert (when.kind, when.start, when.end) == ("when", 7, 8)
    assert root.own["bundles"] == 2 and loop.own["bundles"] == 12 and when.own["bundles"] == 1
    assert when.own["MXU"] == 1 and when.own["products"] == 0.5 and loop.own["products"] == 1
    assert root.total()["VALU"] == 30 and root.total()["SPILL"] == 1 == loop.own["SPILL"]
    assert len(list(llo.lines(root, "v6e", least=1))) == 3
    with pytest.raises(ValueError, match="15 bundles, and counts of 14"):
        llo.read(BUNDLES, USE.rpartition("\n 0")[0], "v6e")


def test_causal_walks():
    """Key tiles that a row tile meets, from the last, and which of them the mask cuts."""
    assert schedules.causal_walks(512, ForwardBlocks(128, 256)) == [[True], [True], [True, False], [True, False]]
    assert schedules.causal_walks(512, ForwardBlocks(256, 128)) == [[True, True], [True, True, False, False]]


def region(kind, at, bundles, products=0, inside=()):
    own = Counter(bundles=bundles, products=products)
    return llo.Region(kind, at, at + 1, inside=list(inside), own=own)


def causal_tiles(blocks, length):
    """What the kernel itself is told of each row tile of a causal head: tiles masked, the last first; its flag."""
    t = jnp.arange(length)[None]
    bounds = masks.intervals(None, t + 1, length, length)
    ranges = masks.tile_ranges(*bounds, blocks.rows, blocks.keys)
    flags = masks.halved(ranges, bounds, blocks.rows, blocks.keys)
    for (low, full, full_end, end), alone in zip(ranges[0].tolist(), flags[0].tolist()):
        yield [not full <= j < full_end for j in range(low, end)][::-1], alone


def test_a_causal_head_is_the_sum_of_its_tiles():
    """What a head costs is what each row tile does, by the ranges and flags that the kernel itself is given."""
    first, first_masked, halved = region("when", 2, 320, 1), region("when", 3, 480, 1), region("when", 4, 1000, 3)
    steps = region("loop", 5, 32, 0, [region("when", 6, 640, 2), region("when", 7, 960, 2)])
    steps.end = 8
    grid = region("loop", 1, 96, 0, [first, first_masked, halved, steps, region("when", 9, 160, 1)])
    blocks, length = ForwardBlocks(256, 128, 128, 128), 1024
    facts = schedules.forward_facts(region("kernel", 0, 7, 0, [grid]), "v6e", blocks, schedules.Shape(), [length])
    total = 0
    for masked, alone in causal_tiles(blocks, length):
        total += 96 + 32 + 160  # of the grid, of its loop over steps, of what closes a row tile
        total += 1000 if alone else 480 if masked[0] else 320
        total += sum(960 if m else 640 for m in masked[1 + alone :])
    assert facts["causal_cycles"] == {"1024": total} and facts["first_halved"] == 1000


def test_a_causal_heads_backward_is_the_sum_of_its_tiles():
    """As of the forward; what is done once for a key head is shared by the query heads that read it."""
    steps = region("loop", 2, 32, 0, [region("when", 3, 640, 4), region("when", 4, 960, 4)])
    once = [region("when", 5, 512), region("when", 6, 8, 0, [region("loop", 7, 100)])]
    grid = region("loop", 1, 96, 0, [steps, region("when", 8, 400, 2), *once])
    blocks, length, shape = BackwardBlocks(256, 128, 128, 128), 1024, schedules.Shape()
    facts = schedules.backward_facts(region("kernel", 0, 7, 0, [grid]), "v6e", blocks, shape, [length])
    total = (512 * length / shape.length + 100 * length / 128) * shape.key_heads / shape.heads
    for masked, alone in causal_tiles(blocks, length):
        total += 96 + 32 + 8
        total += 400 if alone else 960 if masked[0] else 640
        total += sum(960 if m else 640 for m in masked[1:])
    assert facts["causal_cycles"] == {"1024": total} and facts["halved"] == 400


def test_growth_is_said():
    """What is within 5 % is not."""
    then = {name: 100 for name in tpu_schedule.CHECKED} | {"causal_cycles": {"4096": 1000}}
    assert tpu_schedule.grown(then, then) == []
    assert tpu_schedule.grown(then | {"full": 104, "spills": 107}, then) == ["spills 100 -> 107"]
    assert tpu_schedule.grown(then | {"causal_cycles": {"4096": 1100}}, then) == ["causal cycles 4096 1000 -> 1100"]
    assert tpu_schedule.grown({"bundles": 2.2}, {"bundles": 2.0}) == ["bundles 2.0 -> 2.2"]
    assert "nothing is recorded" in tpu_schedule.grown(then, None)[0]


def test_a_memory_is_its_groups_and_a_share_of_its_segment():
    """What runs once for a row (many stores, no product), or for few groups, is left out."""
    region = lambda kind, at, bundles, products=0, stores=0, inside=(): llo.Region(
        kind, at, at + 1, inside=list(inside), own=Counter(bundles=bundles, products=products, VST=stores)
    )
    groups = region("loop", 4, 640, 32, inside=[region("when", 5, 400, stores=99), region("when", 6, 64, 8)])
    body = region("when", 3, 200, inside=[groups])
    grid = region("loop", 1, 56, inside=[region("when", 2, 500, stores=99), body])
    facts = schedules_neural_memory.facts(region("kernel", 0, 7, inside=[grid]), "v6e", heads=2, rows=32, segment=128)
    assert facts["bundles"] == (640 + 64) / (2 * 32) + (56 + 200) / (2 * 128)
    assert facts["matrix"] == 40 * llo.CYCLES["v6e"] / llo.UNITS["v6e"] / (2 * 32)


def test_what_is_done_again_is_beside_the_step():
    """Nor does what runs once for a sequence count: the first step's tables, the last step's state."""
    region = lambda kind, at, end, bundles, products=0, stores=0, inside=(): llo.Region(
        kind, at, end, inside=list(inside), own=Counter(bundles=bundles, products=products, VST=stores)
    )
    level = region("when", 40, 50, 7, 4, 30)
    again = region("when", 30, 60, 9, 0, 20, [region("loop", 35, 55, 500, 16, 99, [level])])
    once = region("when", 10, 20, 48, stores=99)
    body = region("when", 5, 90, 1000, 32, 99, [once, again, region("when", 70, 75, 24)])
    kernel = region("kernel", 0, 99, 7, inside=[region("loop", 1, 95, 76, inside=[body])])
    facts = schedules_linear_recurrence.facts(kernel, "v6e", 100)
    assert facts["bundles"] == (1000 + 24 + 76 + 9) / 100
    assert facts["matrix"] == 32 * llo.CYCLES["v6e"] / llo.UNITS["v6e"] / 100
    assert (facts["again"], facts["once"]) == (507, 48)


def test_an_iteration_is_its_loop_over_tiles():
    """Other passes, and what an iteration has beside the loop, are apart; the estimate runs 16 of them."""
    region = lambda kind, at, end, bundles, products=0, inside=(): llo.Region(
        kind, at, end, inside=list(inside), own=Counter(bundles=bundles, products=products)
    )
    looped = lambda at, turn: region("when", at, at + 3, 0, 0, [region("loop", at, at + 3, turn, 4)])
    sweep = lambda at, opening, turn, odd: region(
        "when", at, at + 9, opening, 1, [looped(at + 1, turn), region("when", at + 5, at + 8, odd, 2)]
    )
    solver = region("loop", 19, 30, 50, 0, [sweep(20, 20, 200, 60)])
    body = region("when", 2, 50, 30, 0, [region("loop", 3, 9, 100, 10), solver, sweep(40, 10, 80, 40)])
    kernel = region("kernel", 0, 60, 5, 0, [region("loop", 1, 55, 7, 0, [body])])
    facts = schedules_local_linear.facts(kernel, "v6e", Blocks(128, 128, 128, 128), 384)
    assert (facts["bundles"], facts["once"], facts["passes"]) == (6.25, 20 + 60 + 50 - 100, 100 / 16 + 80 / 32)
    turns, odds, tiles = 0 + 1 + 1, 1 + 0 + 1, 1 + 2 + 3  # of three tiles of rows
    iterations = 16 * (3 * (50 + 20) + turns * 200 + odds * 60)
    total = 3 * (7 + 30) + tiles * 100 + 3 * 10 + turns * 80 + odds * 40 + iterations
    assert facts["causal_cycles"] == {"384": total}


@tiers.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@tiers.parametrize(
    "cases", CHECKED := ["causal", "linear_recurrence: constant", "flow_attention: documents"], CHECKED[1:2]
)
def test_no_schedule_has_grown(cases, chip="v6e"):
    """Of causal flash attention and of recurrences, by more than 5 % of what is recorded for these versions.

    One generation stands for all: `python -m benchmarks.tpu_schedule --check` compiles for the others.
    """
    table = tuning.table(chip, "schedule")
    if table["versions"] != tpu_schedule.versions():
        pytest.skip(f"schedules are recorded for {table['versions']}, these are {tpu_schedule.versions()}")
    named = ["--cases", *[cases] * (cases == "causal"), "--tiles", "--recurrences", *[cases] * (cases != "causal")]
    command = ["-m", "benchmarks.tpu_schedule", "--check", "--chips", chip, *named]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("flash" if cases == "causal" else cases.split(":")[0]) == 2
