"""The arguments of the command line: what it takes, how each is checked, and what `--help` says."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from attnlab import config as config_lib
from attnlab import output, paths, storage
from attnlab.errors import UserError

_EXAMPLES = """\
examples:
  attnlab list                                                       the mixers; `attnlab list gated`: its knobs
  attnlab list tasks                                                 generated tasks; `attnlab list mqar`: its fields
  attnlab train --config configs/lm.py:mixer=gated --workdir runs/a  train one; the same command goes on with it
  attnlab eval --workdir runs/a                                      its held-out loss
  attnlab generate --workdir runs/a --prompt "def main("             continue a text

`attnlab VERB --help` says the rest. Exit codes: 0 done, 1 a run failed (3: some of a plan's),
2 something to change in the command.
"""
_OVERRIDES = """\
overrides: --config.any.field=value, e.g. --config.train.steps=200 --config.model.mixers.M.window=64
  values: 200, 2e3, 1e-3, true, false, none, text; --config.optimizer=lion picks another one by its name
  an unknown key, a wrong type or an impossible value is refused before anything runs, with what is allowed
"""
_CONFIG = """\
--config PATH.py[:arg=value,...] runs the file's get_config; --config RUN/config.json repeats a run
"""
_EMA = "with the averaged weights of train.ema instead of the parameters"


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest option."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(args)
        return super().parse_known_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        output.write(self.format_help().rstrip("\n"))  # argparse says nothing of what it cannot write

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


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of a command, and its overrides `any.field=value`; a wrong command ends the process with 2."""
    overrides, rest, left = [], [], iter(argv)
    for item in left:
        if not item.startswith("--config."):
            rest.append(item)
            continue
        if "=" not in item:  # `--config.key value`
            item = f"{item}={value}" if (value := next(left, None)) is not None else item
        overrides.append(item.removeprefix("--config."))
    args, unknown = build().parse_known_args(rest)
    if unknown:
        args.parser.refuse(unknown)
    if overrides and not args.overrides:
        args.parser.error(f"--config.{overrides[0]} is for verbs that read a config")
    return args, overrides


def prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of `generate`: those of the command, a file's, or stdin's.

    Raises:
      UserError: a file or stdin cannot be read, or is not UTF-8.
    """
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
            output.note("reading the prompt from stdin; end with Ctrl-D")
        return [sys.stdin.buffer.read().decode("utf-8")]
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error.reason} at position {error.start}") from None


def _place(text: str) -> pathlib.Path | storage.Url:
    """A local path, or a place in a bucket."""
    if not storage.is_url(text):
        return _path(text)
    try:
        return storage.Url(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _path(text: str) -> pathlib.Path:
    if not text:
        raise argparse.ArgumentTypeError("a path is expected")
    if storage.is_url(text):
        raise argparse.ArgumentTypeError(f"{text!r} is a URL, which is not possible here; allowed: a local path")
    try:
        return pathlib.Path(paths.expand(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _slice(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count) < 2**20:
        return int(index), int(count)
    raise argparse.ArgumentTypeError(f"{config_lib.show(text)} is not possible; allowed: I/N, I from 0 to N - 1")


def _integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    return _number(int, lambda value: least <= value <= most, f"an integer from {least} to {most}")


def _number(kind: type, possible: Callable[[Any], bool], allowed: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if possible(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{config_lib.show(text)} is not possible; allowed: {allowed}")

    return read


_count = _integer(1)


def _integers(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


_temperature = _number(float, lambda x: 0 <= x < math.inf, "a finite number, 0 or more")
_share = _number(float, lambda x: 0 < x <= 1, "above 0, at most 1")
_positive = _number(float, lambda x: 0 < x < math.inf, "a finite number above 0")


def build() -> argparse.ArgumentParser:
    """The parser of all verbs; the overrides of a config, `--config.any.field=value`, are not its business."""
    parser = _Parser(prog="attnlab", description="Research on attention architectures.", epilog=_EXAMPLES)
    parser.set_defaults(parser=parser, overrides=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = functools.partial(_verb, verbs)

    sub = verb("train", "train a model, or go on with a run", config=True, workdir=True,
         more="\n\n"
              "All is written to the workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/, samples.txt,\n"
              "log.txt. Ctrl-C, SIGTERM and SIGHUP save and stop; the same command goes on from there.")  # fmt: skip
    sub.add_argument("--init-from", type=_place, metavar="DIR",
                     help="workdir of another run, as whose newest checkpoint's parameters these begin")  # fmt: skip

    sub = verb("eval", "held-out loss, perplexity and bits per byte of a run", workdir=True, machine=True)
    sub.add_argument("--checkpoint", default="best", metavar="best|latest|STEP",
                     help="which one; best: of the lowest held-out loss (best)")  # fmt: skip
    sub.add_argument("--ema", action="store_true", help=_EMA)
    sub.add_argument("--batches", type=_count, metavar="N", help="only the first N held-out batches; default: all")
    sub.add_argument("--lengths", type=_integers, metavar="M,M,..",
                     help="at these multiples of data.length, e.g. 1,2,4,8,16")  # fmt: skip

    _add_generate(verbs)

    sub = verb("list", "the mixers, or the tasks; with a name, its knobs", machine=True)
    sub.add_argument("name", nargs="?", metavar="MIXER|tasks|TASK")
    sub.add_argument("--parameters", action="store_true",
                     help="of MIXER: shapes, axes and roles, and what optimizers make of these")  # fmt: skip
    sub.add_argument("--length", type=_count, metavar="T", help="positions at which state and FLOPs are told (4096)")
    sub.add_argument("--width", type=_count, metavar="D", help="model width at which they are told (512)")

    sub = verb("cost", "parameters, FLOPs per token and state of a config", config=True, machine=True)
    sub.add_argument("--length", type=_count, metavar="T", help="sequence length; default: data.length")

    _add_ablate(verbs)
    _add_compile(verbs)
    _add_tune(verbs)
    _add_tokenizer(verbs)
    _add_report(verbs)
    _add_interchange(verbs)
    verb("goodput", "where a run's time went, over all its attempts", workdir=True, machine=True)
    return parser


def _verb(
    verbs: Any, name: str, text: str, *,
    config: bool | None = False, workdir: bool = False, machine: bool = False, more: str = "",
) -> argparse.ArgumentParser:  # fmt: skip
    reads = config is not False or workdir
    notes = (_CONFIG if config else "") + (_OVERRIDES if reads else "")
    sub = verbs.add_parser(name, help=text, description=text + more, epilog=notes)
    sub.set_defaults(parser=sub, overrides=reads)
    if config:
        sub.add_argument("--config", required=True, metavar="PATH[:arg=value,...]",
                         help="a config file, e.g. configs/lm.py:mixer=gated,size=nano")  # fmt: skip
    if workdir:
        sub.add_argument("--workdir", required=True, type=_place, metavar="DIR",
                         help="of the run" if config is False else "where the run is, or will be")  # fmt: skip
    if machine:
        sub.add_argument("--json", action="store_true", help="print one JSON object")
    return sub


def _add_generate(verbs: Any) -> None:
    sub = _verb(verbs, "generate", "continue prompts with a trained model", workdir=True, machine=True)
    sub.add_argument("--checkpoint", default="best", metavar="best|latest|STEP",
                     help="which one; best: of the lowest held-out loss (best)")  # fmt: skip
    sub.add_argument("--ema", action="store_true", help=_EMA)
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times; default: stdin")
    where.add_argument("--prompt-file", type=_path, metavar="FILE", help="one prompt: the whole file, as it is")
    sub.add_argument("--tokens", type=_integer(1, 2**30), default=256, metavar="N", help="new tokens, at most (256)")
    sub.add_argument("--samples", type=_integer(1, 2**20), default=1, metavar="N", help="samples of each prompt (1)")
    sub.add_argument("--temperature", type=_temperature, default=0.8, metavar="X", help="0: the likeliest token (0.8)")
    sub.add_argument(
        "--top-k", type=_integer(0), default=0, metavar="K", help="only the K likeliest tokens; 0: all (0)"
    )
    sub.add_argument("--top-p", type=_share, default=0.95, metavar="P",
                     help="only the likeliest tokens of this total probability (0.95)")  # fmt: skip
    sub.add_argument("--seed", type=_integer(0), default=0, metavar="N", help="of the draws (0)")
    sub.add_argument("--stop", default="eod", metavar="eod|none|TEXT",
                     help="token that ends a sample (eod: end of document)")  # fmt: skip


def _add_ablate(verbs: Any) -> None:
    more = (
        "\n\nA plan names arms, seeds, what is held equal, metrics and margins. It is written to DIR/plan.json before\n"
        "the first run. Runs are in DIR/arms/ARM/seedK, each an ordinary workdir; results.json, results.csv and the\n"
        "report come at the end. The same command goes on where it stopped, and repeats none. Exit code 3: one failed."
    )
    sub = _verb(verbs, "ablate", "compare arms by a plan: runs, statistics, report",
                config=None, workdir=True, machine=True, more=more)  # fmt: skip
    sub.add_argument("--config", metavar="PATH[:arg=value,...]", help="a plan, e.g. configs/ablations/quick.py")
    sub.add_argument("--dry-run", action="store_true", help="tell what it would cost, and run nothing")
    sub.add_argument("--self-test", action="store_true",
                     help="compare arms that are the same by tiny runs: is a difference seen?")  # fmt: skip
    sub.add_argument("--processes", type=_integer(1, 512), metavar="N",
                     help="on this machine; default: one per core of a CPU, up to 8; else 1")  # fmt: skip
    sub.add_argument("--slice", type=_slice, default=(0, 1), metavar="I/N",
                     help="only the runs of slice I of N, from 0: others take the rest, in the same DIR")  # fmt: skip
    sub.add_argument("--retry-failed", action="store_true", help="run again what failed")


def _add_compile(verbs: Any) -> None:
    more = (
        "\n\nSays what each chip holds, computes and sends, and how long a step takes at least. Needs none of the\n"
        "chips, but a compiler: attnlab[compile] for TPUs, attnlab[compile-cuda] for NVIDIA's Hopper. FLOPs,\n"
        "bytes and collectives in loops are counted as often as the loops run. Exit code 1: it does not fit."
    )
    sub = _verb(verbs, "compile", "compile a run's train step for TPUs or GPUs that are not here",
                config=True, machine=True, more=more)  # fmt: skip
    sub.add_argument("--topology", required=True, metavar="CHIP:SHAPE",
                     help="TPUs: v5e:16x16, v5p:4x4x4, v6e:16x16, v4:4x4x4, tpu7x:4x4x4, two slices 2*v5p:4x4x4; GPUs: "
                          "h100:8 (one host), h100:4x8 (four hosts), h200:8")  # fmt: skip
    sub.add_argument("--search", action="store_true",
                     help="try meshes, train.accumulate and model.remat, and rank those that fit")  # fmt: skip
    sub.add_argument("--count", type=_count, default=12, metavar="N", help="compiles of a search, at most (12)")
    sub.add_argument("--minutes", type=_positive, default=60, metavar="M", help="a search starts none later (60)")


def _add_tune(verbs: Any) -> None:
    more = (
        "\n\nOn a TPU candidates are timed in rounds, one after the other, and the medians compared; one whose\n"
        "results differ is left out. With --target CHIP no TPU is needed, but its compiler (attnlab[compile]):\n"
        "candidates are ranked by the cycles that it schedules for a causal head. Every figure is written as it\n"
        "comes, to DIR/CHIP/KERNEL.json, and the same command goes on with it. Programs use these tables where the\n"
        "environment says ATTNLAB_KERNEL_TABLES=DIR."
    )
    sub = _verb(verbs, "tune", "find the tiles of our TPU kernels", machine=True, more=more)
    sub.add_argument("kernels", nargs="*", metavar="KERNEL", help="flash_forward, flash_backward; default: both")
    sub.add_argument("--out", required=True, type=_path, metavar="DIR", help="folder of tables, new or to go on with")
    sub.add_argument("--target", metavar="CHIP", help="v5e, v5p, v6e or tpu7x; default: the TPU that is here")
    for name, default, text in (
        ("batch", None, "sequences (4; with --target 64)"), ("length", 4096, "positions (4096)"),
        ("heads", None, "heads (8; with --target 2)"), ("kv-heads", None, "key/value heads (as heads)"),
        ("width", 128, "of a head (128)"),
    ):  # fmt: skip
        sub.add_argument(f"--{name}", type=_count, default=default, metavar="N", help=text)
    sub.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16)")
    sub.add_argument("--count", type=_count, default=12, metavar="N", help="candidates of a kernel, at most (12)")
    sub.add_argument("--rounds", type=_count, default=7, metavar="N", help="timings of each candidate (7)")
    sub.add_argument("--minutes", type=_positive, default=60, metavar="M", help="begin nothing later (60)")


def _add_tokenizer(verbs: Any) -> None:
    tokenizer = verbs.add_parser(
        "tokenizer",
        help="make a tokenizer, or tokenise a corpus with one",
        description="Byte-level BPE on a config's data (its `data` alone matters).",
    )
    tokenizer.set_defaults(parser=tokenizer)
    actions = tokenizer.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (("train", "train a byte-level BPE tokenizer on the config's data"),
                       ("apply", "write the config's data as array_record shards of tokens")):  # fmt: skip
        sub = _verb(actions, name, text, config=True, machine=True)
        sub.add_argument("--out", required=True, type=_place, metavar="FILE" if name == "train" else "DIR",
                         help="the tokenizer's JSON file: --config.data.tokenizer=FILE uses it" if name == "train" else
                         "new directory: --config.data.source=array_record:DIR/*.array_record reads it")  # fmt: skip
        sub.add_argument("--overwrite", action="store_true",
                         help="replace a regular file that is there; a device, a FIFO, a directory never is" if
                         name == "train" else "replace a directory that this wrote, and that alone")  # fmt: skip
        if name == "train":
            sub.add_argument("--vocab", type=_integer(257, 2**24), default=32_768, metavar="V", help="entries (32768)")
        else:
            sub.add_argument("--shards", type=_integer(1, 99999), default=8, metavar="N", help="files (8)")


def _add_interchange(verbs: Any) -> None:
    more = (
        "\n\nDIR has config.json, *.safetensors and tokenizer.json. The workdir is one that train, eval and generate\n"
        "take: a checkpoint at step 0, config.json, the tokenizer, and imported.json, which says from where.\n"
        "Go on with `attnlab train --config W/config.json --workdir W`; what it reads and how long it trains are\n"
        "said here, e.g. --config.data.source='text:/data/*.txt' --config.train.steps=2000 --config.mesh.fsdp=8.\n"
        "Families and what is refused: docs/interchange.md."
    )
    sub = _verb(verbs, "import", "make a workdir of a published checkpoint", machine=True, more=more)
    sub.set_defaults(overrides=True)
    sub.epilog = _OVERRIDES
    sub.add_argument("--from", dest="source", required=True, type=_path, metavar="DIR", help="the checkpoint's folder")
    sub.add_argument("--workdir", type=_path, metavar="W", help="new; not needed with --check")
    sub.add_argument("--as", dest="as_", metavar="MIXER",
                     help="turn its softmax attention into: moh, gated, sinks (the same function at first) or "
                          "moh_llama3 (another one)")  # fmt: skip
    sub.add_argument("--check", action="store_true",
                     help="read headers alone; say what each tensor becomes, and write nothing")  # fmt: skip

    more = (
        "\n\nWrites config.json, safetensors and the tokenizer in the layout of the published family that has exactly\n"
        "this model, in the order that transformers reads; a model that no family has is refused by what it has too\n"
        "many of. The folder is there only once it is whole."
    )
    sub = _verb(verbs, "export", "write a run's model as transformers reads it", machine=True, more=more)
    sub.set_defaults(overrides=True)
    sub.epilog = _OVERRIDES
    sub.add_argument("--workdir", required=True, type=_path, metavar="W", help="of the run")
    sub.add_argument("--to", required=True, type=_path, metavar="DIR", help="a new folder")
    sub.add_argument("--checkpoint", default="best", metavar="best|latest|STEP", help="which one (best)")
    sub.add_argument("--ema", action="store_true", help=_EMA)
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                     help="of the tensors; default: as it was imported, else float32")  # fmt: skip
    sub.add_argument("--shard-size", type=_size, default=5 * 10**9, metavar="SIZE",
                     help="of a file, at most, e.g. 500MB (5GB)")  # fmt: skip
    sub.add_argument("--remote-code", action="store_true",
                     help="where transformers has no such architecture, write PyTorch code beside the tensors, which "
                          "its trust_remote_code=True loads")  # fmt: skip

    more = (
        "\n\nNAME is one of ours over the run's held-out text (heldout, heldout_cloze, heldout_write: no network),\n"
        "the path of a YAML file of the harness or of a folder with some, or a name or pattern of its own tasks,\n"
        "which it downloads. Figures and their standard errors are printed and kept in W/eval/lm_eval-STEP.json.\n"
        "Needs attnlab[lm-eval]; docs/lm_eval.md says how requests are read."
    )
    sub = _verb(verbs, "lm-eval", "a run's language model on tasks of lm-evaluation-harness", machine=True, more=more)
    sub.set_defaults(overrides=True)
    sub.epilog = _OVERRIDES
    sub.add_argument("--workdir", required=True, type=_path, metavar="W", help="of the run")
    sub.add_argument("--tasks", required=True, type=_names, metavar="NAME,NAME,..", help="names or paths")
    sub.add_argument("--checkpoint", default="best", metavar="best|latest|STEP", help="which one (best)")
    sub.add_argument("--limit", type=_count, metavar="N", help="only the first N documents of each task")
    sub.add_argument("--fewshot", type=_integer(0, 1000), metavar="N",
                     help="examples before each question; default: as the task says")  # fmt: skip
    sub.add_argument("--seed", type=_integer(0), default=0, metavar="N", help="of texts that are drawn (0)")
    sub.add_argument("--out", type=_path, metavar="FILE", help="a new file to write to instead")


def _names(text: str) -> list[str]:
    if names := [name for name in text.split(",") if name]:
        return names
    raise argparse.ArgumentTypeError("a name is expected, or several with commas between")


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d{1,9})(|KB|MB|GB)", text)
    if found and (size := int(found[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]):
        return size
    raise argparse.ArgumentTypeError(f"{config_lib.show(text)} is not possible; allowed: a number and KB, MB or GB")


def _add_report(verbs: Any) -> None:
    more = (
        "\n\nRuns whose configs differ in the seed alone are one arm; runs of one seed are pairs. Says what differs,\n"
        "and writes report.html (one file, no network), results.json and results.csv. Nothing announced these\n"
        "comparisons before the runs, so all of it is stamped exploratory. A directory with a results.json and no\n"
        "run gets its report.html made anew from that."
    )
    sub = _verb(verbs, "report", "compare runs that are there: statistics, and one page", machine=True, more=more)
    sub.add_argument("workdirs", nargs="+", type=_place, metavar="DIR",
                     help="workdirs of attnlab train, or directories with some (two levels down, at most)")  # fmt: skip
    sub.add_argument("--out", type=_place, metavar="DIR", help="where the files go, made if need be (report)")
    sub.add_argument("--baseline", metavar="ARM|DIR",
                     help="what the others are compared with; default: the arm of the first workdir")  # fmt: skip
    sub.add_argument("--metric", metavar="NAME",
                     help="what is compared: a figure of the last evaluation (heldout_loss)")  # fmt: skip
    sub.add_argument("--unpaired", action="store_true",
                     help="compare arms as independent runs (Welch's test), other data, evaluation sets and devices "
                          "included")  # fmt: skip
