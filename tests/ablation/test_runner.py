"""Plans are run: interleaved, resumable, with no run repeated, and a failed arm costs only itself."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import rich.console

from attnlab import config as config_lib
from attnlab.ablation import announce, gather, plan, schedule, self_test, synthetic, worker
from attnlab.ablation.plan import PlanConfig
from attnlab.ablation.progress import Live
from attnlab.ablation.state import Log, View
from attnlab.train.checkpoints import Checkpoints
from tests import tiers
from tests.ablation import plans
from tests.flags import environment
from tests.train.runs import ROOT


def names(found, event):
    return [e["run"] for e in found if e["event"] == event]


def test_a_plan(tmp_path, attnlab, source):
    """Arms take turns, seeds share a program, a diverging arm is told and not fatal (3), and nothing is run again."""
    arms = {"plain": {}, "rows": {"data.shuffle": False}, "bad": {"optimizer.learning_rate": 1e20}}
    arms["bad"] |= {"model.mixers.M": "gated"}
    tree = plans.tree(source, arms=arms, equal={"what": "tokens"})
    tree["base"]["train"]["max_nonfinite"] = 2
    path, work = plans.write(tmp_path / "plan.py", tree), tmp_path / "w"
    command = ("ablate", "--config", path, "--workdir", work, "--processes", 1)
    code, out, err = attnlab(*command)
    assert code == 3, out + err
    found = plans.events(work)
    order = [f"arms/{arm}/seed{seed}" for seed in (0, 1) for arm in arms]
    assert names(found, "started") == order
    assert names(found, "failed") == [n for n in order if "bad" in n]
    failed = next(e for e in found if e["event"] == "failed")
    assert "not finite" in failed["reason"] and failed["tail"]
    assert "failed: bad/seed0" in out and (work / "report.html").is_file()
    results = json.loads((work / "results.json").read_text())
    differing = {arm: sorted(node["config_diff"]) for arm, node in results["plan"]["arms"].items()}
    assert differing["rows"] == ["data.shuffle"]
    assert differing["bad"] == ["model.mixers.M.name", "optimizer.learning_rate"]  # no knob at its default
    assert results["plan"]["hash"] == json.loads((work / "plan.json").read_text())["hash"]
    assert results["plan"]["equal"]["residual"] == {"plain": 0, "rows": 0, "bad": 0}
    by_name = {(r["arm"], r["seed"]): r for r in results["runs"]}
    assert by_name["bad", 1]["status"] == "failed" and by_name["rows", 1]["status"] == "done"
    last = plans.curves(work)["arms/rows/seed1"][-1]
    assert by_name["rows", 1]["final"]["heldout_loss"] == last["heldout_loss"] and last["step"] == 6
    assert by_name["plain", 0]["tokens"] == by_name["plain", 1]["tokens"] == 6 * 8 * 32
    comparison = next(c for c in results["comparisons"] if c["arm"] == "rows")
    assert comparison["pairs"] == [0, 1] and comparison["margin"] == 0.1
    assert attnlab(*command)[0] == 3 and len(plans.events(work)) == len(found)
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120)
    with Live(announce.read(work), work, console):
        pass
    shown = {line.split()[0]: line for line in console.file.getvalue().splitlines() if line.strip()}
    assert "2/2" in shown["rows"] and "heldout_loss" in shown["rows"] and "0/2" in shown["bad"]
    code, out, err = attnlab(*command[:-2], "--config.seeds=[0,2]")
    assert code == 2 and "holds another plan" in err
    assert attnlab(*command, "--retry-failed")[0] == 3
    again = plans.events(work)[len(found) :]
    assert names(again, "started") == names(again, "retry") == names(found, "failed")


def test_dry_run(tmp_path, attnlab, source):
    """A dry run prices the plan and leaves nothing."""
    tuning = {"rates": [0.005, 0.01, 0.02], "seeds": [9], "share": 0.5}
    path = plans.write(tmp_path / "plan.py", plans.tree(source, tuning=tuning))
    code, out, err = attnlab("ablate", "--config", path, "--workdir", tmp_path / "w", "--dry-run", "--json")
    assert code == 0, err
    priced = json.loads(out)
    assert priced["runs"] == 2 * 2 + 2 * 3 and priced["trials"] == 6
    assert priced["tokens"] == (4 * 6 + 6 * 3) * 8 * 32 and priced["hours"] > 0
    assert [row["arm"] for row in priced["arms"]] == ["plain", "gate"] and priced["arms"][1]["parameters"] > 0
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "args, says",
    [
        (("--self-test", "--config", "x.py"), "one of --config PATH and --self-test"),
        ((), "one of --config PATH and --self-test"),
        (("--config", "x.py", "--slice", "2/2"), "I from 0 to N - 1"),
        (("--config", "x.py", "--processes", "0"), "an integer from 1"),
    ],
)
def test_refused(tmp_path, attnlab, args, says):
    """A wrong command is refused by what is allowed."""
    code, _, err = attnlab("ablate", "--workdir", tmp_path / "w", *args)
    assert code == 2 and says in err


def cells_of(**changes):
    config = config_lib.build(PlanConfig, plans.tree("stdlib", **changes))
    return config, plan.cells(config)


def over(runs, value):
    """A log in which these runs are done, with the held-out loss that `value` gives them."""
    return View({r.name: [{"event": "done", "metrics": {"heldout_loss": value(r)}}] for r in runs})


def test_tuned_runs_come_after_the_search():
    """Trials of all arms first, on their own seeds; then reported runs at each arm's rate, or the reason why not."""
    tuning = {"rates": [0.01, 0.02, 0.04], "seeds": [9], "share": 0.5}
    config, cells = cells_of(tuning=tuning)
    first = schedule.schedule(config, cells, View({}))
    assert [r.name for r in first.runs][:2] == ["tuning/plain/lr0.01/seed9", "tuning/gate/lr0.01/seed9"]
    assert len(first.runs) == 6 and all(r.seed == 9 and r.config().train.steps == 3 for r in first.runs)
    assert [r.config().optimizer.learning_rate for r in first.runs[::2]] == tuning["rates"]
    loss = lambda r: None if r.cell.arm == "gate" else abs(r.rate - 0.02)
    after = schedule.schedule(config, cells, over(first.runs, loss))
    reported = [r for r in after.runs if r.name.startswith("arms/")]
    assert [r.name for r in reported][:2] == ["arms/plain/seed0", "arms/gate/seed0"] and not after.complete
    assert reported[0].config().optimizer.learning_rate == 0.02 and reported[0].config().train.steps == 6
    assert reported[1].reason == "every learning rate of the tuning failed"


