"""Images without attention to themselves."""

from tests.masks.rows import by_hand, held_to_the_laws


def sees(config, q, k, row):
    if q.kind != "image":
        return k.index <= q.index
    return k.index == q.index or (config.pre_text and k.index < q.span[0])


def test_laws():
    held_to_the_laws("no_visual_self", sees, {})
    held_to_the_laws("no_visual_self", sees, {"pre_text": False})


def test_small_matrix_by_hand():
    row = [("text", 1), ("image", (1, 3)), ("question", 2), ("answer", 3)]
    expected = "x........ xx....... x.x...... x..x..... xxxxx.... xxxxxx... xxxxxxx.. xxxxxxxx. xxxxxxxxx"
    assert by_hand("no_visual_self", row)[0] == expected.split()
