"""Paths as people type them: what is replaced and what never is, `~`, and brackets."""

from __future__ import annotations

import io
import json
import os
import signal
import socket

import pytest
import rich.console

from attnlab import cli, data, paths
from attnlab.data import progress as progress_lib
from attnlab.errors import UserError
from attnlab.train.metrics import Report
from tests.train import runs


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home directory, and a working directory in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ATTNLAB_CACHE", "~/cache")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def config(home):
    return runs.write_config(home / "c.py", runs.corpus(home / "corpus"), train__steps=3, train__eval_every=0)


def tree(directory):
    """Everything below a directory: kinds, and what files hold."""
    return {p: p.read_bytes() if p.is_file() else p.stat().st_mode for p in directory.rglob("*")}


@pytest.mark.parametrize("kind", ["file", "fifo", "device", "directory", "socket", "link to a fifo", "source"])
@pytest.mark.parametrize("action", ["train", "apply"])
def test_out_never_replaces_what_is_not_its_own(attnlab, config, home, kind, action):
    """Refused before the work, and all is as it was; with --overwrite, too, unless it is a regular file for a file."""
    out = {"device": "/dev/null", "source": home / "corpus" / "m01.py"}.get(kind, home / "out")
    if kind == "file":
        out.write_text("mine")
    elif kind == "directory":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(out))
    elif "fifo" in kind:
        os.mkfifo(home / "fifo")
        out = home / "fifo"
        if kind != "fifo":
            out = home / "out"
            out.symlink_to(home / "fifo")
    before = tree(home)
    for overwrite in ([], ["--overwrite"]):
        if overwrite and kind == "file" and action == "train":
            continue
        code, printed, err = attnlab("tokenizer", action, "--config", config, "--out", out, *overwrite)
        assert code == 2 and not printed and str(out) in err and len(err.splitlines()) == 1, err
    assert tree(home) == before and os.path.lexists(out)


def test_out_with_overwrite(attnlab, config, home):
    """A regular file is replaced, through a link too, which stays; so is a corpus, and nothing that holds more."""
    file, link, shards = home / "out.json", home / "link.json", home / "shards"
    file.write_text("old")
    link.symlink_to(file)
    make = ["tokenizer", "train", "--config", config, "--vocab", 270, "--overwrite", "--out"]
    assert attnlab(*make, link)[0] == 0
    assert link.is_symlink() and json.loads(file.read_text())["model"]
    apply = ["tokenizer", "apply", "--config", config, "--out", shards]
    assert attnlab(*apply, "--shards", 3)[0] == 0 and len(list(shards.glob("*.array_record"))) == 3
    assert "--overwrite" in attnlab(*apply)[2]
    assert attnlab(*apply, "--shards", 2, "--overwrite")[0] == 0 and len(list(shards.glob("*.array_record"))) == 2
    (shards / "notes.txt").write_text("mine")
    code, _, err = attnlab(*apply, "--overwrite")
    assert code == 2 and "'notes.txt'" in err and (shards / "notes.txt").read_text() == "mine"
    assert {p.name for p in home.iterdir()} == {"work", "corpus", "c.py", "out.json", "link.json", "shards"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), signal.SIGTERM])
@pytest.mark.parametrize("make", ["train_tokenizer", "apply_tokenizer"])
def test_what_fails_leaves_nothing(attnlab, config, home, monkeypatch, error, make):
    """Ctrl-C, a full disk and SIGTERM in the middle: what was there stays, nothing else is left."""
    made = getattr(data, make)
    old = home / "a" / "out"
    if make == "train_tokenizer":
        old.parent.mkdir()
        old.write_text("old")

    def fail(*_):
        if isinstance(error, signal.Signals):
            os.kill(os.getpid(), error)
        else:
            raise error

    monkeypatch.setattr(data, make, lambda *args, **kwargs: made(*args, **kwargs, progress=fail))
    before, handler = tree(home), signal.getsignal(signal.SIGTERM)
    action = make.partition("_")[0]
    code, _, err = attnlab("tokenizer", action, "--config", config, "--overwrite", "--out", old)
    assert (code, tree(home)) == ({KeyboardInterrupt: 130, signal.SIGTERM: 143}.get(error, 2), before), err
    assert signal.getsignal(signal.SIGTERM) == handler


