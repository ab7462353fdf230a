"""The commands behind the committed tables of compiled programs: what they compile, how they judge, what they write."""

from __future__ import annotations

import json
import math
import pathlib
import subprocess

import pytest

from attnlab.train import config as run_config
from attnlab.train.hardware import CHIPS
from benchmarks import compile_table, scaling

DOCS = pathlib.Path(__file__).parent.parent.parent / "docs"


def report(**changes):
    """A report as `attnlab compile --json` prints it, with one copy of a model on 16 chips."""
    made = {
        "devices": 16,
        "mesh": {"data": 1, "fsdp": 16, "context": 1, "tensor": 1},
        "parameters": 1_600,
        "memory": {"arguments": 2.0**30, "temporaries": 2.0**31, "total": 3.5 * 2.0**30, "peak": 2.5 * 2.0**30,
                   "fits": True, "spare": 2.0**30},
        "flops": {"compiler": 100.0, "kernels": 10.0, "declared": 90.0, "compiler_loops_once": 20.0},
        "floor_seconds": {"compute": 2.0, "memory": 1.0, "interconnect": 0.5},
        "bound": "compute",
        "kernels": {"flash_forward": 2, "flash_backward": 1},
        "interconnect_bytes": 1_000.0,
        "compile_seconds": 50.0,
        "compile_cpu_seconds": 60.0,
    }  # fmt: skip
    return made | changes


def result(name="1b-softmax-v5e:16x16", **changes):
    row = next(r for r in compile_table.rows() if r.name == name)
    facts = {"name": name, "size": row.size, "mixer": row.mixer, "topology": row.topology, "sequences": row.sequences,
             "remat": row.remat}  # fmt: skip
    return facts | changes


def test_all_rows_are_there():
    """Two sizes, six mixers, three topologies; every config can be built, and its batch shared out."""
    rows = compile_table.rows()
    assert len({row.name for row in rows}) == len(rows)
    wanted = {(s, m, t) for s in ("1b", "7b") for m in compile_table.MIXERS for t in compile_table.SEQUENCES}
    assert len(wanted) == 36 and wanted <= {(r.size, r.mixer, r.topology) for r in rows if r.name.startswith(r.size)}
    assert rows[0].size == "7b" and rows[0].mixer == "softmax"
    assert math.isclose(compile_table.devices_of("v5p:4x8x8"), 256)
    for row in (rows[0], rows[-1]):
        command = row.command()
        overrides = [a.removeprefix("--config.") for a in command if a.startswith("--config.")]
        config = run_config.load(command[command.index("--config") + 1], overrides)
        assert config.data.batch == row.sequences * compile_table.devices_of(row.topology)
        assert config.data.length == 4096 and config.model.remat == row.remat
        assert row.topology.partition(":")[0] in CHIPS


