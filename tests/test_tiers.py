"""What every run of the suite tries, and what only `--exhaustive` does."""

import ast
import pathlib
import types

import pytest

from tests import conftest, costs, tiers


def collected(*arguments, exhaustive=False):
    """Cases of a test, each by its id, that pytest would run."""
    mark = tiers.parametrize("n", [1, 2, 3], often=[2])
    marks = [bool(getattr(case, "marks", ())) for case in mark.args[1]]
    items = [
        types.SimpleNamespace(
            nodeid=f"tests/a.py::test[{n}]",
            path=pathlib.Path("tests/a.py"),
            get_closest_marker=lambda name, marked=marked: marked and name == "exhaustive",
        )
        for n, marked in zip((1, 2, 3), marks, strict=True)
    ]
    left_out = []
    hook = types.SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    option = lambda name, default=None: exhaustive if name == "--exhaustive" else default
    config = types.SimpleNamespace(args=list(arguments), hook=hook, getoption=option)
    everything = list(items)
    conftest.pytest_collection_modifyitems(config, items)
    assert [item for item in everything if item not in items] == left_out
    return [item.nodeid[-2] for item in items]


def test_what_is_often_tried_is_all_that_a_plain_run_tries():
    assert collected("tests") == ["2"] and collected("tests", exhaustive=True) == ["1", "2", "3"]


def test_a_case_that_is_named_runs():
    assert collected("tests/a.py::test[3]") == ["2", "3"] and collected("tests/a.py::test") == ["2"]


def test_what_is_no_case_is_refused():
    with pytest.raises(ValueError, match=r"\[4\] are none of the cases"):
        tiers.parametrize("n", [1, 2, 3], often=[4])


def test_cases_are_named_by_their_ids():
    """Of two tests one has a case that is often tried; a name that no case has, any more, is an error."""
    mark = tiers.often("2", "b-1").mark
    of = lambda marked: lambda name: mark if marked and name == "often" else None
    item = lambda id, marked: types.SimpleNamespace(nodeid=f"tests/a.py::{id}", get_closest_marker=of(marked))
    items = [item("test[1]", True), item("test[2]", True), item("test[b-1]", True), item("other[1]", False)]
    assert tiers.left_out(items, whole=True) == items[:1]
    with pytest.raises(pytest.UsageError, match=r"no cases: \[\('tests/a.py::test', 'b-1'\)\]"):
        tiers.left_out(items[:2], whole=True)
    assert tiers.left_out(items[:1], whole=False) == items[:1]


def test_what_is_slow_is_there():
    """Each test that tests/slow.txt names is in its file; none twice."""
    root, named = pathlib.Path(__file__).parents[1], costs.FILE.read_text().split()
    assert named == sorted(costs.slow())
    files = {name.partition("::")[0] for name in named}
    there = {
        f"{file}::{node.name}"
        for file in files
        for node in ast.walk(ast.parse((root / file).read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert not (gone := sorted(set(named) - there)), f"take them out of {costs.FILE.name}, or name them anew: {gone}"


def test_costs_tell_what_is_slow(tmp_path):
    """By the dearest case; laws that every mixer is held to are slow by their mixer."""
    (tmp_path / "costs").write_text(
        "0.10\ttests/a.py::test_a[1]\n1.20\ttests/a.py::test_a[2]\n0.50\ttests/a.py::test_b\n"
        "9.00\ttests/mixers/test_contract.py::test_c[titans-default]\n"
    )
    found = costs.read(tmp_path / "costs")
    assert costs.dear(found) == ["tests/a.py::test_a"]
    assert list(costs.summary(found, 1)) == ["4 tests, 11 CPU seconds", "    9.0 tests/mixers/test_contract.py"]
