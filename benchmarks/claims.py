"""Keeps what a claim's plan measured: `python -m benchmarks.claims runs/NAME` writes docs/claims/NAME.json.

It is the run's results.json without single answers, diagnostics and, where it is large, curves.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from typing import Any

FOLDER = pathlib.Path("docs/claims")
DROPPED = "samples", "items", "diagnostics"
MOST = 100_000  # characters; without curves where it would be more


def trimmed(results: dict[str, Any], workdir: str) -> str:
    """The JSON text of `results`, with paths from the workdir's name on."""
    runs = [{key: value for key, value in run.items() if key not in DROPPED} for run in results["runs"]]
    text = json.dumps(results | {"runs": runs}, indent=1)
    if len(text) > MOST:
        text = json.dumps(results | {"runs": [{k: v for k, v in run.items() if k != "curve"} for run in runs]})
    parent = str(pathlib.Path(workdir).resolve().parent)
    return re.sub(re.escape(parent) + "/", "runs/", text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of `attnlab ablate`, called as its plan is")
    for workdir in parser.parse_args().workdirs:
        path = pathlib.Path(workdir) / "results.json"
        if not path.is_file():
            print(f"{path} is not there: has the plan run?", file=sys.stderr)
            return 2
        out = FOLDER / f"{pathlib.Path(workdir).resolve().name}.json"
        out.write_text(trimmed(json.loads(path.read_text()), workdir))
        print(f"{out}: {out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
