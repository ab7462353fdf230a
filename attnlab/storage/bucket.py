"""The client of a bucket: gcsfs or s3fs, every call with a limit of time, and tried again where that may help."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import importlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from attnlab.errors import UserError

T = TypeVar("T")

log = logging.getLogger(__name__)

_EXTRAS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # package and extra by scheme
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_NO_ANSWER = 10.0  # seconds until people are told of a call that takes long
_CALL = 60.0  # seconds that a call may take, and those of its bytes at _SLOWEST
_SLOWEST = 1e6  # bytes a second
_LONGEST_WAIT = 20.0
_THREADS = 8
_PASSING = {408, 425, 429, 500, 502, 503, 504}


def patience() -> float:
    """Seconds for which a call that fails is tried again: $ATTNLAB_STORAGE_PATIENCE, or 300."""
    text = os.environ.get("ATTNLAB_STORAGE_PATIENCE", "300")
    try:
        return max(float(text), 0.0)
    except ValueError:
        raise UserError(f"ATTNLAB_STORAGE_PATIENCE = {text!r} is no number of seconds") from None


def is_url(place: object) -> bool:
    """Whether this names something in a bucket, and no local path."""
    return isinstance(place, str) and bool(_SCHEME.match(place))


class Url(str):
    """A place in a bucket, `gs://BUCKET/KEY` or `s3://BUCKET/KEY`, without a slash at its end.

    Raises:
      UserError: another scheme, or no bucket.
    """

    def __new__(cls, text: str) -> Url:
        scheme, _, rest = str(text).partition("://")
        if scheme not in _EXTRAS or not re.fullmatch(r"[a-z0-9][a-z0-9._-]+[a-z0-9](/.*)?", rest.strip("/"), re.DOTALL):
            raise UserError(f"{text!r} is no place in a bucket; allowed: gs://BUCKET/PATH, s3://BUCKET/PATH")
        return super().__new__(cls, f"{scheme}://{rest.rstrip('/')}")

    @property
    def scheme(self) -> str:
        return self.partition("://")[0]

    @property
    def path(self) -> str:
        """Bucket and key, as fsspec names objects."""
        return self.partition("://")[2]

    @property
    def name(self) -> str:
        return self.rpartition("/")[2]

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self}/{name}")


@dataclasses.dataclass(frozen=True)
class Object:
    """What a listing tells of an object; `version` changes whenever it is written."""

    size: int
    version: str


class Bucket:
    """What is below a URL. Names are relative to it, and `""` is the object of the URL itself.

    Every method raises UserError once a call has failed for `patience` seconds, or fails in a way that will not pass
    (no right to it, no such bucket, another region), and FileNotFoundError where there is no such object.

    Args:
      url: of the directory.
      seconds: to try for; None: `patience()`.
    """

    def __init__(self, url: Url, seconds: float | None = None):
        self.url, self._seconds = url, seconds
        self._fs = filesystem(url.scheme)

    def patient(self, seconds: float) -> Bucket:
        """The same place, tried for another time."""
        return Bucket(self.url, seconds)

    def listing(self, below: str = "") -> dict[str, Object]:
        """All objects below `below`, by name."""
        root = self._path(below)
        found = self._of_bucket(f"listing {self._shown(below)}", lambda: self._fs._find(root, detail=True))
        start = len(self.url.path) + 1
        inside = {path[start:]: info for path, info in found.items() if path.startswith(f"{self.url.path}/")}
        files = {name: info for name, info in inside.items() if name and info.get("type", "file") == "file"}
        return {name: Object(int(info["size"]), _version(info)) for name, info in sorted(files.items())}

    def glob(self, pattern: str) -> dict[str, Object]:
        """Objects that a glob relative to the URL matches, by name."""
        find = lambda: self._fs._glob(f"{self.url.path}/{pattern}", detail=True)
        found = self._of_bucket(f"listing {self._shown(pattern)}", find)
        start = len(self.url.path) + 1
        return {p[start:]: Object(int(i["size"]), _version(i)) for p, i in found.items() if i.get("type") == "file"}

    def size(self, name: str = "") -> int | None:
        """Bytes of an object; None: it is not there."""
        try:
            info = self._call(f"looking for {self._shown(name)}", lambda: self._fs._info(self._path(name)))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info.get("type") == "file" else None

    def get(self, name: str) -> bytes:
        """The content of an object."""
        return self._call(f"reading {self._shown(name)}", lambda: self._fs._cat_file(self._path(name)))

    def put(self, name: str, content: bytes) -> None:
        """Writes an object, whole or not at all."""
        put = lambda: self._fs._pipe_file(self._path(name), content)
        self._of_bucket(f"writing {self._shown(name)}", put, len(content))

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object where there is none, by the store's conditional put; False: somebody else's is there."""
        put = lambda: self._fs._pipe_file(self._path(name), content, mode="create")
        try:
            self._of_bucket(f"writing {self._shown(name)}", put, len(content))
            return True
        except FileExistsError:  # perhaps by a try of ours whose answer was lost
            return self.get(name) == content

    def upload(self, files: dict[str, str | os.PathLike[str]]) -> None:
        """Writes objects from local files, in parallel."""

        def one(item: tuple[str, str | os.PathLike[str]]) -> None:
            name, local = item
            put = lambda: self._fs._put_file(os.fspath(local), self._path(name))
            self._of_bucket(f"writing {self._shown(name)}", put, os.path.getsize(local))

        _each(one, files.items())

    def download(self, files: dict[str, str | os.PathLike[str]], objects: dict[str, Object]) -> None:
        """Reads objects into local files, in parallel; each has its name only once it is whole.

        Args:
          files: local paths by name.
          objects: what a listing told of them: one that comes with another size is read again.
        """

        def one(item: tuple[str, str | os.PathLike[str]]) -> None:
            name, local = item[0], os.fspath(item[1])
            partial, size = f"{local}.partial-{os.getpid()}-{threading.get_ident()}", objects[name].size

            async def get() -> None:
                await self._fs._get_file(self._path(name), partial)
                if (got := os.path.getsize(partial)) != size:
                    raise _Cut(f"{got} of {size} bytes came")

            os.makedirs(os.path.dirname(local), exist_ok=True)
            try:
                self._call(f"reading {self._shown(name)}", get, size)
                os.replace(partial, local)
            finally:
                if os.path.exists(partial):
                    os.remove(partial)

        _each(one, files.items())

    def copy(self, names: dict[str, str]) -> None:
        """Copies objects within the bucket, by name."""
        copy = lambda item: lambda: self._fs._cp_file(self._path(item[0]), self._path(item[1]))
        _each(lambda item: self._of_bucket(f"copying {self._shown(item[0])}", copy(item)), names.items())

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects, those that are not there, too."""

        def one(name: str) -> None:
            try:
                self._call(f"removing {self._shown(name)}", lambda: self._fs._rm_file(self._path(name)))
            except FileNotFoundError:
                pass

        _each(one, names)

    # Inside.

    def _path(self, name: str) -> str:
        return f"{self.url.path}/{name}" if name else self.url.path

    def _shown(self, name: str) -> str:
        return f"{self.url}/{name}" if name else str(self.url)

    def _of_bucket(self, what: str, make: Callable[[], Any], size: int = 0) -> Any:
        """`_call`, where the one thing that may be missing is the bucket."""
        try:
            return self._call(what, make, size)
        except FileNotFoundError as error:
            raise UserError(f"{what} failed: there is no bucket {self.url.path.partition('/')[0]} ({error})") from None

    def _call(self, what: str, make: Callable[[], Any], size: int = 0) -> Any:
        """The outcome of a coroutine that `make` makes, tried again while what it fails of may pass."""
        seconds = patience() if self._seconds is None else self._seconds
        began, wait = time.monotonic(), 0.5
        while True:
            try:
                return self._answered(what, make(), _CALL + size / _SLOWEST)
            except (FileNotFoundError, FileExistsError, UserError):
                raise
            except Exception as error:
                reason, passing = _trouble(error)
                spent = time.monotonic() - began
                if not passing:
                    raise UserError(f"{what} failed: {reason}") from error
                if spent + wait > seconds:
                    raise UserError(f"{what} failed for {spent:.0f} s: {reason}") from error
                left = seconds - spent
                log.warning("%s failed: %s; trying again in %.1f s, and for %.0f s more", what, reason, wait, left)
                time.sleep(wait * random.uniform(0.8, 1.2))
                wait = min(2 * wait, _LONGEST_WAIT)

    def _answered(self, what: str, coroutine: Any, limit: float) -> Any:
        future, began = asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop), time.monotonic()
        while True:
            try:
                return future.result(timeout=_NO_ANSWER)
            except concurrent.futures.TimeoutError:
                if future.done():  # the call's own
                    raise
                spent = time.monotonic() - began
                if spent > limit:
                    future.cancel()
                    raise _Cut(f"no answer for {spent:.0f} s") from None
                log.warning("%s: no answer for %.0f s, still waiting", what, spent)


class _Cut(Exception):
    """An answer that did not come, or not whole."""


def _each(act: Callable[[Any], None], items: Iterable[Any]) -> None:
    items = list(items)
    if len(items) == 1:
        act(items[0])
        return
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for outcome in [pool.submit(act, item) for item in items]:
            outcome.result()


_filesystems: dict[tuple[str, int], Any] = {}
_making = threading.Lock()


def filesystem(scheme: str) -> Any:
    """The fsspec filesystem of a scheme, with limits of time; credentials and endpoints are found by the library.

    Raises:
      UserError: its package is not installed, or it finds no credentials.
    """
    package, extra = _EXTRAS[scheme]
    with _making:
        if (scheme, os.getpid()) not in _filesystems:
            try:
                importlib.import_module(package)
            except ImportError:
                missing = f"{scheme}:// needs {package}, which is not installed"
                raise UserError(f"{missing}; pip install 'attnlab[{extra}]'") from None
            try:
                made = _google() if scheme == "gs" else _amazon()
            except Exception as error:  # whatever the library's search for credentials comes to
                raise UserError(f"{scheme}:// cannot be used: {_start_of(error)}") from error
            _filesystems[scheme, os.getpid()] = made
        return _filesystems[scheme, os.getpid()]


def _google() -> Any:
    import aiohttp
    from gcsfs.core import GCSFileSystem  # the package's own name also asks each bucket for its kind, by gRPC

    class Google(GCSFileSystem):
        _request = GCSFileSystem._request.__wrapped__  # without tries of its own, which are silent

    limits = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_CALL)
    return Google(requests_timeout=limits, consistency="md5", use_listings_cache=False, skip_instance_cache=True)


def _amazon() -> Any:
    from s3fs import S3FileSystem

    limits = {"connect_timeout": 30, "read_timeout": _CALL, "retries": {"total_max_attempts": 1}}
    made = S3FileSystem(config_kwargs=limits, use_listings_cache=False, skip_instance_cache=True)
    made.retries = 1  # its own tries are silent
    return made


def _version(info: dict[str, Any]) -> str:
    for key in ("generation", "ETag", "etag", "LastModified", "updated"):
        if info.get(key):
            return str(info[key]).strip('"')
    return ""


def _trouble(error: BaseException) -> tuple[str, bool]:
    """What a failed call says, and whether it may pass."""
    status, text = _status(error), _start_of(error)
    chain = [e for e in (error, error.__cause__, error.__context__) if e is not None]
    if "region" in text.lower() or status == 301 or "AuthorizationHeaderMalformed" in str(chain):
        return f"{text}; is AWS_REGION the bucket's region?", False
    if status is not None:
        expired = status == 401 and "Invalid Credentials" in text  # they are renewed
        return f"{status}: {text}", status in _PASSING or expired
    kinds = (asyncio.TimeoutError, TimeoutError, ConnectionError, _Cut)
    modules = {type(e).__module__.partition(".")[0] for e in chain}
    named = {kind.__name__ for e in chain for kind in type(e).__mro__}
    passing = any(isinstance(e, kinds) for e in chain) or bool(modules & {"aiohttp", "requests", "urllib3"})
    return text, passing or bool(named & {"HTTPClientError", "FSTimeoutError", "TransportError", "ChecksumError"})


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception of gcsfs or s3fs comes from."""
    for e in (error, error.__cause__, error.__context__):
        response = getattr(e, "response", None)
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        code = code or (getattr(e, "code", None) if type(e).__name__ == "HttpError" else None)
        if str(code).isdecimal():
            return int(code)
        if isinstance(e, PermissionError) or str(e).startswith("Forbidden"):
            return 403
    return None


def _start_of(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
