"""The answers of a sweep: the paper's table, the frontier, and the area under it.

A choice is always made with figures of one half of the items, and shown with figures of the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from speccascade_t5x.evaluation.analysis import Group, Point
from speccascade_t5x.evaluation.scoring import CHOOSE, REPORT
from speccascade_t5x.evaluation.statistics import Estimate


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """A point chosen on one half, with what it does on the other.

    Attributes:
      point: it.
      speed_up: over the verifier alone, batch 1.
      quality: of the main metric.
      gain: its quality less the verifier's, paired.
    """

    point: Point
    speed_up: Estimate
    quality: Estimate
    gain: Estimate


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """A line of the table.

    Attributes:
      arm: which method.
      at_quality: the fastest point whose quality is the verifier's or better; None where there is none.
      at_latency: the best point that is no slower than the verifier; likewise.
      area: mean quality over latency budgets from the drafter's to the verifier's; None where it is not defined.
    """

    arm: str
    at_quality: Choice | None
    at_latency: Choice | None
    area: Estimate | None


def answers(group: Group, tolerance: float = 0.0) -> list[Answer]:
    """Table 2 of "Faster Cascades via Speculative Decoding", for every arm that was timed, and the areas.

    Args:
      group: of one condition.
      tolerance: how far below the verifier's a quality still counts as the verifier's, in units of the metric.
    """
    verifier = group.alone("verifier")
    found = []
    for arm, points in group.arms().items():
        timed = [point for point in points if {CHOOSE, REPORT} <= set(point.speed_up)]
        timed = [point for point in timed if math.isfinite(point.quality[CHOOSE].value)]  # an NLL may not be defined
        if not timed or arm in ("verifier", "drafter"):
            continue
        floor = verifier.quality[CHOOSE].value - tolerance
        good = [point for point in timed if point.quality[CHOOSE].value >= floor]
        quick = [point for point in timed if point.latency(CHOOSE) <= 1.0]
        fastest = min(good, key=lambda p: p.latency(CHOOSE), default=None)
        best = max(quick, key=lambda p: p.quality[CHOOSE].value, default=None)
        found.append(Answer(arm, _choice(fastest, verifier), _choice(best, verifier), area(group, timed)))
    return found


def overall(group: Group, tolerance: float = 0.0) -> tuple[Choice | None, Choice | None]:
    """The fastest of all timed points at the verifier's quality, and the best within its latency: what `infer` runs."""
    verifier = group.alone("verifier")
    timed = [point for point in group.points if {CHOOSE, REPORT} <= set(point.speed_up)]
    timed = [point for point in timed if all(math.isfinite(point.quality[half].value) for half in (CHOOSE, REPORT))]
    floor = verifier.quality[CHOOSE].value - tolerance
    order = lambda p: (p.latency(CHOOSE), -p.quality[CHOOSE].value)  # noqa: E731
    fastest = min((p for p in timed if p.quality[CHOOSE].value >= floor), key=order, default=None)
    quick = (p for p in timed if p.latency(CHOOSE) <= 1.0)
    best = max(quick, key=lambda p: (p.quality[CHOOSE].value, -p.latency(CHOOSE)), default=None)
    return _choice(fastest, verifier), _choice(best, verifier)


def _choice(point: Point | None, verifier: Point) -> Choice | None:
    if point is None:
        return None
    quality = point.quality[REPORT]
    return Choice(point, point.speed_up[REPORT], quality, quality - verifier.quality[REPORT])


def pareto(points: Sequence[Point], half: str) -> list[Point]:
    """Timed points that no other point beats in both latency and quality, from the fastest."""
    timed = [point for point in points if half in point.speed_up and math.isfinite(point.quality[half].value)]
    found, best = [], -math.inf
    for point in sorted(timed, key=lambda p: (p.latency(half), -p.quality[half].value)):
        if point.quality[half].value > best:
            found.append(point)
            best = point.quality[half].value
    return found


def hull(points: Sequence[Point], half: str) -> list[Point]:
    """The upper concave hull of the frontier: what mixing two points over requests can reach."""
    found: list[Point] = []
    for point in pareto(points, half):
        while len(found) > 1 and _below(found[-2], found[-1], point, half):
            found.pop()
        found.append(point)
    return found


def _below(left: Point, middle: Point, right: Point, half: str) -> bool:
    """Whether the middle point lies on or under the line between the other two."""
    (x0, y0), (x1, y1), (x2, y2) = ((p.latency(half), p.quality[half].value) for p in (left, middle, right))
    return (y1 - y0) * (x2 - x0) <= (y2 - y0) * (x1 - x0)


def area(group: Group, points: Sequence[Point]) -> Estimate | None:
    """Mean quality over latency budgets between the drafter's and the verifier's latency.

    At a budget below 1 a method may run as the drafter alone, at any of its points that fits, or as a mixture of them
    over requests; the verifier alone is at 1. Which points make its frontier is decided on one half, and their figures
    come from the other, so a point that was a bad choice counts as one.

    Returns:
      None where the drafter or the verifier was not timed, or the drafter is not the faster of the two.
    """
    drafter, verifier = group.alone("drafter"), group.alone("verifier")
    if any(not {CHOOSE, REPORT} <= set(point.speed_up) for point in (drafter, verifier)):
        return None
    if max(drafter.latency(CHOOSE), drafter.latency(REPORT)) >= 1.0:
        return None
    chosen = hull([drafter, *points, verifier], CHOOSE)
    estimates = [(point.speed_up[REPORT], point.quality[REPORT]) for point in chosen]
    low = drafter.latency(REPORT)
    value = _mean_height([(1.0 / x.value, y.value) for x, y in estimates], low)
    columns = zip(*(zip(1.0 / x.draws, y.draws, strict=True) for x, y in estimates), strict=True)
    return Estimate(value, np.array([_mean_height(list(column), low) for column in columns]))


def _mean_height(corners: Sequence[tuple[float, float]], low: float) -> float:
    """Mean height over [low, 1], straight between corners, all of which were chosen elsewhere."""
    if low >= 1.0 or not all(map(math.isfinite, np.ravel(corners))):
        return math.nan
    xs, ys = zip(*sorted(corners), strict=True)
    places = np.array([low, *(x for x in xs if low < x < 1.0), 1.0])
    return float(np.trapezoid(np.interp(places, xs, ys), places) / (1.0 - low))
