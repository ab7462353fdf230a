"""The command line: `attnlab VERB`. Thin: every verb reads its arguments and calls the part that does the work."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import pathlib
import sys
from typing import Any, NoReturn

from attnlab import config as config_lib
from attnlab.errors import ConfigError, TrainingFailed, UserError

_EXAMPLES = """\
examples:
  attnlab list                                                       the mixers; `attnlab list gated`: its knobs
  attnlab train --config configs/lm.py:mixer=gated --workdir runs/a  train one; the same command goes on with it
  attnlab eval --workdir runs/a                                      its held-out loss
  attnlab generate --workdir runs/a --prompt "def main("             continue a text

`attnlab VERB --help` says the rest. Exit codes: 0 done, 1 a run failed, 2 something to change in the command.
"""
_OVERRIDES = """\
overrides: --config.any.field=value, e.g. --config.train.steps=200 --config.model.mixers.M.window=64
  values: 200, 2e3, 1e-3, true, false, none, text; --config.optimizer=lion picks another one by its name
  an unknown key, a wrong type or an impossible value is refused before anything runs, with what is allowed
"""
_CONFIG = """\
--config PATH.py[:arg=value,...] runs the file's get_config; --config RUN/config.json repeats a run
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; 0 if it did what it should, 1 if a run failed, 2 if the user has to change something."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        _parser().print_help(sys.stderr)
        return 2
    args, overrides = _parse(argv)
    logging.basicConfig(format="%(message)s")  # to stderr: stdout is for results
    logging.getLogger("attnlab").setLevel(logging.INFO)
    try:
        from attnlab.launch import runtime

        runtime.quiet()
        if args.verb in ("list", "cost", "tokenizer"):  # these need no chip, and a TPU serves one process at a time
            os.environ["JAX_PLATFORMS"] = "cpu"
        if args.verb == "train":  # before anything touches a device
            from attnlab.launch import cluster

            cluster.start(args.config, overrides)
        if args.verb == "compile":
            from attnlab.launch import targets

            targets.prepare()
        runtime.configure()
        return _VERBS[args.verb](args, overrides) or 0
    except UserError as error:
        print(f"attnlab {args.verb}: {error}", file=sys.stderr)
        return 2
    except TrainingFailed as error:
        print(f"attnlab {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "RESOURCE_EXHAUSTED" in line or "Unable to initialize" in line), None)
        if reason is None:
            raise
        print(f"attnlab {args.verb}: {reason[:300]}", file=sys.stderr)
        if "RESOURCE_EXHAUSTED" in reason:
            print("lower data.batch, --samples or --tokens, or raise train.accumulate or model.remat", file=sys.stderr)
        return 1 if "RESOURCE_EXHAUSTED" in reason else 2
    except BrokenPipeError:  # the reader of a pipe went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest option."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        options = (a for a in self._given if a.startswith("--") and len(a) > 2)
        unknown = [a for a in options if a.partition("=")[0] not in self._option_string_actions]
        if "are required:" in message and unknown:  # a misspelt option is why one is missing
            self.refuse(unknown)
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def refuse(self, unknown: list[str]) -> NoReturn:
        option = next((a for a in unknown if a.startswith("-")), unknown[0])
        name = option.partition("=")[0]
        hint = config_lib.suggest(name, list(self._option_string_actions))
        if name.startswith("-") and "." in name:
            hint = "; an override is written --config.any.field=value"
        self.exit(2, f"{self.prog}: unknown argument {option!r}{hint}; see {self.prog} --help\n")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    overrides, rest, left = [], [], iter(argv)
    for item in left:
        if not item.startswith("--config."):
            rest.append(item)
            continue
        if "=" not in item:  # `--config.key value`
            item = f"{item}={value}" if (value := next(left, None)) is not None else item
        overrides.append(item.removeprefix("--config."))
    args, unknown = _parser().parse_known_args(rest)
    if unknown:
        args.parser.refuse(unknown)
    if overrides and not args.overrides:
        args.parser.error(f"--config.{overrides[0]} is for verbs that read a config")
    return args, overrides


def _directory(text: str) -> pathlib.Path:
    if not text:
        raise argparse.ArgumentTypeError("a path is expected")
    return pathlib.Path(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


_finite.__name__ = "number"  # argparse names the type in its messages


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="attnlab", description="Research on attention architectures.", epilog=_EXAMPLES)
    parser.set_defaults(parser=parser, overrides=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, text: str, *, config: bool = False, workdir: bool = False, machine: bool = False, more: str = "",
        of: Any = verbs,
    ) -> Any:  # fmt: skip
        reads = config or workdir
        notes = (_CONFIG if config else "") + (_OVERRIDES if reads else "")
        sub = of.add_parser(name, help=text, description=text + more, epilog=notes)
        sub.set_defaults(parser=sub, overrides=reads)
        if config:
            sub.add_argument("--config", required=True, metavar="PATH[:arg=value,...]",
                             help="a config file, e.g. configs/lm.py:mixer=gated,size=nano")  # fmt: skip
        if workdir:
            sub.add_argument("--workdir", required=True, type=_directory, metavar="DIR",
                             help="where the run is, or will be" if config else "of the run")  # fmt: skip
        if machine:
            sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    verb("train", "train a model, or go on with a run", config=True, workdir=True,
         more="\n\n"
              "All is written to the workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/, samples.txt,\n"
              "log.txt. Ctrl-C saves and stops; the same command goes on from there.")  # fmt: skip

    sub = verb("eval", "held-out loss, perplexity and bits per byte of a run", workdir=True, machine=True)
    sub.add_argument("--checkpoint", default="best", metavar="best|latest|STEP",
                     help="which one; best: of the lowest held-out loss (best)")  # fmt: skip
    sub.add_argument("--batches", type=int, metavar="N", help="only the first N held-out batches; default: all")

    sub = verb("generate", "continue prompts with a trained model", workdir=True, machine=True)
    sub.add_argument("--checkpoint", default="best", metavar="best|latest|STEP",
                     help="which one; best: of the lowest held-out loss (best)")  # fmt: skip
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times; default: stdin")
    where.add_argument("--prompt-file", type=_directory, metavar="FILE", help="one prompt: the whole file, as it is")
    sub.add_argument("--tokens", type=int, default=256, metavar="N", help="new tokens, at most (256)")
    sub.add_argument("--samples", type=int, default=1, metavar="N", help="samples of each prompt (1)")
    sub.add_argument("--temperature", type=_finite, default=0.8, metavar="X", help="0: the likeliest token (0.8)")
    sub.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0: all (0)")
    sub.add_argument("--top-p", type=_finite, default=0.95, metavar="P",
                     help="only the likeliest tokens of this total probability (0.95)")  # fmt: skip
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    sub.add_argument("--stop", default="eod", metavar="eod|none|TEXT",
                     help="token that ends a sample (eod: end of document)")  # fmt: skip

    sub = verb("list", "the mixers; with a name, its knobs", machine=True)
    sub.add_argument("name", nargs="?", metavar="MIXER")
    sub.add_argument("--parameters", action="store_true",
                     help="of MIXER: shapes, axes and roles, and what optimizers make of these")  # fmt: skip
    sub.add_argument("--length", type=int, metavar="T", help="positions at which state and FLOPs are told (4096)")
    sub.add_argument("--width", type=int, metavar="D", help="model width at which they are told (512)")

    sub = verb("cost", "parameters, FLOPs per token and state of a config", config=True, machine=True)
    sub.add_argument("--length", type=int, metavar="T", help="sequence length; default: data.length")

    more = (
        "\n\nSays what each chip holds, computes and sends, and how long a step takes at least. Needs none of the\n"
        "chips, but a compiler: attnlab[compile] for TPUs, attnlab[compile-cuda] for NVIDIA's Hopper. FLOPs,\n"
        "bytes and collectives in loops are counted as often as the loops run. Exit code 1: it does not fit."
    )
    sub = verb("compile", "compile a run's train step for TPUs or GPUs that are not here", config=True, machine=True,
               more=more)  # fmt: skip
    sub.add_argument("--topology", required=True, metavar="CHIP:SHAPE",
                     help="TPUs: v5e:16x16, v5p:4x4x4, v6e:16x16, v4:4x4x4, tpu7x:4x4x4, two slices 2*v5p:4x4x4; GPUs: "
                          "h100:8 (one host), h100:4x8 (four hosts), h200:8")  # fmt: skip
    sub.add_argument("--search", action="store_true",
                     help="try meshes, train.accumulate and model.remat, and rank those that fit")  # fmt: skip
    sub.add_argument("--count", type=int, default=12, metavar="N", help="compiles of a search, at most (12)")
    sub.add_argument("--minutes", type=_finite, default=60, metavar="M", help="a search starts none later (60)")

    tokenizer = verbs.add_parser(
        "tokenizer",
        help="make a tokenizer, or tokenise a corpus with one",
        description="Byte-level BPE on a config's data (its `data` alone matters).",
    )
    tokenizer.set_defaults(parser=tokenizer)
    actions = tokenizer.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (("train", "train a byte-level BPE tokenizer on the config's data"),
                       ("apply", "write the config's data as array_record shards of tokens")):  # fmt: skip
        sub = verb(name, text, config=True, machine=True, of=actions)
        sub.add_argument("--out", required=True, type=_directory, metavar="FILE" if name == "train" else "DIR",
                         help="the tokenizer's JSON file: --config.data.tokenizer=FILE uses it" if name == "train" else
                         "new directory: --config.data.source=array_record:DIR/*.array_record reads it")  # fmt: skip
        if name == "train":
            sub.add_argument("--vocab", type=int, default=32_768, metavar="V", help="entries (32768)")
        else:
            sub.add_argument("--shards", type=int, default=8, metavar="N", help="files (8)")
    return parser


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    import rich.console

    from attnlab.train import config as run_config

    config = run_config.load(args.config, overrides)
    from attnlab.train.loop import train

    class Console(rich.console.Console):
        def on_broken_pipe(self) -> None:
            """A run outlives the reader of its output: log.txt has it all."""
            self.quiet = True

    train(config, args.workdir, Console())
    return 0


def _eval(args: argparse.Namespace, overrides: list[str]) -> int:
    if args.batches is not None and args.batches < 1:
        raise UserError(f"--batches {args.batches} is not possible; allowed: 1 or more")
    from attnlab.train import restore

    trained = restore.load(args.workdir, args.checkpoint, overrides)
    evaluation, notes = restore.evaluate_heldout(trained, args.batches)
    summary = {"step": trained.step, **evaluation.summary(), "notes": notes}
    if args.json:
        _print_json(summary)
        return 0
    print(f"step {summary['step']}: loss {summary['loss']:.4f}, perplexity {summary['perplexity']:.3f}, "
          f"{summary['bits_per_byte']:.4f} bits per byte; {summary['tokens']:,} held-out tokens")  # fmt: skip
    for note in notes:
        print(f"note: {note}")
    rows = [[f"{r['first']} to {r['last']}", f"{r['tokens']:,}", f"{r['loss']:.4f}"] for r in summary["by_position"]]
    _table("loss by position in the context", ["positions", "tokens", "loss"], rows)
    return 0


def _generate(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab.evaluate.generate import Sampling, generate
    from attnlab.train import restore

    for key, value in (("samples", args.samples), ("tokens", args.tokens)):
        if not 1 <= value <= 2**30:
            raise UserError(f"--{key} {value} is not possible; allowed: 1 to 2^30")
    try:
        sampling = Sampling(args.tokens, args.temperature, args.top_k, args.top_p, args.seed)
    except ConfigError as error:
        key, _, rest = str(error).partition(" ")
        raise UserError(f"--{key.replace('_', '-')} {rest}") from None
    prompts = _prompts(args)
    trained = restore.load(args.workdir, args.checkpoint, overrides, evaluating=False)
    sampling, ids = restore.prepare_prompts(trained.tokenizer, sampling, prompts, args.samples, args.stop)
    notes = [*trained.notes, *restore.beyond(trained, max(map(len, ids)) + sampling.tokens)]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    out = generate(trained.model.merge, trained.params, ids, sampling)
    texts = [trained.tokenizer.decode(new) for new in out.tokens]
    each = [prompt for prompt in prompts for _ in range(args.samples)]
    if args.json:
        count = sum(map(len, out.tokens))
        _print_json({
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
            print(f"{'' if i == 0 else chr(10)}--- sample {i + 1} of {len(texts)} ---")
        print(prompt + text)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    where = "--prompt"
    try:
        if args.prompt is not None:
            for prompt in args.prompt:
                prompt.encode("utf-8")
            return args.prompt
        if args.prompt_file is not None:
            where = f"--prompt-file {args.prompt_file}"
            return [args.prompt_file.read_bytes().decode("utf-8")]
        where = "the prompt on stdin"
        if sys.stdin is None:
            raise UserError("stdin is closed; give --prompt TEXT or --prompt-file FILE")
        if sys.stdin.isatty():
            print("reading the prompt from stdin; end with Ctrl-D", file=sys.stderr)
        return [sys.stdin.buffer.read().decode("utf-8")]
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error.reason} at position {error.start}") from None


def _list(args: argparse.Namespace, _: list[str]) -> int:
    from attnlab.mixers import describe

    width = describe.WIDTH if args.width is None else args.width
    length = describe.LENGTH if args.length is None else args.length
    if args.parameters:
        if args.name is None:
            raise UserError("--parameters is of one mixer: attnlab list MIXER --parameters")
        rows = describe.parameters(args.name, width)
        if args.json:
            _print_json({"name": args.name, "width": width, "parameters": rows})
            return 0
        title = f"{args.name} with default knobs, width {width}; the last column is with optimizer=muon"
        _table(title, *describe.parameter_table(rows))
        return 0
    if args.name is not None:
        described = describe.mixer(args.name)
        if args.json:
            _print_json(described)
            return 0
        print(f"{described['name']}: {described['summary']}\n{described['paper']}")
        if described["extension"]:
            print(f"extension, not in the paper: {described['extension']}")
        print(f"positions split over devices (mesh.context): {described['context'] or 'no'}")
        _table("knobs", ["key", "default", "meaning"],
               [[k["key"], str(k["default"]), k["doc"]] for k in described["knobs"]])  # fmt: skip
        return 0
    rows = describe.all_mixers(width, length)
    if args.json:
        _print_json(rows)
        return 0
    _table(f"one layer with default knobs, width {width}, at T = {length}",
           ["name", "paper", "can", f"state bytes at {length}", "FLOPs / softmax", "extension, not in the paper"],
           [[r["name"], r["paper"], ", ".join(r["capabilities"]), f"{r['state_bytes']:,}",
             f"{r['relative_flops']:.2f}", r["extension"] or "-"] for r in rows])  # fmt: skip
    return 0


def _cost(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab.models.cost import model_cost
    from attnlab.train import config as run_config

    config = run_config.load(args.config, overrides)
    length = config.data.length if args.length is None else args.length
    if length < 1:
        raise UserError(f"--length {length} is not possible; allowed: 1 or more")
    cost = model_cost(config.model, length)
    if args.json:
        _print_json({
            "length": length,
            "parameters": cost.parameters,
            "embedding_parameters": cost.embedding_parameters,
            "forward_flops_per_token": cost.total_flops,
            "train_flops_per_token": 3 * cost.total_flops,
            "flops": cost.flops,
            "state_bytes_per_sequence": cost.state_bytes,
        })  # fmt: skip
        return 0
    rows = [[part, f"{value:,.0f}", f"{100 * value / cost.total_flops:.1f} %"] for part, value in cost.flops.items()]
    _table(f"forward FLOPs per token at T = {length}, causal counted as causal", ["part", "FLOPs", "share"],
           [*rows, ["all", f"{cost.total_flops:,.0f}", "100.0 %"]])  # fmt: skip
    print(f"parameters: {cost.parameters:,} ({cost.embedding_parameters:,} in the embedding)\n"
          f"training: {3 * cost.total_flops:,.0f} FLOPs per token\n"
          f"state: {cost.state_bytes:,} bytes per sequence of {length} tokens")  # fmt: skip
    return 0


def _compile(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab.launch import compile as compile_lib
    from attnlab.launch import describe, search, targets
    from attnlab.train import config as run_config

    if args.count < 1 or args.minutes <= 0:
        raise UserError("--count and --minutes must be above 0")
    config = run_config.load(args.config, overrides)
    target = targets.Target.of(args.topology)
    if not args.search:
        report = compile_lib.compile_step(config, target)
        if args.json:
            _print_json(report)
        else:
            print("\n".join(describe.program(report)))
        return 0 if report["memory"]["fits"] else 1
    say = lambda line: print(line, file=sys.stderr, flush=True)
    reports = search.search(config, target, seconds=60 * args.minutes, count=args.count, say=say)
    if args.json:
        _print_json(reports)
    else:
        _table(f"{args.topology}: the fastest first, by the slowest floor", *describe.ranking(reports))
    return 0 if reports and reports[0]["memory"]["fits"] else 1


def _tokenizer(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab import data
    from attnlab.train import config as run_config

    config = run_config.load(args.config, overrides).data
    if args.action == "train":
        summary = data.train_tokenizer(config, args.vocab, str(args.out))
    else:
        summary = data.apply_tokenizer(config, str(args.out), shards=args.shards)
    if args.json:
        _print_json(summary)
    else:
        figures = (f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in summary.items())
        print(f"wrote {args.out}: {', '.join(figures)}")
    return 0


def _print_json(value: Any) -> None:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN

    print(json.dumps(clean(value)))


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    import rich.console
    import rich.table
    import rich.text

    table = rich.table.Table(box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 or not rows or not rows[0][i][:1].isdigit() else "right")
    for row in rows:
        table.add_row(*(rich.text.Text(cell) for cell in row))  # a Text, as [B, T] in a string would be markup
    # In a pipe a row is a line, however long.
    console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    with console.capture() as captured:
        console.print(table)
    print(title)
    for line in captured.get().splitlines():
        print(line.rstrip())


_VERBS = {
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "list": _list,
    "cost": _cost,
    "compile": _compile,
    "tokenizer": _tokenizer,
}
