"""The report of a sweep: report.html and report.md, which say the same, and the plots.

Every figure comes from rows of cells.jsonl, named in the last column of the tables, and from the blocks in timing/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speccascade_t5x.common import storage, text_table
from speccascade_t5x.evaluation import frontier, notes, page, plots
from speccascade_t5x.evaluation.analysis import Group, Point
from speccascade_t5x.evaluation.measure import NLL
from speccascade_t5x.evaluation.notes import interval
from speccascade_t5x.evaluation.scoring import CHOOSE, REPORT
from speccascade_t5x.evaluation.statistics import MIN_UNITS

_CAPTIONS = {
    "frontier": "Quality against time per item, on the half that alphas were not chosen on; bars are 95 % intervals. "
    "The grey line is the frontier chosen on the other half.",
    "quality-by-calls": "Quality against verifier calls per token: the same on every machine.",
    "acceptance-by-position": "Acceptance by draft position, each method at its middle alpha.",
    "calls-per-token": "Calls of either model per output token.",
    "gain-against-theory": "Measured speed-up against the cost model at the measured tokens per round.",
    "reliability": "Reliability of both models on the references, on which plug-in rules depend.",
}


_COLUMNS = (
    "speed-up: the verifier's time over the point's, as the geometric mean over the n timed items (at batch 1) or n "
    "batches; above 1 is faster. A dash means that the point was not timed.",
    "by theory: the speed-up predicted from step costs and the measured tokens per round, without overhead.",
    "unreachable: share of reference tokens to which the target distribution gives probability 0.",
    "calls/token: what a point costs on any machine. The verifier alone has 1 and 0.",
    "acceptance: share of the examined draft tokens that were accepted while decoding. overlap on references: the same "
    "on the references, computed from both distributions; where it is far above the acceptance, outputs drift from the "
    "references.",
    "deferred: how often the rule deferred to the verifier. Unlike alphas, this can be compared between rules.",
    "cells: the rows of cells.jsonl behind a line.",
)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a report says beside the points.

    Attributes:
      name: of the task or input.
      metric: what quality means.
      unit_kind: what the intervals of quality resample.
      halves: how many items each half has.
      timed: items wall times were measured on.
      repeats: rounds of the wall times.
      batch_size: B.
      seeds: how many.
      compile_s: seconds of compiling, which no other figure includes.
      warm_up_s: seconds of first runs, likewise.
      failures: rows of cells that failed.
      machine: where it ran.
      reliability: per model.
      missing: baselines without a cell.
      tolerance: see `frontier.answers`.
      traces: items on the trace page; 0 where there is none.
    """

    name: str
    metric: str
    unit_kind: str
    halves: Mapping[str, int]
    timed: int
    repeats: int
    batch_size: int
    seeds: int
    compile_s: float
    warm_up_s: float
    failures: Sequence[Mapping[str, Any]]
    machine: str
    reliability: Mapping[str, Any]
    missing: Sequence[str]
    tolerance: float
    traces: int = 0

    @property
    def quality(self) -> str:
        """Name of quality, higher is better."""
        return "NLL (negated)" if self.metric == NLL else self.metric


def write(folder: Path, groups: Sequence[Group], facts: Facts) -> dict[str, Path]:
    """Writes plots, report.md and report.html. Returns their paths by what they are for."""
    drawn = plots.draw_all(folder / "plots", groups, facts.quality, facts.reliability)
    sections = [_section(group, facts, i == 0) for i, group in enumerate(groups)]
    storage.write_text(folder / "report.md", _markdown(sections, facts, drawn))
    storage.write_text(folder / "report.html", _html(sections, facts, drawn, groups))
    return {"report": folder / "report.html", "report in Markdown": folder / "report.md", "plots": folder / "plots"}


@dataclasses.dataclass(frozen=True)
class _Section:
    """What is said of one condition."""

    title: str
    advice: list[str]
    table: tuple[list[str], list[list[str]]]
    truncation: list[str]
    remarks: list[str]
    points: tuple[list[str], list[list[str]]]


def _section(group: Group, facts: Facts, main: bool) -> _Section:
    found = frontier.answers(group, facts.tolerance)
    nll = facts.metric == NLL
    remarks = ([] if nll else notes.chance(group, facts.quality)) + notes.speed(group, found, facts.unit_kind)
    return _Section(
        title=("Main condition: " if main else "") + str(group.condition),
        advice=notes.advice(group, facts.tolerance, facts.quality) if main and facts.timed else [],
        table=_answers(group, found, facts),
        truncation=[notes.NLL_CHARGES] if nll else notes.truncation(group, facts.quality),
        remarks=remarks,
        points=_points(group, facts),
    )


