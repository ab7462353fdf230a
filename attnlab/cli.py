"""The command line: `attnlab VERB`. Thin: every verb reads its arguments and calls the part that does the work."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import Any

from attnlab.errors import TrainingFailed, UserError

_EPILOG = """\
overrides: --config.any.field=value, e.g. --config.train.steps=200 --config.model.mixers.M.window=64
an unknown key, a wrong type or an impossible value is refused before anything runs
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; 0 if it did what it should, 1 if a run failed, 2 if the user has to change something."""
    args, overrides = _parse(sys.argv[1:] if argv is None else argv)
    try:
        from attnlab.launch import runtime

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
    except BrokenPipeError:  # the reader of a pipe went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    return _parser().parse_args([a for a in argv if not a.startswith("--config.")]), overrides


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="attnlab", description="Research on attention architectures.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, *, config: bool = False, workdir: bool = False, machine: bool = False) -> Any:
        sub = verbs.add_parser(name, help=text, description=text, epilog=_EPILOG, formatter_class=raw)
        if config:
            sub.add_argument("--config", required=True, metavar="PATH[:arg=value,...]",
                             help="a config file, e.g. configs/lm.py:mixer=gated,size=nano")  # fmt: skip
        if workdir:
            sub.add_argument("--workdir", required=True, type=pathlib.Path, metavar="DIR",
                             help="where the run is, or will be")  # fmt: skip
        if machine:
            sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    verb("train", "train a model, or go on with a run", config=True, workdir=True)

    sub = verb("eval", "held-out loss, perplexity and bits per byte of a run", workdir=True, machine=True)
    sub.add_argument("--checkpoint", default="best", metavar="best|latest|STEP")
    sub.add_argument("--batches", type=int, metavar="N", help="only the first N held-out batches; default: all")

    sub = verb("generate", "continue prompts with a trained model", workdir=True, machine=True)
    sub.add_argument("--checkpoint", default="best", metavar="best|latest|STEP")
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times; default: stdin")
    where.add_argument("--prompt-file", type=pathlib.Path, metavar="FILE")
    sub.add_argument("--tokens", type=int, default=256, metavar="N", help="new tokens, at most (256)")
    sub.add_argument("--samples", type=int, default=1, metavar="N", help="samples of each prompt (1)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (0.8)")
    sub.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0: all (0)")
    sub.add_argument("--top-p", type=float, default=0.95, metavar="P", help="only the likeliest tokens of this total (0.95)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--stop", default="eod", metavar="eod|none|TEXT", help="token that ends a sample (eod: end of document)")

    sub = verb("list", "the mixers; with a name, its knobs", machine=True)
    sub.add_argument("name", nargs="?", metavar="MIXER")

    sub = verb("cost", "parameters, FLOPs per token and state of a config", config=True, machine=True)
    sub.add_argument("--length", type=int, metavar="T", help="sequence length; default: data.length")

    tokenizer = verbs.add_parser("tokenizer", help="make a tokenizer, or tokenise a corpus with one")
    actions = tokenizer.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (("train", "train a byte-level BPE tokenizer on the config's data"),
                       ("apply", "write the config's data as array_record shards of tokens")):  # fmt: skip
        sub = actions.add_parser(name, help=text, description=text, epilog=_EPILOG, formatter_class=raw)
        sub.add_argument("--config", required=True, metavar="PATH[:arg=value,...]")
        sub.add_argument("--out", required=True, type=pathlib.Path, metavar="FILE" if name == "train" else "DIR")
        sub.add_argument("--json", action="store_true", help="print one JSON object")
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

    train(config, args.workdir, rich.console.Console())
    return 0


def _eval(args: argparse.Namespace, overrides: list[str]) -> int:
    if args.batches is not None and args.batches < 1:
        raise UserError(f"--batches {args.batches} is not possible; allowed: 1 or more")
    from attnlab.train import restore

    trained = restore.load(args.workdir, args.checkpoint, overrides)
    summary = {"step": trained.step, **restore.evaluate_heldout(trained, args.batches).summary()}
    if args.json:
        print(json.dumps(summary))
        return 0
    print(f"step {summary['step']}: loss {summary['loss']:.4f}, perplexity {summary['perplexity']:.3f}, "
          f"{summary['bits_per_byte']:.4f} bits per byte; {summary['tokens']:,} held-out tokens")  # fmt: skip
    _table("loss by position in the context", ["positions", "tokens", "loss"],
           [[f"{r['first']} to {r['last']}", f"{r['tokens']:,}", f"{r['loss']:.4f}"] for r in summary["by_position"]])  # fmt: skip
    return 0


def _generate(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab.evaluate.generate import Sampling, generate
    from attnlab.train import restore

    sampling = Sampling(args.tokens, args.temperature, args.top_k, args.top_p, args.seed)
    if args.samples < 1:
        raise UserError(f"--samples {args.samples} is not possible; allowed: 1 or more")
    prompts = _prompts(args)
    trained = restore.load(args.workdir, args.checkpoint, overrides)
    sampling, ids = restore.prepare_prompts(trained.tokenizer, sampling, prompts, args.samples, args.stop)
    out = generate(trained.model.merge, trained.params, ids, sampling)
    texts = [trained.tokenizer.decode(new) for new in out.tokens]
    each = [prompt for prompt in prompts for _ in range(args.samples)]
    if args.json:
        count = sum(map(len, out.tokens))
        print(json.dumps({
            "step": trained.step,
            "samples": [{"prompt": p, "text": t, "tokens": n.tolist()} for p, t, n in zip(each, texts, out.tokens)],
            "compile_seconds": out.compile_seconds,
            "seconds": out.seconds,
            "tokens_per_second": count / out.seconds,
        }))  # fmt: skip
        return 0
    for i, (prompt, text) in enumerate(zip(each, texts)):
        if len(texts) > 1:
            print(f"{'' if i == 0 else chr(10)}--- sample {i + 1} of {len(texts)} ---")
        print(prompt + text)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        return args.prompt
    try:
        if args.prompt_file is not None:
            return [args.prompt_file.read_text(encoding="utf-8")]
        if sys.stdin.isatty():
            print("reading the prompt from stdin; end with Ctrl-D", file=sys.stderr)
        return [sys.stdin.read()]
    except OSError as error:
        raise UserError(f"--prompt-file {args.prompt_file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 text: {error}") from None


def _list(args: argparse.Namespace, _: list[str]) -> int:
    from attnlab.mixers import describe

    if args.name is not None:
        described = describe.mixer(args.name)
        if args.json:
            print(json.dumps(described))
            return 0
        print(f"{described['name']}: {described['summary']}\n{described['paper']}")
        if described["extension"]:
            print(f"extension, not in the paper: {described['extension']}")
        _table("knobs", ["key", "default", "meaning"],
               [[k["key"], str(k["default"]), k["doc"]] for k in described["knobs"]])  # fmt: skip
        return 0
    rows = describe.all_mixers()
    if args.json:
        print(json.dumps(rows))
        return 0
    _table(f"mixers, width {describe.WIDTH}, at T = {describe.LENGTH}",
           ["name", "paper", "can", "state bytes", "FLOPs / softmax", "ours"],
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
        print(json.dumps({
            "length": length,
            "parameters": cost.parameters,
            "embedding_parameters": cost.embedding_parameters,
            "forward_flops_per_token": cost.total_flops,
            "train_flops_per_token": 3 * cost.total_flops,
            "flops": cost.flops,
            "state_bytes_per_sequence": cost.state_bytes,
        }))  # fmt: skip
        return 0
    rows = [[part, f"{value:,.0f}", f"{100 * value / cost.total_flops:.1f} %"] for part, value in cost.flops.items()]
    _table(f"forward FLOPs per token at T = {length}, causal counted as causal", ["part", "FLOPs", "share"],
           [*rows, ["all", f"{cost.total_flops:,.0f}", "100.0 %"]])  # fmt: skip
    print(f"parameters: {cost.parameters:,} ({cost.embedding_parameters:,} in the embedding)\n"
          f"training: {3 * cost.total_flops:,.0f} FLOPs per token\n"
          f"state: {cost.state_bytes:,} bytes per sequence of {length} tokens")  # fmt: skip
    return 0


def _tokenizer(args: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab import data
    from attnlab.train import config as run_config

    config = run_config.load(args.config, overrides).data
    if args.action == "train":
        summary = data.train_tokenizer(config, args.vocab, str(args.out))
    else:
        summary = data.apply_tokenizer(config, str(args.out), shards=args.shards)
    if args.json:
        print(json.dumps(summary))
    else:
        print(f"wrote {args.out}: " + ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in summary.items()))
    return 0


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    import rich.console
    import rich.table

    table = rich.table.Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 or not rows or not rows[0][i][:1].isdigit() else "right")
    for row in rows:
        table.add_row(*row)
    rich.console.Console(highlight=False).print(table)


_VERBS = {
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "list": _list,
    "cost": _cost,
    "tokenizer": _tokenizer,
}