def test_home_directory_in_every_path(attnlab, config, home):
    """`~` in every option, key and variable that holds a path is the home directory; nothing is called `~`."""
    use = "--config.data.source=text:~/corpus/*.py"
    made = attnlab("tokenizer", "train", "--config=~/c.py", use, "--out=~/t.json", "--vocab", 270)
    assert made[0] == 0 and (home / "t.json").exists(), made
    made = attnlab("tokenizer", "apply", "--config=~/c.py", use, "--config.data.tokenizer=~/t.json", "--out=~/shards")
    assert made[0] == 0 and (home / "shards" / "index.json").exists(), made
    code, _, err = attnlab("train", "--config=~/c.py", "--workdir=~/run", use, "--config.data.cache=~/other")
    assert code == 0 and (home / "run" / "config.json").exists() and (home / "other").exists(), err
    (home / "prompt").write_text("def")
    code, out, err = attnlab("generate", "--workdir=~/run", "--prompt-file=~/prompt", "--tokens", 2)
    assert code == 0 and out.startswith("def"), err
    assert attnlab("eval", "--workdir=~/run", "--config.data.cache=none")[0] == 0 and (home / "cache").exists()
    assert not list((home / "work").iterdir())


@pytest.mark.parametrize("option", ["--workdir=~nobody-here/x", "--config=~nobody-here/c.py",
                                    "--config.data.source=text:~nobody-here/*", "--config.data.cache=~nobody-here/c",
                                    "--config.data.tokenizer=~nobody-here/t.json"])  # fmt: skip
def test_home_directory_of_nobody(attnlab, config, home, option):
    """A user that is not there is named, and nothing is made."""
    given = {"--config": config, "--workdir": home / "run"}
    given.pop(option.partition("=")[0], None)
    code, out, err = attnlab("train", *[x for pair in given.items() for x in pair], option)
    assert code == 2 and not out and "there is no user 'nobody-here'" in err and "./~nobody-here" in err, err
    assert not (home / "run").exists() and not list((home / "work").iterdir())


def test_home_directory_that_is_not_known(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="no home directory is known; set HOME"):
        paths.expand("~/x")


def test_brackets_and_colons_are_printed_as_they_are(attnlab, config, home, monkeypatch):
    """Rich's markup and emoji in a path are characters of it, in lines, tables and labels of bars."""
    run = home / "[red]x[/] :car:"
    shown = [attnlab("train", "--config", config, "--workdir", run) for _ in range(2)]
    assert all(code == 0 and str(run) in out for code, out, _ in shown), shown
    assert str(run) in (run / "log.txt").read_text() and "is complete" in shown[1][1]
    code, out, _ = attnlab("tokenizer", "train", "--config", config, "--out", home / "[b]t", "--vocab", 270)
    assert code == 0 and f"wrote {home}/[b]t: " in out
    out = io.StringIO()
    Report(rich.console.Console(file=out, force_terminal=True), home).say("[bold]12[/bold] :car:")
    assert out.getvalue() == "[bold]12[/bold] :car:\n"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setattr(progress_lib, "_SHOW_AFTER_SECONDS", 0)
    monkeypatch.setenv("TERM", "xterm")
    with progress_lib.stderr_progress("text:[red]x") as report:
        report(1, 2)
    assert "text:[red]x" in terminal.getvalue()


def test_a_path_that_is_no_text_is_logged(home):
    """A directory whose name is not UTF-8 is written as its escapes."""
    report = Report(rich.console.Console(file=io.StringIO()), home)
    report.log("x\udcff")
    assert (home / "log.txt").read_text().endswith(" x\\udcff\n")
    assert cli.main(["eval", "--workdir", "x\udcff"]) == 2


def test_outputs_have_the_permissions_of_what_they_replace(tmp_path):
    """New files those that the umask leaves."""
    out = tmp_path / "out"
    before = os.umask(0o077)
    try:
        for mode in (0o600, 0o640):
            with paths.file_beside(str(out), lambda: None) as partial:
                open(partial, "w").close()
            assert out.stat().st_mode & 0o777 == mode
            out.chmod(0o640)
    finally:
        os.umask(before)
