"""Copies of objects on this machine, for what reads files: corpora and tokenizers."""

from __future__ import annotations

import glob as globbing
import hashlib
import os

from attnlab.errors import UserError
from attnlab.storage import names
from attnlab.storage.bucket import Bucket, Object, Url


def local_copies(pattern: str, cache: str | None, beside: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Local paths of the objects that a glob matches, and their names below the part of it that has no wildcard.

    A copy is kept in the cache's directory `copies` for as long as the object is the same.

    Args:
      pattern: `gs://BUCKET/GLOB` or `s3://BUCKET/GLOB`.
      cache: directory of the cache; None: the usual one.
      beside: names of files that are read with those of their directory: they lie in one directory here, too.

    Raises:
      UserError: the bucket cannot be read, or nothing matches.
    """
    url = Url(pattern)
    bucket_name, _, key = url.path.partition("/")
    fixed, parts = [], key.split("/")
    while len(parts) > 1 and not globbing.has_magic(parts[0]):
        fixed.append(parts.pop(0))
    root = Url("/".join([f"{url.scheme}://{bucket_name}", *fixed]))
    bucket, rest = Bucket(root), "/".join(parts)
    if globbing.has_magic(rest):
        found = bucket.glob(rest)
    else:
        found = {n: o for n, o in bucket.listing().items() if n == rest}
    if not found:
        raise UserError(f"{pattern!r} matches no object")
    more, groups = {}, {}
    if beside:
        every = bucket.listing()
        folders = {os.path.dirname(name) for name in found}
        more = {n: o for n, o in every.items() if os.path.basename(n) in beside and os.path.dirname(n) in folders}
        for name, object_ in sorted((found | more).items()):
            groups.setdefault(os.path.dirname(name), []).append(f"{name} {object_.size} {object_.version}")
    copied = {
        name: _place(root / name, object_, cache, " ".join(groups.get(os.path.dirname(name), ())))
        for name, object_ in sorted((found | more).items())
    }
    missing = {name: path for name, path in copied.items() if not os.path.isfile(path)}
    bucket.download(missing, found | more)
    return [(copied[name], name) for name in sorted(found)]


def local_copy(place: str, cache: str | None = None) -> str:
    """The path of an object's copy, see `local_copies`; a local path as it is."""
    if "://" not in place:
        return place
    url = Url(place)
    bucket = Bucket(Url(url.rpartition("/")[0])) if "/" in url.path else Bucket(url)
    object_ = bucket.listing().get(url.name)
    if object_ is None:
        raise UserError(f"{place} is not there")
    path = _place(url, object_, cache)
    if not os.path.isfile(path):
        bucket.download({url.name: path}, {url.name: object_})
    return path


def _place(url: Url, object_: Object, cache: str | None, group: str = "") -> str:
    """Where a copy lies: in a directory of its own, or of its group."""
    above, _, name = url.rpartition("/")
    of = f"{above} {group}" if group else f"{url} {object_.size} {object_.version}"
    known = hashlib.sha256(of.encode()).hexdigest()[:24]
    path = os.path.join(names.cache_directory(cache), "copies", known, name)
    names.register(path, url)
    return path
