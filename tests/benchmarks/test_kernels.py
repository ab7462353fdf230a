"""`benchmarks.kernels` as far as a machine without a GPU goes: everything but the timing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernels, kernels_jax
from benchmarks.kernels_cases import PARITY, TIMED, Case
from benchmarks.kernels_recurrences import Recurrence
from kernels_pallas.flash_attention import definition
from tests import tiers


def test_it_needs_a_gpu(tmp_path, monkeypatch, capsys):
    """Exit code 2, and the way out, before anything is computed."""
    here = lambda worker, seconds, do: getattr(kernels_jax.Jax(dry=False), do)()
    monkeypatch.setattr(kernels.Worker, "ask", here)
    monkeypatch.setattr(sys, "argv", ["kernels", "--json", str(tmp_path / "k.json")])
    assert kernels.main() == 2
    said = capsys.readouterr()
    assert "jax sees none here; --dry-run" in said.err and not said.out and not list(tmp_path.iterdir())


@tiers.exhaustive
@pytest.mark.slow
def test_a_dry_run(tmp_path):
    """Every part runs in small or is lowered at full size; the file names who is absent; nothing in it is a figure."""
    path = tmp_path / "k.json"
    command = [sys.executable, "-m", "benchmarks.kernels", "--dry-run", "--json", str(path), "--cases",
               "64/64 documents", "192/128 causal", "128 causal sinks", "linear 64 data"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["complete"] and found["dry_run"] and found["jax"] and "tokamax" in found["absent"]
    (parity,) = found["parity"]
    assert not parity["failed"] and set(parity["errors"]) > {"o", "lse", "dq", "dk", "dv", "dsinks", "dgate"}
    rows = {(row["case"], row["peer"]): row for row in found["times"]}
    assert rows["192/128 causal", "ours"] == {"case": "192/128 causal", "peer": "ours", "lowered": True}
    assert "another width" in rows["192/128 causal", "cudnn"]["unsupported"]
    assert rows["linear 64 data", "ours"]["lowered"] and rows["linear 64 data", "xla"]["lowered"]
    assert ("linear 64 data", "cudnn") not in rows
    assert not found["ceilings"] and not any("ms" in row for row in found["times"])


def test_it_ends_in_time(tmp_path):
    """What there is no time for is named, and what was found is kept."""
    args = argparse.Namespace(minutes=0.0, dry_run=True, json=tmp_path / "k.json", cases=["128 causal cap"])
    run = kernels.Run(args)
    run.times(set())
    assert json.loads(args.json.read_text())["left_out"] == ["128 causal cap"]


def test_wrong_kernels_are_found(monkeypatch):
    """Values that are a percent off, gradients that are, and bits that differ from run to run."""
    case, server = PARITY[0], kernels_jax.Jax(dry=True)

    def off(q, k, v, **rest):
        o, lse = definition(q, k, v, **rest)
        return o * 1.02, lse

    monkeypatch.setattr(kernels_jax, "_kernel", lambda dry, case: off)
    assert {"o", "dq", "dv"} <= set(server.parity(case)["failed"])

    shift = iter(range(99))
    monkeypatch.setattr(kernels_jax, "_kernel", lambda dry, case: definition)
    both = kernels_jax._both
    unsteady = lambda run: lambda arrays: (lambda found: found | {"o": found["o"] + 1e-2 * next(shift)})(run(arrays))
    monkeypatch.setattr(kernels_jax, "_both", lambda attend, rest: unsteady(both(attend, rest)))
    assert server.parity(case)["differ_between_runs"] == ["o"]


def test_a_worker_that_hangs_or_dies_is_said():
    """And the next request gets a new one."""
    worker = kernels.Worker("jax", dry=True)
    worker._command = [sys.executable, "-c", "import sys, time; sys.stdin.readline(); time.sleep(60)"]
    assert worker.ask(1.0, do="about") == {"failed": "no answer in 1 s: ended"}
    worker._command = [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(3)"]
    assert worker.ask(20.0, do="about") == {"failed": "the process ended, with 3"}
    worker._command = [sys.executable, "-c", "input(); print('{\"fine\": 1}', flush=True); input()"]
    assert worker.ask(20.0, do="about") == {"fine": 1}
    worker.end()


@pytest.mark.parametrize("case", [TIMED[i] for i in (0, 1, 5, 6)], ids=lambda case: case.name)
def test_flops_are_of_pairs_that_are_seen(case):
    """Counted one by one in small; forward and backward are 3.5 forward passes."""
    small = dataclasses.replace(case, T=40, window=case.window and 7, B=2)
    starts, ends = small.bounds()
    seen = sum(int(e) - int(s) for s, e in zip(starts.ravel(), ends.ravel(), strict=True)) / len(starts)
    assert small.flops(False) == 2 * 2 * case.H * seen * (case.d + case.e)
    assert small.flops(True) == 3.5 * small.flops(False)


def test_rates_and_ratios():
    """Against the ceiling and the fastest of the others, those that are wrong left out."""
    args = argparse.Namespace(minutes=1.0, dry_run=False, json=None, cases=None)
    run = kernels.Run(args)
    run.found["ceilings"] = {"matmul_tflops": 800.0}
    case = Case("x", 1, 1000, 1, 1, 64, 64, "all")
    times = lambda ms: {"forward": {"ms": ms}, "both": {"ms": 4 * ms}}
    rows = [{"peer": "ours", **times(2.0)}, {"peer": "a", **times(1.0)}, {"peer": "b", **times(0.5), "wrong": True}]
    text = run.line(case, rows[0], rows)
    assert rows[0]["forward"]["of_best"] == 0.5 and rows[0]["both"]["of_best"] == 0.5
    assert rows[0]["forward"]["tflops"] == pytest.approx(2 * 1000**2 * 128 / 2e-3 / 1e12)
    assert "0.50 of best" in text and "WRONG" in run.line(case, rows[2], rows)


def test_arrays_are_the_same_for_everybody():
    """Whoever asks for a case's arrays."""
    case = TIMED[8].tiny()
    assert {n: x.shape for n, x in case.arrays().items()} == case.shapes()
    np.testing.assert_array_equal(case.arrays()["gate"], case.arrays()["gate"])
    assert kernels_jax._arrays(case)["q"].dtype == jnp.bfloat16


def test_recurrences_are_compared_by_what_they_compute():
    """Values that are a percent off are found, XLA's own are not; a case survives the way to a worker."""
    case, server = Recurrence("small", "linear_recurrence", 1, 9, 1, 8, 8, "data"), kernels_jax.Jax(dry=True)
    assert kernels.case_of(dataclasses.asdict(case)) == case
    assert not server.parity(case)["failed"]
    right = kernels_jax.in_jax

    def off(case, impl):
        run = right(case, impl)
        return (lambda **arrays: 1.02 * run(**arrays)) if impl == "chunked" else run

    exact = kernels_jax._gradients(right(case, "definition"))
    arrays = kernels_jax._arrays(case)
    xla, ours = (kernels_jax._gradients(f(case, "chunked"))(arrays) for f in (right, off))
    wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    assert {"o", "dq", "du"} <= set(kernels_jax.compared(exact(wide), xla, ours)[1])
