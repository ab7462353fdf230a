"""Which chunks of a checkpoint a process reads: those that its pieces touch, no others."""

import itertools
import json
import types

import numpy as np
import pytest

from attnlab.errors import Damaged
from attnlab.train import chunks, digests


def saved(directory, array, shape, chunk):
    """Makes the `.zarray` of an array; the names of its files."""
    (directory / "state" / array).mkdir(parents=True)
    layout = {"shape": shape, "chunks": chunk, "dimension_separator": "."}
    (directory / "state" / array / ".zarray").write_text(json.dumps(layout))
    grid = itertools.product(*(range(-(-n // c)) for n, c in zip(shape, chunk)))
    files = [".".join(map(str, index)) or "0" for index in grid]
    return [f"state/{array}/{name}" for name in (*files, ".zarray")]


def leaf(shape, *pieces):
    places = dict(enumerate(pieces))
    sharding = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: places)
    return types.SimpleNamespace(shape=shape, sharding=sharding)


@pytest.mark.parametrize("shape, chunk, pieces", [
    ((8, 6), (2, 6), [np.s_[0:4, :], np.s_[4:5, :]]), ((8, 6), (8, 2), [np.s_[:, 1:3]]), ((7,), (3,), [np.s_[6:7,]]),
    ((7, 5), (3, 2), [np.s_[2:4, 3:5], np.s_[0:1, 0:1]]), ((), (), [()]), ((8, 6), (2, 6), []),
])  # fmt: skip
def test_chunks_that_pieces_touch(tmp_path, shape, chunk, pieces):
    """As counted element by element; arrays of other trees are left out, and those of no known name are read whole."""
    names = saved(tmp_path, "params.w", shape, chunk) + saved(tmp_path, "opt_state.0.w", shape, chunk)
    unknown = saved(tmp_path, "params.unknown", shape, chunk)
    touched = np.zeros(shape, bool)
    for piece in pieces:
        touched[piece] = True
    files = {".".join(str(i // c) for i, c in zip(index, chunk)) or "0" for index in np.argwhere(touched).tolist()}
    files = {"0"} if shape == () and pieces else files
    found = chunks.needed(tmp_path, [*names, *unknown], {"params": {"w": leaf(shape, *pieces)}})
    assert found == {f"state/params.w/{name}" for name in files} | {n for n in unknown if ".zarray" not in n}


def test_others(tmp_path):
    """What is not written chunk by chunk is read as it is."""
    names = saved(tmp_path, "params.w", (4,), (2,))
    rest = ["host/metadata", "state/_METADATA", "state/d/123", "state/array_metadatas/process_0", names[-1]]
    assert chunks.others([*names, *rest]) == set(rest)


def test_damage_is_found_before_layouts_are_read(tmp_path):
    """All is brought, and what says how arrays lie is what was written, or it is damaged and nothing is read by it."""
    names = saved(tmp_path, "params.w", (4,), (2,))
    for name in names[:-1]:
        (tmp_path / name).write_bytes(b"1234")
    digests.write(tmp_path)
    like, brought = {"params": {"w": leaf((4,), np.s_[0:2,])}}, []
    assert chunks.fetched(tmp_path, like, brought.append) == {"state/params.w/.zarray", "state/params.w/0"}
    assert brought == [{"state/params.w/.zarray"}, {"state/params.w/.zarray", "state/params.w/0"}]
    layout = tmp_path / "state/params.w/.zarray"
    layout.write_bytes(b"?" + layout.read_bytes()[1:])
    with pytest.raises(Damaged, match="zarray is not what was written"):
        chunks.fetched(tmp_path, like, brought.append)
