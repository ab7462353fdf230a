"""Kernels on a GPU: are ours right, and how fast are they beside cuDNN, tokamax, PyTorch and fla?

    python -m benchmarks.kernels [--json FILE] [--minutes 9]
    python -m benchmarks.kernels --dry-run          the whole program but the timing, in small, on any machine

In this order: what a matrix product and a copy reach; ours against the definition in float32, for every width whose
tile sizes are shipped; then milliseconds, forward and forward with backward, of everybody that is here. What is
measured is printed and written at once, and each library works in a process of its own: what hangs is ended and said.
A dry run computes small cases, with ours interpreted where this jax can, and lowers the others for a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks import kernels_cases, kernels_recurrences
from benchmarks.kernels_cases import Case
from benchmarks.kernels_recurrences import Recurrence

PARITY = kernels_cases.PARITY + kernels_recurrences.PARITY
TIMED = kernels_cases.TIMED + kernels_recurrences.TIMED
_NO_GPU = "benchmarks.kernels times kernels on a GPU, and jax sees none here; --dry-run tries the rest of it"
_ANSWER_S = 90  # a program is compiled and run in less, or it hangs
_SPARE_S = 20  # nothing is begun with less left


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("kernels.json"), help="the figures' file")
    parser.add_argument("--minutes", type=float, default=9.0, help="in which it ends")
    parser.add_argument("--dry-run", action="store_true", help="in small, interpreted, and no figures")
    parser.add_argument("--cases", nargs="*", default=None, help="only those whose names hold one of these")
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.dry_run)
    return Run(args).everything()


class Worker:
    """A process of this program that answers requests; what does not answer in time is ended and started anew."""

    def __init__(self, kind: str, dry: bool):
        self._command = [sys.executable, "-m", "benchmarks.kernels", "--worker", kind, *(["--dry-run"] * dry)]
        self._process: subprocess.Popen[str] | None = None

    def ask(self, seconds: float, **request: Any) -> dict[str, Any]:
        """The answer; `{"failed": why}` where there is none."""
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.end()
            return {"failed": f"no answer in {seconds:.0f} s: ended"}
        except OSError:
            answer = None
        if answer is None:
            code = self._process.wait()
            self._process = None
            return {"failed": f"the process ended, with {code}"}
        return json.loads(answer)

    def _start(self) -> None:
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if "--dry-run" in self._command:  # the interpreter of GPU kernels needs as many threads
            env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, self._answers), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
        for line in process.stdout:
            answers.put(line)
        answers.put(None)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def work(kind: str, dry: bool) -> int:
    """Answers requests until standard input ends; a request that raises is answered by what it raised."""
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not be taken for an answer
    del sys.argv[1:]  # tokamax would read them as its own
    if kind == "jax":
        from benchmarks.kernels_jax import Jax as Kind
    else:
        from benchmarks.kernels_torch import Torch as Kind
    server = Kind(dry)
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            request["case"] = case_of(request["case"])
        try:
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:  # a peer may raise anything, and the others are still to be measured
            answer = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        print(json.dumps(answer), file=out, flush=True)
    return 0


def case_of(fields: dict[str, Any]) -> Case | Recurrence:
    """The case that these are the fields of."""
    if "op" in fields:
        return Recurrence(**fields)
    return Case(**{**fields, "extras": tuple(fields["extras"])})


class Run:
    """One run: asks, prints, and keeps what was found in a file."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.until = time.monotonic() + 60 * args.minutes
        self.workers = {kind: Worker(kind, args.dry_run) for kind in ("jax", "torch")}
        self.peers: dict[str, str] = {}  # whose process
        self.found: dict[str, Any] = {"complete": False, "dry_run": args.dry_run, "parity": [], "times": []}

    def everything(self) -> int:
        try:
            if code := self.introduce():
                return code
            self.found["ceilings"] = self.ask("jax", do="ceilings")
            self.say(f"ceilings: {self.found['ceilings']}")
            wrong = self.parity()
            self.times(wrong)
            self.found["complete"] = "left_out" not in self.found
            self.keep()
            failed = [x["case"] for kind in ("parity", "times") for x in self.found[kind] if x.get("failed")]
            if failed and self.args.dry_run:
                print(f"failed: {', '.join(failed)}", file=sys.stderr)
            return 1 if wrong or (failed and self.args.dry_run) else 0
        finally:
            for worker in self.workers.values():
                worker.end()

    def introduce(self) -> int:
        about = self.ask("jax", do="about")
        if "failed" in about:
            print(f"benchmarks.kernels: {about['failed']}", file=sys.stderr)
            return 1
        if about["platform"] != "gpu" and not self.args.dry_run:
            print(_NO_GPU, file=sys.stderr)
            return 2
        self.peers = dict.fromkeys(about.pop("peers"), "jax")
        if importlib.util.find_spec("torch") is not None:
            torch = self.ask("torch", do="about")
            self.peers |= dict.fromkeys(torch.pop("peers", []), "torch")
            about |= torch
        everybody = dict.fromkeys((*kernels_cases.PEERS, *kernels_recurrences.PEERS))
        self.found |= about | {"absent": [name for name in everybody if name not in self.peers]}
        self.say(json.dumps({name: x for name, x in self.found.items() if name not in ("parity", "times")}))
        return 0

    def parity(self) -> set[tuple[Any, ...]]:
        """The families of cases that are not right, whose times say nothing."""
        wrong = set()
        for case in self.chosen(PARITY[:3] + kernels_recurrences.PARITY[:1] if self.args.dry_run else PARITY):
            answer = self.ask("jax", do="parity", case=dataclasses.asdict(case))
            self.found["parity"].append({"case": case.name, **answer})
            good = not (answer.get("failed") or answer.get("differ_between_runs"))
            if not good:
                wrong.add(case.family)
            errors = " ".join(f"{name} {error:.1e}" for name, error in answer.get("errors", {}).items())
            self.say(f"parity {case.name}: {'right' if good else f'WRONG: {answer}'} {errors}")
        return wrong

    def times(self, wrong: set[tuple[Any, ...]]) -> None:
        for case in self.chosen(TIMED):
            rows = []
            for peer, kind in self.peers.items():
                if peer not in case.peers:
                    continue
                if self.over(f"{case.name}, {peer}"):
                    continue
                answer = self.ask(kind, do="time", case=dataclasses.asdict(case), peer=peer)
                row = {"case": case.name, "peer": peer, **answer}
                if peer == "ours" and case.family in wrong:
                    row["wrong"] = True
                rows.append(row)
                self.found["times"].append(row)
                self.keep()
            for row in rows:
                self.say(self.line(case, row, rows))

    def line(self, case: Case | Recurrence, row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
        """One row in words, rates added to it; `of best` compares with the fastest of the others."""
        start = f"{case.name:26} {row['peer']:22}"
        if reason := row.get("unsupported") or row.get("failed"):
            return f"{start} - {reason}"
        if self.args.dry_run:
            return f"{start} {'is lowered' if row.get('lowered') else 'runs'}"
        parts = []
        for what in ("forward", "both"):
            x = row[what]
            x["tflops"] = case.flops(what == "both") / x["ms"] / 1e9
            x["of_ceiling"] = x["tflops"] / self.found["ceilings"].get("matmul_tflops", float("nan"))
            others = [r[what]["ms"] for r in rows if r is not row and what in r and not r.get("wrong")]
            x["of_best"] = min(others) / x["ms"] if others else None
            best = "" if x["of_best"] is None else f" {x['of_best']:.2f} of best"
            parts.append(f"{what} {x['ms']:8.3f} ms {x['tflops']:6.0f} TFLOP/s {x['of_ceiling']:4.0%}{best}")
        return f"{start} {'   '.join(parts)}{'   WRONG RESULTS' if row.get('wrong') else ''}"

    def chosen(self, cases: list[Case | Recurrence]) -> Any:
        """Those that were asked for, as long as there is time; the others are noted."""
        for case in cases:
            if self.args.cases is not None and not any(part in case.name for part in self.args.cases):
                continue
            if not self.over(case.name):
                yield case

    def over(self, what: str) -> bool:
        """Whether there is no time for it, which is noted."""
        if time.monotonic() < self.until - _SPARE_S:
            return False
        self.found.setdefault("left_out", []).append(what)
        self.say(f"{what}: left out, the time is over")
        return True

    def ask(self, kind: str, **request: Any) -> dict[str, Any]:
        return self.workers[kind].ask(min(_ANSWER_S, max(1.0, self.until - time.monotonic())), **request)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.keep()

    def keep(self) -> None:
        part = self.args.json.with_name(f"{self.args.json.name}.part")
        part.write_text(json.dumps(self.found, indent=1))
        os.replace(part, self.args.json)


if __name__ == "__main__":
    sys.exit(main())
