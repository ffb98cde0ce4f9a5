"""The `sweep` job: measures methods x alphas on a task, and reports quality and speed of each setting."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from speccascade_t5x.common import checks, storage
from speccascade_t5x.distributed import hosts
from speccascade_t5x.evaluation import calibrate as calibration
from speccascade_t5x.evaluation import grid, operating_points, report, scoring, teacher_forced, timing, trace_page
from speccascade_t5x.evaluation.analysis import Analyst, Group
from speccascade_t5x.evaluation.cells import DESCRIPTION, CellStore
from speccascade_t5x.evaluation.grid import Arm, Cell, Condition
from speccascade_t5x.evaluation.measure import NLL, Choices, Measurement, Progress, Tell, measure_all
from speccascade_t5x.evaluation.scoring import CHOOSE, Scorer
from speccascade_t5x.inference import datasets, infer, plan_files
from speccascade_t5x.inference.generate import LoadedPair, Runner, loaded
from speccascade_t5x.inference.methods import check as check_settings
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import UserError

_ALWAYS_TIMED = ("verifier", "drafter", "lossless")


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The results of a sweep.

    Attributes:
      folder: with everything in it.
      groups: points per condition, the main one first; empty after a calibration, and on hosts but the first.
      calibrated: what a calibration found, see `calibrate`.
      files: what was written last, by what it is for.
      tolerance: how far below the verifier's a quality counts as its, see `frontier.answers`.
    """

    folder: Path
    groups: list[Group]
    calibrated: list[dict[str, Any]]
    files: dict[str, Path]
    tolerance: float = 0.0


@checks.arguments(
    seeds=checks.SEED, draft_lens=(1,), temperatures=(0.0, 2.0), top_ps=(0.0, 1.0), limit=(1,), alpha_points=(1,),
    refine=(0,), timing_items=(2,), timing_repeats=(1,), timed_points=(1,), traces=(0,), quality_tolerance=(0.0,),
)  # fmt: skip
def sweep(
    pair: LoadedPair | Callable[[], LoadedPair],
    settings: Settings,
    output_dir: str | Path | None,
    task: str | None = None,
    split: str = "validation",
    input: str | None = None,
    limit: int | None = None,
    methods: Sequence[str | Arm] = ("token_v3", "opt"),
    alphas: Mapping[str, Sequence[float]] | None = None,
    alpha_points: int = 6,
    refine: int = 2,
    draft_lens: Sequence[int] = (5,),
    temperatures: Sequence[float] = (1.0,),
    top_ps: Sequence[float] = (1.0,),
    varied: Sequence[str] = ("token_v3", "opt", "lossy_sd", "lossless", "min_p"),
    seeds: Sequence[int] = (0, 1, 2),
    metric: str | None = None,
    quality_tolerance: float = 0.0,
    timing_items: int = 32,
    timing_repeats: int = 3,
    timed_points: int = 6,
    traces: int = 8,
    calibrate: Mapping[str, float] | None = None,
    report_only: bool = False,
    baselines: Sequence[str] = grid.BASELINES,
    progress: Tell | None = None,
) -> SweepResult:
    """Measures, and reports. Started again after a kill, it continues at the first missing cell.

    Several hosts share the cells, in a folder all of them see; the first one measures times and reports.

    Args:
      pair: what decodes, or a function that loads it, called once all else has been checked; it needs a drafter.
      settings: common to all cells: lengths, batch size B, top_k. What the arms choose must be left alone.
      output_dir: everything goes there; see `cells`, `report` and docs/sweep.md.
      task: a registered seqio task with targets; its vocabulary must be the pair's.
      split: of the task.
      input: a .jsonl file with "inputs" and "targets" instead; quality is then the NLL.
      limit: only the first so many examples.
      methods: arms in short form (`grid.arm`), or `grid.Arm` objects.
      alphas: {arm: alphas} for arms measured at alphas of their own.
      alpha_points: default alphas per arm.
      refine: further alphas per arm, where its curve bends; none for arms with alphas of their own.
      draft_lens: the first one is the main condition's; the others are measured for `varied`, one change at a time.
      temperatures: likewise.
      top_ps: likewise.
      varied: arms that also run under the other conditions, where they are measured at all; MinP comes with TokenV3.
      seeds: one random key each; at temperature 0 the first alone.
      metric: what quality is: a metric of the task (its first by default), or "nll".
      quality_tolerance: how far below the verifier's a quality still counts as its, in units of the metric.
      timing_items: how many items wall times are measured on, drawn at random, half of them from each half.
      timing_repeats: rounds of the wall times; each takes the next seed.
      timed_points: most points per arm and condition that are timed: those that matter.
      traces: items on the trace page.
      calibrate: {rate: value}: instead of sweeping, find the alphas of `methods` that reach it.
      report_only: measure nothing; report the finished cells, also those of a sweep that is still running.
      baselines: always measured. Change them in tests only: a gain without them means nothing.
      progress: called after every cell and block.

    Raises:
      UserError: bad data, methods, alphas or options; a folder of another sweep; no cell succeeded.
    """
    if (task is None) == (input is None):
        raise UserError("name either a task or an input file to sweep on (TASK or INPUT), and not both")
    if output_dir is None:
        raise UserError("a sweep needs an output folder: set OUTPUT_DIR, or give --output_dir")
    _check_seeds(seeds)
    if report_only:
        _check_report(output_dir, calibrate)
    grid.check_base(settings)
    chosen = grid.arms(methods, alphas or {}, () if calibrate else baselines)
    _check_varied(varied, chosen)
    conditions = grid.conditions(draft_lens, temperatures, top_ps)
    target = None if calibrate is None else calibration.wanted(calibrate)
    named = {grid.arm(text).name for text in methods}
    calibrated = [each for each in chosen if each.name in named]
    if target is not None:
        calibration.check(calibrated)
    _check_cells(settings, chosen, conditions)
    pair = loaded(pair)
    _check_pair(pair, settings, chosen, conditions)
    dataset, scorer, halves = _dataset(pair, settings, task, split, input, limit)
    metric = _metric(metric, dataset, scorer)
    choices = Choices(chosen, conditions, tuple(varied), tuple(seeds), alpha_points, refine, metric)
    config = _config(pair, settings, dataset, choices) | {
        "timing": {"items": timing_items, "repeats": timing_repeats, "points": timed_points},
        "calibrate": calibrate,
    }
    here = hosts.current()
    _check_hosts(here, pair, calibrate)
    with storage.one_writer(output_dir, "the sweep", here.first and not report_only):
        store = _open(here, output_dir, config, report_only)
        tell = progress or (lambda _: None)
        measurement = Measurement(pair, settings, dataset, scorer, store, halves, tell, metric, here)
        if target is not None:
            found = calibration.calibrate(measurement, calibrated, conditions[0], seeds[0], target, alpha_points)
            path = storage.write_json(store.folder / "calibration.json", {"calibrated": found})
            return SweepResult(store.folder, [], found, {"calibration": path})
        if not report_only:
            measure_all(measurement, choices)
            if here.first:  # while the others rest
                _measure_times(measurement, choices, timing_items, timing_repeats, timed_points, tell)
        result = SweepResult(store.folder, [], [], {})
        if here.first:
            result = _report(measurement, choices, quality_tolerance, traces)
        here.wait("the sweep is reported")
        return result


