"""Compiled steps that a later process loads whole: it neither traces nor lowers them, half of a warm start.

jax's own cache is asked by what was lowered. An entry here is by what the program is made of: the config, the code,
versions, flags and devices. That holds in a process whose code is what its files say, `attnlab train`'s; whoever
changes objects as it runs (a notebook, a test) does not use it. An entry is code, and is trusted as the code is.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import pickle
import platform
import sys
import sysconfig
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from attnlab.train import goodput

logger = logging.getLogger(__name__)

MOST = 16  # entries of a folder; the longest unused go
_SUFFIX = ".executable"
_HIT = "/jax/compilation_cache/cache_hits"
_OWN = ("attnlab", "kernels_pallas")
_THREAD = "attnlab-executables"

_folder: pathlib.Path | None = None
_hits: list[str] = []  # what jax took from its own cache


def keep_in(folder: pathlib.Path | None) -> None:
    """Where this process's steps are looked up and kept from now on; None: nowhere."""
    global _folder
    if _folder is None:
        jax.monitoring.register_event_listener(_heard)
    _folder = folder


def threads() -> list[threading.Thread]:
    """Those that write now; Python waits for them at its end."""
    return [thread for thread in threading.enumerate() if thread.name == _THREAD]


def _heard(event: str, **_: Any) -> None:
    if event == _HIT:
        _hits.append(event)


class Executables:
    """What was compiled of one program, in the folder that `keep_in` was told; nothing, where it was told none.

    Args:
      program: text that says all that it computes and is given.
      devices: those that it runs on, in order.
    """

    def __init__(self, program: str, devices: Sequence[Any]):
        self._program, self._devices = program, list(devices)
        self._made: dict[str, tuple[Any, Any]] = {}
        allowed = jax.config.jax_enable_compilation_cache and jax.process_count() == 1
        self._folder = _folder if _folder and allowed and _unchanged() else None
        self._key = self._facts() if self._folder else ""
        self._hits = len(_hits)

    def load(self, name: str) -> tuple[Any, Any] | None:
        """The executable of this name, and what was noted of it; None where there is none of this code.

        One that is damaged or that jax does not take is said so, removed, and is none.
        """
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            digest, content = path.read_bytes().split(b"\n", 1)
            if digest.decode() != hashlib.sha256(content).hexdigest():
                raise ValueError("its digest is another's")
            from jax.experimental import serialize_executable

            serialized, notes = pickle.loads(content)
            client = self._devices[0].client
            loaded = serialize_executable.deserialize_and_load(*serialized, client, self._devices)
            path.touch()
        except Exception as error:  # whatever a file of another make can raise
            reason = str(error).partition("\n")[0][:200]
            logger.warning("%s cannot be used (%s: %s): compiled anew", path, type(error).__name__, reason)
            path.unlink(missing_ok=True)
            return None
        return loaded, notes

    def made(self, name: str, compiled: Any, notes: Any = None) -> None:
        """Tells what was compiled here; `keep` writes it."""
        if self._folder:
            self._made[name] = compiled, notes

    def keep(self) -> None:
        """Writes what was compiled here, beside what goes on.

        What jax took from its own cache is not written: XLA's CPU programs lose parts when they are read and written
        again. Nor is anything where the code changed, or more of it was imported, since the key was made.
        """
        made, self._made = self._made, {}
        if made and len(_hits) == self._hits and _unchanged() and self._facts() == self._key:
            threading.Thread(target=self._write, args=(made,), name=_THREAD).start()

    def _write(self, made: dict[str, tuple[Any, Any]]) -> None:
        from jax.experimental import serialize_executable

        for name, (compiled, notes) in made.items():
            path = self._path(name)
            new = path.with_suffix(f".{os.getpid()}")
            try:
                content = pickle.dumps((serialize_executable.serialize(compiled), notes))
                path.parent.mkdir(parents=True, exist_ok=True)
                new.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                new.replace(path)
            except Exception as error:  # a full disk, or a program that cannot be written: the run goes on without
                logger.warning("%s of this run is not kept for later ones: %s", name, str(error).partition("\n")[0])
                new.unlink(missing_ok=True)
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        entries = [(path.stat().st_mtime, path) for path in self._folder.glob(f"*{_SUFFIX}")]
        for _, path in sorted(entries, reverse=True)[MOST:]:
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> pathlib.Path | None:
        return self._folder and self._folder / f"{name}-{self._key}{_SUFFIX}"

    def _facts(self) -> str:
        facts = [self._program, *_settings(), *map(_device, self._devices)]
        facts += [f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in _sources()]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def _device(device: Any) -> str:
    where = getattr(device, "coords", None), getattr(device, "core_on_chip", None)
    return f"{device.id} {device.platform} {device.device_kind} {where} {device.client.platform_version}"


def _settings() -> Iterable[str]:
    """What else decides how code is traced and compiled: versions, flags, the processor."""
    yield f"{sys.version} {platform.platform()} {jax.device_count()}"
    for path in sorted(set(sys.path)):
        if os.path.isdir(path):
            yield from sorted(name for name in os.listdir(path) if name.endswith((".dist-info", ".egg-info")))
    yield from (f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("XLA_", "LIBTPU_", "ATTNLAB_")))
    places = ("cache", "log", "dump", "coordinator")
    values = jax.config.values.items()
    yield from (f"{name}={value}" for name, value in sorted(values) if not any(place in name for place in places))
    tables = os.environ.get("ATTNLAB_KERNEL_TABLES")
    if tables:
        yield from (f"{path} {path.read_text()}" for path in sorted(pathlib.Path(tables).rglob("*.json")))
    cpu = pathlib.Path("/proc/cpuinfo")
    if cpu.exists():
        lines = cpu.read_text().partition("\n\n")[0].splitlines()
        yield from (line for line in lines if line.startswith(("model", "flags", "Features")))


def _sources() -> list[pathlib.Path]:
    """Files of all code that no installed distribution's version tells: attnlab's, and whoever's was imported."""
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    modules = list(sys.modules.values())
    files = {file for module in modules if (file := getattr(module, "__file__", None)) and os.path.isfile(file)}
    found = {pathlib.Path(file) for file in files if not file.startswith(installed)}
    for package in _OWN:
        folder = pathlib.Path(sys.modules[package].__file__).parent if package in sys.modules else None
        found |= {path for path in folder.rglob("*") if path.suffix in (".py", ".json")} if folder else set()
    return sorted(found)


def _unchanged() -> bool:
    """Whether no file of the code is newer than this process, which may have imported it as it was before."""
    began = goodput.process_began()
    return all(path.stat().st_mtime < began for path in _sources())
