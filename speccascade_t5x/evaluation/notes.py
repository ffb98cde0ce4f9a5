"""What a sweep shows, in sentences: where a gain is an artefact of truncation, what is chance, what is missing."""

from __future__ import annotations

import math

from speccascade_t5x.evaluation import frontier, grid
from speccascade_t5x.evaluation.analysis import Group, Point
from speccascade_t5x.evaluation.frontier import Answer
from speccascade_t5x.evaluation.scoring import REPORT
from speccascade_t5x.evaluation.statistics import Estimate, TimeRatio

_DIGITS, _MOST_DIGITS = 2, 6
# Said in place of `truncation` where quality is the NLL.
NLL_CHARGES = (
    "Quality is the NLL of the references, which charges truncation: a token that was cut away costs -log 1e-6. No "
    "gain here can be an artefact of truncation, but a loss can, above all MinP's. A metric of outputs shows both."
)


def interval(one: Estimate | None, digits: int | None = _DIGITS, sign: bool = False) -> str:
    """ "1.23 [1.10, 1.40]"; a dash where there is no figure.

    Args:
      one: the figure; of a ratio of wall times the number of units is shown as well: "1.23 [1.10, 1.40] n=16".
      digits: after the point; None gives as many as the interval's width asks for.
      sign: whether to show a plus.
    """
    if one is None or not math.isfinite(one.value):
        return "-"
    if digits is None:
        width = one.high - one.low
        digits = max(_DIGITS, min(1 - math.floor(math.log10(width)), _MOST_DIGITS)) if width > 0 else _DIGITS
    plus = "+" if sign else ""
    ends = "" if math.isnan(one.low) else f" [{one.low:{plus}.{digits}f}, {one.high:{plus}.{digits}f}]"
    return f"{one.value:{plus}.{digits}f}{ends}{f' n={one.units}' if isinstance(one, TimeRatio) else ''}"


def truncation(group: Group, metric: str) -> list[str]:
    """Per alpha of a TokenV3: how much of its gain over the verifier alone MinP at the same alpha shows as well."""
    verifier = group.alone("verifier").quality[REPORT]
    found = []
    for arm, points in group.arms().items():
        for point in points:
            if point.row["rule"] != grid.TRUNCATED:
                continue
            fair = group.find(grid.TRUNCATION, point.alpha)
            if fair is None:
                found.append(f"{point.label}: MinP was not measured at this alpha, so its gains cannot be trusted.")
                continue
            found.append(_truncation(arm, point, fair, verifier, metric))
    return found


def _truncation(arm: str, point: Point, fair: Point, verifier: Estimate, metric: str) -> str:
    """One sentence on one alpha."""
    gain, truncated = point.quality[REPORT] - verifier, fair.quality[REPORT] - verifier
    beyond = point.quality[REPORT] - fair.quality[REPORT]
    figures = (
        f"{arm} at alpha {point.alpha:g}: {metric} {interval(gain, None, True)} over the verifier alone; MinP at the "
        f"same alpha, which keeps the same tokens without the drafter, {interval(truncated, None, True)}; difference "
        f"of the two {interval(beyond, None, True)}."
    )
    if math.isnan(gain.low):
        return f"{figures} Undecided: there are too few items for an interval."
    if gain.below():
        return f"{figures} A loss, not a gain."
    if not gain.above():
        return f"{figures} No gain is shown: the interval contains 0."
    if beyond.above():
        share = "" if truncated.above() else ", and truncation alone shows none"
        return f"{figures} Truncation does not explain all of the gain: the difference from MinP is above 0{share}."
    if truncated.above() or truncated.value >= 0.5 * gain.value:
        return f"{figures} ARTEFACT: truncation explains the gain; no part of it is shown to come from the cascade."
    return f"{figures} Undecided: the gain is shown neither to come from truncation nor to exceed it."


def advice(group: Group, tolerance: float, metric: str) -> list[str]:
    """Which of the timed points of one condition to run."""
    said = []
    for choice, wish, flags in zip(
        frontier.overall(group, tolerance),
        ("the fastest at the verifier's quality", f"the best {metric} within the verifier's time"),
        ("", " --latency_budget=1"),
        strict=True,
    ):
        if choice is None:
            said.append(f"No timed point is {wish}.")
            continue
        if choice.point.arm == "verifier":
            said.append(f"Of all timed points the verifier alone is {wish}: run it without a drafter.")
            continue
        said.append(
            f"Chosen on one half of the items as {wish}: {choice.point.label}. On the other half its speed-up is "
            f"{interval(choice.speed_up)}, its {metric} less the verifier's {interval(choice.gain, None, True)}. "
            f"To run it: speccascade infer --operating_point=FOLDER{flags}"
        )
    return said


def chance(group: Group, metric: str) -> list[str]:
    """Lossless speculation has the verifier's distribution: the difference between the two measures chance."""
    lossless = group.find("lossless", None)
    if lossless is None:
        return []
    gap = lossless.quality[REPORT] - group.alone("verifier").quality[REPORT]
    if group.condition.temperature == 0:
        return [
            f"At temperature 0 lossless speculation writes what the verifier alone writes. Its {metric} differs by "
            f"{interval(gap, None, True)}: a difference comes from rounding, which depends on the width of a block."
        ]
    text = (
        f"Lossless speculation samples from the verifier's own distribution. Its {metric} differs from the verifier's "
        f"by {interval(gap, None, True)}: this is sampling noise, and other differences of this size mean nothing."
    )
    if gap.above() or gap.below():
        text += " The interval excludes 0, as one in twenty does by chance: add seeds or items to find out."
    return [text]


def speed(group: Group, found: list[Answer], unit_kind: str) -> list[str]:
    """What a reader should know about the speed-ups."""
    told = []
    drafter = group.alone("drafter")
    if REPORT in drafter.speed_up and drafter.speed_up[REPORT].value <= 1.0:
        told.append(
            "The drafter alone is not faster than the verifier here, so the area under the frontier, which covers the "
            "latencies between the two, is not defined."
        )
    if found and not any(a.at_quality and a.at_quality.speed_up.above(1.0) for a in found):
        told.append("No method is shown to be faster than the verifier alone at its quality on this machine.")
    lost = [a.arm for a in found if a.at_quality is not None and a.at_quality.gain.below()]
    if lost:
        told.append(
            f"Chosen to reach the verifier's quality on one half, {', '.join(lost)} fell below it on the other: the "
            "speed-up comes with a loss."
        )
    if unit_kind != "examples":
        told.append(
            f"The metric is not a mean over examples: its intervals come from {unit_kind} (jackknife pseudo-values). "
            "There are few of these, so the intervals are rough."
        )
    return told
