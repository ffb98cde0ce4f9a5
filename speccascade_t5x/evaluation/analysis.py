"""From finished cells to points with intervals: quality, cost and speed of each method at each alpha.

Everything is computed per half of the items. Alphas are chosen on one half (`scoring.CHOOSE`) and every figure that is
shown of a choice comes from the other (`scoring.REPORT`). All points share the resamples of their half, so that
differences and ratios between them are paired.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from speccascade_t5x.core import rules
from speccascade_t5x.evaluation import timing
from speccascade_t5x.evaluation.cells import CellStore
from speccascade_t5x.evaluation.grid import Condition
from speccascade_t5x.evaluation.measure import NLL
from speccascade_t5x.evaluation.scoring import CHOOSE, REPORT, Scorer
from speccascade_t5x.evaluation.statistics import Bootstrap, Estimate, TimeRatio, TimeRatios
from speccascade_t5x.interfaces import UserError

_TIME_SEED = 1  # of the draws of timed items, apart from those of the scored ones


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """A method at one alpha under one condition, over its seeds.

    Attributes:
      name: of the point; its cells are named after it.
      arm: name of the arm.
      alpha: None where it takes none.
      row: of its first cell.
      cells: ids of its rows in cells.jsonl.
      quality: per half; the main metric, higher is better.
      nll: per half, in nats per reference token; empty where the method has no distribution per token.
      rates: over all items, the mean of the seeds' rates.
      speed_up: per half, time of the verifier alone on the same items over its own, batch 1.
      seconds: per half, mean per item at batch 1, without an interval.
      batch_speed_up: likewise of whole batches, over both halves.
      tokens_per_s: at batch 1 and in whole batches, over both halves.
      predicted: gain of the cost model at the measured tokens per round, or None.
    """

    name: str
    arm: str
    alpha: float | None
    row: Mapping[str, Any]
    cells: tuple[str, ...]
    quality: Mapping[str, Estimate]
    nll: Mapping[str, Estimate]
    rates: Mapping[str, Any]
    speed_up: Mapping[str, TimeRatio] = dataclasses.field(default_factory=dict)
    seconds: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)
    batch_speed_up: TimeRatio | None = None
    tokens_per_s: tuple[float, float] | None = None
    predicted: float | None = None

    @property
    def label(self) -> str:
        """Its name in tables and plots."""
        return self.arm if self.alpha is None else f"{self.arm} {self.alpha:g}"

    def latency(self, half: str) -> float:
        """Time over the verifier alone's, at batch 1; infinite where it was not timed."""
        return 1.0 / self.speed_up[half].value if half in self.speed_up else float("inf")


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """All points under one condition, the two models alone included.

    Attributes:
      condition: it.
      points: in the order they were measured.
    """

    condition: Condition
    points: tuple[Point, ...]

    def alone(self, model: str) -> Point:
        """The point of one model alone."""
        return next(point for point in self.points if point.arm == model)

    def arms(self) -> dict[str, list[Point]]:
        """Points of each arm, by alpha."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            found.setdefault(point.arm, []).append(point)
        return {name: sorted(points, key=lambda p: p.alpha or 0.0) for name, points in found.items()}

    def find(self, arm: str, alpha: float | None) -> Point | None:
        """A point, or None."""
        return next((point for point in self.points if (point.arm, point.alpha) == (arm, alpha)), None)


class Analyst:
    """Builds points from a sweep's folder.

    Args:
      store: its cells.
      scorer: of the task's metrics; None where quality is the NLL.
      halves: places of the items of each half.
      metric: what quality means; for "nll" quality is minus the NLL.
    """

    def __init__(self, store: CellStore, scorer: Scorer | None, halves: Mapping[str, Sequence[int]], metric: str):
        self.store, self.halves, self.metric = store, halves, metric
        self.scorer: Any = scorer  # there wherever the metric is not the NLL
        self._boots: dict[int, Bootstrap] = {}
        self._weight: str | None = None
        self.unit_kind = "examples"

    def groups(
        self, conditions: Sequence[Condition], blocks: Sequence[Mapping[str, Any]], costs: Mapping[str, Any] | None
    ) -> list[Group]:
        """The points of each condition that holds both models alone.

        Raises:
          UserError: no cell succeeded.
        """
        rows = self.store.done
        if not rows:
            reasons = sorted({row["error"] for row in self.store.rows if "error" in row})
            told = f": {reasons[0]}" if reasons else ""
            raise UserError(f"no cell of the sweep in {self.store.folder} has succeeded: nothing can be reported{told}")
        by_point: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_point.setdefault(row["point"], []).append(row)
        predictions = {}
        if self.metric != NLL:
            for row in rows:
                found = self.store.read(row["cell"]).records
                predictions[row["cell"]] = [record["prediction"] for record in found]
                for place, record in enumerate(found):
                    if "scores" in record:
                        self.scorer.learn(place, record["prediction"], record["scores"])
            self._weight = self.scorer.weight(self.metric, list(predictions.values()))
            self.unit_kind = "groups of examples" if self._weight is None else "examples"
        points = {name: self._point(name, mine, predictions) for name, mine in by_point.items()}
        groups = []
        for condition in conditions:
            mine = [point for point in points.values() if _belongs(point.row, condition)]
            alone = {point.arm: point for point in mine if point.arm in ("verifier", "drafter")}
            if len(alone) == 2:
                timed = [self._timed(point, alone["verifier"], blocks, costs) for point in mine]
                groups.append(Group(condition, tuple(timed)))
        return groups

    def _boot(self, size: int) -> Bootstrap:
        if size not in self._boots:
            self._boots[size] = Bootstrap(size)
        return self._boots[size]

    def _point(self, name: str, rows: Sequence[dict[str, Any]], predictions: Mapping[str, Sequence[str]]) -> Point:
        quality, nll = {}, {}
        references = self.store.read(rows[0]["cell"]).references
        for half, places in self.halves.items():
            if references is not None:
                one = self._boot(len(places))
                sums = {key: np.asarray(references[key])[list(places)] for key in (NLL, "tokens")}
                nll[half] = one.ratio(sums[NLL], sums["tokens"])
            if self.metric == NLL:
                undefined = Estimate(float("nan"), np.full(self._boot(len(places)).counts.shape[0], np.nan))
                quality[half] = -nll[half] if half in nll else undefined
            else:
                runs = [predictions[row["cell"]] for row in rows]
                units = self.scorer.units(self.metric, runs, half, self._weight)
                quality[half] = self._boot(units.numerators.shape[1]).ratio(units.numerators, units.denominators)
        return Point(
            name=name,
            arm=rows[0]["arm"],
            alpha=rows[0]["alpha"],
            row=rows[0],
            cells=tuple(row["cell"] for row in rows),
            quality=quality,
            nll=nll,
            rates=_mean_rates([row["rates"]["all"] for row in rows]),
        )

    def _timed(
        self, point: Point, verifier: Point, blocks: Sequence[Mapping[str, Any]], costs: Mapping[str, Any] | None
    ) -> Point:
        """The point with its wall times, where it was timed."""
        # A sweep that is timing anew, because a cell was added, has blocks without it.
        shared = [block for block in blocks if {point.name, verifier.name} <= set(block["points"])]
        mine, base = timing.read(shared, point.name), timing.read(shared, verifier.name)
        if mine is None or base is None:
            return point
        speed_up, seconds = {}, {}
        for half, places in self.halves.items():
            inside = [i for i, item in enumerate(mine["items"]) if item in set(places)]
            if not inside:
                continue
            times = TimeRatios(len(inside), seed=_TIME_SEED)
            speed_up[half] = times.ratio(base["seconds"][inside], mine["seconds"][inside])
            seconds[half] = Estimate(float(mine["seconds"][inside].mean()), np.array([]), units=len(inside))
        whole = TimeRatios(len(mine["batch_seconds"]), seed=_TIME_SEED)
        return dataclasses.replace(
            point,
            speed_up=speed_up,
            seconds=seconds,
            batch_speed_up=whole.ratio(base["batch_seconds"], mine["batch_seconds"]),
            tokens_per_s=mine["tokens_per_s"],
            predicted=_predicted(point, costs),
        )


def _predicted(point: Point, costs: Mapping[str, Any] | None) -> float | None:
    settings = point.row["settings"]
    plain = (settings.get("method", "speculative"), settings.get("drafter", "model")) == ("speculative", "model")
    if costs is None or not plain or "draft_len" not in settings or "draft_stop" in settings:
        return None
    reads = rules.get(point.row["rule"]).reads_drafter
    return timing.theory(costs, point.rates, settings["draft_len"], reads)


def _belongs(row: Mapping[str, Any], condition: Condition) -> bool:
    """Whether a row was measured under a condition; what drafts nothing belongs to every draft length."""
    same = (row["temperature"], row["top_p"]) == (condition.temperature, condition.top_p)
    return same and row["draft_len"] in (None, condition.draft_len)


def _mean_rates(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in each[0]:
        if name == "acceptance_by_position":
            shared = min(len(rates[name]) for rates in each)
            found[name] = np.mean([rates[name][:shared] for rates in each], axis=0).tolist() if shared else []
        else:
            found[name] = np.mean([rates[name] for rates in each], axis=0).tolist()
    return found


__all__ = ["CHOOSE", "REPORT", "Analyst", "Group", "Point"]
