"""The command line: `attnlab VERB`. Thin: every verb takes its arguments and calls the part that does the work."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import sys
from typing import Any

from attnlab import arguments, output, storage
from attnlab.errors import TrainingFailed, UserError
from attnlab.storage import verbs


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; 0 if it did what it should, 1 if a run failed, 2 if the user has to change something."""
    output.prepare()
    try:
        code = _main(argv)
    except SystemExit as ended:  # argparse
        code = ended.code
    except output.Unwritable as error:  # the help
        output.note(f"attnlab: {error}")
        code = 2
    except output.ReaderGone:
        code = 0
    output.settle()
    if code and (cluster := sys.modules.get("attnlab.launch.cluster")):
        cluster.leave(code)
    return code


def _main(given: list[str] | None) -> int:
    argv = sys.argv[1:] if given is None else given
    if not argv:
        output.note(arguments.build().format_help())
        return 2
    args, overrides = arguments.parse(argv)
    args.own_process = given is None
    say = lambda text: output.note(f"attnlab {args.verb}: {text}")
    try:
        if args.verb not in ("train", "ablate", "tokenizer"):  # what these do is in files
            output.require()
        _start(args, overrides)
        with verbs.staged(args):
            return _VERBS[args.verb](args, overrides) or 0
    except UserError as error:
        say(error)
        return 2
    except TrainingFailed as error:
        say(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except (RuntimeError, MemoryError) as error:
        lines = ["RESOURCE_EXHAUSTED: out of memory"] if isinstance(error, MemoryError) else str(error).splitlines()
        reason = next((line for line in lines if "RESOURCE_EXHAUSTED" in line or "Unable to initialize" in line), None)
        if reason is None:
            raise
        say(reason[:300])
        if "RESOURCE_EXHAUSTED" in reason:
            output.note("lower data.batch, --samples or --tokens, or raise train.accumulate or model.remat")
        return 1 if "RESOURCE_EXHAUSTED" in reason else 2


def _start(args: argparse.Namespace, overrides: list[str]) -> None:
    verbs.log_messages()
    logging.getLogger("attnlab").setLevel(logging.INFO)
    from attnlab.launch import runtime

    runtime.quiet()
    runtime.seldom_collect()
    if args.verb in ("list", "cost", "tokenizer", "report", "goodput"):  # a TPU serves one process at a time
        os.environ["JAX_PLATFORMS"] = "cpu"
    if args.verb == "train":  # before anything touches a device
        from attnlab.launch import cluster

        cluster.start(args.config, overrides)
    if args.verb == "import" and not args.check:
        from attnlab.launch import cluster

        cluster.connect([override for override in overrides if override.startswith("cluster.")])
    if args.verb == "compile" or (args.verb == "tune" and args.target):
        from attnlab.launch import targets

        targets.prepare()
    runtime.configure()
    if os.environ.get("ATTNLAB_KERNEL_TABLES"):
        from attnlab.launch import tune

        tune.check_tables()


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    import rich.console

    from attnlab.train import config as run_config

    config = run_config.load(args.config, overrides)
    from attnlab.launch import runtime
    from attnlab.train import goodput
    from attnlab.train.loop import train

    out = output.Lasting(sys.stdout)  # a run outlives the reader of its output: log.txt has it all
    remote = isinstance(args.workdir, storage.Url)
    kept = pathlib.Path(storage.cache_directory()) if remote else args.workdir
    runtime.keep_compiled(kept, whole=args.own_process)
    console, began = rich.console.Console(file=out), goodput.process_began()
    train(config, args.workdir, console, began=began, init_from=args.init_from)
    with output.after(f"the run went on, and {args.workdir / 'log.txt'} has what it said"):
        output.require() if out.error is None else output.fail(out.error)
    return 0


def _eval(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab import memory
    from attnlab.train import hardware, restore

    trained = restore.load(args.workdir, args.checkpoint, overrides, ema=args.ema)
    hardware.require_memory(trained.config, memory.size(trained.program.batch), memory.size(trained.params))
    if args.lengths:
        return _eval_lengths(args, trained)
    evaluation, notes = restore.evaluate_heldout(trained, args.batches)
    summary = {"step": trained.step, **evaluation.summary(), "notes": notes}
    if args.json:
        output.write_json(summary)
        return 0
    output.write(f"step {summary['step']}: " + "\n".join(evaluation.lines()))
    for note in notes:
        output.write(f"note: {note}")
    output.write_table(*evaluation.table())
    return 0


def _eval_lengths(args: argparse.Namespace, trained: Any) -> int:
    from attnlab.train import restore

    found = restore.evaluate_lengths(trained, args.lengths, args.batches)
    if args.json:
        rows = [{"multiple": m, "length": t, **figures.summary()} for m, t, figures in found]
        output.write_json({"step": trained.step, "trained_length": trained.trained_length, "lengths": rows})
        return 0
    records = [figures.record() for _, _, figures in found]
    names = [name for name in records[0] if "/" not in name]
    output.write_table(f"step {trained.step}, trained on rows of {trained.trained_length}",
           ["times", "positions", *(name.removeprefix("heldout_") for name in names)],
           [[str(m), f"{t:,}", *(f"{record[name]:.4f}" for name in names)]
            for (m, t, _), record in zip(found, records)])  # fmt: skip
    return 0


def _generate(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab.evaluate.generate import Sampling, generate, prepare
    from attnlab.train import restore

    sampling = Sampling(args.tokens, args.temperature, args.top_k, args.top_p, args.seed)
    prompts = arguments.prompts(args)
    trained = restore.load(args.workdir, args.checkpoint, overrides, evaluating=False, ema=args.ema)
    if not trained.program.model.objective.decodes:
        raise UserError(
            f"--workdir {args.workdir} holds a model of kind {trained.config.model.node_name!r}, which continues no "
            "text; allowed: a run of a language model (attnlab eval tells this one's figures)"
        )
    if trained.data.tokenizer is None:
        raise UserError(
            f"--workdir {args.workdir}: data.name = {trained.data.name!r} has no text to continue; allowed: text "
            "(attnlab eval tells this run's figures)"
        )
    tokenizer = trained.data.tokenizer
    sampling, ids = prepare(tokenizer, sampling, prompts, args.samples, args.stop)
    notes = [*trained.notes, *restore.beyond(trained, max(map(len, ids)) + sampling.tokens)]
    for note in notes:
        output.note(f"note: {note}")
    out = generate(trained.program.model.merge, trained.params, ids, sampling, trained.program.streamed)
    texts = [tokenizer.decode(new) for new in out.tokens]
    each = [prompt for prompt in prompts for _ in range(args.samples)]
    if args.json:
        count = sum(map(len, out.tokens))
        output.write_json({
            "step": trained.step,
            "samples": [{"prompt": p, "text": t, "tokens": n.tolist()} for p, t, n in zip(each, texts, out.tokens)],
            "notes": notes,
            "compile_seconds": out.compile_seconds,
            "seconds": out.seconds,
            "tokens_per_second": count / out.seconds,
        })  # fmt: skip
        return 0
    for i, (prompt, text) in enumerate(zip(each, texts)):
        if len(texts) > 1:
            output.write(f"{'' if i == 0 else chr(10)}--- sample {i + 1} of {len(texts)} ---")
        output.write(prompt + text)
    return 0


def _list(args: argparse.Namespace, _: list[str]) -> int:
    from attnlab import tasks
    from attnlab.mixers import describe

    width = describe.WIDTH if args.width is None else args.width
    length = describe.LENGTH if args.length is None else args.length
    if args.parameters:
        if args.name is None:
            raise UserError("--parameters is of one mixer: attnlab list MIXER --parameters")
        rows = describe.parameters(args.name, width)
        if args.json:
            output.write_json({"name": args.name, "width": width, "parameters": rows})
            return 0
        title = f"{args.name} with default knobs, width {width}; the last column is with optimizer=muon"
        output.write_table(title, *describe.parameter_table(rows))
        return 0
    if args.name is not None and (args.name == "tasks" or args.name in tasks.names()):
        return _list_tasks(args)
    if args.name is not None:
        described = describe.mixer(args.name)
        if args.json:
            output.write_json(described)
            return 0
        output.write(f"{described['name']}: {described['summary']}\n{described['paper']}")
        if described["extension"]:
            output.write(f"extension, not in the paper: {described['extension']}")
        output.write(f"positions split over devices (mesh.context): {described['sequence_parallel'] or 'no'}")
        output.write_table("knobs", ["key", "default", "meaning"],
               [[k["key"], str(k["default"]), k["doc"]] for k in described["knobs"]])  # fmt: skip
        return 0
    rows = describe.all_mixers(width, length)
    if args.json:
        output.write_json(rows)
        return 0
    output.write_table(f"one layer with default knobs, width {width}, at T = {length}",
           ["name", "paper", "can", f"state bytes at {length}", "FLOPs / softmax", "extension, not in the paper"],
           [[r["name"], r["paper"], ", ".join(r["capabilities"]), f"{r['state_bytes']:,}",
             f"{r['relative_flops']:.2f}", r["extension"] or "-"] for r in rows])  # fmt: skip
    return 0


def _list_tasks(args: argparse.Namespace) -> int:
    from attnlab.tasks import describe

    if args.name != "tasks":
        described = describe.task(args.name)
        if args.json:
            output.write_json(described)
            return 0
        output.write(f"{args.name}: {described['summary']}\n{described['tests']}; {described['source']}")
        output.write_table(f"fields; its model is model.name={described['model']}", ["key", "default", "meaning"],
               [[k["key"], str(k["default"]), k["doc"]] for k in described["fields"]])  # fmt: skip
        return 0
    rows = describe.all_tasks()
    if args.json:
        output.write_json(rows)
        return 0
    chance = lambda row: f"{row['chance']['accuracy']:.4g}" if row["chance"] else "measured"
    output.write_table("tasks with default fields: attnlab train --config configs/tasks.py:task=NAME,mixer=MIXER",
           ["name", "tests", "model", "T", "chance", "source"],
           [[r["name"], r["tests"], r["model"], str(r["length"]), chance(r) if r["model"] != "regression" else "-",
             r["source"]] for r in rows])  # fmt: skip
    return 0


def _cost(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab.models.cost import model_cost
    from attnlab.train import config as run_config

    config = run_config.load(args.config, overrides)
    length = config.data.length if args.length is None else args.length
    cost = model_cost(config.model, length, config.data.batch // config.train.accumulate)
    if args.json:
        output.write_json({
            "length": length,
            "parameters": cost.parameters,
            "embedding_parameters": cost.embedding_parameters,
            "forward_flops_per_token": cost.total_flops,
            "train_flops_per_token": 3 * cost.total_flops,
            "flops": cost.flops,
            "state_bytes_per_sequence": cost.state_bytes,
            "notes": cost.notes,
        })  # fmt: skip
        return 0
    rows = [[part, f"{value:,.0f}", f"{100 * value / cost.total_flops:.1f} %"] for part, value in cost.flops.items()]
    output.write_table(f"forward FLOPs per token at T = {length}, causal counted as causal", ["part", "FLOPs", "share"],
           [*rows, ["all", f"{cost.total_flops:,.0f}", "100.0 %"]])  # fmt: skip
    for note in cost.notes:
        output.write(note)
    output.write(f"parameters: {cost.parameters:,} ({cost.embedding_parameters:,} in the embedding)\n"
          f"training: {3 * cost.total_flops:,.0f} FLOPs per token\n"
          f"state: {cost.state_bytes:,} bytes per sequence of {length} tokens")  # fmt: skip
    return 0


def _ablate(args: argparse.Namespace, overrides: list[str]) -> int:
    import rich.console

    from attnlab.ablation import announce, price, runner, self_test
    from attnlab.launch import runtime

    if args.self_test == (args.config is not None):
        raise UserError("one of --config PATH and --self-test is needed")
    options = runner.Options(args.processes, *args.slice, args.retry_failed)
    out = output.Lasting(sys.stderr if args.json else sys.stdout)
    console = rich.console.Console(file=out)
    if args.self_test:
        found = self_test.run(args.workdir, options, console)
        output.write_json(found) if args.json else output.write("\n".join(self_test.lines(found)))
        return 0 if found["holds"] else 1
    config, cells = announce.load(args.config, overrides)
    if not args.dry_run:
        with runtime.ending_in_order(), runner.opened(args.workdir, options) as workdir:
            code = runner.run_plan(config, cells, workdir, options, console)
            if args.json and (results := workdir / "results.json").is_file():
                output.write_json(json.loads(results.read_text(encoding="utf-8")))
        return code
    processes = runner.processes(options, len(cells) * len(config.seeds))
    with storage.opened(args.workdir) as workdir:
        priced = price.price(config, cells, workdir, processes, output.note)
    if args.json:
        output.write_json(priced)
        return 0
    output.write_table(*price.table(priced))
    output.write("\n".join([price.summary(priced), *(f"note: {note}" for note in priced["notes"])]))
    return 0


def _compile(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab.launch import compile as compile_lib
    from attnlab.launch import describe, search, targets
    from attnlab.train import config as run_config

    config = run_config.load(args.config, overrides)
    target = targets.Target.of(args.topology)
    if not args.search:
        report = compile_lib.compile_step(config, target)
        if args.json:
            output.write_json(report)
        else:
            output.write("\n".join(describe.program(report)))
        return 0 if report["memory"]["fits"] else 1
    reports = search.search(config, target, seconds=60 * args.minutes, count=args.count, say=output.note)
    if args.json:
        output.write_json(reports)
    else:
        output.write_table(f"{args.topology}: the fastest first, by the slowest floor", *describe.ranking(reports))
    return 0 if reports and reports[0]["memory"]["fits"] else 1


def _tune(args: argparse.Namespace, _: list[str]) -> int:
    from attnlab.launch import describe, tune

    job = tune.job(
        args.kernels, args.out, args.target, batch=args.batch, length=args.length, heads=args.heads,
        key_heads=args.kv_heads, width=args.width, dtype=args.dtype, count=args.count, rounds=args.rounds,
        seconds=60 * args.minutes,
    )  # fmt: skip
    tables = tune.run(job, args.target, say=output.note)
    if args.json:
        output.write_json({kernel: table.report() for kernel, table in tables.items()})
        return 0
    for kernel, table in tables.items():
        output.write_table(f"{kernel}: {table.path}", *describe.tiles(table.report()))
    output.write(f"programs use these tiles with ATTNLAB_KERNEL_TABLES={args.out}")
    return 0


def _tokenizer(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab import data
    from attnlab.launch import runtime
    from attnlab.train import config as run_config

    config = run_config.load(args.config, overrides).data
    if not isinstance(config, data.DataConfig):
        raise UserError(f"data.name = {config.node_name!r} has no text; allowed: text")
    with runtime.ending_in_order(), storage.writing(args.out, last="index.json") as path:
        out = str(path)
        if args.action == "train":
            summary = data.train_tokenizer(config, args.vocab, out, overwrite=args.overwrite)
        else:
            summary = data.apply_tokenizer(config, out, shards=args.shards, overwrite=args.overwrite)
    figures = (f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in summary.items())
    with output.after(f"{out} is written"):
        output.write_json(summary) if args.json else output.write(f"wrote {out}: {', '.join(figures)}")
    return 0


def _goodput(args: argparse.Namespace, _: list[str]) -> int:
    from attnlab.train import goodput

    found = goodput.account(args.workdir)
    if args.json:
        output.write_json(found)
    for table in () if args.json else goodput.tables(found):
        output.write_table(*table)
    return 0


def _report(args: argparse.Namespace, _: list[str]) -> int:
    from attnlab.ablation import collect, report, sections

    first = args.workdirs[0]
    if len(args.workdirs) == 1 and (first / "results.json").is_file() and not (first / "config.json").is_file():
        if args.out or args.baseline or args.metric or args.unpaired:
            raise UserError(f"{first} holds results.json, of which the report is made anew; it takes no other argument")
        path = report.remake(first)
        if (remote := storage.mirrored(first)) is not None:
            remote.push()
        output.write_json({"report": str(path)}) if args.json else output.write(f"wrote {path}")
        return 0
    out = pathlib.Path("report") if args.out is None else args.out
    with storage.writing(out, reads=("results.json",)) as here:
        report.require_free(here)
        results = collect.collect(args.workdirs, baseline=args.baseline, metric=args.metric, paired=not args.unpaired)
        results, path = report.write(here, results)
    with output.after(f"{path} is written"):
        if args.json:
            output.write_json(
                {"report": str(path), "comparisons": [dataclasses.asdict(c) for c in results.comparisons]}
            )
            return 0
        for table in sections.plain(results):
            output.write_table(*table)
        output.write(f"exploratory: no plan announced these comparisons\nwrote {path}, results.json and results.csv")
    return 0


def _interchange(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab.interchange import verbs as interchange

    if args.verb == "import" and args.workdir is None and not args.check:
        raise UserError("--workdir W is needed, or --check")
    return interchange.VERBS[args.verb](args, overrides)


_VERBS = {
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "list": _list,
    "cost": _cost,
    "ablate": _ablate,
    "compile": _compile,
    "tune": _tune,
    "tokenizer": _tokenizer,
    "report": _report,
    "goodput": _goodput,
    "import": _interchange,
    "export": _interchange,
    "lm-eval": _interchange,
}
