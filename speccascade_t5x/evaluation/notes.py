"""What a sweep shows, in words: where a gain is an artefact of truncation, what is chance, what is missing."""

from __future__ import annotations

import math

from speccascade_t5x.evaluation import grid
from speccascade_t5x.evaluation.analysis import Group, Point
from speccascade_t5x.evaluation.frontier import Answer
from speccascade_t5x.evaluation.scoring import REPORT
from speccascade_t5x.evaluation.statistics import Estimate

_DIGITS = 2
# Said in place of `truncation` where quality is the NLL.
NLL_CHARGES = (
    "Quality is the NLL of the references, which charges truncation: a token that was cut away costs -log 1e-6. So no "
    "gain here can be an artefact of truncation; a loss can, MinP's above all. Choose a metric of outputs to see one."
)


def interval(one: Estimate | None, digits: int = _DIGITS, sign: bool = False) -> str:
    """ "1.23 [1.10, 1.40]"; a dash where there is no figure."""
    if one is None or not math.isfinite(one.value):
        return "-"
    plus = "+" if sign else ""
    ends = "" if math.isnan(one.low) else f" [{one.low:{plus}.{digits}f}, {one.high:{plus}.{digits}f}]"
    return f"{one.value:{plus}.{digits}f}{ends}"


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
                found.append(f"{point.label}: MinP was not measured at this alpha, so no gain of it can be trusted.")
                continue
            found.append(_truncation(arm, point, fair, verifier, metric))
    return found


def _truncation(arm: str, point: Point, fair: Point, verifier: Estimate, metric: str) -> str:
    """One sentence on one alpha."""
    gain, truncated = point.quality[REPORT] - verifier, fair.quality[REPORT] - verifier
    beyond = point.quality[REPORT] - fair.quality[REPORT]
    figures = (
        f"{arm} at alpha {point.alpha:g}: {metric} {interval(gain, sign=True)} over the verifier alone; MinP at the "
        f"same alpha, the same kept tokens with no drafter in the law, {interval(truncated, sign=True)}; between the "
        f"two {interval(beyond, sign=True)}."
    )
    if gain.below():
        return f"{figures} A loss, not a gain."
    if not gain.above():
        return f"{figures} No gain is shown: the interval holds 0."
    if beyond.above():
        share = "" if truncated.above() else ", and truncation alone shows none"
        return f"{figures} Truncation does not explain all of it: the difference from MinP is above 0{share}."
    if truncated.above() or truncated.value >= 0.5 * gain.value:
        return f"{figures} ARTEFACT: truncation explains the gain; nothing is shown to come from the cascade."
    return f"{figures} Undecided: the gain is neither shown to be truncation nor shown to be more than that."


def chance(group: Group, metric: str) -> list[str]:
    """Lossless speculation has the verifier's law: what lies between the two measures chance."""
    lossless = group.find("lossless", None)
    if lossless is None:
        return []
    gap = lossless.quality[REPORT] - group.alone("verifier").quality[REPORT]
    text = (
        f"Lossless speculation emits the verifier's own law. Its {metric} differs from the verifier's by "
        f"{interval(gap, sign=True)}: that is sampling noise, and other differences of this order say nothing."
    )
    if gap.above() or gap.below():
        text += " The interval leaves 0 out, which happens to one comparison in twenty: more seeds or items would tell."
    return [text]


def speed(group: Group, found: list[Answer], unit_kind: str) -> list[str]:
    """What to know before believing speed-ups."""
    told = []
    drafter = group.alone("drafter")
    if REPORT in drafter.speed_up and drafter.speed_up[REPORT].value <= 1.0:
        told.append(
            "The drafter alone is not faster than the verifier here, so no latency lies between the two and the area "
            "under the frontier is not defined."
        )
    if found and not any(a.at_quality and a.at_quality.speed_up.above(1.0) for a in found):
        told.append("No method is shown to be faster than the verifier alone at its quality on this machine.")
    lost = [a.arm for a in found if a.at_quality is not None and a.at_quality.gain.below()]
    if lost:
        told.append(
            f"Chosen to reach the verifier's quality on one half, {', '.join(lost)} fell below it on the other: the "
            "speed-up stands beside a loss."
        )
    if unit_kind != "examples":
        told.append(
            f"The metric is no mean over examples: its intervals come from {unit_kind} (jackknife pseudo-values), "
            "which are few, so they are rough."
        )
    return told
