"""What cannot fit into this machine's memory is refused before it is tried: the kernel would end the process."""

from __future__ import annotations

import math
import os
from typing import Any

import jax

from attnlab.errors import UserError


def size(tree: Any) -> int:
    """Bytes of a tree of arrays, or of their shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def require(needed: int, what: str, lower: str) -> None:
    """Raises UserError if more bytes are needed than a CPU's machine has; an accelerator's runtime says so itself.

    Args:
      needed: what is needed at least, in this process.
      what: what needs them.
      lower: which options or keys to lower.
    """
    if jax.default_backend() != "cpu":
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{what} need {needed / 1e9:,.1f} GB of memory; this machine has {there / 1e9:,.1f} GB\n{lower}"
        )
