"""Points with figures made up, so that answers can be worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from speccascade_t5x.evaluation import report
from speccascade_t5x.evaluation.analysis import Group, Point
from speccascade_t5x.evaluation.grid import Condition
from speccascade_t5x.evaluation.scoring import CHOOSE, REPORT
from speccascade_t5x.evaluation.statistics import Bootstrap, Estimate, TimeRatio, TimeRatios

MAIN = Condition(5, 1.0, 1.0)
_BOOT = Bootstrap(50, draws=200)
_NOISE = np.random.default_rng(0).normal(size=50)
_NOISE -= _NOISE.mean()


def estimate(value: float, spread: float = 0.0) -> Estimate:
    """A figure with an interval of about +- 0.28 spread; all share their noise's examples, not its direction."""
    return _BOOT.mean(value + spread * _NOISE)


def speed_up(latency: float) -> TimeRatio:
    """Of 50 items that all gain as much."""
    return TimeRatios(50, draws=200).ratio(np.ones(50), np.full(50, latency))


def point(
    arm: str,
    alpha: float | None,
    quality: tuple[float, float],
    latency: tuple[float, float] | None,
    spread: float = 0.0,
    **row: Any,
) -> Point:
    """A point from (choose, report) figures; latencies are over the verifier's."""
    rates = {
        "acceptance": 0.8,
        "block_efficiency": 3.0,
        "verifier_calls_per_token": 0.0 if arm == "drafter" else latency[0] if latency else 0.5,
        "drafter_calls_per_token": 0.0 if arm == "verifier" else 1.2,
        "scored_per_token": 1.5,
        "deferral_rate": 0.4,
        "acceptance_by_position": [] if arm in ("drafter", "verifier") else [0.9, 0.8, 0.7],
    }
    rule = arm if arm not in ("drafter", "verifier") else None
    settings = {"method": arm} if rule is None else {"rule": rule, "draft_len": 5}
    settings |= {} if alpha is None else {"alpha": alpha}
    metrics = {half: {"unreachable": 0.01, "reference_overlap": 0.9} for half in (CHOOSE, REPORT)}
    name = arm if alpha is None else f"{arm}_a{alpha:g}"
    base = {"rule": rule, "draft_len": None if rule is None else 5, "settings": settings, "metrics": metrics}
    halves = (CHOOSE, REPORT)
    timed = {} if latency is None else {h: speed_up(x) for h, x in zip(halves, latency, strict=True)}
    return Point(
        name=name,
        arm=arm,
        alpha=alpha,
        row=base | row,
        cells=(f"{name}_s0",),
        quality={h: estimate(x, spread) for h, x in zip(halves, quality, strict=True)},
        nll={h: estimate(0.1) for h in halves},
        rates=rates,
        speed_up=timed,
        seconds={h: estimate(0.01 * x) for h, x in zip(halves, latency or (), strict=False)},
        batch_speed_up=TimeRatios(3).ratio([1.1] * 3, [1.0] * 3) if latency else None,
        tokens_per_s=(1000.0, 3000.0) if latency else None,
        predicted=1.5 if rule and latency else None,
    )


def group(*points: Point) -> Group:
    """Both models alone (quality 80 and 60, the drafter at a fifth of the time) and some points."""
    alone = point("verifier", None, (80, 80), (1, 1)), point("drafter", None, (60, 60), (0.2, 0.2))
    return Group(MAIN, (*alone, *points))


def facts(**changed: Any) -> report.Facts:
    """What a report says beside the points."""
    bins = [{"confidence": 0.5, "accuracy": 0.4, "tokens": 10.0}, {"confidence": 0.9, "accuracy": 0.95, "tokens": 90.0}]
    one = {"bins": bins, "ece": 0.055}
    known = {
        "name": "a task <b>&",
        "metric": "exact_match",
        "unit_kind": "examples",
        "halves": {CHOOSE: 50, REPORT: 50},
        "timed": 8,
        "repeats": 2,
        "batch_size": 4,
        "seeds": 2,
        "compile_s": 12.3,
        "warm_up_s": 1.0,
        "failures": [],
        "machine": "a machine",
        "reliability": {"drafter": one, "verifier": one},
        "missing": [],
        "tolerance": 0.0,
    }
    return report.Facts(**known | changed)
