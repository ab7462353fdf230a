"""What every run of the suite tries, and what only `--exhaustive` does."""

import types

import pytest

from tests import conftest, tiers


def collected(*arguments, exhaustive=False):
    """Cases of a test, each by its id, that pytest would run."""
    mark = tiers.parametrize("n", [1, 2, 3], often=[2])
    marks = [bool(getattr(case, "marks", ())) for case in mark.args[1]]
    items = [
        types.SimpleNamespace(nodeid=f"tests/a.py::test[{n}]", get_closest_marker=lambda name, marked=marked: marked)
        for n, marked in zip((1, 2, 3), marks, strict=True)
    ]
    left_out = []
    hook = types.SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config = types.SimpleNamespace(args=list(arguments), hook=hook, getoption=lambda name: exhaustive)
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
