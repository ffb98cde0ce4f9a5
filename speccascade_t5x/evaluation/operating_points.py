"""operating_points.json: which method and alpha to use for a latency budget or a quality floor.

Written by `speccascade sweep`, read by `speccascade infer --operating_point=FILE`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speccascade_t5x.common import checks, schema, storage
from speccascade_t5x.evaluation import frontier
from speccascade_t5x.evaluation.analysis import Group, Point
from speccascade_t5x.evaluation.scoring import CHOOSE, REPORT
from speccascade_t5x.interfaces import UserError

FORMAT, VERSION = "speccascade_t5x.operating_points", 1
_CONTENT = schema.record({"points": schema.list_of(schema.of(dict))})
FILE = "operating_points.json"
# Fields of Settings that make the operating point; the rest (seed, batch size, lengths) stays the user's.
FIELDS = (
    *("method", "rule", "alpha", "rule_options", "draft_len", "verification", "draft_stop", "stop_threshold"),
    *("drafter", "k_matrix", "lenience", "edge_rules", "max_ngram", "min_ngram", "ngram_fill", "confidence"),
    *("quantile", "temperature", "top_k", "top_p", "min_p"),
)
# What a user may still choose with an operating point: among points measured under it.
CONDITIONS = ("temperature", "top_p", "draft_len")


def write(
    folder: Path, groups: Sequence[Group], metric: str, pair: str, weights: str | None = None, tolerance: float = 0.0
) -> Path:
    """Writes every timed point: figures of one half of the items to choose by, those of the other to expect.

    Args:
      folder: of the sweep.
      groups: the main condition first.
      metric: what quality means.
      pair: identity of the pair, see `inference.plan_files.identity`.
      weights: of its parameters, see `inference.infer.pair_identity`; None leaves them open.
      tolerance: how far below the verifier's a quality counts as its, see `frontier.answers`.
    """
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        best = {point.name for point in frontier.hull(group.points, CHOOSE)}
        for point in group.points:
            timed = {CHOOSE, REPORT} <= set(point.speed_up)
            if timed and all(math.isfinite(point.quality[half].value) for half in (CHOOSE, REPORT)):
                entry = found.setdefault(point.name, _entry(point, group, point.name in best, group is groups[0]))
                entry["conditions"].append(_named(group))  # what drafts nothing is a point of every draft length
    points = sorted(found.values(), key=lambda entry: entry["latency"])
    meaning = {
        "latency": "time per item at batch 1 over the verifier alone's under the same sampling options",
        "quality": f"{metric}, higher is better" if metric != "nll" else "minus the NLL of the references per token",
        "figures": "of the half of the items that alphas were not chosen on, with 95 % intervals",
        "chosen_on": "figures of the other half, by which `infer` chooses",
    }
    described = {"format": FORMAT, "version": VERSION, "metric": metric, "pair": pair, "weights": weights}
    described |= {"quality_tolerance": tolerance, "meaning": meaning, "main": _named(groups[0])}
    return storage.write_json(folder / FILE, {**described, "points": points})


def _entry(point: Point, group: Group, best: bool, main: bool) -> dict[str, Any]:
    return {
        "name": point.name,
        "label": point.label,
        "settings": {name: value for name, value in point.row["settings"].items() if name in FIELDS},
        "latency": point.latency(REPORT),
        "speed_up": point.speed_up[REPORT].as_dict(),
        "seconds_per_item": point.seconds[REPORT].as_dict(),
        "quality": point.quality[REPORT].as_dict(),
        "gain_over_verifier": (point.quality[REPORT] - group.alone("verifier").quality[REPORT]).as_dict(),
        "chosen_on": {"latency": point.latency(CHOOSE), "quality": point.quality[CHOOSE].value},
        "verifier_calls_per_token": point.rates["verifier_calls_per_token"],
        "deferral_rate": point.rates["deferral_rate"],
        "frontier": best,
        "main": main,
        "conditions": [],
        "cells": list(point.cells),
    }


def _named(group: Group) -> dict[str, Any]:
    return {name: getattr(group.condition, name) for name in CONDITIONS}


def read(path: str | Path) -> dict[str, Any]:
    """Reads operating points from the file, or from the folder that contains it.

    Raises:
      UserError: it is missing, damaged, empty, or of a newer format.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise UserError(f"there are no operating points {path}: `speccascade sweep` writes them")
    found = schema.read_versioned(path, VERSION, "a file of operating points", _CONTENT, format=FORMAT)
    if not found["points"]:
        raise UserError(f"{path} holds no operating points: `speccascade sweep` writes them, for points it has timed")
    return found


