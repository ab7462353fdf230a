"""`attnlab tune`: candidates, what is kept, what is refused, and tables of one's own."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys

import pytest

from attnlab import cli
from attnlab.errors import TrainingFailed, UserError
from attnlab.launch import tune
from attnlab.launch.schedules import Shape
from kernels_pallas import tuning
from kernels_pallas.tuning import BackwardBlocks, ForwardBlocks
from tests import tiers

SHAPE = Shape(1, 512, 1, 1, 16, "float32")


def job(path, kernels=("flash_forward",), **changes):
    return tune.Job(kernels, SHAPE, path, **{"count": 2, "rounds": 3} | changes)


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_candidates_are_near_what_is_in_use(kernel):
    """The tiles in use first; then what differs in one field; all of them possible, none twice."""
    now, *rest = tune.candidates(kernel, "v6e", 4096, 1000)
    assert now == getattr(tuning, f"{kernel.removeprefix('flash_')}_blocks")("v6e", 4096, 4096)
    changed = [sum(a != b for a, b in zip(dataclasses.astuple(now), dataclasses.astuple(x))) for x in rest]
    assert changed == sorted(changed) and changed[0] == 1 and changed.count(1) >= 3
    assert len({now, *rest}) == 1 + len(rest) > 12
    for blocks in rest:
        tuning.check(blocks)
        assert 4096 % blocks.rows == 0 == 4096 % blocks.keys


def test_timing_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A call that ends in its second round leaves the first; the next takes what is missing of all candidates."""
    taken, limit = [], [3]

    def clock(call, repeats):
        if len(taken) == limit[0]:
            raise KeyboardInterrupt
        taken.append(call)
        return 1.0 if len(taken) % 2 else 0.5

    programs = lambda kernel, shape, kind, tried, interpret: ((b, lambda b=b: 0.0, None) for b in tried)
    monkeypatch.setattr(tune, "_compiled", programs)
    monkeypatch.setattr(tune, "_differ", lambda a, b: None)
    monkeypatch.setattr(tune, "_time", lambda call, repeats: clock(call, repeats) if repeats != 1 else 1e-3)
    said = []
    with pytest.raises(KeyboardInterrupt):
        tune.timed(job(tmp_path), said.append, kind="v6e")
    path = tmp_path / "v6e" / "flash_forward.json"
    kept = json.loads(path.read_text())
    assert [entry["figures"] for entry in kept["candidates"]] == [[0.5], [1.0]]
    assert kept["default"] == kept["candidates"][0]["blocks"]
    limit[0] = 100
    (table,) = tune.timed(job(tmp_path), said.append, kind="v6e").values()
    assert len(taken) == 3 + 4 and all(len(figures) == 3 for figures in table.figures.values())
    assert any("round 3/3" in line for line in said)
    with pytest.raises(UserError, match="found with shape.*another --out"):
        tune.timed(dataclasses.replace(job(tmp_path), shape=Shape()), said.append, kind="v6e")
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        tune.timed(job(tmp_path), said.append, kind="v6e")


def test_kernels_are_timed(tmp_path, monkeypatch):
    """Both kernels, interpreted; a candidate whose results differ, and one that does not compile, are left out."""
    fields = {"rows": (128,), "keys": (128, 256), "sub_rows": (128,), "sub_keys": (128,)}
    monkeypatch.setattr(tune, "_TRIED", {"flash_forward": fields | {"ones": (True,)}, "flash_backward": fields})
    monkeypatch.setattr(tune, "_SECONDS", 1e-9)
    small = dict(rows=128, keys=128, sub_rows=128, sub_keys=128)
    monkeypatch.setattr(tuning, "forward_blocks", lambda *a: ForwardBlocks(**small))
    monkeypatch.setattr(tuning, "backward_blocks", lambda *a: BackwardBlocks(**small))
    of = lambda **more: dataclasses.replace(job(tmp_path, **more), shape=dataclasses.replace(SHAPE, length=256))
    said = []
    tables = tune.timed(of(kernels=tune.KERNELS, rounds=1), said.append, kind="v6e", interpret=True)
    for kernel, table in tables.items():
        assert len(table.figures) == 2 and not table.failed
        assert all(seconds > 0 for (seconds,) in table.figures.values())
        assert json.loads((tmp_path / "v6e" / f"{kernel}.json").read_text()) == table.report()

    def programs(kernel, shape, kind, tried, interpret):
        yield tried[0], lambda: tune.jnp.ones(3), None
        yield tried[1], lambda: tune.jnp.zeros(3), None

    monkeypatch.setattr(tune, "_compiled", programs)
    (table,) = tune.timed(dataclasses.replace(of(), out=tmp_path / "b"), said.append, kind="v6e").values()
    assert len(table.figures) == 1 and "not those" in next(iter(table.failed.values()))
    refuse = lambda kernel, shape, kind, tried, interpret: ((b, lambda: None, "out of VMEM") for b in tried)
    monkeypatch.setattr(tune, "_compiled", refuse)
    with pytest.raises(TrainingFailed, match="out of VMEM"):
        tune.timed(dataclasses.replace(of(), out=tmp_path / "c"), said.append, kind="v6e")


