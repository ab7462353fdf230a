"""Damage to any file of a finished run: the right figures, of this checkpoint or the one before, or one clear error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import shutil

import jax
import pytest

from attnlab import cli
from tests import tiers
from tests.train import runs

STEPS = 4  # a checkpoint after 2, and after 4


def flipped(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unreadable(path: pathlib.Path) -> None:
    if os.geteuid() != 0:
        path.chmod(0)
        return
    path.unlink()
    path.symlink_to("/proc/self/mem")  # whose first bytes nobody can read, not even root


def directory(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "precious").write_text("x")


def loop(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGE = {
    "absent": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": flipped,
    "foreign": lambda path: path.write_text('["precious"]\n'),
    "directory": directory,
    "unreadable": unreadable,
    "loop": loop,
}
VERBS = ("train", "eval", "generate")


class Finished:
    """A finished run, and what each verb gives on its newest checkpoint and on the one before."""

    def __init__(self, home: pathlib.Path):
        self.home = home
        os.environ["ATTNLAB_CACHE"] = str(home / "cache")
        small = {"model__width": 8, "model__layers": 1, "train__eval_batches": 1, "train__save_every": 2,
                 "train__eval_every": 0, "train__sample_tokens": 0, "data__batch": 2, "data__heldout": 0.01,
                 "optimizer__schedule": "constant"}  # fmt: skip
        source = runs.corpus(home / "corpus")
        self.config = runs.write_config(home / "short.py", source, train__steps=STEPS, **small)
        self.longer = runs.write_config(
            home / "long.py", source, train__steps=STEPS + 1, train__on_config_change="continue", **small
        )
        self.workdir = home / "run"
        assert cli.main(["train", "--config", self.config, "--workdir", str(self.workdir)]) == 0
        self.files = sorted(p.relative_to(self.workdir) for p in self.workdir.rglob("*") if p.is_file())

    def share(self, verb: str, turn: int) -> list[pathlib.Path]:
        """A verb's part of the files, which wanders with `turn`: outside of checkpoints all for training, which reads
        them, and half for the others; within, where all read the same, an eighth."""
        outside = [f for f in self.files if f.parts[0] != "checkpoints"]
        within = [f for f in self.files if f.parts[0] == "checkpoints"]
        half = {"train": (0, 1), "eval": (0,), "generate": (1,)}
        eighths = {"train": (0,), "eval": (2,), "generate": (5,)}
        pick = lambda files, of, parts: [f for i, f in enumerate(files) if (i + turn) % of in parts]
        return pick(outside, 2, half[verb]) + pick(within, 8, eighths[verb])

    def copy(self, path: pathlib.Path) -> pathlib.Path:
        shutil.rmtree(path, ignore_errors=True)
        return shutil.copytree(self.workdir, path, symlinks=True)

    def run(self, verb: str, workdir: pathlib.Path) -> int:
        commands = {
            "train": ["train", "--config", self.longer],
            "eval": ["eval", "--json"],
            "generate": ["generate", "--json", "--prompt", "x", "--tokens", "4", "--temperature", "0"],
        }
        return cli.main([*commands[verb], "--workdir", str(workdir)])

    def outcome(self, verb: str, workdir: pathlib.Path, printed: str) -> object:
        """What a verb that ended well gave, without what depends on the clock."""
        if verb == "train":
            return runs.lines(workdir)[-1]["loss"]
        told = json.loads(printed.splitlines()[-1])
        return (told["step"], told["loss"]) if verb == "eval" else (told["step"], told["samples"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    # The same few programs, over and over: what is kept between runs need not be compiled, however small.
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield Finished(tmp_path_factory.mktemp("finished"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


@pytest.fixture(scope="module")
def right(finished, tmp_path_factory):
    """By verb: what it gives on each of the two checkpoints; training goes on to the same from both."""
    outcomes = {}
    for verb in VERBS:
        outcomes[verb] = []
        for gone in ((), ("4",)):
            workdir = finished.copy(tmp_path_factory.mktemp("right") / "run")
            for step in gone:
                shutil.rmtree(workdir / "checkpoints" / step)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                assert finished.run(verb, workdir) == 0
            outcomes[verb].append(finished.outcome(verb, workdir, printed.getvalue()))
    assert outcomes["train"][0] == outcomes["train"][1] and outcomes["eval"][0] != outcomes["eval"][1]
    return outcomes


@tiers.exhaustive
@pytest.mark.parametrize("verb", VERBS)
@tiers.parametrize("kind", DAMAGE, often=["flipped"])
def test_damage(finished, right, tmp_path, capsys, verb, kind):
    """No traceback, exit code 0 with a right figure or 2 with a line that says why; what was there is still there."""
    for file in finished.share(verb, list(DAMAGE).index(kind)):
        workdir = finished.copy(tmp_path / "run")
        DAMAGE[kind](workdir / file)
        code = finished.run(verb, workdir)
        printed = capsys.readouterr()
        case = f"{verb}, {file} {kind}: exit code {code}\n{printed.out[-500:]}\n{printed.err[-500:]}"
        if code == 0:
            assert finished.outcome(verb, workdir, printed.out) in right[verb], case
        else:
            assert code == 2 and 1 <= len(printed.err.strip().splitlines()) <= 4, case
        assert "Traceback" not in printed.err, case
        if kind in ("foreign", "directory") and file.parts[0] != "checkpoints":  # these go when newer ones come
            left = [p for p in workdir.rglob("*") if p.is_file()]
            assert any(p.name == "precious" or b"precious" in p.read_bytes() for p in left), case