def _check_seeds(seeds: Sequence[int]) -> None:
    """All of them: the cells of the first would be there before the second is read."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"seeds={seeds!r} must be different whole numbers, at least one")


def _check_varied(varied: Sequence[str], arms: Sequence[Arm]) -> None:
    """Arms that are not measured are skipped, but the name of no arm is an error."""
    for name in varied:
        if name not in {each.name for each in arms}:
            grid.arm(name)


def _check_report(folder: str | Path, calibrate: Mapping[str, float] | None) -> None:
    """Refuses to report what is not there; nothing is made."""
    if calibrate:
        raise UserError("report_only reports a sweep, and a calibration measures: leave one of them out")
    if not (Path(folder) / DESCRIPTION).exists():
        raise UserError(f"there is no sweep in {folder} to report: it has no {DESCRIPTION}")


def _check_hosts(here: hosts.Hosts, pair: LoadedPair, calibrate: Mapping[str, float] | None) -> None:
    """Refuses what several hosts cannot share."""
    if here.count > 1 and calibrate:
        raise UserError("a calibration measures one cell after another: start it on one host")
    members = hosts.team(pair.partitioning, here).members
    if len(members) > 1:
        raise UserError(f"a sweep needs a pair that fits on one host, and this mesh spans {len(members)}")


def _open(here: hosts.Hosts, folder: str | Path, config: Mapping[str, Any], reading: bool) -> CellStore:
    """The folder of the sweep, which host 0 makes."""
    if here.first:
        store = CellStore(folder, config, reading=reading)
        here.wait("the sweep begins")
        return store
    here.wait("the sweep begins")
    here.see((Path(folder) / DESCRIPTION).exists, Path(folder) / DESCRIPTION)
    return CellStore(folder, config, first=False)


def _one_per_arm(base: Settings, arms: Sequence[Arm], conditions: Sequence[Condition]) -> Iterator[Settings]:
    """The settings of one cell per arm and condition."""
    for arm in arms:
        alpha = None
        if arm.range is not None:
            alpha = -1.0 if arm.method == "sequence_cascade" else (arm.alphas or grid.default_alphas(arm, 1))[0]
        for condition in conditions:
            yield Cell(arm, alpha, condition, 0).settings(base)


def _check_cells(base: Settings, arms: Sequence[Arm], conditions: Sequence[Condition]) -> None:
    """Refuses what can be known to be wrong without the pair."""
    for settings in _one_per_arm(base, arms, conditions):
        check_settings(settings)


def _check_pair(pair: LoadedPair, base: Settings, arms: Sequence[Arm], conditions: Sequence[Condition]) -> None:
    """Builds every arm's program under every condition, so that what this pair cannot run is refused at once."""
    for settings in _one_per_arm(base, arms, conditions):
        Runner(pair, settings)


