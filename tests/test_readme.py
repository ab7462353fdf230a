"""The README's example mixer is real: it passes the contract battery and is the formula that it says."""

from __future__ import annotations

import importlib.util
import inspect
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.mixers import base
from tests import tiers
from tests.mixers import cases, test_contract, test_contract_declared

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example's module, registered for these tests only."""
    (code,) = re.findall(r"<!-- example.*?-->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("mixer") / "average.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("example_average", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    tests = types.ModuleType("tests.mixers.test_average")  # which state nothing that the laws would be told
    tests.ROLES = {}
    sys.modules[tests.__name__] = tests
    spec.loader.exec_module(module)
    yield module
    del base.MIXERS.classes["average"], sys.modules[spec.name], sys.modules[tests.__name__]


def laws():
    """The battery's, those that only `--exhaustive` tries marked as there; so are two of numbers, which the example's
    text settles: what breaks it is another interface."""
    is_law = lambda f: inspect.isfunction(f) and f.__name__.startswith("test_")
    tests = [law for module in (test_contract, test_contract_declared) for law in inspect.getmembers(module, is_law)]
    settled = lambda law: [tiers.exhaustive] * (law.__name__ in ("test_bfloat16", "test_overflow"))
    marks = lambda law: [m for m in getattr(law, "pytestmark", []) if m.name == "exhaustive"] or settled(law)
    return [pytest.param(law, marks=marks(law), id=law.__name__) for _, law in tests]


@pytest.mark.parametrize("law", laws())
def test_example_passes_the_battery(example, law):
    """Every law, in every config that the example's knobs name."""
    wanted = inspect.signature(law).parameters
    if "name" in wanted:
        law(name="average")
        return
    for config, _ in cases.configs("average").values():
        if "x64" in wanted:
            with jax.enable_x64(True):
                law(config=config, x64=None)
        else:
            law(config=config)


def test_example_is_the_formula(example):
    """Its output before the projection is the average written out."""
    with jax.enable_x64(True):
        module = cases.module(example.AverageConfig(heads=2, slowest=0.9), jnp.float64)
        x, _ = cases.inputs(jnp.float64)
        y = module(x, mixers.Sequence.whole(2, cases.LENGTH)).y
        v = np.asarray(x @ module.value.kernel[...]).reshape(2, cases.LENGTH, 2, -1)
        o = np.zeros_like(v)
        for h, decay in enumerate((0.9, 0.5)):
            for t in range(cases.LENGTH):
                weights = decay ** (t - np.arange(t + 1.0))
                o[:, t, h] = np.einsum("s,bsd->bd", weights / weights.sum(), v[:, : t + 1, h])
        np.testing.assert_allclose(y, o.reshape(x.shape) @ module.out.kernel[...], atol=1e-12)
