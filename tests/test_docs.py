"""docs/mixers/ tells of every mixer and every knob, and names tests that exist; docs/tasks.md of every task."""

from __future__ import annotations

import dataclasses
import pathlib
import re

import pytest

from attnlab import mixers, tasks

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs/mixers").glob("*.md"))}
INDEX = PAGES.pop("README")


@pytest.mark.parametrize("name", mixers.names())
def test_every_knob_is_told(name):
    """A mixer's page names each knob that its Config adds to those of the Config it derives from."""
    config = mixers.get(name).Config
    inherited = {key for base in config.__mro__[1:] for key in getattr(base, "__dataclass_fields__", ())}
    for field in dataclasses.fields(config):
        if field.name not in inherited:
            assert f"`{field.name}`" in PAGES[name], f"docs/mixers/{name}.md does not tell of {field.name}"


def test_pages_are_of_mixers():
    """Each has a page, and the index a row with its source; what is ours is called so, in the docs and docstring."""
    assert sorted(PAGES) == mixers.names()
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \|", INDEX, re.MULTILINE)
    assert rows == [(name, name) for name in mixers.names()]
    for name, text in PAGES.items():
        if mixers.get(name).extension:
            assert f"**Extension, not in the paper:** {mixers.get(name).extension}." in text, name
            assert "xtension, not in the paper" in mixers.get(name).__doc__, name


def test_identities_are_tests():
    """What is named as a test is one."""
    defined = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        defined |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", "".join([INDEX, *PAGES.values()])))
    assert named and named <= defined, sorted(named - defined)


def test_every_task_is_told():
    """docs/tasks.md has each in its table."""
    rows = [line for line in (ROOT / "docs/tasks.md").read_text().splitlines() if line.startswith("| `")]
    assert [name for name in tasks.names() if not any(f"`{name}`" in row for row in rows)] == []
