"""Near cells of an image."""

from tests.masks.rows import by_hand, held_to_the_laws


def sees(config, q, k, row):
    if q.kind == "image" and k.span == q.span:
        far = max(abs(q.cell[0] - k.cell[0]), abs(q.cell[1] - k.cell[1]))
        return k.index <= q.index and far <= config.radius
    return k.index <= q.index


def test_laws():
    held_to_the_laws("visual_neighbours", sees, {"radius": 1})


def test_its_limits():
    """A radius of the image's size is causal attention; one of 0 leaves a cell and what is before its image."""
    row = [("text", 2), ("image", (3, 4)), ("text", 2)]
    causal = ["x" * (t + 1) + "." * (15 - t) for t in range(16)]
    assert by_hand("visual_neighbours", row, radius=4)[0] == causal
    assert by_hand("visual_neighbours", row, radius=2**30 - 1)[0] == causal
    assert by_hand("visual_neighbours", row, radius=0) == by_hand("no_visual_self", row)
