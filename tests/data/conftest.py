import signal

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test has its own token cache."""
    monkeypatch.setenv("ATTNLAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def time_limit():
    """A loader that hangs fails its test."""

    def stop(*_):
        raise TimeoutError("the test took more than 90 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def corpus(tmp_path):
    """Twenty text files of different lengths, non-ASCII text among them; the glob that matches them."""
    directory = tmp_path / "text"
    for i in range(20):
        path = directory / f"part{i % 3}" / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i}: " + "naïve café " * (i % 7) + "x" * (i * 13 % 97) + "\n", encoding="utf-8")
    return f"text:{directory}/**/*.txt"
