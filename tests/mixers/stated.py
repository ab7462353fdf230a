"""What a mixer's own tests, `tests/mixers/test_NAME.py`, state of it for the laws that every mixer is held to.

ROLES     role -> names of the parameters of all its configs; `.kernel` of matrices, `.scale` of norms left out, and
          the `.bias` of projections and norms. Required.
FUSED     names of kernels that hold several matrices; default: none.
BIASED    (fields, projections of queries, keys and values, of the output): which the knob `bias` gives one, in a
          config of these fields; default: [({}, "q k v", "out")].
BLOCK     rows that its ops compute together, where the config has no `chunk`; default: 256, as attention does.
KERNEL_TOLERANCE  how near kernels are to the definition where both round to float32; default: 2e-5.
NUMBERS_OF  the mixer by whose numbers in bf16 this one's are, by what both run: attention by the shared seam or with
          scores of its own, scans with or without decays and transitions, solvers. Every run tries that one alone;
          default: none, it is tried itself.
BFLOAT16_GRADIENTS  whether every run tries gradients in bf16, too; default: yes.
WRITTEN_OUT  whether its own tests write the layer out on rows without segments, which `--exhaustive` alone tries then
          in the battery; default: no.
SPLIT_GRADIENTS  whether every run tries its gradients on several devices, where it is the mixer that is run for its way
          of splitting positions; no, where they are dear and its op's tests (tests/ops, tests/parallel) hold them;
          default: yes.
BESIDE    knob -> fields of a config in which it turns, where it does not in the default one, as `cases.BESIDE`;
          default: none.
OF_A_STEP  names of parameters whose gradient is the same of any batch: a number of steps; others' are sums over
          documents. Default: none.
keys_seen(config, t)      keys that a query at position t of one document of `cases.LENGTH` sees, where they are not
          those of a window or a mask.
keys_computed(config)     of all rows, what a program computes that masks instead of skipping; default: LENGTH.
"""

from __future__ import annotations

import importlib
from typing import Any


def of(name: str, what: str, default: Any = None) -> Any:
    """The attribute `what` of the tests of mixer `name`; `default` where they do not state it.

    Raises:
      AssertionError: the mixer has no tests of its own, or states no ROLES.
    """
    try:
        tests = importlib.import_module(f"tests.mixers.test_{name}")
    except ModuleNotFoundError as error:
        raise AssertionError(f"mixer {name!r} has no tests/mixers/test_{name}.py: its identities go there") from error
    assert hasattr(tests, "ROLES"), f"state the roles of {name}'s parameters, ROLES, in tests/mixers/test_{name}.py"
    return getattr(tests, what, default)