@pytest.mark.parametrize("arguments, says", [
    (["flesh", "--target", "v6e"], "kernel 'flesh'.*allowed: flash_forward, flash_backward"),
    (["--target", "v9"], "--target 'v9'.*allowed: v5e, v5p, v6e, tpu7x"),
    (["--target", "v6e", "--length", "1000"], "--length 1000.*multiples of 512"),
    (["--target", "v6e", "--heads", "3", "--kv-heads", "2"], "--kv-heads 2.*divisors of --heads 3"),
    ([], "no TPU is here, the platform is cpu; --target CHIP"),
])  # fmt: skip
def test_refusals(arguments, says, tmp_path, capsys):
    """Before anything is compiled, with what is allowed; nothing is written."""
    assert cli.main(["tune", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, says", [
    ('{"default": {"rows": 100}}', "rows=100"), ('{"default": {"row": 512}}', "allowed: rows: int"), ("{", "no JSON"),
    ("[]", "holds list"),
])  # fmt: skip
def test_tables_of_ones_own(text, says, tmp_path, monkeypatch, capsys):
    """They go before the shipped ones, file by file; what cannot be used is said before anything runs."""
    shipped = tuning.forward_blocks("v6e", 4096, 4096), tuning.backward_blocks("v6e", 4096, 4096)
    monkeypatch.setenv(tuning.OWN_TABLES, str(tmp_path))
    path = tmp_path / "v6e" / "flash_forward.json"
    path.parent.mkdir()
    path.write_text('{"default": {"rows": 256, "keys": 512, "sub_rows": 256, "sub_keys": 256, "ones": false}}')
    assert tuning.forward_blocks("v6e", 4096, 4096) == ForwardBlocks(256, 512, 256, 256, False) != shipped[0]
    assert tuning.backward_blocks("v6e", 4096, 4096) == shipped[1]
    assert tuning.forward_blocks("v5e", 4096, 4096) == ForwardBlocks(**tuning.table("v5e", "flash_forward")["default"])
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        tuning.forward_blocks("v6e", 4096, 4096)
    assert cli.main(["list"]) == 2 and says in capsys.readouterr().err
    monkeypatch.setenv(tuning.OWN_TABLES, str(tmp_path / "none"))
    assert cli.main(["list"]) == 2 and "is no folder" in capsys.readouterr().err


@tiers.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_ranked_for_a_chip_that_is_not_here(tmp_path):
    """By the compiler's schedule; the second call compiles nothing again."""
    command = [sys.executable, "-m", "attnlab", "tune", "flash_forward", "--target", "v6e", "--out", str(tmp_path),
               "--count", "2", "--length", "1024", "--batch", "16", "--json"]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)["flash_forward"]
    figures = [entry["figures"][0] for entry in report["candidates"]]
    assert figures == sorted(figures) and figures[0] > 1000 and report["default"] == report["candidates"][0]["blocks"]
    assert "1/2" in first.stderr and "2/2" in first.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert json.loads(again.stdout) == json.loads(first.stdout) and "2/2" not in again.stderr