def _dataset(
    pair: LoadedPair, base: Settings, task: str | None, split: str, source: str | None, limit: int | None
) -> tuple[datasets.Dataset, Scorer | None, dict[str, list[int]]]:
    runner = Runner(pair, dataclasses.replace(base, method="verifier"))
    dataset = datasets.read(runner.prompt_form, task, split, source, limit)
    references, halves = dataset.references, scoring.halves(len(dataset.prompts))
    scorer = Scorer(dataset.score, references) if dataset.score else None
    return dataset, scorer, halves


def _metric(metric: str | None, dataset: datasets.Dataset, scorer: Scorer | None) -> str:
    """What quality means.

    Raises:
      UserError: the task has no such metric; the message names those it has.
    """
    offered = [] if scorer is None else list(scorer.scores(dataset.references))
    if metric is None:
        return offered[0] if offered else NLL
    if metric != NLL and metric not in offered:
        raise UserError(f"{dataset.name} has no metric {metric!r}: use one of {', '.join([*offered, NLL])}")
    return metric


def _config(pair: LoadedPair, base: Settings, dataset: datasets.Dataset, choices: Choices) -> dict[str, Any]:
    """What makes two sweeps the same sweep."""
    return {
        "data": dataset.identity(),
        "pair": infer.pair_identity(pair),
        "settings": {
            field.name: getattr(base, field.name)
            for field in dataclasses.fields(base)
            if getattr(base, field.name) != getattr(Settings(), field.name)
        },
        "methods": {each.name: {**each.options, "alphas": each.alphas} for each in choices.arms},
        "conditions": [str(condition) for condition in choices.conditions],
        "varied": choices.varied,
        "seeds": choices.seeds,
        "alpha_points": choices.alpha_points,
        "refine": choices.refine,
        "metric": choices.metric,
    }


def _measure_times(measurement: Measurement, choices: Choices, items: int, repeats: int, most: int, tell: Tell) -> None:
    """Wall times of the points that matter, and the step costs the cost model needs."""
    store, pair, base = measurement.store, measurement.pair, measurement.base
    costs = store.folder / "costs.json"
    if not costs.exists():
        widest = max(measurement.references.batches, key=lambda batch: batch.bucket)
        widths = sorted({condition.draft_len + 1 for condition in choices.conditions})
        storage.write_json(costs, timing.step_costs(pair, base, widest, widths))
    points = {}
    for row in matter(store.done, choices, most, _size_ratio(pair)):
        chosen = {name: value for name, value in row["settings"].items() if value is not None}
        points[row["point"]] = dataclasses.replace(base, **chosen)
    prompts = {prompt.index: prompt for prompt in measurement.dataset.prompts}
    drawn = timing.timed_items(measurement.halves, items)
    watch = timing.Stopwatch(pair, points, prompts, drawn, repeats, choices.seeds)
    stamps: list[tuple[int, float]] = []

    def advance(done: int, total: int) -> None:
        stamps.append((done, time.monotonic()))
        (first, began), (last, now) = stamps[0], stamps[-1]
        eta = (now - began) / (last - first) * (total - done) if last > first else None
        tell(Progress("time", done, total, eta))

    watch.measure(store, advance)


def _size_ratio(pair: LoadedPair) -> float:
    """Parameters of the drafter over the verifier's: a cost that is the same on every machine and every restart."""
    models = (*pair.drafters[:1], pair.verifier)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(bound.params)) for bound in models]
    return sizes[0] / sizes[-1]


