"""Claims of "Faster Cascades via Speculative Decoding" (ICLR 2025) beside what a sweep has measured.

Every verdict is a statement about this pair, this task and this machine: "holds" where the whole 95 % interval is on
the claim's side, "fails" where it is on the other, "not shown" in between, or where there are too few items for one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from speccascade_t5x.evaluation import frontier, notes
from speccascade_t5x.evaluation.analysis import Group
from speccascade_t5x.evaluation.frontier import Answer
from speccascade_t5x.evaluation.notes import interval
from speccascade_t5x.evaluation.scoring import REPORT
from speccascade_t5x.evaluation.statistics import Estimate

# Top-p: speed-up at the verifier's quality and best quality within its latency, LossySD then TokenV3, as published
# for WMT (BLEU) and CNN/DM (ROUGE-2).
PUBLISHED = {
    0.1: ("1.55x / 1.74x", "1.48x / 1.61x", "27.35 / 27.49", "15.72 / 15.79"),
    0.25: ("1.54x / 1.75x", "1.49x / 1.52x", "27.34 / 27.52", "15.71 / 15.73"),
    0.5: ("1.64x / 1.73x", "1.63x / 1.65x", "27.10 / 27.30", "15.27 / 15.46"),
}


def verdict(figure: Estimate | None, level: float = 0.0) -> str:
    """What an interval of (claimed winner - other) says; of (claimed winner / other) with level 1."""
    if figure is None:
        return "cannot be told"
    return "holds" if figure.above(level) else "fails" if figure.below(level) else "not shown"


def markdown(groups: Sequence[Group], tolerance: float = 0.0) -> str:
    """All claims as a page. For `tolerance` see `frontier.answers`."""
    lines = ["# Claims of the paper, and what was measured here", ""]
    lines += ["Intervals: 95 %, paired over examples; alphas chosen on other items than reported. See report.html."]
    lines += ["Behind a speed-up stand the n timed items; below 8 it has no interval.", ""]
    lines += _table(groups, tolerance)
    main = groups[0]
    found = {answer.arm: answer for answer in frontier.answers(main, tolerance)}
    lines += ["## Main condition", ""]
    sequential = ("token_cascade:chow", "sequence_cascade")
    for claim, winner, others in (
        ("Speculative execution of a rule beats the sequential cascades", "opt", sequential),
        ("OPT beats Diff and Chow under speculative execution", "opt", ("diff", "chow")),
        ("Token V3 beats OPT", "token_v3", ("opt",)),
        ("Token V3 beats lossy speculative decoding, both residuals", "token_v3", ("lossy_sd", "lossy_sd_optimal")),
        ("Token V3 beats BiLD, fixed and as published", "token_v3", ("bild_fixed", "bild")),
    ):
        lines += [_areas(claim, found, winner, others)]
    lines += ["", "Is it the cascade, or the truncation? (MinP at the same alpha keeps the same tokens.)", ""]
    lines += [f"- {group.condition}: {text}" for group in groups for text in notes.truncation(group, "quality")]
    lines += ["", _points(groups), _theory(groups)]
    return "\n".join(lines) + "\n"


def _table(groups: Sequence[Group], tolerance: float) -> list[str]:
    """The top-p table in the paper's form, its figures beside ours."""
    lines = ["## Lossy SD / Token V3 under top-p", ""]
    lines += [
        "| top-p | speed-up at the verifier's quality here | V3 over LossySD | verdict | published WMT, CNN/DM "
        "| best quality within its latency here | V3 less LossySD | verdict | published WMT, CNN/DM |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group in groups:
        if group.condition.top_p not in PUBLISHED and group is not groups[0]:
            continue
        found = {answer.arm: answer for answer in frontier.answers(group, tolerance)}
        lossy, ours = found.get("lossy_sd"), found.get("token_v3")
        cells = [f"{group.condition.top_p:g}"]
        published = PUBLISHED.get(group.condition.top_p, ("-",) * 4)
        halves = (("at_quality", "speed_up", published[:2]), ("at_latency", "quality", published[2:]))
        for field, figure, where in halves:
            pair = [_figure(answer, field, figure) for answer in (lossy, ours)]
            ratio, shown = figure == "speed_up", None
            if None not in pair:
                shown = pair[1] / pair[0] if ratio else pair[1] - pair[0]
            cells += [" / ".join(map(interval, pair)), interval(shown), verdict(shown, float(ratio))]
            cells.append("; ".join(where))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _figure(answer: Answer | None, field: str, figure: str) -> Estimate | None:
    choice = answer and getattr(answer, field)
    return getattr(choice, figure) if choice else None


def _areas(claim: str, found: dict[str, Answer], winner: str, others: Sequence[str]) -> str:
    """One claim by areas under the frontier."""
    parts = []
    for other in others:
        one, two = (found[name].area if name in found else None for name in (winner, other))
        difference = one - two if one is not None and two is not None else None
        parts.append(f"{winner} less {other} {interval(difference)}: {verdict(difference)}")
    return f"- {claim} (area under the frontier): {'; '.join(parts)}."


def _points(groups: Sequence[Group]) -> str:
    """How many operating points lossy speculative decoding really has."""
    parts = []
    for group in groups:
        points = group.arms().get("lossy_sd", [])
        distinct = {(round(p.rates["verifier_calls_per_token"], 3), round(p.quality[REPORT].value, 2)) for p in points}
        parts.append(f"{len(distinct)} of {len(points)} under {group.condition}")
    claim = "Lossy SD has few distinct operating points at small P (3 at P = 0.1 in the paper)"
    return f"- {claim}. Here {'; '.join(parts)}."


def _theory(groups: Sequence[Group]) -> str:
    ratios = [
        point.speed_up[REPORT].value / point.predicted
        for group in groups
        for point in group.points
        if point.predicted and REPORT in point.speed_up
    ]
    if not ratios:
        return "- Measured gains against the cost model: nothing was timed."
    return (
        f"- Measured gains against the cost model: {statistics.median(ratios):.2f} of the prediction in the median, "
        f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} points. The model knows no encoders and no "
        "overhead of a round."
    )
