"""Who may write a workdir in a bucket: one run at a time, for as long as it renews its lease.

Leases are objects `lease/TERM.json` with rising terms, each created by the store's conditional put: of several runs
that want a term one gets it. Its holder renews it four times in its seconds, by writing it again. A lease that is not
renewed for its seconds is of a run that died: the next term may be taken. The holder of an earlier term sees the later
one, and ends. Nobody's clock is compared with another's, but to see that a lease ran out long ago.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from attnlab.errors import TrainingFailed, UserError
from attnlab.storage.bucket import Bucket, patience

BELOW = "lease"
_LONG_AGO = 300.0  # seconds by which no two clocks differ


def seconds() -> float:
    """How long a lease holds without being renewed: $ATTNLAB_LEASE_SECONDS, or 60."""
    text = os.environ.get("ATTNLAB_LEASE_SECONDS", "60")
    try:
        if (value := float(text)) >= 1:
            return value
    except ValueError:
        pass
    raise UserError(f"ATTNLAB_LEASE_SECONDS = {text!r} is not possible; allowed: a number of seconds, at least 1")


class Lease:
    """A lease that this process holds and renews, in a thread of its own.

    Attributes:
      term: its number, higher than that of any lease before.
    """

    def __init__(self, bucket: Bucket, term: int, content: dict[str, Any], valid_until: float):
        self.term = term
        self._bucket, self._content = bucket, content
        self._valid_until = valid_until  # of time.monotonic
        self._lost = ""
        self._renewing, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises TrainingFailed if the lease is known to be another's by now; asks nobody."""
        if self._lost:
            raise TrainingFailed(self._lost)

    def require(self) -> None:
        """Raises TrainingFailed unless this process may write now; asks the bucket where the lease has run out."""
        self.check()
        if time.monotonic() >= self._valid_until:
            try:
                self._renew(self._bucket.patient(patience()))
            except UserError as error:
                ended = f"the lease of {self._bucket.url} ran out and cannot be renewed"
                raise TrainingFailed(f"{ended}: {error}") from error
            self.check()

    def release(self) -> None:
        """Lets the next run have the workdir at once; one where nothing was written keeps no trace."""
        self._end.set()
        with contextlib.suppress(UserError), self._renewing:
            if self._lost:
                return
            bucket = self._bucket.patient(min(patience(), self._content["seconds"]))
            if all(name.startswith(f"{BELOW}/") for name in bucket.listing()):
                bucket.remove([_name(self.term)])
            else:
                bucket.put(_name(self.term), _encoded({**self._content, "released": True}))

    def _keep(self) -> None:
        every = self._content["seconds"] / 4
        while not self._end.wait(every) and not self._lost:
            with contextlib.suppress(UserError):  # tried again; `require` tells
                self._renew(self._bucket.patient(every))

    def _renew(self, bucket: Bucket) -> None:
        with self._renewing:
            if self._end.is_set():
                return
            asked = time.monotonic()
            now = _newest(bucket)
            if now is None or now[1].get("token") != self._content["token"]:
                self._lost = _how_lost(bucket, now)
            else:
                self._content["until"] = time.time() + self._content["seconds"]
                bucket.put(_name(self.term), _encoded(self._content))
                self._valid_until = asked + self._content["seconds"]


class Borrowed:
    """The lease of another process of this machine, under which this one writes, too.

    Attributes:
      term: the lease's number, which no other lease of the workdir ever has.
    """

    def __init__(self, bucket: Bucket, term: int):
        self.term, self._bucket, self._lost = term, bucket, ""

    def check(self) -> None:
        """Raises TrainingFailed if the lease is known to be another's by now; asks nobody."""
        if self._lost:
            raise TrainingFailed(self._lost)

    def require(self) -> None:
        """Raises TrainingFailed unless the lease is there and its holder's; asks the bucket."""
        self.check()
        try:
            now = _newest(self._bucket)
        except UserError as error:
            raise TrainingFailed(f"whose the lease of {self._bucket.url} is cannot be read: {error}") from error
        if now is None or now[0] != self.term:
            self._lost = _how_lost(self._bucket, now)
        elif now[1].get("released"):
            self._lost = f"{_holder(now[1])} has let go of the workdir {self._bucket.url}"
        self.check()


def claim(bucket: Bucket, say: Callable[[str], None]) -> Lease:
    """Takes the lease of a workdir.

    Where one is there that was not released, waits for its seconds at most: whether it is renewed.

    Args:
      say: is told that it waits.

    Raises:
      UserError: another run holds it, or it cannot be read or written.
    """
    lasts, seen, since = seconds(), None, 0.0
    token, me = secrets.token_hex(8), {**_identity(), "seconds": lasts}
    while True:
        found = _newest(bucket)
        term, there = found or (0, {"released": True})
        if not there.get("released") and not _ended(there):
            if seen is None:
                seen, since = (term, there), time.monotonic()
                say(f"{_refusal(bucket, there)}; waiting whether it is renewed")
            if (term, there) != seen:
                raise UserError(f"{_refusal(bucket, there)}; wait for it or use another workdir")
            if time.monotonic() - since < float(there.get("seconds", lasts)):
                time.sleep(min(1.0, lasts / 10))
                continue
        began, wall = time.monotonic(), time.time()
        content = {**me, "token": token, "until": wall + lasts}
        if bucket.create(_name(term + 1), _encoded(content)):
            if not there.get("released"):
                say(f"the lease of {_holder(there)} has run out; this run takes over")
            bucket.remove([name for name in bucket.listing(BELOW) if name < _name(term + 1)])
            return Lease(bucket, term + 1, content, began + lasts)
        seen = None  # another was faster


def _name(term: int) -> str:
    return f"{BELOW}/{term:09d}.json"


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()


def _newest(bucket: Bucket) -> tuple[int, dict[str, Any]] | None:
    names = [name for name in bucket.listing(BELOW) if name.endswith(".json")]
    if not names:
        return None
    try:
        content = json.loads(bucket.get(max(names)))
    except FileNotFoundError:  # a later one is there by now
        return _newest(bucket)
    except ValueError:
        content = {}
    return int(pathlib.PurePosixPath(max(names)).stem), content if isinstance(content, dict) else {}


def _identity() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid(), "began": _began(os.getpid()), "machine": _machine()}


def _machine() -> str:
    """What processes have in common that see each other's numbers; empty where that is not known."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(process: int) -> str:
    """When a process began, as the system counts; empty: there is none, or it only waits to be buried."""
    try:
        fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _ended(lease: dict[str, Any]) -> bool:
    """Whether a lease's holder is known to be gone."""
    here = bool(lease.get("machine")) and lease["machine"] == _machine()
    if here and lease.get("began") != _began(lease.get("process", 0)):
        return True
    return float(lease.get("until", 0)) + _LONG_AGO < time.time()


def _holder(lease: dict[str, Any]) -> str:
    return f"process {lease.get('process', 'unknown')} on {lease.get('host', 'an unknown host')}"


def _how_lost(bucket: Bucket, now: tuple[int, dict[str, Any]] | None) -> str:
    if now is None:
        return f"workdir {bucket.url} was removed while the run wrote to it"
    return f"workdir {bucket.url} was taken over by {_holder(now[1])}: this run had not renewed its lease"


def _refusal(bucket: Bucket, lease: dict[str, Any]) -> str:
    until = time.strftime("%H:%M:%S", time.localtime(float(lease.get("until", 0))))
    return f"workdir {bucket.url} is in use by another run ({_holder(lease)}), whose lease holds until {until}"
