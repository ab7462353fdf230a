"""A workdir in a bucket, and its staging directory, in which a run works as in any workdir.

Files are written whole, but logs, which grow: what comes to `metrics.jsonl` goes to `metrics.jsonl.parts/OFFSET`, and
who reads puts the parts behind the file. A checkpoint is complete once its `digests.json` is there, which is
written last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable, Iterator

from attnlab.errors import TrainingFailed, UserError
from attnlab.storage import lease as lease_lib
from attnlab.storage import names
from attnlab.storage.bucket import Bucket, Url, log
from attnlab.storage.checkpoints import BELOW, RemoteCheckpoints

EVERY = 10.0  # seconds between looks at what is new
LOGS = ("metrics.jsonl", "goodput.jsonl", "log.txt")
_PARTS = ".parts"
_MOST_PARTS = 100
_OVERLAP = 2**16  # bytes; more than a line
# Written less often, as they are written whole each time.
_SLOW = ("tensorboard/", "profile/", "compiled/", "wandb/", "mlruns/", "mlflow.db")
_SLOW_EVERY = 60.0
_NOT_FILES = {BELOW, "damaged_checkpoints", lease_lib.BELOW, "lock"}
_TRANSIENT = re.compile(r"(^|/)(probe-[^/]*|[^/]*\.new|[^/]*\.partial-[^/]*)$")

_mirrored: dict[str, RemoteWorkdir] = {}


def mirrored(path: pathlib.Path) -> RemoteWorkdir | None:
    """The workdir in a bucket whose staging directory this is; None: it is a directory as others."""
    return _mirrored.get(os.fspath(path))


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a workdir has besides what a run's has, by names in it.

    Attributes:
      logs: files that grow.
      directories: whose files are brought here, too, and written less often.
      apart: of this machine alone, or brought by others.
    """

    logs: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()


_OF_A_RUN = Contents()


