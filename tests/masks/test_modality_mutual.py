"""Modality-mutual attention."""

from tests.masks.rows import by_hand, held_to_the_laws


def sees(config, q, k, row):
    asked = None
    if q.kind == "image":
        later = [p for p in row if p.document == q.document and p.index > q.index and p.kind in ("question", "answer")]
        asked = later[0].span if later and later[0].kind == "question" else None
    begin = asked and (asked[0] if config.begin == "question" else q.span[1])
    return k.index <= q.index or (asked is not None and begin <= k.index < asked[1])


def test_laws():
    held_to_the_laws("modality_mutual", sees, {})
    held_to_the_laws("modality_mutual", sees, {"begin": "image"})


def test_small_matrix_by_hand():
    row = [("text", 1), ("image", (1, 3)), ("question", 2), ("answer", 3)]
    expected = "x........ xx..xx... xxx.xx... xxxxxx... xxxxx.... xxxxxx... xxxxxxx.. xxxxxxxx. xxxxxxxxx"
    assert by_hand("modality_mutual", row)[0] == expected.split()
    lines, _ = by_hand("modality_mutual", [("text", 2), ("image", (2, 2)), ("answer", 2)])
    assert lines == ["x" * (t + 1) + "." * (7 - t) for t in range(8)]  # no question: causal
    lines, _ = by_hand("modality_mutual", [("image", (1, 2)), ("answer", 1), ("question", 2)])
    assert lines == ["x" * (t + 1) + "." * (4 - t) for t in range(5)]  # an answer before it: causal
    row = [("image", (1, 1)), ("question", 1), ("answer", 1), ("image", (1, 1)), ("question", 1)]
    assert by_hand("modality_mutual", row)[0] == ["xx...", "xx...", "xxx..", "xxxxx", "xxxxx"]
