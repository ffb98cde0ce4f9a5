"""The plots of a sweep, as PNG and SVG. matplotlib without pyplot: no window, no state of the process is touched."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speccascade_t5x.common import storage
from speccascade_t5x.evaluation import frontier
from speccascade_t5x.evaluation.analysis import Group, Point
from speccascade_t5x.evaluation.scoring import CHOOSE, REPORT
from speccascade_t5x.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (
    *("#1b6ca8", "#d1495b", "#3a7d44", "#8e5ea2", "#c77d0a", "#2a9d8f", "#6d597a", "#b56576", "#577590", "#7f5539"),
    *("#0b7a75", "#a63d40", "#4d5061", "#5c80bc", "#9a031e"),
)
_MARKERS = "osD^vPX<>*hpd"


def style(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each arm, the same in every plot."""
    turns = zip(arms, itertools.cycle(_COLOURS), itertools.cycle(_MARKERS))
    return {arm: {"color": colour, "marker": marker} for arm, colour, marker in turns}


def draw_all(folder: Path, groups: Sequence[Group], quality: str, reliability: Mapping[str, Any]) -> dict[str, Path]:
    """Writes every plot that has something to show.

    Args:
      folder: of the plots.
      groups: the main condition first.
      quality: name of the main metric.
      reliability: per model, see `teacher_forced.reliability`.

    Returns:
      {name: path of the SVG}; the PNG lies beside it.
    """
    main, looks = groups[0], style(list(groups[0].arms()))
    wanted: dict[str, tuple[bool, Callable[[Axes], None]]] = {}
    for i, group in enumerate(groups):
        timed = any(REPORT in point.speed_up for point in group.points)
        wanted[f"frontier-{i}"] = (timed, functools.partial(_frontier, group=group, quality=quality, looks=looks))
    wanted |= {
        "quality-by-calls": (True, lambda ax: _by_calls(ax, main, quality, looks)),
        "acceptance-by-position": (True, lambda ax: _positions(ax, main, looks)),
        "calls-per-token": (True, lambda ax: _calls(ax, main, looks)),
        "gain-against-theory": (
            any(point.predicted is not None and point.speed_up for group in groups for point in group.points),
            lambda ax: _theory(ax, groups, looks),
        ),
        "reliability": (bool(reliability), lambda ax: _reliability(ax, reliability)),
    }
    return {name: _save(folder, name, draw) for name, (useful, draw) in wanted.items() if useful}


def _save(folder: Path, name: str, draw: Callable[[Axes], None]) -> Path:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A fixed salt and no date: the same figures give the same bytes.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "text.parse_math": False}
    ):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        draw(ax)
        handles, labels = ax.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)
        for kind, extra in (("png", {"dpi": 130}), ("svg", {"metadata": {"Date": None}})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, **extra)
            path = storage.write_bytes(folder / f"{name}.{kind}", [buffer.getvalue()])
    return path


def _bars(values: Sequence[Estimate]) -> np.ndarray:
    """[2, N] lengths of error bars; a percentile interval need not hold the value itself."""
    low = [max(one.value - one.low, 0.0) for one in values]
    high = [max(one.high - one.value, 0.0) for one in values]
    return np.nan_to_num(np.array([low, high]))


def _latencies(points: Sequence[Point]) -> tuple[list[float], np.ndarray]:
    x = [point.latency(REPORT) for point in points]
    low = [max(one - 1.0 / point.speed_up[REPORT].high, 0.0) for one, point in zip(x, points, strict=True)]
    high = [max(1.0 / point.speed_up[REPORT].low - one, 0.0) for one, point in zip(x, points, strict=True)]
    return x, np.nan_to_num(np.array([low, high]))