def test_a_row_says_what_there_is_of_it(monkeypatch):
    """A report; no JSON; too late."""
    row = compile_table.rows()[0]

    def done(stdout="", stderr=""):
        return lambda *args, **kwargs: subprocess.CompletedProcess(args, 1, stdout, stderr)

    monkeypatch.setattr(subprocess, "run", done(json.dumps(report())))
    assert compile_table.run(row, 5)["report"]["devices"] == 16
    monkeypatch.setattr(subprocess, "run", done(stderr="one\nattnlab compile: the reason\n"))
    assert compile_table.run(row, 5)["failed"] == "attnlab compile: the reason"

    def late(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired(args, timeout)

    monkeypatch.setattr(subprocess, "run", late)
    assert compile_table.run(row, 5)["failed"] == "stopped after 5 s"


def test_rows_of_the_table():
    """What fits, what does not and by how much, what took too long, what there is no program of."""
    short = report()["memory"] | {"fits": False, "spare": -(2.0**30)}
    refused = {"fits": False, "hbm": 2.0**34, "peak": 2.0**35, "spare": -(2.0**34), "total": None}
    made = [
        result(report=report()),
        result(report=report(memory=short, compile_cpu_seconds=601.0)),
        result(report={"memory": refused, "compile_seconds": 3.0, "compile_cpu_seconds": 4.0}),
        result(failed="stopped after 600 s"),
    ]
    columns, _, *lines = compile_table.table(made)
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {columns.count("|") - 1}
    assert cells[0][5:9] == ["3.00", "2.50", "yes", "100 + 10"] and cells[0][-1] == "50 (60)"
    assert cells[0][10] == "flash_forward 2, flash_backward 1"
    assert cells[1][7] == "no, by 1.00 GiB" and cells[1][-1] == "50 (601): over 600"
    assert cells[2][6:8] == ["32.00", "no, by 16.00 GiB"]
    assert cells[3][7] == "no program: stopped after 600 s"


def test_it_goes_on_where_it_stopped(monkeypatch, tmp_path):
    """Rows that are in the file are not compiled again; the tables go between their marks and nothing else changes."""
    results, document = tmp_path / "r.json", tmp_path / "d.md"
    text = "head\n" + "".join(
        f"<!-- {n} -->\nold\n<!-- end -->\nand {n}\n" for n in ("llama", "layers", "1b", "7b", "hopper")
    )
    document.write_text(text)
    rows = compile_table.rows()
    results.write_text(json.dumps([result(r.name, report=report()) for r in rows[2:]]))
    asked = []

    def run(row, timeout):
        asked.append(row.name)
        return result(row.name, report=report())

    monkeypatch.setattr(compile_table, "run", run)
    arguments = ["x", "--results", str(results), "--document", str(document)]
    monkeypatch.setattr("sys.argv", arguments)
    assert compile_table.main() == 0
    assert asked == [r.name for r in rows[:2]] and len(json.loads(results.read_text())) == len(rows)
    written = document.read_text()
    assert "old" not in written and written.startswith("head\n") and written.endswith("and hopper\n")
    monkeypatch.setattr("sys.argv", [*arguments, "--only", "7b-titans"])
    compile_table.main()
    assert asked[2:] == [r.name for r in rows if "7b-titans" in r.name]
    assert document.read_text() == written
    document.write_text("no marks")
    with pytest.raises(SystemExit, match="<!-- llama -->"):
        compile_table.write([], document)


def grown(chips, copies, **changes):
    """The same program on more chips: gradients of `parameters` / 16, fp32, are summed over the copies."""
    mesh = report()["mesh"] | {"data": copies}
    sent = 1_000.0 + 2 * (4 * 1_600 / 16) * (copies - 1) / copies
    return report(devices=chips, mesh=mesh, **({"interconnect_bytes": sent} | changes))


def scaled(*reports):
    return scaling.points([{"mixer": "softmax", "report": r} for r in reports])


def test_what_the_axis_implies_is_no_growth():
    """Copies send 2 (n - 1) / n of their gradients, and that alone."""
    found = scaled(grown(64, 4), report(), grown(256, 16))
    assert [p.chips for p in found] == [16, 64, 256]
    for point in found:
        assert all(math.isclose(growth, 0, abs_tol=1e-12) for growth in point.growth().values())
    assert scaling.judge(found) == []


@pytest.mark.parametrize("percent, said", [(4, 0), (6, 1)])
@pytest.mark.parametrize("cost", scaling.COSTS)
def test_growth_is_judged(cost, percent, said):
    """More than 5 % beyond what is implied is said, with the cost."""
    factor, other = 1 + percent / 100, grown(64, 4)
    if cost == "flops":
        other["flops"] = {name: factor * value for name, value in other["flops"].items()}
    elif cost == "memory":
        other["memory"] = other["memory"] | {k: factor * other["memory"][k] for k in ("arguments", "temporaries")}
    else:
        other["interconnect_bytes"] *= factor
    lines = scaling.judge(scaled(report(), other))
    assert len(lines) == said and all(f"softmax on 64 chips: {cost} grows by 6.0 %" in line for line in lines)


def test_plot_and_table(tmp_path):
    """A picture, and a row for every program."""
    pytest.importorskip("matplotlib")
    found = scaled(report(), grown(64, 4))
    scaling.plot(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    lines = scaling.table(found)
    assert len(lines) == 2 + 2 and "data 4 x fsdp 16" in lines[-1]


@pytest.mark.parametrize("chips", scaling.TOPOLOGIES)
def test_points_are_the_chips_they_say(chips):
    """Topologies multiply to the chips; every chip has the same sequences."""
    row = scaling.row("gated", chips)
    assert compile_table.devices_of(row.topology) == chips
    settings = dict(a.removeprefix("--config.").split("=") for a in row.command() if a.startswith("--config."))
    assert int(settings["mesh.data"]) * int(settings["mesh.fsdp"]) == chips
    assert int(settings["data.batch"]) == scaling.SEQUENCES * chips


@pytest.mark.parametrize("write", ["compile_results", "scaling"])
def test_committed_tables_are_those_of_the_rows(write, tmp_path):
    """The documents hold what the commands write from the committed rows; no cost grows more than is allowed."""
    committed = (DOCS / f"{write}.md").read_text()
    rows = json.loads((DOCS / f"{write}.json").read_text())
    if write == "scaling":
        found = scaling.points(rows)
        assert {(p.mixer, p.chips) for p in found} == {(m, n) for m in scaling.MIXERS for n in scaling.TOPOLOGIES}
        assert scaling.judge(found) == []
        assert compile_table.between_marks(committed, "scaling", scaling.table(found)) == committed
    else:
        document = tmp_path / "d.md"
        document.write_text(committed)
        compile_table.write(rows, document)
        assert document.read_text() == committed
