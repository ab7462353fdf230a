"""`attnlab import`, `export` and `lm-eval`: their arguments to the parts that do the work, and what these say."""

from __future__ import annotations

import argparse

from attnlab import output
from attnlab.interchange import exporting, importing


def _import(args: argparse.Namespace, overrides: list[str]) -> int:
    plan = importing.plan(args.source, args.workdir, args.as_, overrides)
    said = {"family": plan.family.name, "tensors": len(plan.table.shapes), "bytes": plan.bytes, "notes": plan.notes}
    if args.check:
        columns = ["tensor", "shape", "dtype", "becomes"]
        if args.json:
            output.write_json(said | {"table": [dict(zip(columns, row)) for row in plan.rows()]})
            return 0
        output.write_table(f"{args.source}: {plan.family.name}", columns, plan.rows())
    else:
        importing.run(plan, args.workdir, output.note)
        if args.json:
            output.write_json(said | {"workdir": str(args.workdir)})
            return 0
    output.write("\n".join([f"{said['tensors']} tensors, {plan.bytes:,} bytes, of family {plan.family.name}",
                            *(f"note: {note}" for note in plan.notes)]))  # fmt: skip
    if not args.check:
        output.write(f"{args.workdir} is made: `attnlab train` goes on in it with its config.json")
    return 0


def _export(args: argparse.Namespace, overrides: list[str]) -> int:
    done = exporting.run(
        args.workdir, args.to, checkpoint=args.checkpoint, dtype=args.dtype, largest=args.shard_size,
        remote_code=args.remote_code, overrides=overrides, ema=args.ema, say=output.note,
    )  # fmt: skip
    said = {"folder": str(done.folder), "family": done.family.name, "step": done.step, "dtype": done.dtype,
            "tensors": done.tensors, "bytes": done.bytes, "notes": done.notes}  # fmt: skip
    if args.json:
        output.write_json(said)
        return 0
    output.write(f"wrote {done.folder}: {done.tensors} tensors of family {done.family.name} in {done.dtype}, "
                 f"{done.bytes:,} bytes, step {done.step}")  # fmt: skip
    for note in done.notes:
        output.write(f"note: {note}")
    return 0


def _lm_eval(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab.interchange import evaluating

    done = evaluating.run(
        args.workdir, args.tasks, checkpoint=args.checkpoint, limit=args.limit, fewshot=args.fewshot, seed=args.seed,
        out=args.out, overrides=overrides, say=output.note,
    )  # fmt: skip
    with output.after(f"{done.path} is written"):
        if args.json:
            output.write_json(done.said)
            return 0
        for note in done.said["notes"]:
            output.write(f"note: {note}")
        rows = [
            [name, metric, *(_figure(figures[key]) for key in ("value", "stderr")), f"{entry.get('samples', '')}"]
            for name, entry in done.said["tasks"].items()
            for metric, figures in entry["metrics"].items()
        ]
        output.write_table(f"step {done.said['step']}", ["task", "metric", "value", "stderr", "samples"], rows)
        output.write(f"wrote {done.path}")
    return 0


def _figure(value: float | str | None) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else value


VERBS = {"import": _import, "export": _export, "lm-eval": _lm_eval}
