"""Which cases of a law every run of the suite tries, and which `--exhaustive` adds.

The first cross every branch once. The rest, more combinations of the same branches, cost minutes and find something
where the code they try has changed: `bash scripts/test.sh --exhaustive tests/kernels_pallas`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

exhaustive = pytest.mark.exhaustive


def parametrize(names: str, cases: Iterable[Any], often: Iterable[Any], ids: Any = None, indirect: bool = False) -> Any:
    """`pytest.mark.parametrize` of all cases; those not in `often` are exhaustive.

    Raises:
      ValueError: one that is often tried is no case.
    """
    cases, often, several = list(cases), list(often), "," in names
    if unknown := [c for c in often if c not in cases]:
        raise ValueError(f"{unknown} are none of the cases {cases}")
    rest = lambda case: pytest.param(*(case if several else (case,)), marks=exhaustive)
    return pytest.mark.parametrize(names, [c if c in often else rest(c) for c in cases], ids=ids, indirect=indirect)
