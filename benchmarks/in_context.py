"""What trained in-context learners have become: figures that the rules of plans in configs/ablations/claims ask for.

    python -m benchmarks.in_context gradient runs/claim-icl-gradient [--json FILE]
    python -m benchmarks.in_context transition runs/claim-icl-classes [--json FILE]

Directories are runs' workdirs, or hold such below `arms`.

`gradient`, of one softmax layer trained on `icl_regression` with `queries=last`, without norm, MLP and positions. In
the inputs' own coordinates z = (x, y), head h has logits z_q^T M_h z and adds OV_h^T z to the prediction. Told are

    diagonal  sum_h sum_i M_h,ii^2 / sum_h |M_h|_F^2 over the block of x: 1 where logits are a scaled x_q . x
    sum       |sum_h mu_h| / sum_h |mu_h|, mu_h the entry of OV_h that y goes through: 0 where heads are opposed
    outside   the share of sum_h |OV_h| that x goes through
    risk      squared error on held-out rows, beside that of a step of gradient descent and of Bayes on the same rows
    growth    risk at 4 times the examples over risk, beside that of linear attention: the step whose rate is best for
              the examples trained on, divided by the number of examples that there are

(He et al. 2025, In-Context Linear Regression Demystified, arXiv:2503.12734).

`transition`, of `icl_classes`: a = accuracy on new classes, by evaluation. Chance is B/N: one of the context's labels,
as often as it is there. Where a rises by a tenth or more, `middle` is the step at which half of the rise from chance is
done, `width` the steps from 20 to 80 % of it over `middle`, both linear between evaluations (after Reddy 2023,
arXiv:2312.03002); `gain` is (a - B/N) / (1 - B/N) at the end.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table

from attnlab.ablation import collect
from attnlab.errors import UserError
from attnlab.tasks.icl_regression import step_rate, step_risk
from attnlab.train import restore

NEW_CLASSES = "heldout_accuracy/set=context_new_classes"
WEIGHTS = "heldout_accuracy/set=weights_only"
LEAST_RISE = 0.1


# --- one step of gradient descent -------------------------------------------------------------------------------------


def matrices(config: Any, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """M [H, d + 1, d + 1] and OV [H, d + 1] of a trained model, see the module's docstring; float64.

    Args:
      config: the run's.
      params: pure dict.

    Raises:
      UserError: a model whose logits and outputs are not those of two matrices a head.
    """
    model, node = config.model, next(iter(config.model.mixers.values()))
    bare = model.node_name == "regression" and model.layers == 1 and model.hidden == 0 and model.norm == "none"
    plain = node.node_name == "softmax" and node.rope_base is None and not node.qk_norm and node.bias == "none"
    if not (bare and plain and node.key_heads == node.heads and node.soft_cap is None and node.input_conv == 1):
        raise UserError(
            "matrices are of one softmax layer with as many key heads, rope_base=None and neither norms nor biases, in "
            "a regression model with layers=1, mlp_width=0 and norm='none'"
        )
    array = lambda x: np.asarray(x, np.float64)
    layer = params["transformer"]["periods"]["blocks"][0]["sublayers"][0]["branch"]
    embedding, head = array(params["embedding"]["kernel"]), array(params["head"]["kernel"])[:, 0]
    kernels = {name: array(layer[name]["kernel"][0]) for name in ("q", "k", "v", "out")}
    split = lambda name: (embedding @ kernels[name]).reshape(len(embedding), node.heads, -1)
    q, k, v = map(split, ("q", "k", "v"))
    logits = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
    return logits, np.einsum("jhd,hd->hj", v, (kernels["out"] @ head).reshape(node.heads, -1))


def structure(logits_Hij: np.ndarray, ov_Hj: np.ndarray) -> dict[str, float | None]:
    """`diagonal`, `sum` (None of one head) and `outside`."""
    x = logits_Hij[:, :-1, :-1]
    mu = ov_Hj[:, -1]
    norms = np.linalg.norm(ov_Hj, axis=1)
    return {
        "diagonal": float((np.einsum("hii->hi", x) ** 2).sum() / (x**2).sum()),
        "sum": float(abs(mu.sum()) / abs(mu).sum()) if len(mu) > 1 else None,
        "outside": float(np.linalg.norm(ov_Hj[:, :-1], axis=1).sum() / norms.sum()),
    }


def gradient(path: pathlib.Path) -> dict[str, Any]:
    """A row of figures of a run."""
    trained = restore.load(path, "latest")
    c = trained.config
    if c.data.node_name != "icl_regression" or c.data.queries != "last":
        raise UserError(f"{path} was not trained on icl_regression with data.queries = 'last'")
    found = structure(*matrices(c, trained.params))
    figures, _ = restore.evaluate_heldout(trained)
    (_, _, longer), *_ = restore.evaluate_lengths(trained, [4])
    known = figures.summary()
    d, L, noise = c.data.d, c.data.examples, c.data.noise
    rate = step_rate(L, d, noise)
    return {
        **_which(path, c),
        "heads": next(iter(c.model.mixers.values())).heads,
        **found,
        "risk": known["loss"],
        "step_risk": known["step_loss"],
        "bayes_risk": known["bayes_loss"],
        "growth": longer.summary()["loss"] / known["loss"],
        "linear_growth": step_risk(rate, 4 * L, d, noise) / step_risk(rate, L, d, noise),
    }


# --- an abrupt transition ---------------------------------------------------------------------------------------------


def crossing(steps: Sequence[float], values: Sequence[float], level: float) -> float:
    """The first step at which values are at `level`, linear between two of them; the first step if all are above."""
    for i, value in enumerate(values):
        if value >= level:
            if i == 0:
                return float(steps[0])
            share = (level - values[i - 1]) / (value - values[i - 1])
            return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    raise ValueError(f"no value reaches {level}")


def rise(steps: Sequence[float], values: Sequence[float], chance: float) -> dict[str, float | None]:
    """`middle` and `width` of a rise from chance to the last value; None where it is less than `LEAST_RISE`."""
    total = values[-1] - chance
    if total < LEAST_RISE:
        return {"middle": None, "width": None}
    at = lambda share: crossing(steps, values, chance + share * total)
    return {"middle": at(0.5), "width": (at(0.8) - at(0.2)) / at(0.5)}


def transition(path: pathlib.Path) -> dict[str, Any]:
    """A row of figures of a run."""
    run = collect.read(path)
    c = run.config
    if c.data.node_name != "icl_classes":
        raise UserError(f"{path} was not trained on icl_classes")
    evaluated = [r for r in run.records if NEW_CLASSES in r]
    if not evaluated:
        raise UserError(f"{path} has not been evaluated yet")
    values = [r[NEW_CLASSES] for r in evaluated]
    chance = c.data.burst / c.data.pairs
    return {
        **_which(path, c),
        "classes": c.data.classes,
        "burst": c.data.burst if c.data.p_burst else 0,
        **rise([r["step"] for r in evaluated], values, chance),
        "gain": (values[-1] - chance) / (1 - chance),
        "new_classes": values[-1],
        "weights_only": evaluated[-1][WEIGHTS],
    }


# --- the command ------------------------------------------------------------------------------------------------------


def _which(path: pathlib.Path, config: Any) -> dict[str, Any]:
    """A run's name below `arms`, and its seed."""
    parts = path.parts
    below = parts[len(parts) - parts[::-1].index("arms") :] if "arms" in parts else parts[-1:]
    return {"run": "/".join(below), "seed": config.seed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gradient", "transition"))
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the rows to this file")
    args = parser.parse_args()
    row_of = {"gradient": gradient, "transition": transition}[args.what]
    places = [p for path in args.workdirs for p in (sorted(path.glob("arms/*")) or [path])]
    try:
        rows = [row_of(path) for path in collect.runs_below(places)]
    except UserError as error:
        raise SystemExit(f"benchmarks.in_context: {error}") from None
    table = rich.table.Table(title=args.what, title_justify="left", box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    shown = lambda x: "-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)
    for row in rows:
        table.add_row(*map(shown, row.values()))
    rich.console.Console(width=140, highlight=False).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
