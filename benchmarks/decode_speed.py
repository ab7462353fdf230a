"""Decoding speed on a CPU: attnlab's generation against a plain PyTorch GPT of the same sizes, batch 1, greedy.

attnlab's side runs what `attnlab generate` runs, prefill and decode, compiled before. PyTorch's side is the eager
decoder with a key-value cache of `benchmarks/torch_gpt.py`. The parameters are random and differ between the sides.

Memory is measured too: one token at a time through the model's `extend`, with room for `--max-length` positions, the
state's bytes and the process's resident memory are read at several numbers of tokens; neither may grow.

    python -m benchmarks.decode_speed
    python -m benchmarks.decode_speed --mixer gated --tokens 1000 --json
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import harness

_MODULE = "benchmarks.decode_speed"
_GROWTH_ALLOWED_MB = 1.0  # of resident memory, over all tokens after the first reading


def main() -> int:
    """0, or 1 where the ratio is below `--require` or memory grew."""
    args = _parser().parse_args()
    if args.worker:
        _work(args)
        return 0
    harness.require_torch()
    started, facts = time.monotonic(), harness.machine()
    arguments = ["--mixer", args.mixer, "--prompt", str(args.prompt), "--tokens", str(args.tokens)]
    with harness.Side(_MODULE, ["--worker", "stream", *arguments]) as stream:
        memory = stream.ask(do="memory", max_length=args.max_length)
    with (
        harness.Side(_MODULE, ["--worker", "attnlab", *arguments]) as ours,
        harness.Side(_MODULE, ["--worker", "torch", *arguments]) as peer,
    ):
        sides = {"attnlab": ours, "torch": peer}
        prepared = {name: side.ask(do="prepare") for name, side in sides.items()}
        work = {name: lambda side=side: side.time(do="work", times=args.times) for name, side in sides.items()}
        timings, undisturbed = harness.alternate(work, rounds=args.rounds, until=started + args.seconds)

    rates = [harness.rate(timings[name], args.tokens * args.times) for name in sides]
    ratio = harness.paired_ratio(timings["attnlab"], timings["torch"])
    first, last = memory[0], memory[-1]
    constant = (
        last["state_bytes"] == first["state_bytes"] and last["resident_mb"] - first["resident_mb"] < _GROWTH_ALLOWED_MB
    )
    if args.json:
        print(json.dumps({
            "mixer": args.mixer, "machine": facts, "undisturbed": undisturbed, "attnlab": rates[0], "torch": rates[1],
            "ratio": ratio, "compile_seconds": prepared["attnlab"]["seconds"], "memory": memory,
            "memory_constant": constant,
        }))  # fmt: skip
    else:
        name = f"{args.prompt} + {args.tokens}"
        harness.print_rates(f"decoding, {args.mixer}, micro, prompt + new tokens", "tokens/s", [(name, *rates, ratio)])
        print(f"{rates[0]['rounds']} rounds of {args.times} generations; "
              f"attnlab's compile: {prepared['attnlab']['seconds']:.1f} s")  # fmt: skip
        print(f"memory at room for {args.max_length} positions ({'constant' if constant else 'GROWS'}):")
        for m in memory:
            print(f"  after {m['tokens']:5d} tokens: state {m['state_bytes']:,} bytes, resident "
                  f"{m['resident_mb']:,.1f} MB, peak {m['peak_mb']:,.1f} MB")  # fmt: skip
        harness.print_machine(facts, undisturbed)
    return int(not constant or (args.require is not None and ratio["median"] < args.require))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixer", default="softmax", help="a registered mixer (softmax)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (16)")
    parser.add_argument("--tokens", type=int, default=400, help="new tokens (400)")
    parser.add_argument("--times", type=int, default=2, help="generations a round (2)")
    parser.add_argument("--rounds", type=int, default=9, help="undisturbed rounds wanted (9)")
    parser.add_argument("--seconds", type=float, default=100, help="no round starts later (100)")
    parser.add_argument("--max-length", type=int, default=2048, help="positions in the measurement of memory (2048)")
    parser.add_argument("--require", type=float, metavar="RATIO", help="exit with 1 if the ratio is below")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=("attnlab", "torch", "stream"), help=argparse.SUPPRESS)
    return parser


def _work(args: argparse.Namespace) -> None:
    prompt = (np.arange(args.prompt) % 7).astype(np.int32)
    run: Callable[[], Any] | None = None

    def prepare() -> dict[str, float]:
        nonlocal run
        started = time.perf_counter()
        run = (_attnlab if args.worker == "attnlab" else _torch)(args.mixer, prompt, args.tokens)
        seconds = time.perf_counter() - started
        for _ in range(2):
            if len(run()) != args.tokens:
                raise RuntimeError(f"{args.worker} made another number of tokens than {args.tokens}")
        return {"seconds": seconds}

    def work(times: int) -> None:
        for _ in range(times):
            run()

    harness.answer({
        "prepare": prepare,
        "work": work,
        "memory": lambda max_length: _memory(args.mixer, max_length),
    })  # fmt: skip


def _torch(mixer: str, prompt: np.ndarray, tokens: int) -> Callable[[], Any]:
    from benchmarks import torch_gpt

    decoder = torch_gpt.Decoder(torch_gpt.GPTConfig())
    return lambda: decoder.generate(prompt, tokens)


def _model(mixer: str) -> tuple[Any, Any]:
    """The model and random parameters of it."""
    from attnlab.launch import runtime

    runtime.configure()
    import jax

    from attnlab.train import config as run_config
    from attnlab.train.program import Program

    model = Program.of(run_config.load(f"configs/lm.py:mixer={mixer},size=micro", []), batches=False).model
    return model, jax.jit(lambda: model.init(0))()


def _attnlab(mixer: str, prompt: np.ndarray, tokens: int) -> Callable[[], Any]:
    model, params = _model(mixer)
    from attnlab.evaluate.generate import Sampling, compiled

    run = compiled(model.merge, params, [prompt], Sampling(tokens=tokens, temperature=0.0))
    return lambda: run(params)[0]


def _memory(mixer: str, max_length: int) -> list[dict[str, Any]]:
    """State and process after ever more tokens, fed one by one through `extend`, the state donated."""
    model, params = _model(mixer)
    import jax
    import jax.numpy as jnp

    from attnlab import mixers

    def one(params: Any, token: jax.Array, i: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        lm = model.merge(params)
        seq = mixers.Sequence(jnp.reshape(i, (1, 1)))
        hidden, state = lm.extend(lm.transformer.unstacked(), token, seq, state)
        return jnp.argmax(lm.logits(hidden[:, 0]), axis=-1)[:, None].astype(jnp.int32), state

    step = jax.jit(one, donate_argnums=3)
    state = jax.jit(lambda p: model.merge(p).init_state(1, max_length))(params)
    token = jnp.zeros((1, 1), jnp.int32)
    readings = []
    for i in range(max_length):
        token, state = step(params, token, jnp.int32(i), state)
        if i + 1 in (max_length // 8, max_length // 4, max_length // 2, max_length):
            jax.block_until_ready(token)
            readings.append({
                "tokens": i + 1,
                "state_bytes": sum(a.nbytes for a in jax.tree.leaves(state)),
                "resident_mb": _resident_mb(),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            })  # fmt: skip
    return readings


def _resident_mb() -> float:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    sys.exit(main())
