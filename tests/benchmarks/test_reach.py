"""Exact reach of stacks of sparse patterns."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import reach

LENGTH, LAYERS = 40, 4


def by_masks(layers, length):
    """The last row of products of boolean masks, by distance: what flows to the last position."""
    now, rows = np.eye(length, dtype=bool), []
    for offsets in layers:
        mask = np.array([[t - s in offsets for s in range(length)] for t in range(length)])
        now = mask @ now
        rows.append(now[-1][::-1])
    return np.array(rows)


@pytest.mark.parametrize("offsets", [
    [reach.powers(LENGTH, 7)], [reach.window(3)], [reach.dilated(3, 5)], [reach.strided(5, 2, 7)],
    [reach.dilated(3, 3**i) for i in range(LAYERS)],
])  # fmt: skip
def test_is_the_product_of_masks(offsets):
    """What sums of distances say is what masks of positions multiply to."""
    layers = offsets if len(offsets) > 1 else offsets * LAYERS
    np.testing.assert_array_equal(reach.reached(layers, LENGTH), by_masks(layers, LENGTH))


def test_patterns():
    """Each by its distances: as many as there are keys."""
    assert reach.powers(40, 9) == {0, 1, 2, 3, 4, 5, 8, 16, 32} and reach.window(3) == {0, 1, 2}
    assert reach.dilated(3, 5) == {0, 5, 10}
    assert reach.strided(5, 2, 7) == {0, 1, 7, 14, 21} and reach.strided(5, 3, 2) == {0, 1, 2, 4, 6}


def test_powers_of_two_alone():
    """d layers reach what has at most d ones in binary: 2^(d + 1) - 1 without a gap, so all below 2^d."""
    rows = reach.facts([reach.powers(256, 9)] * 8, 256)
    assert [row["covered"] for row in rows] == [min(2 ** (d + 1) - 1, 256) for d in range(1, 9)]
    ones = np.array([n.bit_count() for n in range(256)])
    assert [row["reached"] for row in rows] == [(ones <= d).sum() for d in range(1, 9)]


def test_other_patterns_by_their_formulas():
    """A window covers d (w - 1) + 1, one dilation nothing but its multiples, growing dilation w^d."""
    table = reach.compare(64, 3, 7)
    assert [row["covered"] for row in table["window"]] == [7, 13, 19]
    assert [row["covered"] for row in table["growing"]] == [7, 49, 64]
    dilated = next(rows for name, rows in table.items() if name.startswith("dilated"))
    assert [row["covered"] for row in dilated] == [1, 1, 1] and dilated[-1]["reached"] == -(-64 // 10)


def test_command(tmp_path, capsys, monkeypatch):
    """The table, the verdict and the JSON; too few keys are refused with what is allowed."""
    path = tmp_path / "new" / "reach.json"
    monkeypatch.setattr("sys.argv", ["reach", "--length", "16", "--layers", "4", "--json", str(path)])
    assert reach.main() == 0
    assert "power reaches every distance below 2^d: yes" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["keys"] == 5 and found["verdict"]["layers_to_cover"]["power"] == 4
    monkeypatch.setattr("sys.argv", ["reach", "--length", "16", "--keys", "3"])
    with pytest.raises(SystemExit, match="3 is not allowed; allowed: 5 or more"):
        reach.main()
