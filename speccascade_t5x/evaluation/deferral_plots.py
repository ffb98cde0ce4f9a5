"""Plots of learned deferral: the objective over alpha, and reliability diagrams."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speccascade_t5x.common import storage

_SHOWN_ABOVE_ORACLE = ("always defer", "never defer")


def draw(folder: Path, report: Mapping[str, Any]) -> list[str]:
    """Writes the plots. Returns their file names; none where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []

    def save(figure: Figure, name: str) -> str:
        buffer = io.BytesIO()
        FigureCanvasAgg(figure)
        # Without software and date, so that equal data give equal bytes.
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        storage.write_bytes(folder / name, [buffer.getvalue()])
        return name

    return [
        save(_objective(Figure, report), "deferral-objective.png"),
        save(_reliability(Figure, report), "deferral-reliability.png"),
    ]


def _objective(figure_class: Any, report: Mapping[str, Any]) -> Any:
    """Each rule's objective minus plug-in OPT's, over alpha."""
    figure = figure_class(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    alphas = report["alphas"]
    for name, curve in report["curves"].items():
        if name in _SHOWN_ABOVE_ORACLE:
            continue
        values = [each.value for each in curve.against]
        (line,) = axes.plot(alphas, values, marker="o", markersize=3, label=name)
        low, high = ([getattr(each, end) for each in curve.against] for end in ("low", "high"))
        axes.fill_between(alphas, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.axhline(0.0, color="black", linewidth=0.6)
    axes.set_xlabel("alpha")
    axes.set_ylabel("objective minus plug-in OPT's (lower is better)")
    axes.legend(fontsize=8)
    return figure


def _reliability(figure_class: Any, report: Mapping[str, Any]) -> Any:
    """Accuracy over confidence of both models, before and after each calibration."""
    figure = figure_class(figsize=(9, 4.4), layout="constrained")
    for axes, (side, who) in zip(figure.subplots(1, 2), (("q", "drafter"), ("p", "verifier")), strict=True):
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.6)
        for kind, found in report["reliability"][side].items():
            rows = found["rows"]
            label = f"{'as it is' if kind == 'none' else kind}, ECE {found['ece']:.3f}"
            read, right = ([row[column] for row in rows] for column in ("confidence", "accuracy"))
            axes.plot(read, right, marker="o", markersize=3, label=label)
        axes.set_title(who)
        axes.set_xlabel("largest probability, as the rule reads it")
        axes.set_ylabel("share of labels it is right at")
        axes.legend(fontsize=8)
    return figure