@checks.arguments(latency_budget=(0.0,))
def choose(
    path: str | Path,
    latency_budget: float | None = None,
    quality_floor: float | None = None,
    wanted: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The point to run: the best quality within a latency, or the least latency at a quality.

    It is chosen by the figures of one half of the items, so those of the other, which the point shows, are no best of
    many.

    Args:
      path: of the file, or its folder.
      latency_budget: most time per item, over the verifier alone's; 0.5 asks for a speed-up of 2.
      quality_floor: least quality, in the units of the file's metric. Neither of the two: the verifier alone's.
      wanted: conditions the point must have been measured under, such as {"temperature": 0.0}; what is not named is
        as in the main condition of the sweep.

    Raises:
      UserError: both limits, or no point within them; the message says what the file offers.
    """
    if latency_budget is not None and quality_floor is not None:
        raise UserError("give a latency budget or a quality floor, not both: each alone says which point to use")
    offered = read(path)
    wanted = {name: value for name, value in (wanted or {}).items() if value is not None}
    points = [point for point in offered["points"] if _under(point, offered.get("main", {}), wanted)]
    if not points:
        has = sorted({_in_words(one) for point in offered["points"] for one in _conditions(point)})
        asked = ", ".join(f"{name}={value}" for name, value in wanted.items())
        raise UserError(f"{path} has no point under {asked or 'the main condition'}: it has {'; '.join(has)}")
    if latency_budget is not None:
        fit = [point for point in points if _latency(point) <= latency_budget]
        if not fit:
            least = min(map(_latency, points))
            raise UserError(
                f"no operating point stays within latency_budget={latency_budget:g}: the fastest takes {least:.3g} of "
                "the verifier's time"
            )
        return max(fit, key=lambda point: (_quality(point), -_latency(point)))
    if quality_floor is None:
        alone = [point for point in points if point["settings"].get("method") == "verifier"]
        if not alone:
            raise UserError(f"{path} lacks the verifier alone: give a latency budget or a quality floor")
        quality_floor = _quality(alone[0]) - offered.get("quality_tolerance", 0.0)
    fit = [point for point in points if _quality(point) >= quality_floor]
    if not fit:
        most = max(map(_quality, points))
        raise UserError(
            f"no operating point reaches quality_floor={quality_floor:g}: the best has {offered['metric']} {most:.4g}"
        )
    return min(fit, key=lambda point: (_latency(point), -_quality(point)))


def in_words(point: Mapping[str, Any], metric: str) -> str:
    """A point and its expected quality and latency, in one line."""
    quality = point["quality"]
    ends = "" if quality.get("low") is None else f" [{quality['low']:.4g}, {quality['high']:.4g}]"
    return (
        f"{point.get('label', point['name'])}: {point['latency']:.3g} of the verifier's time, {metric} "
        f"{quality['value']:.4g}{ends} on held-out items of the sweep"
    )


# A file of an earlier release has no figures to choose by, nor conditions.
def _latency(point: Mapping[str, Any]) -> float:
    return point.get("chosen_on", point)["latency"]


def _quality(point: Mapping[str, Any]) -> float:
    return point["chosen_on"]["quality"] if "chosen_on" in point else point["quality"]["value"]


def _conditions(point: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    settings = point["settings"]
    own = {"temperature": settings.get("temperature", 1.0), "top_p": settings.get("top_p", 1.0)}
    return point.get("conditions") or [own | {"draft_len": settings.get("draft_len")}]


def _under(point: Mapping[str, Any], main: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    if not wanted:
        return point["main"]
    wanted = {**main, **wanted}
    return any(all(one[name] in (value, None) for name, value in wanted.items()) for one in _conditions(point))


def _in_words(condition: Mapping[str, Any]) -> str:
    drafts = "" if condition["draft_len"] is None else f", draft_len {condition['draft_len']}"
    return f"temperature {condition['temperature']:g}, top-p {condition['top_p']:g}{drafts}"