def _answers(group: Group, found: Sequence[frontier.Answer], facts: Facts) -> tuple[list[str], list[list[str]]]:
    """The paper's table: speed-up at the verifier's quality, best quality within its latency."""
    header = [
        *("method", "alpha", "speed-up at the verifier's quality", f"its {facts.quality} less the verifier's"),
        *("alpha ", f"best {facts.quality} within the verifier's latency", "less the verifier's"),
        "area under frontier",
    ]
    rows = []
    for answer in found:
        row = [answer.arm]
        for choice, figures in ((answer.at_quality, ("speed_up", "gain")), (answer.at_latency, ("quality", "gain"))):
            if choice is None:
                row += ["none", "-", "-"]
                continue
            row.append("-" if choice.point.alpha is None else f"{choice.point.alpha:g}")
            for name in figures:
                digits = 2 if name == "speed_up" else None
                row.append(interval(getattr(choice, name), digits, sign=name == "gain"))
        rows.append([*row, interval(answer.area, None)])
    return header, rows


def _points(group: Group, facts: Facts) -> tuple[list[str], list[list[str]]]:
    """Every point with everything that was measured of it."""
    verifier = group.alone("verifier")
    columns: list[tuple[str, Callable[[Point], str]]] = [
        ("point", lambda p: p.label),
        (facts.quality, lambda p: interval(p.quality[REPORT], None)),
        ("less the verifier's", lambda p: interval(p.quality[REPORT] - verifier.quality[REPORT], None, True)),
        ("NLL", lambda p: interval(p.nll.get(REPORT), 3)),
        ("unreachable", lambda p: _share(p.row["metrics"][REPORT].get("unreachable"))),
        ("speed-up, batch 1", lambda p: interval(p.speed_up.get(REPORT))),
        (f"batch {facts.batch_size}", lambda p: interval(p.batch_speed_up)),
        ("tokens/s", lambda p: "-" if p.tokens_per_s is None else f"{p.tokens_per_s[0]:.0f}"),
        ("in batches", lambda p: "-" if p.tokens_per_s is None else f"{p.tokens_per_s[1]:.0f}"),
        ("by theory", lambda p: "-" if p.predicted is None else f"{p.predicted:.2f}"),
        ("verifier calls/token", lambda p: f"{p.rates['verifier_calls_per_token']:.3f}"),
        ("drafter calls/token", lambda p: f"{p.rates['drafter_calls_per_token']:.3f}"),
        ("acceptance", lambda p: f"{p.rates['acceptance']:.3f}"),
        ("overlap on references", lambda p: _share(_overlap(p))),
        ("deferred", lambda p: f"{p.rates['deferral_rate']:.3f}"),
        ("cells", lambda p: " ".join(p.cells)),
    ]
    ordered = [point for points in group.arms().values() for point in points]
    return [name for name, _ in columns], [[show(point) for _, show in columns] for point in ordered]


def _overlap(point: Point) -> float | None:
    """Mean chance of a draft on the references; None where nothing is drafted, or not by the drafter model."""
    settings = point.row["settings"]
    drafts = settings.get("method", "speculative") in ("speculative", "bild") and "drafter" not in settings
    return point.row["metrics"][REPORT].get("reference_overlap") if drafts else None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _protocol(facts: Facts) -> list[str]:
    items, batch = sum(facts.halves.values()), facts.batch_size
    decoded = f"decoded in batches of {batch} over all items with {facts.seeds} seed{'s' * (facts.seeds != 1)}"
    nll = f"minus the NLL of the references, the same for all seeds; rates are of outputs {decoded}"
    timed = [
        f"Wall time: {facts.timed} items drawn at random, half of them from each half, {facts.repeats} rounds with the "
        f"seeds in turn, at batch 1 and in batches of {batch}; all timed points alternate on each item. A speed-up is "
        "the geometric mean of the ratios of n items, its interval Student's t on their logarithms; fewer than "
        f"{MIN_UNITS} have none.",
    ]
    return [
        f"{facts.name}: {items} items; alphas chosen on {facts.halves[CHOOSE]} of them, every figure below from the "
        f"other {facts.halves[REPORT]} (calls, acceptance and tokens/s from all).",
        f"Quality is {nll if facts.metric == NLL else f'{facts.quality}, {decoded}'} (one at temperature 0).",
        f"Intervals of quality: 95 %, paired bootstrap over {facts.unit_kind}. No interval is corrected for the number "
        "of comparisons: one in twenty is expected to miss the true value.",
        *(timed if facts.timed else []),
        f"Compiling took {facts.compile_s:.1f} s and warm-up {facts.warm_up_s:.1f} s; no figure includes them.",
        "NLL: -log of the reference token's probability under the target distribution, both models teacher-forced, in "
        "nats per token; a token of probability 0 (unreachable) is charged -log 1e-6.",
        f"Machine: {facts.machine}.",
    ]