def test_looks_end_a_plan():
    """Seeds are added up to a look only, and no more once the question is answered."""
    config, cells = cells_of(seeds=list(range(8)), looks=[4, 8])
    asked = []
    run = lambda view, answer: schedule.schedule(config, cells, view, lambda n, _: asked.append(n) or answer)
    first = run(View({}), True)
    assert len(first.runs) == 8 and not asked
    view = over(first.runs, lambda r: 1.0)
    stopped, goes_on = run(view, True), run(view, False)
    assert stopped.complete and stopped.look == 4 and stopped.seeds == (0, 1, 2, 3)
    assert len(goes_on.runs) == 16 and not goes_on.complete and asked == [4, 4]


@pytest.mark.parametrize("far, decided", [(True, True), (False, False)])
def test_a_look_at_real_losses(tmp_path, source, far, decided):
    """Four seeds answer a question whose arms are far apart, by the comparisons of the report, and no other."""
    config = config_lib.build(PlanConfig, plans.tree(source, seeds=list(range(8)), looks=[4, 8]))
    made = announce.announce(config, plan.cells(config), tmp_path / "w", print)
    noise = (0.1, -0.2, 0.3, -0.1)
    loss = lambda r: 4.0 + 0.01 * r.seed + (r.cell.arm == "gate") * (noise[r.seed] - 3.0 * far)
    log = Log(tmp_path / "w")
    for run in schedule.schedule(config, made.cells, View({})).runs:
        log.write("done", run.name, metrics={"heldout_loss": loss(run)}, tokens=1, seconds=1.0, device="cpu")
    assert gather.answered(made, tmp_path / "w")(4, log.read()) == decided


def test_slices_take_every_run_once():
    """Whatever their number, each run is of one slice, by its name alone."""
    config, cells = cells_of(seeds=list(range(20)))
    runs = schedule.planned(config, cells)
    for count in (1, 3, 7):
        shares = [[r.name for r in runs if worker.Part("w", i, count).has(r)] for i in range(count)]
        assert sorted(sum(shares, [])) == sorted(r.name for r in runs) and max(map(len, shares)) < 40 / count + 12


