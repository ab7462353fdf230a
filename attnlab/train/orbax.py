"""What reads and writes checkpoints' items, made of orbax's parts."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from attnlab.train.late import ocp


def checkpointer(written: Callable[[], None], *, apart: bool, seconds: int) -> ocp.AsyncCheckpointer:
    """Writes the items `state` and `host` of a checkpoint in the background.

    Args:
      written: called by its thread when all is written, before the directory gets its final name.
      apart: whether each process writes its part into a directory of its own; else all into one.
      seconds: for which processes wait for each other.
    """
    several = ocp.options.MultiprocessingOptions(primary_host=None if apart else 0)
    state = ocp.StandardCheckpointHandler(multiprocessing_options=several, use_ocdbt=not apart)
    host = ocp.JsonCheckpointHandler(multiprocessing_options=several)
    background = ocp.options.AsyncOptions(
        timeout_secs=seconds,
        # Made by another thread, a directory that cannot be made leaves others waiting for it for ever.
        create_directories_asynchronously=False,
        post_finalization_callback=written,
    )
    # Both need the options: were only one told, items would be written into directories that may not be there yet.
    of_both = ocp.CompositeOptions(multiprocessing_options=several, async_options=background)
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(state=state, host=host, composite_options=of_both),
        multiprocessing_options=several,
        async_options=background,
    )


def read_state(path: pathlib.Path, args: Any, handler: Any = None) -> Any:
    """What `args` ask of the item `state` of a checkpoint; `handler`: orbax's standard one by default."""
    reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(state=handler or ocp.StandardCheckpointHandler()))
    return reader.restore(path, args=ocp.args.Composite(state=args))["state"]


def read_group(path: pathlib.Path, group: str, like: Any, *, part: bool) -> Any:
    """One group of the arrays of a checkpoint's item `state`, or with `part` some of them, and nothing else.

    Raises:
      ValueError: it has others than `like`.
    """
    handler, wanted = ocp.PyTreeCheckpointHandler(), {group: like}
    # What a partial restore does not find, or is not asked for, it leaves out without a word.
    there, asked = _names(handler.metadata(path / "state").tree[group]), _names(like)
    if differing := asked - there if part else asked ^ there:
        raise ValueError(f"it or the model has no parameter {min(differing)}")
    placed = ocp.checkpoint_utils.construct_restore_args(wanted)
    return read_state(path, ocp.args.PyTreeRestore(wanted, placed, partial_restore=True), handler)[group]


def _names(tree: Any) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves}