def matter(
    rows: Sequence[Mapping[str, Any]], choices: Choices, most: int, drafter_cost: float
) -> list[Mapping[str, Any]]:
    """Rows of the points that are timed: per arm and condition first those no other point of the arm beats.

    A point is beaten by one of its arm that is better on the half alphas are chosen on and costs fewer calls (a call
    of the drafter counted by its share of parameters). The rest follows evenly spaced until there are `most`.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["seed"] == choices.seeds[0]:
            key = (row["arm"], row["draft_len"], row["temperature"], row["top_p"])
            groups.setdefault(key, []).append(row)
    found = []
    for (arm, *_), mine in groups.items():
        if arm in _ALWAYS_TIMED or len(mine) <= most:
            found += mine
            continue

        def cost(row: Mapping[str, Any]) -> float:
            rates = row["rates"][CHOOSE]
            return rates["verifier_calls_per_token"] + drafter_cost * rates["drafter_calls_per_token"]

        def quality(row: Mapping[str, Any]) -> float:
            metrics = row["metrics"][CHOOSE]
            return -metrics.get(NLL, math.inf) if choices.metric == NLL else metrics[choices.metric]

        best, front = -math.inf, []
        for row in sorted(mine, key=lambda row: (cost(row), -quality(row))):
            if quality(row) > best:
                front.append(row)
                best = quality(row)
        front = front[:: max(1, math.ceil(len(front) / most))]
        rest = [row for row in sorted(mine, key=lambda row: row["alpha"] or 0.0) if row not in front]
        room = most - len(front)
        found += front + (rest[:: math.ceil(len(rest) / room)] if room and rest else [])
    return found


def _report(measurement: Measurement, choices: Choices, tolerance: float, traces: int) -> SweepResult:
    """Points, answers, plots, pages."""
    store = measurement.store
    analyst = Analyst(store, measurement.scorer, measurement.halves, choices.metric)
    blocks, index = [], 0
    while (block := store.block(index)) is not None:
        blocks.append(block)
        index += 1
    costs_file = store.folder / "costs.json"
    costs = storage.from_json(costs_file.read_text("utf-8")) if costs_file.exists() else None
    groups = analyst.groups(choices.conditions, blocks, costs)
    if not groups:
        raise UserError(
            f"the sweep in {store.folder} has no condition under which both models alone have been measured: its "
            "cells.jsonl can be read, but nothing can be compared; run it further"
        )
    files = {"cells": store.folder / "cells.jsonl"}
    identities = plan_files.identity(measurement.pair), infer.pair_identity(measurement.pair)
    files["operating points"] = operating_points.write(store.folder, groups, choices.metric, *identities, tolerance)
    facts = report.Facts(
        name=measurement.dataset.name,
        metric=choices.metric,
        unit_kind=analyst.unit_kind,
        halves={name: len(places) for name, places in measurement.halves.items()},
        timed=sum(len(block["items"]) for block in blocks),
        repeats=blocks[0]["repeats"] if blocks else 0,
        batch_size=measurement.base.batch_size,
        seeds=len(choices.seeds),
        compile_s=sum(row["compile_s"] for row in store.done) + sum(block["compile_s"] for block in blocks),
        warm_up_s=sum(block["warm_up_s"] for block in blocks),
        failures=[row for row in store.rows if row["status"] == "failed"],
        machine="; ".join(dict.fromkeys(row["machine"] for row in store.done)),
        reliability=_reliability(measurement),
        missing=[name for name in grid.BASELINES if not groups[0].arms().get(name)],
        tolerance=tolerance,
        traces=traces,
    )
    files |= report.write(store.folder, groups, facts)
    if traces:
        files["trace page"] = trace_page.write(measurement, groups[0], traces)
    return SweepResult(store.folder, groups, [], files, tolerance)


def _reliability(measurement: Measurement) -> dict[str, Any]:
    """Reliability of both models on the references; kept on disk, as models and references do not change."""
    path = measurement.store.folder / "reliability.json"
    if path.exists():
        return storage.from_json(path.read_text("utf-8"))
    forced = teacher_forced.TeacherForced(measurement.pair, measurement.max_len)
    alone = dataclasses.replace(measurement.base, method="verifier")
    (figures,) = forced.score(measurement.references, [alone])
    found = {
        "drafter": teacher_forced.reliability(figures["max_q"], figures["right_q"]),
        "verifier": teacher_forced.reliability(figures["max_p"], figures["right_p"]),
    }
    storage.write_json(path, found)
    return found
