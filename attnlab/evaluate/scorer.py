"""A language model's answers to many requests: log-likelihoods, greedy flags and continuations, in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import UserError
from attnlab.evaluate import generate, requests
from attnlab.models.lm import LanguageModel
from attnlab.ops.cross_entropy import likeliest

_CHOICES = 8  # one-token continuations of a context that share a row
_SHORTEST = 32  # positions of a batch, at least


@dataclasses.dataclass
class Counts:
    """What was asked, for whoever reads the answers.

    Attributes:
      rows: sequences that the model read for log-likelihoods.
      truncated: contexts of which only the last tokens were read.
    """

    rows: int = 0
    truncated: int = 0


class Scorer:
    """Answers come in the order of their requests, and none depends on the others of its batch.

    Args:
      merge: makes the model from its parameters.
      params: parameters, a pytree of arrays.
      length: positions that the model reads at most.
      rows: sequences of that length that it holds at a time; shorter ones are more.
      options: `loss_chunk` and `loss_impl` of the model's loss.
      traced, streamed: make of a function one that is traced for the mesh on which `params` lie, of whole sequences
        and of positions that come one after another; as it is, for one device.
      ways: over how many devices rows are split.
      whole: whether batches of all sequences have `length` positions, as where devices split these.

    Attributes:
      counts: of all requests until now.
    """

    def __init__(
        self,
        merge: Callable[[Any], LanguageModel],
        params: Any,
        length: int,
        rows: int,
        options: Mapping[str, Any],
        *,
        traced: generate.Wrapper = lambda fn: fn,
        streamed: generate.Wrapper = lambda fn: fn,
        ways: int = 1,
        whole: bool = False,
    ):
        self._merge, self._params, self.length = merge, params, length
        self._budget, self._ways, self._shortest = rows * length, ways, length if whole else _SHORTEST
        self._streamed = streamed
        self._generating: dict[generate.Sampling, Any] = {}
        self.counts = Counts()

        def rest(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
            model, chunk = merge(params), options["loss_chunk"]
            nll, _, out = model.token_losses(batch, chunk=chunk, impl=options["loss_impl"])
            return nll, likeliest(out.y, model.output_kernel(), chunk) == batch["targets"]

        def last(params: Any, batch: Any, at_B: jax.Array, choices_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
            model = merge(params)
            hidden = model.encoded(model.embedded(batch), model.sequence(batch), None).y
            logits = model.logits(jnp.take_along_axis(hidden, at_B[:, None, None], axis=1)[:, 0])
            logp = jnp.take_along_axis(jax.nn.log_softmax(logits), choices_BK, axis=1)
            return logp, jnp.argmax(logits, axis=-1)[:, None] == choices_BK

        self._rest, self._last = jax.jit(traced(rest)), jax.jit(traced(last))

    def continuations(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation after its context, and whether greedy decoding would say it.

        Args:
          pairs: ids of contexts and continuations, of one or more tokens each; of a context too long its last are
            read. Contexts that several one-token continuations have are read once.

        Raises:
          UserError: a continuation is longer than the model reads.
        """
        rows = [requests.row(context, continuation, self.length) for context, continuation in pairs]
        self.counts.truncated += sum(len(c) + len(n) > len(r.ids) for (c, n), r in zip(pairs, rows))
        answers: list[Any] = [None] * len(rows)
        longer = [i for i, r in enumerate(rows) if r.scored > 1]
        for i, (nll, right) in zip(longer, self.tokens([rows[i] for i in longer])):
            answers[i] = float(-nll.sum()), bool(right.all())
        single = [i for i, r in enumerate(rows) if r.scored == 1]
        for i, answer in zip(single, self._choices([rows[i].ids for i in single])):
            answers[i] = answer
        return answers

    def rolling(self, texts: Sequence[np.ndarray], start: int) -> list[float]:
        """Log-likelihood in nats of whole texts of any length, each token predicted once; see `requests.windows`."""
        rows = [requests.windows(ids, start, self.length) for ids in texts]
        found = iter(self.tokens([row for own in rows for row in own]))
        return [float(-sum(next(found)[0].sum() for _ in own)) for own in rows]

    def tokens(self, rows: Sequence[requests.Row]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each row's scored tokens the negative log-likelihoods, float64, and whether each is the likeliest."""
        answers: list[Any] = [None] * len(rows)
        self.counts.rows += len(rows)
        for places, length, count in self._batches([r.length for r in rows]):
            here = [rows[i] for i in places]
            nll, right = jax.device_get(self._rest(self._params, requests.arrays(here, length, count)))
            for i, r, nll_T, right_T in zip(places, here, nll, right):
                scored = slice(r.length - r.scored, r.length)
                answers[i] = nll_T[scored].astype(np.float64), right_T[scored]
        return answers

    def _choices(self, ids: Sequence[np.ndarray]) -> list[tuple[float, bool]]:
        """Of the last token of each."""
        shared: dict[bytes, list[list[int]]] = {}
        for i, own in enumerate(ids):
            groups = shared.setdefault(own[:-1].tobytes(), [[]])
            if len(groups[-1]) == _CHOICES:
                groups.append([])
            groups[-1].append(i)
        groups = [group for own in shared.values() for group in own]
        rows = [requests.Row(ids[group[0]], 1) for group in groups]
        self.counts.rows += len(rows)
        answers: list[Any] = [None] * len(ids)
        for places, length, count in self._batches([r.length for r in rows]):
            batch = requests.arrays([rows[i] for i in places], length, count)
            at, choices = np.zeros(count, np.int32), np.zeros((count, _CHOICES), np.int32)
            for b, i in enumerate(places):
                at[b] = rows[i].length - 1
                choices[b, : len(groups[i])] = [ids[j][-1] for j in groups[i]]
            logp, greedy = jax.device_get(self._last(self._params, batch, at, choices))
            for b, i in enumerate(places):
                for k, j in enumerate(groups[i]):
                    answers[j] = float(logp[b, k]), bool(greedy[b, k])
        return answers

    def _batches(self, lengths: Sequence[int]) -> Any:
        sizes = [requests.bucket(n, self._shortest, self.length) for n in lengths]
        return requests.batches(sizes, self._budget, self._ways)

    def generate(self, prompts: Sequence[np.ndarray], sampling: generate.Sampling) -> list[np.ndarray]:
        """New ids of each prompt, whose number in the order given is that of its random key.

        Args:
          prompts: ids, one or more each; of one longer than `length - sampling.tokens` the last are read.

        Raises:
          ValueError: `sampling.tokens` leaves no position for prompts.
        """
        room = self.length - sampling.tokens
        if room < 1:
            raise ValueError(f"{sampling.tokens} new tokens leave no room in {self.length} positions")
        self.counts.truncated += sum(len(p) > room for p in prompts)
        prompts = [p[-room:] for p in prompts]
        if sampling not in self._generating:
            self._generating[sampling] = generate.program(self._merge, sampling, self._streamed)
        run, answers = self._generating[sampling], [None] * len(prompts)
        # The prompt's positions and the new ones are held together.
        sizes = [requests.bucket(len(p), _SHORTEST, room) + sampling.tokens for p in prompts]
        for places, size, count in requests.batches(sizes, self._budget, self._ways):
            numbers = [*places, *[places[-1]] * (count - len(places))]
            arrays = generate.padded([prompts[i] for i in numbers], size - sampling.tokens)
            keys = generate.keys_of(sampling.seed, numbers)
            new, lengths = jax.device_get(run(self._params, *arrays, keys))
            for i, ids, n in zip(places, new, lengths):
                answers[i] = ids[:n]
        return answers


def settings(given: Mapping[str, Any], tokenizer: Any, length: int, seed: int) -> tuple[generate.Sampling, list[str]]:
    """How to draw, and the strings that end a text, of a request's keys.

    `until` is a string or several; `max_gen_toks` (`max_new_tokens`, `max_tokens`) is by default 256, or half of
    `length` if that is less; the likeliest token is taken unless `do_sample` is true, which `temperature` (1), `top_k`
    and `top_p` then shape. Other keys change nothing: `unknown` names them.

    Args:
      tokenizer: its end-of-document token ends a text, too.
      length: positions of prompt and new tokens together.

    Raises:
      UserError: a value is impossible, or no position is left for a prompt.
    """
    named = [given[key] for key in _COUNTS if given.get(key) is not None]
    tokens = int(named[0]) if named else min(256, max(1, length // 2))
    if not 1 <= tokens < length:
        raise UserError(
            f"max_gen_toks = {tokens} is not possible; allowed: 1 to {length - 1}, as prompt and new tokens have "
            f"{length:,} positions (data.length)"
        )
    until = given.get("until") or []
    stops = [until] if isinstance(until, str) else [str(stop) for stop in until]
    drawing = {"temperature": 0.0}
    if given.get("do_sample"):
        drawing = {key: kind(given[key]) for key, kind in _DRAWING.items() if given.get(key) is not None}
    ends = requests.stop_tokens(tokenizer, stops)
    sampling = generate.Sampling(tokens, **drawing, seed=seed, stop=ends, vocab=tokenizer.vocab_size)
    return sampling, stops


def unknown(given: Mapping[str, Any]) -> set[str]:
    """Keys of a request that `settings` does not read."""
    return set(given) - {"until", "do_sample", *_COUNTS, *_DRAWING}


_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_DRAWING = {"temperature": float, "top_k": int, "top_p": float}
