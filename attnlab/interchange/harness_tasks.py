"""Tasks for the harness: its own by name, YAML files and folders by path, and ours over a run's held-out text."""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import datasets
from lm_eval.tasks import TaskManager

from attnlab import config as config_lib
from attnlab.errors import UserError, first_line
from attnlab.evaluate import cloze

MOST = 1000  # questions of a cloze
Texts = Callable[[], Iterable[str]]


def _documents(texts: Texts, **_: Any) -> dict[str, Any]:
    rows = [{"text": text} for text in texts()]
    return _split(rows, "heldout")


def _questions(name: str, texts: Texts, **_: Any) -> dict[str, Any]:
    asked = (passage for text in texts() for passage in cloze.passages(text))
    return _split([{"context": c, "word": w} for c, w in itertools.islice(asked, MOST)], name)


def _split(rows: list[dict[str, str]], name: str) -> dict[str, Any]:
    if not rows:
        raise UserError(f"task {name}: the held-out text has nothing to ask; allowed: other data by data.source")
    return {"test": datasets.Dataset.from_list(rows)}


def _is_word(doc: dict[str, str], results: Sequence[str]) -> dict[str, int]:
    return {"exact_match": int(cloze.first_word(results[0]) == doc["word"])}


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def ours(texts: Texts) -> dict[str, dict[str, Any]]:
    """The harness's configs of our tasks, by name; `texts` gives the held-out documents."""
    common = {"test_split": "test", "target_delimiter": "", "num_fewshot": 0, "metadata": {"version": 1}}
    heldout = {
        "output_type": "loglikelihood_rolling", "custom_dataset": functools.partial(_documents, texts),
        "doc_to_text": "", "doc_to_target": lambda doc: doc["text"],
        "metric_list": [{"metric": m} for m in ("bits_per_byte", "byte_perplexity", "word_perplexity")],
    }  # fmt: skip
    asked = {"doc_to_text": lambda doc: doc["context"], "doc_to_target": lambda doc: " " + doc["word"]}
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    scored = asked | {
        "output_type": "loglikelihood", "custom_dataset": functools.partial(_questions, "heldout_cloze", texts),
        "metric_list": [_mean("acc"), perplexity],
    }  # fmt: skip
    written = asked | {
        "output_type": "generate_until", "custom_dataset": functools.partial(_questions, "heldout_write", texts),
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
        "process_results": _is_word, "metric_list": [_mean("exact_match")],
    }  # fmt: skip
    named = {"heldout": heldout, "heldout_cloze": scored, "heldout_write": written}
    return {name: {"task": name, **common, **config} for name, config in named.items()}


class Tasks:
    """Tasks that were named, found but not yet loaded.

    Args:
      named: of each the name of one of ours, the path of a YAML file or of a folder with some (all tasks in it), or a
        name or pattern of the harness.
      texts: gives the held-out documents, for ours.

    Attributes:
      manager: the harness's, which knows them.
      ours: whether one of ours is among them.

    Raises:
      UserError: one is not there.
    """

    def __init__(self, named: Sequence[str], texts: Texts):
        known, self.ours = ours(texts), False
        self._specs: list[Any] = []
        folders, others = [], []
        for name in named:
            path = pathlib.Path(name).expanduser()
            if name in known:
                self._specs.append(known[name])
                self.ours = True
            elif path.is_dir():
                folders.append(path)
                self._specs += _tasks_in(path)
            elif path.suffix in (".yaml", ".yml") or "/" in name:
                if not path.is_file():
                    raise UserError(f"task {name}: there is no such file or folder")
                self._specs.append(str(path))
            else:
                others.append(name)
        # The harness's own index is of thousands of files: read only for its names.
        self.manager = TaskManager(include_path=folders or None, include_defaults=bool(others))
        for name in others:
            found = self.manager.match_tasks([name])
            if not found:
                hint = config_lib.suggest(name, [*known, *self.manager.all_tasks])
                raise UserError(
                    f"task {name}: no such task{hint}; allowed: {', '.join(known)}, a path of a YAML file or "
                    "folder, a name of lm_eval's"
                )
            self._specs += found

    def loaded(self) -> list[Any]:
        """The tasks and groups, with their data.

        Raises:
          UserError: a task is wrong, or its data is not to be had.
        """
        try:
            found = self.manager.load(self._specs)
        except UserError:
            raise
        except Exception as error:  # whatever a task's YAML, its code, or its download comes to
            raise UserError(f"a task cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
        groups = found.get("groups", {})
        inner = {child for children in found.get("group_map", {}).values() for child in children}
        inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
        return [
            *(group for name, group in groups.items() if name not in inner),
            *(task for name, task in found["tasks"].items() if name not in inside),
        ]


def _tasks_in(folder: pathlib.Path) -> list[str]:
    names = TaskManager(include_path=folder, include_defaults=False).all_subtasks
    if not names:
        raise UserError(f"task {folder}: the folder has no task; allowed: one with YAML files that have `task: NAME`")
    return names
