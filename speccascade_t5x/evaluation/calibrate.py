"""The alpha that reaches a wanted rate: found on one half of the items, checked on the other.

A rate is what a decode counts, such as how often the rule turns to the verifier, so it is found by decoding. Every
decode is a cell of the sweep's folder: a killed calibration continues.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from speccascade_t5x.common import checks
from speccascade_t5x.evaluation import grid
from speccascade_t5x.evaluation.grid import Arm, Cell, Condition
from speccascade_t5x.evaluation.measure import Measurement, sequence_grid
from speccascade_t5x.evaluation.scoring import CHOOSE, REPORT
from speccascade_t5x.evaluation.statistics import Bootstrap
from speccascade_t5x.interfaces import UserError

# Rate -> (counter above, counter below); see `core.accounting.rates`.
RATES = {
    "deferral_rate": ("deferred", "committed"),
    "verifier_calls_per_token": ("verifier_calls", "committed"),
    "drafter_calls_per_token": ("drafter_calls", "committed"),
    "acceptance": ("accepted", "examined"),
    "block_efficiency": ("committed", "rounds"),
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A rate and the value it should have."""

    rate: str
    value: float


def wanted(asked: Mapping[str, float]) -> Wanted:
    """{"deferral_rate": 0.3} checked.

    Raises:
      UserError: not exactly one rate, an unknown one, or a value below 0.
    """
    if not isinstance(asked, Mapping) or len(asked) != 1:
        raise UserError(f"calibrate={asked!r} must name one rate and its value, such as deferral_rate=0.3")
    ((rate, value),) = asked.items()
    if rate not in RATES:
        raise UserError(f"there is no rate {rate!r} to calibrate: use one of {', '.join(RATES)}")
    checks.real(rate, value, 0.0)
    return Wanted(rate, float(value))


def check(arms: Sequence[Arm]) -> None:
    """Refuses methods that cannot be calibrated, before anything is decoded.

    Raises:
      UserError: there is none, or one takes no alpha.
    """
    if not arms:
        raise UserError("a calibration needs methods: name at least one that takes an alpha")
    for arm in arms:
        if arm.range is None:
            raise UserError(f"the method {arm.name!r} takes no alpha, so there is nothing to calibrate: leave it out")


def calibrate(
    measurement: Measurement,
    arms: Sequence[Arm],
    condition: Condition,
    seed: int,
    target: Wanted,
    points: int,
    steps: int = 6,
) -> list[dict[str, Any]]:
    """Finds each arm's alpha.

    A coarse grid first, and where it does not span the rate the ends of the rule's span; then halving of the interval
    on whose ends the rate lies above and below what is wanted, so the rate need not be monotone all over. The closest
    of all measured alphas is taken.

    Args:
      measurement: runs the cells.
      arms: that take an alpha, see `check`.
      condition: draft length and sampling.
      seed: of the decodes.
      target: what is wanted.
      points: alphas of the coarse grid.
      steps: halvings.

    Returns:
      Per arm: "arm", "alpha", "wanted", "chosen_on" (the rate on the half the alpha was chosen on), "held_out" (on
      the other half, with its interval), "reached" (whether the wanted rate lies within the measured ones) and "cell".

    Raises:
      UserError: no decode of a method succeeded.
    """
    measurement.expect(len(arms) * (points + steps))
    found = []
    for arm in arms:
        known: dict[float, float] = {}

        def rate(alpha: float, arm: Arm = arm, known: dict[float, float] = known) -> None:
            row = measurement.run(Cell(arm, alpha, condition, seed))
            if row is not None:
                known[alpha] = row["rates"][CHOOSE][target.rate]

        spans = lambda known=known: min(known.values()) <= target.value <= max(known.values())  # noqa: E731
        for alpha in arm.alphas or _coarse(measurement, arm, condition, seed, points):
            rate(alpha)
        if not known:
            raise UserError(f"no decode of {arm.name!r} succeeded: cells.jsonl says why")
        for alpha in () if arm.alphas else grid.ends(arm):
            if not spans():
                rate(alpha)
        reached = spans()
        for _ in range(steps):
            middle = _between(known, target.value)
            if middle is None or middle in known:
                break
            rate(middle)
            if middle not in known:
                break
        alpha = min(known, key=lambda a: (abs(known[a] - target.value), a))
        cell = Cell(arm, alpha, condition, seed).id
        found.append(
            {
                "arm": arm.name,
                "alpha": alpha,
                "rate": target.rate,
                "wanted": target.value,
                "chosen_on": known[alpha],
                "held_out": _held_out(measurement, cell, target.rate),
                "reached": reached,
                "cell": cell,
            }
        )
    return found


def _coarse(measurement: Measurement, arm: Arm, condition: Condition, seed: int, points: int) -> tuple[float, ...]:
    if arm.method != "sequence_cascade":
        return grid.default_alphas(arm, points)
    drafted = Cell(grid.arm("drafter"), None, condition, seed)
    if measurement.run(drafted) is None:
        raise UserError("the drafter alone cannot be decoded, so there are no alphas to try: cells.jsonl says why")
    return sequence_grid(measurement, arm, drafted, points)


def _between(known: Mapping[float, float], target: float) -> float | None:
    """The middle of the narrowest interval across whose ends the rate passes the target."""
    alphas = sorted(known)
    crossing = [
        (high - low, low, high)
        for low, high in itertools.pairwise(alphas)
        if min(known[low], known[high]) <= target <= max(known[low], known[high]) and known[low] != known[high]
    ]
    if not crossing:
        return None
    _, low, high = min(crossing)
    return float(f"{(low + high) / 2:.4g}")


def _held_out(measurement: Measurement, cell: str, rate: str) -> dict[str, float | None]:
    above, below = RATES[rate]
    counts = [measurement.store.read(cell).records[i]["counts"] for i in measurement.halves[REPORT]]
    columns = [np.array([count[name] for count in counts], np.float64) for name in (above, below)]
    return Bootstrap(len(counts)).ratio(*columns).as_dict()
