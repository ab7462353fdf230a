"""Concentric causal attention."""

import numpy as np

from tests.masks.rows import ROWS, by_hand, defined, held_to_the_laws, places


def ring(place):
    (y, x), (rows, columns) = place.cell, place.size
    return min(y, rows - 1 - y, x, columns - 1 - x)


def sees(config, q, k, row):
    if q.kind == "image" and k.span == q.span:
        return ring(k) <= ring(q)
    return k.index <= q.index


def turned(p, row):
    own = [x for x in row if x.document == p.document]
    before = {(x.span, x.size) for x in own if x.kind == "image" and x.span[1] <= p.index}
    less = sum(rows * columns - -(-min(rows, columns) // 2) for _, (rows, columns) in before)
    begin = p.span[0] if p.kind == "image" else p.index
    return begin - own[0].index - less + (ring(p) if p.kind == "image" else 0)


def test_laws():
    held_to_the_laws("concentric", sees, {}, turned)


def test_small_matrix_and_positions_by_hand():
    border, centre = "xxxxx.xxxx.", "xxxxxxxxxx."
    lines, positions = by_hand("concentric", [("text", 1), ("image", (3, 3)), ("text", 1)])
    assert lines == ["x" + "." * 10, *[border] * 4, centre, *[border] * 4, "x" * 11]
    assert positions == [0, 1, 1, 1, 1, 2, 1, 1, 1, 1, 3]
    as_they_are = by_hand("concentric", [("text", 1), ("image", (3, 3)), ("text", 1)], ring_positions=False)[1]
    assert as_they_are == list(range(11))


def test_an_image_sees_all_of_the_one_before():
    """Its border sees the centre of the image before it, which by its ring it would not see of its own image."""
    lines, _ = by_hand("concentric", [("image", (3, 3)), ("image", (3, 3))])
    border, centre = "xxxx.xxxx", "x" * 9
    assert lines[:9] == [x + "." * 9 for x in [*[border] * 4, centre, *[border] * 4]]
    assert lines[9:] == [centre + x for x in [*[border] * 4, centre, *[border] * 4]]


def test_sorted_by_ring_it_is_one_interval():
    """With each image's keys sorted border first, and nothing else moved, every row of packed rows sees one run."""
    for row in map(places, ROWS):
        order = sorted(row, key=lambda p: (p.span[0], ring(p), p.index) if p.kind == "image" else (p.index,))
        seen = defined([row], lambda *pair: sees(None, *pair))[0][:, [p.index for p in order]]
        begins = np.diff(np.pad(seen, ((0, 0), (1, 0))).astype(int), axis=1) > 0
        np.testing.assert_array_equal(begins.sum(1), [p.kind != "padding" for p in row])


def test_rings_are_as_many_as_the_paper_says():
    """24 x 24 patches: 12 rings, and the text behind stands 12 after where the image begins, where it stood 576."""
    lines, positions = by_hand("concentric", [("text", 2), ("image", (24, 24)), ("text", 1)])
    assert positions[-1] == 2 + 12 and max(positions[2:-1]) == 2 + 11
    sizes = [92 - 8 * r for r in range(12)]
    inside = sum(size * sum(sizes[: r + 1]) for r, size in enumerate(sizes))
    assert sum(line[2:578].count("x") for line in lines[2:578]) == inside
