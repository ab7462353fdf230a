"""Settings of the whole suite: CPU with eight devices, programs that compile fast and are kept between runs."""

import gc
import inspect
import os
import pathlib
import signal
import sys

from attnlab.launch import runtime
from tests import flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

# A run under nohup leaves SIGHUP alone, and so would what the tests start.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# XLA reads its flags when the first device is made: processes that tests start do not get these, and compile as a
# user's do, unless they ask for `flags.environment`.
_FLAGS = os.environ["XLA_FLAGS"]
os.environ["XLA_FLAGS"] += flags.UNOPTIMISED
runtime.configure()
os.environ["XLA_FLAGS"] = _FLAGS

import jax  # noqa: E402
import pytest  # noqa: E402

from attnlab import cli  # noqa: E402
from kernels_pallas import tuning  # noqa: E402
from tests import costs, tiers  # noqa: E402
from tests.budget import (  # noqa: E402, F401
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_terminal_summary,
)

# Processes that tests start share the cache, too: a small run of the command line compiles for half a minute.
_CACHE = str(pathlib.Path(__file__).parent.parent / ".jax_cache")
jax.config.update("jax_compilation_cache_dir", os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
jax.config.update("jax_traceback_in_locations_limit", 0)  # a tenth of lowering goes into these
flags.share_contexts()
gc.set_threshold(200_000, 50, 50)  # a tenth of all goes into jaxprs that are in use


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive", action="store_true", help="run what is marked `exhaustive`, too: see tests/tiers.py"
    )
    parser.addoption("--costs", metavar="FILE", help="append each test's CPU seconds to FILE: see tests/costs.py")


def pytest_configure(config):
    if config.getoption("--costs"):
        config.pluginmanager.register(costs.Costs(config.getoption("--costs")))


def _params(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def pytest_collection_modifyitems(config, items):
    """Leaves the exhaustive part out; not of what is named to the letter of its case. Laws of one mixer's config stand
    together, so that one process compiles the program that they share."""
    battery = [i for i, item in enumerate(items) if item.path.name == "test_contract.py" and "config" in _params(item)]
    for at, item in zip(battery, sorted((items[i] for i in battery), key=lambda item: item.callspec.id)):
        items[at] = item
    slow = costs.slow()
    for item in items:
        if item.nodeid.partition("[")[0] in slow:
            item.add_marker("slow")
    if config.getoption("--exhaustive"):
        return
    named = {argument.replace(os.sep, "/") for argument in config.args if "[" in argument}
    left_out = [
        item
        for item in tiers.left_out(items, not named and not config.getoption("lf", False))
        if item.nodeid not in named
    ]
    config.hook.pytest_deselected(items=left_out)
    gone = set(map(id, left_out))
    items[:] = [item for item in items if id(item) not in gone]


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay to the end


@pytest.fixture
def attnlab(capsys):
    """Runs a command in this process: exit code, stdout, stderr."""

    def call(*args):
        code = cli.main([str(a) for a in args])
        return code, *capsys.readouterr()

    return call


class _Patch(pytest.MonkeyPatch):
    """Forgets programs when it patches what may be in one, and what it patched back: none is in another test's."""

    _apart = (  # what no program is made of
        "sys", "attnlab.cli", "attnlab.data", "attnlab.progress", "attnlab.train.checkpoints", "attnlab.train.digests",
        "attnlab.train.loop",
    )  # fmt: skip
    _forgets = False

    def setattr(self, target, *args, **kwargs):
        of_class = target.__module__ if isinstance(target, type) else type(target).__module__
        of_object = target.__name__ if inspect.ismodule(target) else of_class
        origin = target if isinstance(target, str) else of_object
        self._forget(not any(f"{origin}.".startswith(f"{name}.") for name in self._apart))
        super().setattr(target, *args, **kwargs)

    def setitem(self, *args, **kwargs):
        self._forget(True)
        super().setitem(*args, **kwargs)

    def setenv(self, name, *args, **kwargs):
        self._forget(name == tuning.OWN_TABLES)
        super().setenv(name, *args, **kwargs)

    def undo(self):
        super().undo()
        self._forget(self._forgets)
        self._forgets = False

    def _forget(self, whether):
        if whether:
            self._forgets = True
            if (program := sys.modules.get("attnlab.train.program")) is not None:
                program.Program.forget()


@pytest.fixture
def monkeypatch():
    with _Patch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`data.source` of a small corpus, whose tokens are kept for the module alone."""
    from tests.train import runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield runs.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def few_programs():
    """Drops compiled programs before they are too many: each is memory maps, and Linux ends a process at 65,530."""
    yield
    global _tests
    _tests += 1
    maps = pathlib.Path("/proc/self/maps")
    if _tests % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


_tests = 0
