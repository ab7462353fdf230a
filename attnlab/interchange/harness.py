"""EleutherAI's lm-evaluation-harness over a language model of ours. Imports `lm_eval`: only what runs it imports this.

The model reads each request as `attnlab.evaluate.requests` says; tasks, prompts, metrics and their errors are the
harness's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lm_eval
from lm_eval.api.model import LM

from attnlab.errors import UserError, first_line
from attnlab.evaluate import cloze, requests
from attnlab.evaluate import scorer as scoring
from attnlab.interchange.harness_tasks import Tasks

BOOTSTRAP = 1000  # draws of the errors that have no closed form
SEED = 1234  # of few-shot examples, as the harness's own default


class Adapter(LM):
    """What the harness asks, answered in the order asked.

    Args:
      scorer: of the model.
      tokenizer: of its text.
      seed: of what is drawn.
      say: called with what whoever reads the results must know, once each.
    """

    def __init__(self, scorer: scoring.Scorer, tokenizer: Any, seed: int, say: Callable[[str], None]):
        super().__init__()
        self._scorer, self._tokenizer, self._seed, self._say = scorer, tokenizer, seed, say
        self._said: set[str] = set()

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint()

    def loglikelihood(self, requests_: Sequence[Any]) -> list[tuple[float, bool]]:
        pairs = [requests.boundary(self._tokenizer, *asked.args) for asked in requests_]
        return self._told("loglikelihood", requests_, self._scorer.continuations(pairs))

    def loglikelihood_rolling(self, requests_: Sequence[Any]) -> list[float]:
        texts = [self._tokenizer.encode(asked.args[0]) for asked in requests_]
        answers = self._scorer.rolling(texts, self._tokenizer.eod_id)
        return self._told("loglikelihood_rolling", requests_, answers)

    def generate_until(self, requests_: Sequence[Any]) -> list[str]:
        answers: list[str] = [""] * len(requests_)
        alike: dict[str, list[int]] = {}
        for i, asked in enumerate(requests_):
            alike.setdefault(repr(sorted(asked.args[1].items())), []).append(i)
        for places in alike.values():
            given = requests_[places[0]].args[1]
            if strange := scoring.unknown(given) - self._said:
                self._said |= strange
                self._say(f"keys of generation that change nothing here: {', '.join(sorted(strange))}")
            sampling, stops = scoring.settings(given, self._tokenizer, self._scorer.length, self._seed)
            prompts = [requests.started(self._tokenizer, requests_[i].args[0]) for i in places]
            for i, ids in zip(places, self._scorer.generate(prompts, sampling)):
                answers[i] = requests.cut(self._tokenizer.decode(ids), stops)
        return self._told("generate_until", requests_, answers)

    def _told(self, kind: str, requests_: Sequence[Any], answers: list[Any]) -> list[Any]:
        for asked, answer in zip(requests_, answers):
            self.cache_hook.add_partial(kind, asked.args, answer)
        return answers


def evaluate(
    adapter: Adapter, tasks: Tasks, *, limit: int | None = None, fewshot: int | None = None
) -> dict[str, dict[str, Any]]:
    """What the tasks came to, by their names and those of their groups.

    Args:
      limit: only so many of each task's documents, the first.
      fewshot: examples before each question; None: as the task says.

    Returns:
      `metrics`, by name, with `value` and `stderr` (None where there is none); and `samples`, `limit`, `fewshot`,
      `version`, `output_type` of a task.

    Raises:
      UserError: a task cannot be run: its data is not there, or the model cannot take its requests.
    """
    with _quiet():
        try:
            results = lm_eval.simple_evaluate(
                model=adapter, tasks=tasks.loaded(), task_manager=tasks.manager, num_fewshot=fewshot, limit=limit,
                bootstrap_iters=BOOTSTRAP, random_seed=SEED, numpy_random_seed=SEED, torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )  # fmt: skip
        except (ValueError, ImportError) as error:  # its checks of tasks; what some of them import
            raise UserError(f"lm_eval: {first_line(error)}") from error
    return {name: _entry(name, results, limit) for name in results["results"]}


def version() -> str:
    """Of the harness."""
    return importlib.metadata.version("lm_eval")


def _entry(name: str, results: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    found, samples = results["results"][name], results["samples"].get(name, [])
    metrics = {}
    for key, value in found.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = found.get(f"{metric}_stderr,{filtered}")
        error = float(error) if isinstance(error, (int, float)) else _ratio_error(metric, samples)
        said = metric if filtered == "none" else f"{metric} ({filtered})"
        metrics[said] = {"value": _plain(value), "stderr": _plain(error)}
    entry: dict[str, Any] = {"metrics": metrics, "limit": limit}
    if counted := results["n-samples"].get(name):
        entry["samples"] = counted["effective"]
    for key, where in (("fewshot", "n-shot"), ("version", "versions")):
        if name in results[where]:
            entry[key] = results[where][name]
    if name in results["configs"]:
        entry["output_type"] = results["configs"][name]["output_type"]
    return entry


def _ratio_error(metric: str, samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Of what is summed over a task's texts and divided by their words or bytes, for which the harness has none."""
    pairs = [sample[metric] for sample in samples if isinstance(sample.get(metric), (tuple, list))]
    if metric not in ("bits_per_byte", "byte_perplexity", "word_perplexity") or not pairs:
        return None
    sums, weights = [-s for s, _ in pairs], [w for _, w in pairs]
    if (error := cloze.ratio_error(sums, weights)) is None:
        return None
    return error / math.log(2) if metric == "bits_per_byte" else error * math.exp(sum(sums) / sum(weights))


def _plain(value: Any) -> Any:
    """A number that is finite as it is; any other, which JSON has not, as None."""
    if isinstance(value, str) or value is None:
        return value
    return float(value) if math.isfinite(value) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What it says goes to stderr, if it matters; errors by draws in this process, which must not be forked."""
    before, logger = os.environ.get("DISABLE_MULTIPROC"), logging.getLogger("lm_eval")
    level = logger.level
    os.environ["DISABLE_MULTIPROC"] = "1"
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr or io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC") if before is None else os.environ.update(DISABLE_MULTIPROC=before)
