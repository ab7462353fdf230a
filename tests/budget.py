"""What each mixer's tests cost: printed at the end of a run, beside the budget that docs/mixers/README.md states."""

from __future__ import annotations

import collections
import pathlib
import re
import time

import pytest

BUDGET = 12.0  # CPU seconds of one mixer's laws and identities


def mixer_of(item: pytest.Item, names: list[str]) -> str | None:
    """The mixer that a test of tests/mixers is of: its config's, its name's, or its file's."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    name = getattr(params.get("config"), "node_name", params.get("name"))
    name = re.sub("^test_", "", item.path.stem) if name is None else name
    return name if name in names else None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    if item.path.parent != pathlib.Path(__file__).parent / "mixers":
        yield
        return
    from attnlab import mixers

    name, before = mixer_of(item, mixers.names()), time.process_time()
    item.user_properties.append(("mixer", (name, before)))
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    started = dict(item.user_properties).get("mixer")
    if started and call.when == "teardown":  # reports travel from pytest-xdist's workers with their properties
        report.user_properties = [("mixer_cpu", (started[0], time.process_time() - started[1]))]


def pytest_terminal_summary(terminalreporter):
    spent = collections.Counter()
    for report in terminalreporter.getreports(""):
        mixer, seconds = dict(report.user_properties).get("mixer_cpu", (None, 0))
        if mixer:
            spent[mixer] += seconds
    if spent:
        over = sum(seconds > BUDGET for seconds in spent.values())
        terminalreporter.section(f"CPU seconds by mixer; {over} above the budget of {BUDGET:.0f}")
        told = [f"{name} {seconds:.0f}{'!' * (seconds > BUDGET)}" for name, seconds in spent.most_common()]
        terminalreporter.write_line(", ".join(told))