class RemoteWorkdir:
    """A workdir in a bucket.

    Attributes:
      path: its staging directory.
      checkpoints: those in the bucket.
      lease: under which it is written; None where this process only reads, or another process of the run writes.
      url, term: where it is, and the number of the lease; 0: this process only reads.
    """

    def __init__(
        self,
        bucket: Bucket,
        path: pathlib.Path,
        lease: lease_lib.Lease | lease_lib.Borrowed | None,
        term: int,
        contents: Contents = _OF_A_RUN,
    ):
        self._logs, self._apart = (*LOGS, *contents.logs), _NOT_FILES.union(contents.apart)
        self._directories = tuple(f"{name}/" for name in contents.directories)
        self.path, self.lease, self.url, self.term, self._bucket = path, lease, bucket.url, term, bucket
        self.checkpoints = RemoteCheckpoints(bucket, path, term, before_commit=self._before_commit)
        self._pushed: dict[str, tuple[int, int, int]] = {}  # inode, size, mtime of what is in the bucket
        self._parts: dict[str, int] = {}
        self._pushing, self._end = threading.Lock(), threading.Event()
        self._slow_since = 0.0
        self._thread: threading.Thread | None = None

    def require(self) -> None:
        """Raises TrainingFailed if another run has the workdir by now."""
        if self.lease is not None:
            self.lease.check()

    def pull(self, depth: int = 0) -> None:
        """Brings the workdir's own files here, logs with their parts; not checkpoints, nor what only people look at.

        Args:
          depth: of the workdirs below it whose files are wanted, too.
        """
        objects = self._bucket.listing()
        workdirs = {d for n in objects if (d := n.removesuffix("/config.json")) != n and d.count("/") < depth} | {""}
        wanted = {
            n: self.path / n for n in objects if n.startswith(self._directories) or n.rpartition("/")[0] in workdirs
        }
        self._bucket.download(wanted, objects)
        parted = {name for name in map(_parted, objects) if name and name.rpartition("/")[0] in workdirs}
        for name in parted:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_bytes(merged(self._bucket, name))
        self._pushed |= {name: _stamp(self.path / name) for name in {*wanted, *parted}}
        if self.lease is not None:
            for name in parted:
                self._consolidate(name, (self.path / name).read_bytes())

    def push(self, *, everything: bool = True) -> None:
        """Brings to the bucket what is new here; logs first.

        Args:
          everything: also what is written less often.
        """
        with self._pushing:
            if self.lease is not None:
                self.lease.require()
            found = _files(self.path, self._apart)
            for name in self._logs:
                if name in found:
                    self._push_log(name, found.pop(name))
            now = time.monotonic()
            if slow := everything or now - self._slow_since >= _SLOW_EVERY:
                self._slow_since = now
            new = {}
            for name, path in found.items():
                with contextlib.suppress(FileNotFoundError):
                    often = not name.startswith(_SLOW + self._directories)
                    if (slow or often) and self._pushed.get(name) != (stamp := _stamp(path)):
                        new[name] = (path, stamp)
            self._bucket.upload({name: path for name, (path, _) in new.items()})
            self._pushed |= {name: stamp for name, (_, stamp) in new.items()}

    def recent(self, name: str) -> bytes:
        """The last lines of a log, among them all that may not be in the bucket yet; asks nobody."""
        pushed = self._pushed.get(name, (0, 0, 0))
        try:
            with (self.path / name).open("rb") as file:
                begin = pushed[1] - _OVERLAP if pushed[0] == os.fstat(file.fileno()).st_ino else 0
                file.seek(max(begin, 0))
                content = file.read()
        except FileNotFoundError:
            return b""
        return content.partition(b"\n")[2] if begin > 0 else content

    def start(self) -> None:
        """Pushes from now on, in the background."""
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Pushes all, and makes of each log one file again."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        self.push()
        for name in [name for name, parts in self._parts.items() if parts]:
            self._consolidate(name, (self.path / name).read_bytes())

    def _keep(self) -> None:
        while not self._end.wait(EVERY):
            try:
                self.push(everything=False)
            except (UserError, OSError) as error:
                log.warning("%s; the run goes on, and tries again", error)
            except TrainingFailed:  # the run itself finds that out
                return

    def _before_commit(self) -> None:
        if self.lease is not None:
            self.push()
            self.lease.require()

    def _push_log(self, name: str, path: pathlib.Path) -> None:
        inode, size, _ = _stamp(path)
        before = self._pushed.get(name)
        if before is not None and (before[0] != inode or size < before[1]) or self._parts.get(name, 0) >= _MOST_PARTS:
            content = path.read_bytes()
            self._consolidate(name, content, replaced=before is not None and before[0] != inode)
            self._pushed[name] = (inode, len(content), 0)
            return
        offset = before[1] if before is not None else 0
        if size > offset:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read()
            self._bucket.put(f"{name}{_PARTS}/{offset:015d}", content)
            self._parts[name] = self._parts.get(name, 0) + 1
            self._pushed[name] = (inode, offset + len(content), 0)

    def _consolidate(self, name: str, content: bytes, replaced: bool = False) -> None:
        """Makes the object of a log hold it all. Parts that it covers are passed over by readers, so go last."""
        if replaced:
            self._bucket.remove(self._bucket.listing(f"{name}{_PARTS}"))
        self._bucket.put(name, content)
        if not replaced:
            self._bucket.remove(self._bucket.listing(f"{name}{_PARTS}"))
        self._parts[name] = 0


def _files(path: pathlib.Path, apart: set[str]) -> dict[str, pathlib.Path]:
    """What of a staging directory goes to the bucket as it is, by name; others may write in it meanwhile."""
    found = {}
    for directory, below, files in os.walk(path):
        if directory == os.fspath(path):
            below[:] = [name for name in below if name not in apart]
            files = [name for name in files if name not in apart]
        here = {name: pathlib.Path(directory, name) for name in files}
        found |= {str(p.relative_to(path)): p for p in here.values() if p.is_file()}
    return {name: p for name, p in found.items() if not _TRANSIENT.search(name)}


