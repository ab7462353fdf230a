"""A headless Chromium, where there is one on the PATH."""

from __future__ import annotations

import html
import json
import pathlib
import re
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FOUND = next((path for name in NAMES if (path := shutil.which(name))), None)
_PROBE = """
addEventListener("load", () => {
  const page = frames[0], root = page.document.documentElement;
  const all = (what) => [...page.document.querySelectorAll(what)];
  const seen = (node) => node.getClientRects().length > 0;
  const sizes = { width: page.innerWidth, scroll: root.scrollWidth, client: root.clientWidth };
  const before = all("table.sortable")[0]?.tBodies[0].rows[0].cells[0].textContent;
  const sort = all("table.sortable thead button")[3];
  sort?.click(); sort?.click();
  const after = all("table.sortable")[0]?.tBodies[0].rows[0].cells[0].textContent;
  document.body.dataset.found = JSON.stringify({ ...sizes, sorts: before !== after, buttons: all("button").length,
    charts: all("svg").filter(seen).length, panes: all(".pane").filter(seen).length,
    tables: all("table").filter(seen).length });
});
"""


def opened(home: pathlib.Path, page: pathlib.Path, width: int, *, scripts: bool = True) -> tuple[dict, list[str]]:
    """What a page is like in a window of some width, with or without its scripts, and what the console said.

    The window is a frame: Chromium makes none of its own below 500 px.
    """
    off = "" if scripts else 'sandbox="allow-same-origin"'
    text = html.escape(page.read_text())
    frame = f'<iframe {off} style="width:{width}px;height:900px;border:0" srcdoc="{text}">'
    outer = home / f"outer-{width}-{scripts}.html"
    outer.write_text(f"<!DOCTYPE html><meta charset=utf-8><script>{_PROBE}</script><body>{frame}</iframe>")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,1000")
    command = [FOUND, *flags, f"--user-data-dir={home / 'profile'}", "--dump-dom", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, (done.stdout[-300:], done.stderr[-2000:])
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]
