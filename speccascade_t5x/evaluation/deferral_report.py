"""How good a deferral rule is: the realised objective as curves over alpha, with intervals over examples.

    <folder>/deferral-report.json, deferral-report.md, deferral-objective.png, deferral-reliability.png

Every rule but `diff` defers iff its score > alpha D_TV(p, q). The alphas are fixed on the held-out split, at the 5 % to
95 % deferral quantiles of plug-in OPT (OPTLog for the log loss), before the test split is looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speccascade_t5x.common import storage
from speccascade_t5x.deferral import calibration, fitting, labels, objective
from speccascade_t5x.deferral.head import Head, remark
from speccascade_t5x.deferral.objective import Positions
from speccascade_t5x.evaluation import deferral_plots, statistics
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.training.deferral.pair_scores import CLASSES

PLUG_IN, LEARNED, EXACT, ORACLE = "plug-in OPT", "learned gap", "exact Bayes", "label oracle (unreachable)"
Columns = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One rule over the alphas.

    Attributes:
      cost: of each alpha, mean objective per token.
      deferral: share of tokens deferred.
      against: cost minus plug-in OPT's, paired.
    """

    cost: list[statistics.Estimate]
    deferral: list[float]
    against: list[statistics.Estimate]

    def as_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "cost": [each.as_dict() for each in self.cost],
            "deferral": self.deferral,
            "minus_plug_in": [each.as_dict() for each in self.against],
        }


def rule_scores(columns: Columns, names: tuple[str, ...], loss: str, head: Head | None) -> dict[str, np.ndarray]:
    """The score of each rule at collected positions.

    Args:
      columns: of a split.
      names: of its feature columns.
      loss: "zero_one" or "log".
      head: a prefix head, or None.
    """
    at = lambda name: columns["features"][:, names.index(name)]  # noqa: E731
    plug_in = at("max_p") - at("max_q") if loss == "zero_one" else at("entropy_q") - at("entropy_p")
    found = {PLUG_IN: plug_in}
    for kind in calibration.KINDS:
        if f"score_{kind}_{loss}" in columns:
            found[f"{kind} OPT"] = columns[f"score_{kind}_{loss}"]
    if head is not None:
        found[LEARNED] = fitting.scores(head, columns)
    if f"exact_{loss}" in columns:
        found[EXACT] = columns[f"exact_{loss}"]
    found[ORACLE] = labels.gap(columns, loss)
    return found


def positions_of(columns: Columns, loss: str) -> Positions:
    """What the objective reads at collected positions."""
    return Positions(*labels.losses(columns, loss), columns["distance"], columns["example"])


def curves(
    scores: Mapping[str, np.ndarray],
    positions: Positions,
    alphas: np.ndarray,
    diff_thresholds: np.ndarray | None = None,
    draws: int = statistics.DRAWS,
) -> dict[str, Curve]:
    """The realised objective of each rule at each alpha. One bootstrap serves all, so differences are paired."""
    boot = statistics.Bootstrap(len(np.unique(positions.example)), draws)
    tests = {name: [score > alpha * positions.distance for alpha in alphas] for name, score in scores.items()}
    if diff_thresholds is not None:
        tests["diff"] = [scores[PLUG_IN] > threshold for threshold in diff_thresholds]
    tests |= {"always defer": [np.ones(len(positions.distance), bool)] * len(alphas)}
    tests |= {"never defer": [np.zeros(len(positions.distance), bool)] * len(alphas)}
    costs = {
        name: [
            boot.ratio(*objective.by_example(positions.cost(defers, alpha), positions.example))
            for defers, alpha in zip(each, alphas, strict=True)
        ]
        for name, each in tests.items()
    }
    return {
        name: Curve(
            cost,
            [float(defers.mean()) for defers in tests[name]],
            [mine - theirs for mine, theirs in zip(cost, costs[PLUG_IN], strict=True)],
        )
        for name, cost in costs.items()
    }


def evaluate(
    test: Columns,
    held_out: Columns,
    names: tuple[str, ...],
    loss: str,
    head: Head | None,
    draws: int = statistics.DRAWS,
) -> dict[str, Any]:
    """Everything the report shows, as JSON types but for "curves" ({rule: Curve}).

    Raises:
      UserError: the test split is empty.
    """
    if not len(test["tokens"]):
        raise UserError("the test split holds no position to evaluate on: give more examples, or a larger share")
    held_scores = rule_scores(held_out, names, loss, None)
    alphas = objective.quantile_alphas(held_scores[PLUG_IN], held_out["distance"])
    held_positions = positions_of(held_out, loss)
    thresholds = [objective.best_threshold(held_scores[PLUG_IN], held_positions, alpha) for alpha in alphas]
    scores, positions = rule_scores(test, names, loss, head), positions_of(test, loss)
    found = curves(scores, positions, alphas, np.array(thresholds), draws)
    gap = positions.loss_q - positions.loss_p
    report: dict[str, Any] = {
        "loss": loss,
        "alphas": [float(alpha) for alpha in alphas],
        "examples": len(np.unique(positions.example)),
        "tokens": len(gap),
        "curves": found,
        "auc": {
            name: objective.area_under_curve(score[gap != 0], gap[gap != 0] > 0)
            for name, score in scores.items()
            if name != ORACLE
        },
        "gap_ece": {name: objective.gap_error(score, gap) for name, score in scores.items() if name != ORACLE},
        "reliability": reliability(test, names),
        "recovered": recovered(found),
        "remark": remark(head) if head is not None else "",
    }
    return report