def _parted(name: str) -> str:
    """The log whose part this is; empty: it is none."""
    head, _, offset = name.rpartition("/")
    return head.removesuffix(_PARTS) if head.endswith(_PARTS) and offset.isdecimal() else ""


def merged(bucket: Bucket, name: str) -> bytes:
    """The content of a log: the object, and the parts behind it."""
    while True:
        try:
            content = bucket.get(name)
        except FileNotFoundError:
            content = b""
        try:
            for part in bucket.listing(f"{name}{_PARTS}"):
                offset, more = int(part.rpartition("/")[2]), bucket.get(part)
                if offset <= len(content) < offset + len(more):
                    content = content[:offset] + more
            return content
        except FileNotFoundError:  # its writer has just made one file of them
            continue


def _stamp(path: pathlib.Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def opened(
    place: pathlib.Path | Url,
    *,
    writes: bool = False,
    first: bool = True,
    depth: int = 0,
    contents: Contents = _OF_A_RUN,
    tell: Callable[[str], list[str]] = lambda value: [value],
) -> Iterator[pathlib.Path]:
    """Gives the directory in which to work: the path itself, or the staging directory of a workdir in a bucket.

    Args:
      place: of the workdir.
      writes: whether it is written, which takes its lease; other runs are kept out.
      first: whether this is the process of the run that holds the lease and writes files.
      depth: of the workdirs below it that are read, too.
      contents: what it has besides what a run's has.
      tell: gives what each process of the run gave, the first one's first; all come here.

    Raises:
      UserError: another run holds the workdir, or the bucket cannot be used.
      TrainingFailed: another run has taken it over meanwhile.
    """
    if not isinstance(place, Url):
        yield place
        return
    with contextlib.ExitStack() as stack:
        bucket = Bucket(place)
        lease = None
        if writes and first:
            lease = lease_lib.claim(bucket, log.warning)
            stack.callback(lease.release)
        term = int(tell(str(lease.term if lease else 0))[0])
        path = stack.enter_context(names.staging(place.name))
        here = stack.enter_context(_attached(RemoteWorkdir(bucket, path, lease, term, contents)))
        here.pull(depth)
        with _written(here) if lease is not None else contextlib.nullcontext():
            yield path


@contextlib.contextmanager
def joined(path: pathlib.Path, place: str, term: int) -> Iterator[None]:
    """In another process of the machine: `path` is the staging directory of what is at the URL `place`.

    That process holds the lease with the number `term`, and brings what is in the directory; this one what it writes
    `below` it.
    """
    bucket = Bucket(Url(place))
    with _attached(RemoteWorkdir(bucket, path, lease_lib.Borrowed(bucket, term), term)):
        yield


@contextlib.contextmanager
def below(workdir: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """Gives the workdir `name` below another. Where that is in a bucket, this one is, too, and written under its lease.

    Raises:
      UserError: the bucket cannot be used.
      TrainingFailed: another has taken over the lease meanwhile.
    """
    path, above = workdir / name, mirrored(workdir)
    if above is None:
        yield path
        return
    above.lease.require()
    path.mkdir(parents=True, exist_ok=True)
    with _attached(RemoteWorkdir(Bucket(Url(f"{above.url}/{name}")), path, above.lease, above.term)) as here:
        here.pull()
        with _written(here):
            yield path


@contextlib.contextmanager
def _attached(here: RemoteWorkdir) -> Iterator[RemoteWorkdir]:
    """It is found by its staging directory, which messages call by its URL."""
    path = os.fspath(here.path)
    names.register(path, here.url)
    _mirrored[path] = here
    try:
        with names.by_urls():
            yield here
    finally:
        del _mirrored[path]
        names.forget(path)


@contextlib.contextmanager
def _written(here: RemoteWorkdir) -> Iterator[None]:
    """What is new comes to the bucket, now and then and at the end."""
    here.start()
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong before is what to say
            here.stop()
        raise
    here.stop()
