"""operating_points.json: which method and alpha to use for a latency budget or a quality floor.

Written by `speccascade sweep`, read by `speccascade infer --operating_point=FILE`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speccascade_t5x.evaluation import frontier
from speccascade_t5x.evaluation.analysis import Group
from speccascade_t5x.evaluation.scoring import CHOOSE, REPORT
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.runtime import options, records

FORMAT, VERSION = "speccascade_t5x.operating_points", 1
FILE = "operating_points.json"
# Fields of Settings that make the operating point; the rest (seed, batch size, lengths) stays the user's.
FIELDS = (
    *("method", "rule", "alpha", "rule_options", "draft_len", "verification", "draft_stop", "stop_threshold"),
    *("drafter", "k_matrix", "lenience", "edge_rules", "max_ngram", "min_ngram", "ngram_fill", "confidence"),
    *("quantile", "temperature", "top_k", "top_p", "min_p"),
)
# What a user may still choose with an operating point: among points measured under it.
CONDITIONS = ("temperature", "top_p", "draft_len")


def write(folder: Path, groups: Sequence[Group], metric: str, pair: str) -> Path:
    """Writes every timed point with its figures on the half that alphas were not chosen on.

    Args:
      folder: of the sweep.
      groups: the main condition first.
      metric: what quality means.
      pair: identity of the pair, see `runtime.plans.identity`.
    """
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        best = {point.name for point in frontier.hull(group.points, CHOOSE)}
        for point in group.points:
            if REPORT not in point.speed_up or not math.isfinite(point.quality[REPORT].value):
                continue
            settings = {name: value for name, value in point.row["settings"].items() if name in FIELDS}
            latency = point.latency(REPORT)
            found.setdefault(
                point.name,
                {
                    "name": point.name,
                    "label": point.label,
                    "settings": settings,
                    "latency": latency,
                    "speed_up": point.speed_up[REPORT].as_dict(),
                    "seconds_per_item": point.seconds[REPORT].as_dict(),
                    "quality": point.quality[REPORT].as_dict(),
                    "gain_over_verifier": (point.quality[REPORT] - group.alone("verifier").quality[REPORT]).as_dict(),
                    "verifier_calls_per_token": point.rates["verifier_calls_per_token"],
                    "deferral_rate": point.rates["deferral_rate"],
                    "frontier": point.name in best,
                    "main": group is groups[0],
                    "cells": list(point.cells),
                },
            )
    points = sorted(found.values(), key=lambda entry: entry["latency"])
    meaning = {
        "latency": "time per item at batch 1 over the verifier alone's under the same sampling options",
        "quality": f"{metric}, higher is better" if metric != "nll" else "minus the NLL of the references per token",
        "figures": "of the half of the items that alphas were not chosen on, with 95 % intervals",
    }
    described = {"format": FORMAT, "version": VERSION, "metric": metric, "pair": pair, "meaning": meaning}
    return records.write_json(folder / FILE, {**described, "points": points})


def read(path: str | Path) -> dict[str, Any]:
    """Reads operating points; a folder stands for the file in it.

    Raises:
      UserError: it is missing, damaged, empty, or of a newer format.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(path.read_text("utf-8"))
        whole = found["format"] == FORMAT and isinstance(found["points"], list)
    except FileNotFoundError:
        raise UserError(f"there are no operating points {path}: `speccascade sweep` writes them") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no operating points: `speccascade sweep` writes them") from error
    if not whole or not found["points"]:
        raise UserError(f"{path} holds no operating points: `speccascade sweep` writes them, for points it has timed")
    if found["version"] > VERSION:
        raise UserError(
            f"{path} has format version {found['version']}, this release reads up to {VERSION}: upgrade the package"
        )
    return found


def choose(
    path: str | Path,
    latency_budget: float | None = None,
    quality_floor: float | None = None,
    wanted: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The point to run: the best quality within a latency, or the least latency at a quality.

    Args:
      path: of the file, or its folder.
      latency_budget: most time per item, over the verifier alone's; 0.5 asks for a speed-up of 2.
      quality_floor: least quality, in the units of the file's metric. Neither of the two: the verifier alone's.
      wanted: conditions the point must have been measured under, such as {"temperature": 0.0}; where none is given,
        the main condition of the sweep.

    Raises:
      UserError: both limits, or no point within them; the message says what the file offers.
    """
    if latency_budget is not None and quality_floor is not None:
        raise UserError("give a latency budget or a quality floor, not both: each alone says which point to use")
    offered = read(path)
    wanted = {name: value for name, value in (wanted or {}).items() if value is not None}
    points = [point for point in offered["points"] if _under(point, wanted)]
    if not points:
        has = sorted({_condition(point) for point in offered["points"]})
        asked = ", ".join(f"{name}={value}" for name, value in wanted.items())
        raise UserError(f"{path} has no point under {asked or 'the main condition'}: it has {'; '.join(has)}")
    if latency_budget is not None:
        options.real("latency_budget", latency_budget, 0.0)
        fit = [point for point in points if point["latency"] <= latency_budget]
        if not fit:
            least = min(point["latency"] for point in points)
            raise UserError(
                f"no operating point stays within latency_budget={latency_budget:g}: the fastest takes {least:.3g} of "
                "the verifier's time"
            )
        return max(fit, key=lambda point: (point["quality"]["value"], -point["latency"]))
    if quality_floor is None:
        alone = [point for point in points if point["settings"].get("method") == "verifier"]
        if not alone:
            raise UserError(f"{path} lacks the verifier alone: give a latency budget or a quality floor")
        quality_floor = alone[0]["quality"]["value"]
    options.real("quality_floor", quality_floor)
    fit = [point for point in points if point["quality"]["value"] >= quality_floor]
    if not fit:
        most = max(point["quality"]["value"] for point in points)
        raise UserError(
            f"no operating point reaches quality_floor={quality_floor:g}: the best has {offered['metric']} {most:.4g}"
        )
    return min(fit, key=lambda point: point["latency"])


def _under(point: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    if not wanted:
        return point["main"]
    defaults = {"temperature": 1.0, "top_p": 1.0}
    settings = defaults | point["settings"]
    return all(settings.get(name) in (value, None) for name, value in wanted.items())


def _condition(point: Mapping[str, Any]) -> str:
    settings = point["settings"]
    return f"temperature {settings.get('temperature', 1.0):g}, top-p {settings.get('top_p', 1.0):g}"
