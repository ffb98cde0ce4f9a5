"""The trace page: which model wrote each output token, with q, p and the decision. HTML and CSS alone, no script."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from speccascade_t5x.common import storage
from speccascade_t5x.evaluation import page, teacher_forced
from speccascade_t5x.evaluation.analysis import Group, Point
from speccascade_t5x.evaluation.measure import Measurement
from speccascade_t5x.evaluation.scoring import REPORT
from speccascade_t5x.inference.generate import Runner
from speccascade_t5x.interfaces import (
    SOURCE_ACCEPTED,
    SOURCE_BONUS,
    SOURCE_DRAFTER,
    SOURCE_RESIDUAL,
    SOURCE_VERIFIER,
)

_SOURCES = {
    SOURCE_ACCEPTED: "accepted draft",
    SOURCE_RESIDUAL: "residual after a rejection",
    SOURCE_BONUS: "bonus after a whole draft",
    SOURCE_VERIFIER: "verifier",
    SOURCE_DRAFTER: "drafter",
}
# Readable on white for every common colour blindness, and told apart by their underline as well.
_STYLE = """
.tokens { font: 15px/2 ui-monospace, monospace; white-space: pre-wrap; }
.tokens span { border-radius: 3px; padding: 1px 0; cursor: help; outline-offset: 1px; }
.s1 { background: #cfe8d5; } .s2 { background: #f8c9c4; border-bottom: 2px solid #a3271b; }
.s3 { background: #cfe0f7; border-bottom: 2px dashed #1b6ca8; }
.s4 { background: #f7e3b5; border-bottom: 2px dotted #8a5a00; } .s5 { background: #e6e0f0; }
.tokens span:hover::after, .tokens span:focus::after { content: attr(data-t); position: fixed; left: 0; right: 0;
  bottom: 0; background: #1d2733; color: #fff; font: 14px/1.5 system-ui, sans-serif; padding: .6rem 1rem;
  white-space: normal; z-index: 2; }
.grid { display: grid; grid-template-columns: minmax(7rem, 11rem) 1fr; gap: .1rem 1rem; align-items: baseline; }
.grid > b { font-size: .85rem; } .beside { background: #f4f6f8; border-radius: 6px; padding: .4rem .8rem; }
@media (max-width: 40rem) { .grid { grid-template-columns: 1fr; } }
body { padding-bottom: 6rem; }
"""


def write(measurement: Measurement, group: Group, items: int) -> Path:
    """Writes trace.html: the first items of the half that is reported, under each method at its middle alpha.

    Args:
      measurement: of the sweep; the texts come from its cells, and q, p and pi from scoring them once more.
      group: the main condition.
      items: how many.
    """
    places = list(measurement.halves[REPORT])[:items]
    shown = [points[len(points) // 2] for points in group.arms().values()]
    columns = {point.name: _rows(measurement, point, places) for point in shown}
    alone = [point for point in shown if point.arm in ("drafter", "verifier")]
    rest = [point for point in shown if point not in alone]
    parts = ["<h1>Who wrote which token</h1>", _legend()]
    parts.append(
        '<p class="note">Touch or hover over a token for q (drafter) and p (verifier) at temperature 1, its '
        "probability pi under the target distribution, and the decision. A character of several tokens is shown at its "
        "last one, the others as a dot. All methods used the same seed.</p>"
    )
    for place in places:
        example = measurement.dataset.prompts[place]
        parts.append(f"<h2>Item {place}</h2>")
        given = {"input": example.inputs_text, "reference": example.targets_text or ""}
        lines = [(name, page.escape(text)) for name, text in given.items()]
        lines += [(f"{point.arm} alone", columns[point.name][place]) for point in alone]
        parts.append(f'<div class="beside">{_grid(lines)}</div>')
        parts.append(_grid([(point.label, columns[point.name][place]) for point in rest]))
    path = measurement.store.folder / "trace.html"
    return storage.write_text(path, page.page("Who wrote which token", "\n".join(parts), _STYLE))


def _grid(lines: list[tuple[str, str]]) -> str:
    cells = "".join(f'<b>{page.escape(name)}</b><div class="tokens">{text}</div>' for name, text in lines)
    return f'<div class="grid">{cells}</div>'


def _legend() -> str:
    spans = " ".join(f'<span class="s{source}">&nbsp;{name}&nbsp;</span>' for source, name in _SOURCES.items())
    return f'<p class="tokens">{spans}</p>'


def _rows(measurement: Measurement, point: Point, places: list[int]) -> dict[int, str]:
    """HTML of one method's output for each item."""
    stored = measurement.store.read(point.cells[0])
    found = {place: stored.records[place] for place in places}
    chosen = {name: value for name, value in point.row["settings"].items() if value is not None}
    settings = dataclasses.replace(measurement.base, **chosen)
    figures = None
    if teacher_forced.why_not(measurement.pair, settings) is None:
        prompts = [prompt for prompt in measurement.dataset.prompts if prompt.index in found]
        batches = Runner(measurement.pair, settings).batches(prompts)
        texts = teacher_forced.Texts(tuple(batches), {place: record["tokens"] for place, record in found.items()})
        (figures,) = measurement.forced.score(texts, [settings])
    rows = {}
    for place, record in found.items():
        pieces = measurement.pair.vocabulary.decode_pieces(record["tokens"])
        each = {name: values[place] for name, values in figures.items()} if figures else {}
        written = enumerate(zip(pieces, record["source"], strict=True))
        if settings.drafter != "model" or settings.verification != "token":
            each.pop("drafted", None)  # drafts come from elsewhere, or are not accepted one by one
        rows[place] = "".join(_span(piece, source, i, each) for i, (piece, source) in written)
    return rows


def _span(piece: str, source: int, i: int, figures: dict[str, np.ndarray]) -> str:
    """One token."""
    told = [f"token {i + 1}: {piece!r}", _SOURCES[source]]
    if figures:
        q, p, pi, deferral = (float(figures[name][i]) for name in ("q", "p", "prob", "deferral"))
        told.append(f"q {q:.3f}, p {p:.3f}, pi {pi:.3f}")
        told.append(f"the rule defers to the verifier here with probability {deferral:.2f}")
        drafted = float(figures["drafted"][i]) if "drafted" in figures else 0.0
        if source == SOURCE_ACCEPTED and drafted > 0:
            told.append(f"a draft of it is accepted with probability {min(1.0, pi / drafted):.2f}")
    shown = page.escape(piece) if piece else "·"
    return f'<span class="s{source}" tabindex="0" data-t="{page.escape("; ".join(told))}">{shown}</span>'
