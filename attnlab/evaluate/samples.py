"""Samples of a model while it trains: continuations of held-out text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnlab.data import Data
from attnlab.evaluate.generate import Sampling, Wrapper, generate

_PROMPT = 64  # tokens, at most


def continuations(
    merge: Callable[[Any], Any], params: Any, data: Data, tokens: int, seed: int, traced: Wrapper
) -> list[tuple[str, str]]:
    """Prompts and what the model makes of them, for up to two held-out rows; none where the data is no text.

    Args:
      merge, params, traced: as of `generate`.
      data: text, opened.
      tokens: of each continuation, at most.
      seed: of the draws.
    """
    tokenizer = data.tokenizer
    if tokenizer is None:
        return []
    # The same prompts in every process: they run one program, whose steps depend on them.
    rows = range(min(2, data.config.batch))
    batch = next(iter(data.heldout(batches=1, rows=rows)))
    firsts = [ids[segments == 1][:_PROMPT] for ids, segments in zip(batch["tokens"], batch["segments"])]
    prompts = [ids for ids in firsts if len(ids)]
    sampling = Sampling(
        tokens, temperature=0.8, top_p=0.95, seed=seed, stop=tokenizer.eod_id, vocab=tokenizer.vocab_size
    )
    out = generate(merge, params, prompts, sampling, traced)
    return [(tokenizer.decode(prompt), tokenizer.decode(new)) for prompt, new in zip(prompts, out.tokens)]