def _frontier(ax: Axes, group: Group, quality: str, looks: Mapping[str, Any]) -> None:
    for arm, points in group.arms().items():
        timed = [point for point in points if {CHOOSE, REPORT} <= set(point.speed_up)]
        if not timed:
            continue
        x, spread = _latencies(timed)
        values = [point.quality[REPORT] for point in timed]
        y = [one.value for one in values]
        ax.errorbar(
            *(x, y), xerr=spread, yerr=_bars(values), label=arm, lw=0.8, elinewidth=0.5, ms=4.5, alpha=0.9, **looks[arm]
        )
    best = frontier.hull(group.points, CHOOSE)
    if len(best) > 1:
        x, y = [point.latency(REPORT) for point in best], [point.quality[REPORT].value for point in best]
        order = np.argsort(x)
        ax.plot(np.array(x)[order], np.array(y)[order], color="black", lw=2.2, alpha=0.25, zorder=0, label="frontier")
    # One wide interval must not squeeze all points into a corner.
    ax.set_xlim(0.0, 1.25 * max([1.0, *(p.latency(REPORT) for p in group.points if REPORT in p.speed_up)]))
    ax.axvline(1.0, color="grey", lw=0.8, ls=":")
    ax.axhline(group.alone("verifier").quality[REPORT].value, color="grey", lw=0.8, ls=":")
    ax.set_xlabel("time per item, verifier alone = 1 (batch 1)")
    ax.set_ylabel(quality)
    ax.set_title(str(group.condition))


def _by_calls(ax: Axes, group: Group, quality: str, looks: Mapping[str, Any]) -> None:
    for arm, points in group.arms().items():
        values = [point.quality[REPORT] for point in points]
        x = [point.rates["verifier_calls_per_token"] for point in points]
        y = [one.value for one in values]
        ax.errorbar(x, y, yerr=_bars(values), label=arm, lw=0.8, elinewidth=0.5, ms=4, **looks[arm])
    ax.set_xlabel("verifier calls per token")
    ax.set_ylabel(quality)
    ax.set_title(str(group.condition))


def _positions(ax: Axes, group: Group, looks: Mapping[str, Any]) -> None:
    """One curve per arm: its middle alpha, for there would be too many."""
    for arm, points in group.arms().items():
        point = points[len(points) // 2]
        curve = point.rates["acceptance_by_position"]
        if curve and point.row["draft_len"]:
            ax.plot(range(1, len(curve) + 1), curve, label=point.label, lw=1, ms=4, **looks[arm])
    ax.set_xlabel("draft position")
    ax.set_ylabel("share of examined drafts accepted")
    ax.set_ylim(0, 1.02)
    ax.set_title(str(group.condition))


def _calls(ax: Axes, group: Group, looks: Mapping[str, Any]) -> None:
    for arm, points in group.arms().items():
        x = [point.rates["drafter_calls_per_token"] for point in points]
        y = [point.rates["verifier_calls_per_token"] for point in points]
        ax.plot(x, y, label=arm, lw=0.8, ms=4, **looks[arm])
    ax.set_xlabel("drafter calls per token")
    ax.set_ylabel("verifier calls per token")
    ax.set_title(str(group.condition))


def _theory(ax: Axes, groups: Sequence[Group], looks: Mapping[str, Any]) -> None:
    seen: dict[str, list[Point]] = {}
    for group in groups:
        for point in group.points:
            if point.predicted is not None and REPORT in point.speed_up:
                seen.setdefault(point.arm, []).append(point)
    for arm, points in seen.items():
        values = [point.speed_up[REPORT] for point in points]
        y = [one.value for one in values]
        x = [point.predicted or 0.0 for point in points]
        ax.errorbar(x, y, yerr=_bars(values), ls="", label=arm, elinewidth=0.5, ms=4, **looks.get(arm, {}))
    high = max(max(ax.get_xlim()), max(ax.get_ylim()))
    ax.plot([0, high], [0, high], color="grey", lw=0.8, ls=":")
    ax.set_xlabel("gain by the cost model, tokens per round / (n_d c + v)")
    ax.set_ylabel("measured speed-up, batch 1")
    ax.set_title("measured gain against theory")


def _reliability(ax: Axes, reliability: Mapping[str, Any]) -> None:
    ax.plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
    for model, marker in (("drafter", "o"), ("verifier", "s")):
        bins = reliability[model]["bins"]
        x, y = [one["confidence"] for one in bins], [one["accuracy"] for one in bins]
        ax.plot(x, y, marker=marker, lw=1, label=f"{model}, ECE {reliability[model]['ece']:.3f}")
    ax.set_xlabel("largest probability, temperature 1")
    ax.set_ylabel("share of reference tokens that are the argmax")
    ax.set_title("reliability on the references")