def recovered(found: Mapping[str, Curve]) -> dict[str, list[float | None]]:
    """Share of the way from plug-in OPT to the exact Bayes rule that each rule goes, per alpha and (last) in all."""
    if EXACT not in found:
        return {}
    shares: dict[str, list[float | None]] = {}
    room = [-each.value for each in found[EXACT].against]
    for name, curve in found.items():
        gained = [-each.value for each in curve.against]
        each = [gain / way if way > 1e-9 else None for gain, way in zip(gained, room, strict=True)]
        shares[name] = [*each, sum(gained) / sum(room) if sum(room) > 1e-9 else None]
    return shares


def reliability(test: Columns, names: tuple[str, ...]) -> dict[str, Any]:
    """ECE and diagram rows of each model before and after each calibration, over all tokens and by class of the label.

    The class is that of the label, which a model does not know: it shows where errors are, and no rule reads it.
    """
    found: dict[str, Any] = {}
    kinds = [kind for kind in calibration.KINDS if f"score_{kind}_confidence_q" in test]
    for side in "qp":
        hits = test[f"hit_{side}"]
        readings = {"none": test["features"][:, names.index(f"max_{side}")]}
        readings |= {kind: test[f"score_{kind}_confidence_{side}"] for kind in kinds}
        found[side] = {}
        for kind, confidence in readings.items():
            by_class = {}
            if "class" in test:
                for index, name in enumerate(CLASSES):
                    inside = test["class"] == index
                    if inside.any():
                        by_class[name] = calibration.expected_error(confidence[inside], hits[inside])
            found[side][kind] = {
                "ece": calibration.expected_error(confidence, hits),
                "by_class": by_class,
                "rows": calibration.reliability(confidence, hits),
            }
    return found


def write(folder: str | Path, report: Mapping[str, Any], title: str) -> Path:
    """Writes JSON, a page and plots. Returns the page's path."""
    folder = Path(folder)
    plain = {**report, "curves": {name: curve.as_dict() for name, curve in report["curves"].items()}}
    storage.write_json(folder / "deferral-report.json", _without_nan(plain))
    drawn = deferral_plots.draw(folder, report)
    return storage.write_text(folder / "deferral-report.md", page(report, title, drawn))


def page(report: Mapping[str, Any], title: str, plots: list[str]) -> str:
    """The report, in Markdown."""
    sizes = f"{report['examples']} examples, {report['tokens']:,} tokens; loss: {report['loss']}."
    lines = [f"# {title}", "", sizes, ""]
    if report["remark"]:
        lines += [f"**Nothing was learnt:** {report['remark']}.", ""]
    lines += objective_table(report)
    if report["recovered"]:
        lines += [
            "",
            "Share of the gap between plug-in OPT and the exact Bayes rule that is closed, over all alphas:",
            "",
        ]
        lines += [
            f"- {name}: {100 * each[-1]:.0f} %"
            for name, each in report["recovered"].items()
            if each[-1] is not None and name not in (PLUG_IN, EXACT, ORACLE)
        ]
    lines += ["", "| rule | deferral AUC | ECE of its gap |", "|---|---|---|"]
    lines += [f"| {name} | {auc:.3f} | {report['gap_ece'][name]:.4f} |" for name, auc in report["auc"].items()]
    lines += ["", "| model | calibration | ECE | " + " | ".join(CLASSES) + " |"]
    lines += ["|---|---|---|" + "---|" * len(CLASSES)]
    for side, who in (("q", "drafter"), ("p", "verifier")):
        for kind, found in report["reliability"][side].items():
            cells = [f"{found['by_class'][name]:.4f}" if name in found["by_class"] else "-" for name in CLASSES]
            lines.append(f"| {who} | {kind} | {found['ece']:.4f} | " + " | ".join(cells) + " |")
    lines += [""] + [f"![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n".join(lines) + "\n"


def objective_table(report: Mapping[str, Any]) -> list[str]:
    """Lines of a table: the objective of each rule at each alpha; a star where it differs from plug-in OPT's.

    Stars are corrected for the number of comparisons, so that the chance of any false one in the table is 5 %.
    """
    names = list(report["curves"])
    others = [(name, i) for name in names if name != PLUG_IN for i in range(len(report["alphas"]))]
    differs = dict(zip(others, statistics.holm([report["curves"][name].against[i] for name, i in others]), strict=True))
    lines = [
        "Realised objective, lower is better; in brackets the half width of the 95 % interval over examples. A star "
        f"marks a difference from plug-in OPT, corrected for the {len(others)} comparisons of the table (Holm): the "
        "chance that any star is false is at most 5 %.",
        "",
    ]
    lines += ["| alpha | OPT defers | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for i, alpha in enumerate(report["alphas"]):
        cells = []
        for name in names:
            curve = report["curves"][name]
            cost, star = curve.cost[i], "*" * differs.get((name, i), False)
            half = "" if np.isnan(cost.low) else f" ({(cost.high - cost.low) / 2:.4f})"
            cells.append(f"{cost.value:.4f}{half}{star}")
        lines.append(f"| {alpha:.3f} | {report['curves'][PLUG_IN].deferral[i]:.2f} | " + " | ".join(cells) + " |")
    return lines


def _without_nan(value: Any) -> Any:
    """NaN as None, which JSON has a word for."""
    if isinstance(value, Mapping):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value
