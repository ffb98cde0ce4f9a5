"""Decodes the cells of a sweep, methods alternating, and keeps what the report needs of each."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from speccascade_t5x.distributed import hosts
from speccascade_t5x.evaluation import grid, teacher_forced, timing
from speccascade_t5x.evaluation.cells import CellStore
from speccascade_t5x.evaluation.grid import Arm, Cell, Condition
from speccascade_t5x.evaluation.scoring import CHOOSE, Scorer
from speccascade_t5x.inference.datasets import Dataset
from speccascade_t5x.inference.generate import LoadedPair, Runner
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import UserError

NLL = "nll"


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a sweep tells while it runs.

    Attributes:
      phase: "quality" or "time".
      done: cells, or blocks, that are on disk.
      total: how many there will be; refinement may end with fewer.
      eta_s: seconds until the phase ends, None while nothing is known.
      row: the cell just finished, None for blocks and resumed work.
    """

    phase: str
    done: int
    total: int
    eta_s: float | None
    row: Mapping[str, Any] | None = None


Tell = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a sweep measures, checked.

    Attributes:
      arms: baselines included.
      conditions: the main one first.
      varied: names of the arms that also run under the other conditions.
      seeds: of the random key; one is enough at temperature 0.
      alpha_points: how many default alphas an arm gets.
      refine: how many more where its curve bends.
      metric: what quality means.
    """

    arms: tuple[Arm, ...]
    conditions: tuple[Condition, ...]
    varied: tuple[str, ...]
    seeds: tuple[int, ...]
    alpha_points: int
    refine: int
    metric: str


class Measurement:
    """Runs cells of one pair on one dataset.

    Args:
      pair: what decodes.
      base: Settings common to all cells.
      dataset: with targets.
      scorer: of the task's metrics; None where it has none.
      store: where finished cells go.
      halves: places of the items of each half.
      tell: called after each cell.
      metric: what quality means; a cell without it has failed.
      here: the hosts that share the cells.
    """

    def __init__(
        self,
        pair: LoadedPair,
        base: Settings,
        dataset: Dataset,
        scorer: Scorer | None,
        store: CellStore,
        halves: Mapping[str, Sequence[int]],
        tell: Tell,
        metric: str = NLL,
        here: hosts.Hosts | None = None,
    ):
        self.here = here or hosts.Hosts()
        self._planned = self._meetings = 0
        self.pair, self.base, self.dataset, self.scorer, self.store = pair, base, dataset, scorer, store
        self.halves, self.tell, self.metric = halves, tell, metric
        self.max_len = base.max_len or pair.feature_lengths["targets"]
        batches = Runner(pair, dataclasses.replace(base, method="verifier")).batches(dataset.prompts)
        self.references = teacher_forced.references(pair, batches, dataset.references, self.max_len)
        self.forced = teacher_forced.TeacherForced(pair, self.max_len)
        self._known: dict[str, Any] = {}
        self._began, self._measured, self._done, self._total = time.monotonic(), 0, 0, 0

    def expect(self, total: int) -> None:
        """Sets how many cells there will be, for the ETA."""
        self._total = total

    def run_all(self, cells: Sequence[Cell]) -> None:
        """Measures cells, of which none depends on another; of several hosts each its share, and waits for all.

        Raises what `run` raises.
        """
        count = self.here.count
        for place, cell in enumerate(cells):
            if place % count == self.here.index:
                self.run(cell, None if count == 1 else self._planned + place)
        if count > 1:
            self._planned += len(cells)
            self._meetings += 1
            self.here.wait(f"cells {self._meetings}")
            self.here.see(lambda: all(self.store.has(cell.id) for cell in cells), "some cell")
            self.store.read_anew()
            self._done = self._planned

    def run(self, cell: Cell, order: int | None = None) -> dict[str, Any] | None:
        """The row of a cell, measured now unless it is on disk; None where it failed, whose reason is then stored.

        What was decoded of a failed cell is stored as well, so that it is only scored when the cell is tried again.

        Args:
          cell: what to measure.
          order: of its row among the others; None puts it after those there are.

        Raises:
          UserError: the disk is full.
        """
        row = self.store.row(cell.id)
        if row is None:
            settings = cell.settings(self.base)
            name = self._name(cell, settings) | ({} if order is None else {"order": order})
            found, timed = self.store.unscored(cell.id)
            try:
                if not found:
                    found, timed = self._decode(settings)
                references = self._on_references(cell, settings)
                self._score_singles(found)
                figures = self._figures(found, references)
            except (UserError, jax.errors.JaxRuntimeError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                row = self.store.write_failure(name | {"decoding": timed}, reason, found)
            else:
                row = self.store.write(name | figures | timed, found, references)
            self._measured += 1
        self._done += 1
        self._total = max(self._total, self._done)
        spent = time.monotonic() - self._began
        eta = spent / self._measured * (self._total - self._done) if self._measured else None
        self.tell(Progress("quality", self._done, self._total, eta, row))
        return row if row["status"] == "done" else None

    def _decode(self, settings: Settings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(records in input order, times) of all items, decoded in batches by the runner `infer` uses."""
        runner, found = Runner(self.pair, settings), {}
        for batch in runner.batches(self.dataset.prompts):
            found.update(runner.decode(batch))
        times = {
            "compile_s": round(runner.timing.compile_s, 3),
            "decode_s": round(runner.timing.decode_s, 3),
            "compiled_shapes": runner.timing.compiled_shapes,
            "batch_size": settings.batch_size,
            "tokens": runner.totals["committed"],
        }
        return [found[prompt.index] for prompt in self.dataset.prompts], times

    def _on_references(self, cell: Cell, settings: Settings) -> dict[str, list[float]] | None:
        """Sums per reference of the cell's target distribution, which its seed does not change."""
        if teacher_forced.why_not(self.pair, settings):
            return None
        if cell.point not in self._known:
            (figures,) = self.forced.score(self.references, [settings])
            self._known[cell.point] = teacher_forced.per_example(figures)
        return self._known[cell.point]

    def _score_singles(self, found: list[dict[str, Any]]) -> None:
        """Adds what each prediction is worth by itself, so that a report need not score it again."""
        if self.scorer is None:
            return
        for place, record in enumerate(found):
            record["scores"] = self.scorer.single(place, record["prediction"])

    def _name(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        """What identifies a row."""
        default = Settings()
        changed = {
            field.name: getattr(settings, field.name)
            for field in dataclasses.fields(settings)
            if getattr(settings, field.name) != getattr(default, field.name)
        }
        return {
            "cell": cell.id,
            "point": cell.point,
            "arm": cell.arm.name,
            "rule": cell.arm.rule,
            "alpha": cell.alpha,
            "draft_len": cell.condition.draft_len if cell.arm.reads_draft_len else None,
            "temperature": cell.condition.temperature,
            "top_p": cell.condition.top_p,
            "seed": cell.seed,
            "settings": changed,
            "machine": f"{platform.platform()}, {jax.devices()[0].device_kind}, jax {jax.__version__}",
        }

    def _figures(self, found: list[dict[str, Any]], references: Mapping[str, Any] | None) -> dict[str, Any]:
        predictions = [record["prediction"] for record in found]
        parts = {"all": None, **self.halves}
        metrics = self.scorer.all_scores(predictions) if self.scorer else {name: {} for name in parts}
        undefined = [name for name, found_here in metrics.items() if self.metric not in (NLL, *found_here)]
        if undefined:
            raise UserError(f"{self.metric} is not a number on the outputs of {' and '.join(undefined)}")
        if references is not None:
            for name, places in parts.items():
                chosen = slice(None) if places is None else list(places)
                sums = {key: float(np.asarray(values)[chosen].sum()) for key, values in references.items()}
                metrics[name] |= {
                    NLL: sums["nll"] / sums["tokens"],
                    "unreachable": sums["unreachable"] / sums["tokens"],
                    "reference_deferral": sums["deferral"] / sums["tokens"],
                    "reference_overlap": sums["overlap"] / sums["tokens"],
                }
        rates = {name: timing.rates_of(found, places) for name, places in parts.items()}
        return {"examples": len(found), "metrics": metrics, "rates": rates}


def planned(choices: Choices) -> int:
    """How many cells there will be; refinement may end with fewer."""
    main, others = choices.conditions[0], choices.conditions[1:]
    free = [each for each in choices.arms if each.range is None]
    tunable = [each for each in choices.arms if each.range is not None]
    count = sum(len(each.alphas or ()) or choices.alpha_points + choices.refine for each in tunable) + len(free)
    total = count * len(_seeds(choices, main))
    varied = _varied(choices)
    for condition in others:
        points = sum(len(each.alphas or ()) or choices.alpha_points for each in tunable if each.name in varied)
        alone = sum(each.name in (*varied, "verifier", "drafter") for each in free)
        total += (points + alone) * len(_seeds(choices, condition))
    return total


def measure_all(measurement: Measurement, choices: Choices) -> None:
    """Runs every cell of a sweep: the main condition with its refinement, then the others on the unrefined grids.

    The order is the same on every run, so a restart measures what is missing. Methods alternate, alpha by alpha.

    Raises:
      UserError: neither the verifier nor the drafter alone could be measured: nothing could be compared with them.
    """
    measurement.expect(planned(choices))
    main = choices.conditions[0]
    seeds = _seeds(choices, main)
    free = [each for each in choices.arms if each.range is None]
    alone = [Cell(each, None, main, seeds[0]) for each in free if each.name in ("verifier", "drafter")]
    measurement.run_all(alone)
    for cell in alone:
        if measurement.store.row(cell.id) is None:
            reason = measurement.store.read(cell.id).row["error"]
            raise UserError(
                f"the {cell.arm.name} alone cannot be measured, so nothing can be compared with it: {reason}"
            )
    measurement.run_all([Cell(each, None, main, seeds[0]) for each in free if each.name not in ("verifier", "drafter")])
    grids = _grids(measurement, choices, main)
    measurement.run_all([Cell(each, alpha, main, seeds[0]) for each, alpha in _turns(choices.arms, grids)])
    start = {name: list(alphas) for name, alphas in grids.items()}
    _refine(measurement, choices, grids)
    rest = []
    for seed in seeds[1:]:
        rest += [Cell(each, None, main, seed) for each in free]
        rest += [Cell(each, alpha, main, seed) for each, alpha in _turns(choices.arms, grids)]
    for condition in choices.conditions[1:]:
        varied = [each for each in choices.arms if each.name in _varied(choices)]
        others = [each for each in free if each.name in ("verifier", "drafter") or each in varied]
        for seed in _seeds(choices, condition):
            rest += [Cell(each, None, condition, seed) for each in others]
            rest += [Cell(each, alpha, condition, seed) for each, alpha in _turns(varied, start)]
    measurement.run_all(rest)


def _varied(choices: Choices) -> tuple[str, ...]:
    """Arms of the other conditions: MinP goes wherever TokenV3 does."""
    led = any(each.rule == grid.TRUNCATED and each.name in choices.varied for each in choices.arms)
    return (*choices.varied, *((grid.TRUNCATION,) if led else ()))


def _seeds(choices: Choices, condition: Condition) -> tuple[int, ...]:
    """At temperature 0 all seeds give the same."""
    return choices.seeds if condition.temperature > 0 else choices.seeds[:1]


def _grids(measurement: Measurement, choices: Choices, main: Condition) -> dict[str, list[float]]:
    """Alphas of each arm that takes some."""
    found = {}
    for each in choices.arms:
        if each.range is None:
            continue
        if each.alphas is not None:
            found[each.name] = list(each.alphas)
        elif each.method == "sequence_cascade":
            alone = next(one for one in choices.arms if one.name == "drafter")
            drafted = Cell(alone, None, main, choices.seeds[0])
            found[each.name] = list(sequence_grid(measurement, each, drafted, choices.alpha_points))
        else:
            found[each.name] = list(grid.default_alphas(each, choices.alpha_points))
    _join_truncation(choices, found)
    return found


def sequence_grid(measurement: Measurement, chosen: Arm, drafted: Cell, count: int) -> tuple[float, ...]:
    """Default alphas of a sequence cascade, from its confidence in what the drafter alone wrote.

    Args:
      measurement: of the sweep.
      chosen: the arm.
      drafted: a finished cell of the drafter alone.
      count: how many.
    """
    found, kind = measurement.store.read(drafted.id).records, chosen.options.get("confidence", "mean")
    if kind == "quantile":  # of the probabilities of its tokens, which records do not hold
        texts = teacher_forced.Texts(measurement.references.batches, {i: r["tokens"] for i, r in enumerate(found)})
        (figures,) = measurement.forced.score(texts, [dataclasses.replace(measurement.base, method="drafter")])
        confidences = np.nanquantile(np.log(figures["q"]), chosen.options.get("quantile", 0.0), axis=1)
    else:
        lengths = np.array([1 if kind == "sum" else len(record["tokens"]) for record in found])
        confidences = np.array([record["log_prob"] for record in found]) / lengths
    return grid.sequence_alphas(confidences[measurement.halves[CHOOSE]], count)


def _join_truncation(choices: Choices, grids: dict[str, list[float]]) -> None:
    """Adds to the alphas of MinP all those at which a TokenV3 is measured."""
    if grid.TRUNCATION not in grids:
        return
    for each in choices.arms:
        if each.rule == grid.TRUNCATED:
            low = grid.arm(grid.TRUNCATION).range[0]
            grids[grid.TRUNCATION] += [a for a in grids[each.name] if a not in grids[grid.TRUNCATION] and a >= low]


def _turns(arms: Sequence[Arm], grids: Mapping[str, Sequence[float]]) -> Iterator[tuple[Arm, float]]:
    """First alpha of every arm, then the second of every arm, and so on."""
    for place in range(max((len(alphas) for alphas in grids.values()), default=0)):
        for each in arms:
            if place < len(grids.get(each.name, ())):
                yield each, grids[each.name][place]


def _qualities(metrics: Sequence[Mapping[str, float]], metric: str) -> list[float] | None:
    """What a curve is judged by, of each cell: its likelihood, else `metric`; None where some cell has neither."""
    # The NLL has no sampling noise, which could look like a bend in the curve of a metric. Executions without a
    # distribution per token have no NLL, and a sweep over a file of texts has no other metric.
    for found in ([-each.get(NLL, np.nan) for each in metrics], [each.get(metric, np.nan) for each in metrics]):
        if not np.isnan(found).any():
            return found
    return None


def _refine(measurement: Measurement, choices: Choices, grids: dict[str, list[float]]) -> None:
    """Adds alphas where curves bend, one per arm and pass, by the figures of the half alphas are chosen on."""
    main, seed = choices.conditions[0], choices.seeds[0]
    given = {each.name for each in choices.arms if each.alphas is not None}
    led = any(each.rule == grid.TRUNCATED for each in choices.arms)
    following = {grid.TRUNCATION} if led else set()  # it takes its alphas from TokenV3
    for _ in range(choices.refine):
        found = []
        for each in choices.arms:
            if each.name not in grids or each.name in given or each.name in following:
                continue
            cells = [Cell(each, alpha, main, seed).id for alpha in grids[each.name]]
            rows = [row for row in map(measurement.store.row, cells) if row]
            quality = _qualities([row["metrics"][CHOOSE] for row in rows], choices.metric)
            if quality is None:
                continue
            calls = [row["rates"][CHOOSE]["verifier_calls_per_token"] for row in rows]
            alpha = grid.refined([row["alpha"] for row in rows], calls, quality)
            if alpha is not None and alpha not in grids[each.name]:  # it is, where its cell has failed
                grids[each.name].append(alpha)
                found.append(Cell(each, alpha, main, seed))
        measurement.run_all(found)
    before = list(grids.get(grid.TRUNCATION, ()))
    _join_truncation(choices, grids)
    joined = grids.get(grid.TRUNCATION, ())[len(before) :]
    fair = [each for each in choices.arms if each.name == grid.TRUNCATION]
    measurement.run_all([Cell(each, alpha, main, seed) for each in fair for alpha in joined])