def test_a_run_that_ends_its_process_is_not_tried_for_ever(tmp_path):
    """After three tries at one step it has failed; progress, a signal or a retry begins the count anew."""
    config, cells = cells_of()
    run, log = schedule.planned(config, cells)[0], Log(tmp_path)
    for event in ("started", "started", "stopped", "started", "started"):
        log.write(event, run.name, step=0)
    worker.require_progress(run, 0, log)
    log.write("started", run.name, step=0)
    worker.require_progress(run, 4, log)
    with pytest.raises(worker.UserError, match="ended 3 times after step 0"):
        worker.require_progress(run, 0, log)
    log.write("retry", run.name)
    worker.require_progress(run, 0, log)


@tiers.exhaustive
@pytest.mark.timeout(1800)
def test_killed_and_stopped(tmp_path, attnlab, source):
    """Killed with SIGKILL, all processes, and stopped, a plan gives an unbroken one's curves bitwise, that one's in one
    process. No run is done twice."""
    tree = plans.tree(source)
    tree["base"]["train"] |= {"steps": 120, "save_every": 20, "log_every": 20, "eval_every": 60}
    path = plans.write(tmp_path / "plan.py", tree)
    command = lambda work: [sys.executable, "-m", "attnlab", "ablate", "--config", path, "--workdir", work,
                            "--processes", "2"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    settings = {"cwd": ROOT, "env": {**environment(), **cache}}
    code, _, err = attnlab(*command(whole)[3:-1], "1")
    assert code == 0, err
    log = Log(broken)
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command(broken), **settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = collections.Counter(names(plans.events(broken), "started")) if log.path.exists() else {}
        wait_for(lambda: in_the_middle(broken, log, before), 400)
        if number == signal.SIGTERM:  # saves
            process.terminate()
            assert process.wait(120) == 128 + signal.SIGTERM and names(plans.events(broken), "stopped")
            continue
        held = log.held()
        os.kill(process.pid, signal.SIGSTOP)  # so that it starts no others
        for who in held.values():
            os.kill(who["pid"], signal.SIGKILL)
        process.kill()
        process.wait()
    done = subprocess.run(command(broken), **settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = plans.events(broken)
    assert sorted(names(found, "done")) == sorted(f"arms/{arm}/seed{seed}" for arm in tree["arms"] for seed in (0, 1))
    assert any(e["step"] > 0 for e in found if e["event"] == "started")
    assert plans.curves(broken) == plans.curves(whole)
    figures = [json.loads((w / "results.json").read_text())["comparisons"] for w in (whole, broken)]
    assert figures[0] == figures[1]


def in_the_middle(workdir, log, before):
    """Whether a run that was begun since has got on, to another checkpoint, and is not over."""
    view = log.read()
    begun = [n for n in view.events if view.count(n, "started") > before.get(n, 0) and view.status(n) == "open"]
    got = lambda n: max(Checkpoints(workdir / n).steps(), default=0)
    return any(got(n) > view.last(n, "started")["step"] for n in begun)


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.02)


@tiers.exhaustive
@pytest.mark.slow
def test_self_test(tmp_path, attnlab, monkeypatch):
    """Arms that are the same but for their seeds are compared by Welch's test, and both rates decide (1: not held)."""
    rate = synthetic.Rates(10_000, rejections=0.07, claims=0.07, better=0.03)
    monkeypatch.setattr(self_test, "PLANS", 2)
    monkeypatch.setattr(synthetic, "null_rate", lambda: rate)
    code, out, err = attnlab("ablate", "--self-test", "--workdir", tmp_path, "--json")
    found = json.loads(out)
    assert code == 1 and not found["holds"] and found["synthetic"] == 0.07, err
    assert len(found["p"]) == 2 and all(0 < p <= 1 for p in found["p"])
    results = json.loads((tmp_path / "plan0" / "results.json").read_text())
    assert results["comparisons"][0]["test"] == "Welch" and results["plan"]["seeds"] == [0, 1, 2]
    monkeypatch.setattr(synthetic, "null_rate", lambda: dataclasses.replace(rate, rejections=0.05))
    code, out, _ = attnlab("ablate", "--self-test", "--workdir", tmp_path, "--json")
    assert code == 0 and json.loads(out)["holds"]
