"""Every implementation in every op's table equals the definition, value and gradients, forced by its name."""

import ast

from tests import tiers
from tests.ops import implementations
from tests.test_imports import trees

EACH = [(op, impl) for op, (table, _) in implementations.CASES.items() for impl in implementations.names(table)]
ALONE = {
    "cross_entropy",
    "kl_divergence",
    "segmented_ema",
}  # the battery of mixers holds the others to their definitions


@tiers.parametrize("op, impl", EACH, often=[(op, impl) for op, impl in EACH if op in ALONE and impl != "pallas"])
def test_equals_the_definition(op, impl):
    """Kernels of another platform interpreted."""
    implementations.held_to_the_definition(op, impl)


def test_every_op_has_cases():
    """An op that is added is held to its definition."""
    made = {
        node.args[0].value
        for path, tree in trees().items()
        if path.parts[0] == "ops"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Op"
    }
    assert made == set(implementations.CASES)