def _warnings(facts: Facts) -> list[str]:
    found = [f"Baselines that were not measured: {', '.join(facts.missing)}."] if facts.missing else []
    found += [f"The cell {row['cell']} failed: {row['error']}" for row in facts.failures]
    if not facts.timed:
        found.append("No wall time was measured yet, so there are no speed-ups and no table of answers.")
    elif facts.timed < 2 * MIN_UNITS:
        found.append(f"Wall times come from {facts.timed} items, half of them each: too few to trust a speed-up.")
    return found


def _markdown(sections: Sequence[_Section], facts: Facts, drawn: Mapping[str, Path]) -> str:
    lines = [f"# Sweep on {text_table.escaped(facts.name)}", ""]
    lines += [f"- {text_table.escaped(line)}" for line in _protocol(facts)]
    if warnings := _warnings(facts):
        lines += ["", *(f"> {text_table.escaped(line)}" for line in warnings)]
    for i, section in enumerate(sections):
        lines += ["", f"## {text_table.escaped(section.title)}", ""]
        lines += [*(f"- {text}" for text in section.advice), ""] if section.advice else []
        if section.table[1]:
            lines += [*text_table.markdown([section.table[0], *section.table[1]]), ""]
        if section.truncation:
            lines += ["Where a gain is an artefact of truncation:", ""]
            lines += [*(f"- {text}" for text in section.truncation), ""]
        lines += [f"- {text}" for text in section.remarks]
        lines += ["", *(f"![{name}](plots/{name}.png)" for name in _pictures(i, drawn)), ""]
        lines += text_table.markdown([section.points[0], *section.points[1]])
    lines += ["", "## What the columns mean", "", *(f"- {text}" for text in _COLUMNS)]
    return "\n".join(lines) + "\n"


def _html(sections: Sequence[_Section], facts: Facts, drawn: Mapping[str, Path], groups: Sequence[Group]) -> str:
    parts = [f"<h1>Sweep on {page.escape(facts.name)}</h1>"]
    if warnings := _warnings(facts):
        parts.append(f'<div class="warn">{page.bullets(warnings)}</div>')
    if facts.traces:
        parts.append('<p>Who wrote which token: <a href="trace.html">trace page</a>.</p>')
    for i, section in enumerate(sections):
        parts.append(f"<h2>{page.escape(section.title)}</h2>")
        parts.append(page.bullets(section.advice))
        if section.table[1]:
            parts.append(page.table(*section.table))
        if section.truncation:
            parts += ["<h3>Where a gain is an artefact of truncation</h3>", page.bullets(section.truncation)]
        parts.append(page.bullets(section.remarks))
        for name in _pictures(i, drawn):
            parts.append(page.picture(drawn[name], _CAPTIONS[name.rstrip("-0123456789")]))
        points = f"<summary>All {len(section.points[1])} points</summary>{page.table(*section.points)}"
        parts.append(f"<details{' open' if i == 0 else ''}>{points}</details>")
    parts += ["<h2>What the columns mean</h2>", page.bullets(_COLUMNS)]
    parts += ["<h2>How it was measured</h2>", page.bullets(_protocol(facts))]
    return page.page(f"Sweep on {facts.name}", "\n".join(parts))


def _pictures(section: int, drawn: Mapping[str, Path]) -> list[str]:
    """Plots of a condition; the main one also shows those that are drawn once."""
    own = [f"frontier-{section}"]
    once = [name for name in drawn if not name.startswith("frontier-")] if section == 0 else []
    return [name for name in own + once if name in drawn]
