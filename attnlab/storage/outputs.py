"""What a command writes to a bucket: written here first, as to any local path, then brought there."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

from attnlab.storage import names
from attnlab.storage.bucket import Bucket, Url


@contextlib.contextmanager
def writing(place: pathlib.Path | Url, last: str = "", reads: tuple[str, ...] = ()) -> Iterator[pathlib.Path]:
    """Gives a local path to write a file or a directory at, and brings what is there to the bucket at the end.

    What is in the bucket stands there already, as empty files, so that it is refused or replaced as it would be on a
    disk; objects whose files are gone or new at the end are removed or replaced. Nothing is brought where what runs
    inside raises.

    Args:
      place: where it goes; a local path is given as it is.
      reads: files of a directory that are not empty here.
      last: the file of a directory that makes it whole: the old one is removed first, the new one written last.

    Raises:
      UserError: the bucket cannot be written.
    """
    if not isinstance(place, Url):
        yield place
        return
    with names.by_urls(), names.staging("out") as above:
        bucket, path = Bucket(place), above / place.name
        names.register(path, place)  # for what is said of it later, too
        objects = bucket.listing()
        before = [""] if bucket.size() is not None else list(objects)
        for name in before:
            (path / name if name else path).parent.mkdir(parents=True, exist_ok=True)
            (path / name if name else path).touch()
        bucket.download({name: path / name for name in reads if name in objects}, objects)
        standing = {name: _stamp(path / name if name else path) for name in before}
        yield path
        if path.is_file():
            bucket.upload({"": path} if _stamp(path) != standing.get("") else {})
            return
        now = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}
        new = {name: p for name, p in now.items() if _stamp(p) != standing.get(name)}
        if last in new and last in standing:
            bucket.remove([last])
        bucket.upload({name: p for name, p in new.items() if name != last})
        bucket.upload({name: p for name, p in new.items() if name == last})
        bucket.remove([name for name in standing if name not in now])


def _stamp(path: pathlib.Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
