"""The files of a corpus: globs, the files that they match, and one name for each."""

from __future__ import annotations

import dataclasses
import glob as globbing
import os
import re
from collections.abc import Iterable, Iterator

from attnlab import storage
from attnlab.errors import UserError
from attnlab.paths import expand

# What stands between two commas; a comma in brackets is the name's own.
_PART = re.compile(r"(?:\[[^\]]*\]|[^,])+")
_LONGEST_PATH = 4096


@dataclasses.dataclass(frozen=True)
class File:
    """A file of the corpus. `name` is relative to the part of the glob that has no wildcard."""

    path: str
    name: str
    size: int
    mtime_ns: int


def split_globs(text: str) -> tuple[str, ...]:
    """Globs that commas separate.

    No comma separates inside brackets (`a[,]b*.txt`), nor in the path of a file that exists (`a,b.txt`).
    """
    parts = _PART.findall(text)
    globs, first = [], 0
    while first < len(parts):
        last = first + 1
        joined = parts[first]
        for end in range(first + 2, len(parts) + 1):
            joined += "," + parts[end - 1]
            if len(joined) > _LONGEST_PATH:
                break
            if os.path.isfile(expand(joined.strip())):
                last = end
        globs.append(",".join(parts[first:last]).strip())
        first = last
    return tuple(glob for glob in globs if glob)


def matching_files(globs: tuple[str, ...], cache: str | None = None, beside: tuple[str, ...] = ()) -> list[File]:
    """The files that the globs match, by name, each once however many names or links lead to it.

    `**` goes through links to directories, and into no directory twice. Of objects in a bucket the files are copies,
    see `storage.local_copies` for `cache` and `beside`.

    Raises:
      UserError: a glob matches none.
    """
    found: dict[str, tuple[str, File, tuple[int, int] | str]] = {}
    for pattern in globs:
        if storage.is_url(pattern):
            for path, name in _copies(pattern, cache, beside):
                stat = os.stat(path)
                found[path] = os.path.dirname(path), File(path, name, stat.st_size, stat.st_mtime_ns), path
            continue
        expanded = expand(pattern)
        literal = os.path.isfile(expanded)
        paths = [expanded] if literal else () if "\0" in expanded else _expand(expanded)
        paths = sorted({path for path in paths if os.path.isfile(path)})
        if not paths:
            raise UserError(f"data.source: {pattern!r} matches no file (from {os.getcwd()}).")
        root = os.path.dirname(expanded) if literal else _fixed_part(expanded)
        for path in paths:
            absolute = os.path.abspath(path)
            if absolute not in found:
                stat = os.stat(path)
                name = os.path.relpath(path, root or ".").replace(os.sep, "/")
                identity = (stat.st_dev, stat.st_ino) if stat.st_ino else os.path.realpath(path)
                found[absolute] = root, File(absolute, name, stat.st_size, stat.st_mtime_ns), identity
    return _once(found.values())


def _copies(pattern: str, cache: str | None, beside: tuple[str, ...]) -> list[tuple[str, str]]:
    try:
        return storage.local_copies(pattern, cache, beside)
    except UserError as error:
        raise UserError(f"data.source: {error}") from error


def _once(found: Iterable[tuple[str, File, tuple[int, int] | str]]) -> list[File]:
    """One name for every real file: one without links below its glob's root, then the first."""
    groups: dict[tuple[int, int] | str, list[tuple[str, File]]] = {}
    for root, file, identity in found:
        groups.setdefault(identity, []).append((root, file))

    def rank(entry: tuple[str, File]) -> tuple[bool, str, str]:
        root, file = entry
        plain = os.path.normpath(os.path.join(os.path.realpath(root), file.name))
        return os.path.realpath(file.path) != plain, file.name, file.path

    files = [group[0][1] if len(group) == 1 else min(group, key=rank)[1] for group in groups.values()]
    return sorted(files, key=lambda file: (file.name, file.path))


def _expand(pattern: str) -> Iterator[str]:
    """Paths that match a glob. The library's own `**` goes round a loop of links forty times, or for ever."""
    components = pattern.split(os.sep)
    if "**" not in components:
        yield from globbing.iglob(pattern)
        return
    at = components.index("**")
    while components[at + 1 : at + 2] == ["**"]:
        del components[at]
    head, tail = os.sep.join(components[:at]), os.sep.join(components[at + 1 :])
    if at and not head:
        head = os.sep
    for base in globbing.iglob(head) if globbing.has_magic(head) else [head]:
        for directory in _directories(base):
            yield from _expand(os.path.join(globbing.escape(directory), tail or "*"))


def _directories(base: str) -> Iterator[str]:
    """`base` and the directories below it that are not hidden, each real directory once, links last."""
    seen: set[tuple[int, int] | str] = set()
    waiting, links = [base], []
    while waiting or links:
        path = waiting.pop() if waiting else links.pop(0)
        try:
            stat = os.stat(path or os.curdir)
            identity = (stat.st_dev, stat.st_ino) if stat.st_ino else os.path.realpath(path or os.curdir)
            if identity in seen:
                continue
            with os.scandir(path or os.curdir) as found:
                entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda entry: entry.name)
        except OSError:  # not a directory, or one that may not be read: globs match nothing there
            continue
        seen.add(identity)
        yield path
        waiting += [os.path.join(path, e.name) for e in reversed(entries) if e.is_dir(follow_symlinks=False)]
        links += [os.path.join(path, e.name) for e in entries if e.is_symlink()]


def _fixed_part(pattern: str) -> str:
    """The directory above the first component with a wildcard."""
    root = pattern
    while globbing.has_magic(root):
        root = os.path.dirname(root)
    return root
