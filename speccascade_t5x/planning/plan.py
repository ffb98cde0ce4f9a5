"""The `plan` job: predicts which drafter, draft length and K matrix pay off, from measured or given figures."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from speccascade_t5x import drafting
from speccascade_t5x.common import checks
from speccascade_t5x.core import rules
from speccascade_t5x.data import batching
from speccascade_t5x.inference import datasets, measuring, methods, plan_files
from speccascade_t5x.inference.generate import LoadedPair, Runner, loaded
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.planning import probing
from speccascade_t5x.planning.cost_model import (
    Acceptance,
    Costs,
    block_time,
    predict_cascade,
    round_law,
    tokens_per_round,
)

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
_LONGEST = 12
# Called with a short description of the current step.
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to draft, and its predicted gain.

    Attributes:
      drafter: "model", "max_gram" or "cascade".
      draft_len: tokens drafted per round; 0 does not speculate.
      k_matrix: of a cascade.
      lenience: between the drafters of a cascade; None is exact.
      tokens_per_round: expected.
      calls_per_token: of the verifier and of each model below it.
      gain: tokens per unit of time over the verifier alone; above 1 it pays off.
      chosen_by: the same, measured on the examples that candidates are ranked by; None if it was not measured.
      measured: the same, measured on the other examples, so that it is not the best of many; None if not measured.
    """

    drafter: str
    draft_len: int
    k_matrix: tuple[tuple[int, ...], ...] | None
    tokens_per_round: float
    calls_per_token: tuple[float, ...]
    gain: float
    lenience: float | None = None
    chosen_by: float | None = None
    measured: float | None = None

    @property
    def label(self) -> str:
        """Human-readable name."""
        if self.draft_len == 0:
            return "no speculation"
        if self.k_matrix is None:
            return f"{self.drafter}, draft_len {self.draft_len}"
        exact = "cascade, K " + ";".join(",".join(map(str, row)) for row in self.k_matrix)
        return exact if self.lenience is None else f"{exact}, lenience {self.lenience:g}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of a `plan` job.

    Attributes:
      candidates: the candidates, best first; "no speculation" is one of them.
      speculate: whether the best is expected to be faster than the verifier alone.
      measured: the measurements behind the prediction; None if figures were given.
      path: path of plan.json; None without an output folder.
    """

    candidates: tuple[Candidate, ...]
    speculate: bool
    measured: probing.Measured | None
    path: Path | None


@checks.arguments(limit=(1,), measure=(0,), acceptance=(0.0, 1.0), costs=(0.0,))
def plan(
    pair: LoadedPair | Callable[[], LoadedPair] | None,
    settings: Settings,
    output_dir: str | Path | None = None,
    task: str | None = None,
    split: str = "validation",
    input: str | None = None,
    limit: int = 16,
    acceptance: Sequence[Sequence[float]] | None = None,
    costs: Sequence[float] | None = None,
    measure: int = 0,
    progress: Progress = lambda _: None,
) -> Plan:
    """Ranks draft lengths, drafters and K matrices by predicted walltime.

    Args:
      pair: the pair, or a function that loads it, called after all other checks; not read if acceptance and costs are
        given.
      settings: rule, sampling, batch size and lengths; the planned options are not read from them. With a lenience,
        cascades are ranked with it as well as exact, and the plan chooses.
      output_dir: folder of plan.json, which draft_len="auto" follows; None writes none.
      task: a registered seqio task to measure on.
      split: split of the task.
      input: text file, `.jsonl` file or "-", instead of a task.
      limit: number of examples to measure on, from the first.
      acceptance: figures to use instead of measuring: row i is how often level i's review accepts a token of each
        level below i; levels are the verifier, its drafters, and Max-Gram last.
      costs: with acceptance: a step of each drafter model, in steps of the verifier.
      measure: number of candidates to decode with, the best of each drafter first; these then rank first. Every other
        example is left out of the prediction and the ranking, and the reported gain is measured on these examples.
      progress: called with a short description of the current step.

    Raises:
      UserError: nothing to measure on, figures of the wrong shape, or settings that the pair cannot run with.
    """
    _check(settings, limit, measure, acceptance, costs, task, input)
    lenience = settings.lenience
    settings = dataclasses.replace(
        settings, draft_len=None, drafter="model", k_matrix=None, lenience=None, trace=False, plan=None
    )
    methods.check(settings)
    reads = rules.by_name(settings.rule, settings.alpha, **settings.rule_options).reads_drafter
    if acceptance is not None and costs is not None:
        known, spent = _given(acceptance, costs)
        return _finish(tuple(rank(known, spent, len(costs), reads)), None, None, settings, output_dir)
    if pair is None:
        raise UserError("there is no pair to measure: name one (PAIR), or give acceptance and costs")
    pair = loaded(pair)
    models = len(pair.drafters)
    if not models and reads:
        raise UserError(f"the rule {settings.rule!r} reads a drafter, but this bundle holds a verifier alone")
    runner = Runner(pair, settings if models else dataclasses.replace(settings, drafter="max_gram"))
    prompts = datasets.read(runner.prompt_form, task, split, input, limit).prompts
    if measure and len(prompts) < 2:
        raise UserError("measure needs at least 2 examples, to choose on one and measure on another: give more")
    batches = runner.batches(prompts[::2] if measure else prompts)
    progress("measuring acceptance and step costs")
    found = probing.measure(pair, settings, batches, lenience)
    ranked = rank_measured(found, models, reads, lenience)
    chosen = _worth_measuring(ranked, measure)
    if chosen:
        progress("decoding with " + "; ".join(ranked[i].label for i in chosen))
        tried = [ranked[i] for i in chosen]
        by, on = (_measured_gains(pair, settings, tried, own) for own in (batches, runner.batches(prompts[1::2])))
        for i, chosen_by, measured in zip(chosen, by, on, strict=True):
            ranked[i] = dataclasses.replace(ranked[i], chosen_by=chosen_by, measured=measured)
    return _finish(tuple(ranked), found, pair, settings, output_dir)


def _check(
    settings: Settings,
    limit: int,
    measure: int,
    acceptance: Sequence[Sequence[float]] | None,
    costs: Sequence[float] | None,
    task: str | None,
    input: str | None,
) -> None:
    """Refuses what cannot be planned."""
    if (acceptance is None) != (costs is None):
        raise UserError("acceptance and costs belong together: give both, or neither to have them measured")
    if settings.method != "speculative":
        raise UserError(f"method={settings.method!r} is not planned: only speculative drafts")
    if acceptance is not None and measure:
        raise UserError("measure decodes with a pair, but acceptance and costs were given: leave one out")
    if acceptance is not None and settings.lenience is not None:
        raise UserError("lenience changes the acceptance, which was given: leave it out, and give the figures with it")
    if acceptance is None and (task is None) == (input is None):
        raise UserError(
            "name either a task or an input file to measure on (TASK or INPUT), or give acceptance and costs"
        )


def _measured_gains(
    pair: LoadedPair, settings: Settings, candidates: Sequence[Candidate], batches: Sequence[batching.Batch]
) -> list[float]:
    """Tokens per second of each over those of the verifier alone, measured alternately."""
    alone = Runner(pair, dataclasses.replace(settings, method="verifier", rule="lossless", alpha=None, rule_options={}))
    chosen = [{name: getattr(candidate, name) for name in plan_files.CHOICE} for candidate in candidates]
    programs = [Runner(pair, dataclasses.replace(settings, **choice)).program for choice in chosen]
    base, *runs = measuring.timed(pair, [alone.program, *programs], batches, settings.seed)
    return [run.tokens_per_s / base.tokens_per_s for run in runs]


def _worth_measuring(ranked: Sequence[Candidate], most: int) -> list[int]:
    """The best of each drafter, then the best of all, so that a biased prediction for one drafter is noticed."""
    drafting_ones = [i for i, candidate in enumerate(ranked) if candidate.draft_len]
    first = {(ranked[i].drafter, ranked[i].lenience): i for i in reversed(drafting_ones)}
    return sorted([*sorted(first.values()), *(i for i in drafting_ones if i not in first.values())][:most])


def rank_measured(found: probing.Measured, models: int, reads: bool, lenience: float | None = None) -> list[Candidate]:
    """Every candidate with the gain predicted from measurements, corrected by what the probe of its kind gained."""
    lengths = found.alone.lengths
    ranked = rank(found.acceptance, found.costs, models, reads, lengths)
    if found.lenient is not None:
        lenient = (_cascade(k, found.lenient, found.costs, models, lengths, reads) for k in k_matrices(models))
        ranked += [dataclasses.replace(candidate, lenience=lenience) for candidate in lenient]
    for i, c in enumerate(ranked):
        if c.draft_len:
            factor = found.corrections[probing.kind_of(c.drafter, c.k_matrix, c.lenience)]
            ranked[i] = dataclasses.replace(c, gain=c.gain * factor)
    return sorted(ranked, key=lambda candidate: -candidate.gain)


def rank(
    acceptance: Acceptance, costs: Costs, models: int, reads: bool, lengths: Sequence[int] = ()
) -> list[Candidate]:
    """Every exact candidate with its predicted gain, best first.

    Args:
      acceptance: between levels.
      costs: of steps and blocks.
      models: how many drafter models there are.
      reads: whether the rule reads a drafter's distribution, which is then needed at the bonus position as well.
      lengths: tokens of typical outputs; see `cost_model.tokens_per_round`.
    """
    copier = models + 1
    found = [_nothing(costs, models, reads)]

    def plain(drafter: str, writer: int, length: int, steps: int, drafting_time: float) -> Candidate:
        tokens = tokens_per_round(round_law(acceptance.curves[0, writer], length), lengths)
        calls = [1.0, *(float(steps) if i == 0 else 0.0 for i in range(models))]
        spent = costs.round + block_time(costs.verifier, length + 1) + drafting_time
        return Candidate(drafter, length, None, tokens, tuple(n / tokens for n in calls), tokens * costs.step / spent)

    for length in LENGTHS:
        if models:
            steps = length + reads
            found.append(plain("model", 1, length, steps, steps * costs.drafter_step))
        if not reads and (0, copier) in acceptance.curves:
            found.append(plain("max_gram", copier, length, 0, costs.copy(length)))
    if (0, copier) in acceptance.curves:
        found += [_cascade(k, acceptance, costs, models, lengths, reads) for k in k_matrices(models)]
    return sorted(found, key=lambda candidate: -candidate.gain)


def _nothing(costs: Costs, models: int, reads: bool) -> Candidate:
    """The verifier alone; a rule that reads the drafter runs it as well."""
    calls = [float(reads and i == 0) for i in range(models)]
    gain = costs.step / (costs.step + (costs.drafter_step if reads else 0.0))
    return Candidate("model", 0, None, 1.0, (1.0, *calls), gain)


def _cascade(
    k: tuple[tuple[int, ...], ...],
    acceptance: Acceptance,
    costs: Costs,
    models: int,
    lengths: Sequence[int],
    reads: bool,
) -> Candidate:
    found = predict_cascade(drafting.k_matrix(k, models, True), acceptance, costs, lengths, reads)
    calls = tuple(n / found.tokens for n in (1.0, *found.calls))
    return Candidate("cascade", sum(k[0]), k, found.tokens, calls, found.gain)


def k_matrices(models: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """The K matrices to rank: every row gives a share to its first drafter, and in some the rest to the copier."""
    if not models:
        return
    shares = (1, 2, 3, 4, 5, 6, 8) if models == 1 else (2, 4)
    rests = (0, 2, 4) if models == 1 else (0, 2)
    for own in itertools.product(shares, repeat=models):
        for copied, last in itertools.product(rests, (1, 2, 3, 5, 8) if models == 1 else (2, 4, 8)):
            rows = [[0] * (models + 1) for _ in range(models + 1)]
            for level, share in enumerate(own):
                rows[level][level] = share
            rows[0][models] = copied
            rows[models][models] = last
            if sum(rows[0]) <= _LONGEST:
                yield tuple(map(tuple, rows))


def _given(acceptance: Sequence[Sequence[float]], costs: Sequence[float]) -> tuple[Acceptance, Costs]:
    """The user's figures, checked."""
    levels = len(costs) + 2
    shape = [len(row) for row in acceptance]
    if shape == [levels - 2 - i for i in range(len(acceptance))] and len(acceptance) == levels - 2:
        levels -= 1  # no Max-Gram
    elif shape != [levels - 1 - i for i in range(levels - 1)]:
        whole, bare = (list(range(size, 0, -1)) for size in (levels - 1, levels - 2))
        raise UserError(
            f"acceptance has rows of {shape} figures, but {len(costs)} drafter model(s) and Max-Gram need rows of "
            f"{whole}, or {bare} without Max-Gram"
        )
    curves = {(i, i + 1 + j): (float(value),) for i, row in enumerate(acceptance) for j, value in enumerate(row)}
    return Acceptance(curves), Costs.relative([float(cost) for cost in costs])


def _finish(
    ranked: tuple[Candidate, ...],
    found: probing.Measured | None,
    pair: LoadedPair | None,
    settings: Settings,
    output_dir: str | Path | None,
) -> Plan:
    """Writes plan.json. Measured candidates are ranked first, by the examples that are used to choose.

    The best must also gain on the other examples.
    """
    ranked = tuple(sorted(ranked, key=lambda c: (c.chosen_by is None, -(c.chosen_by or c.gain))))
    alone = next(c for c in ranked if c.draft_len == 0)
    best = ranked[0]
    chosen_by, measured = best.chosen_by, best.measured
    gain = best.gain if chosen_by is None or measured is None else min(chosen_by, measured)
    if gain <= alone.gain and best is not alone:
        ranked = (alone, *(c for c in ranked if c is not alone))
    speculate = ranked[0].draft_len > 0 and gain > 1.0
    path = None
    if output_dir is not None:
        content = {
            "pair": pair and plan_files.identity(pair),
            "conditions": plan_files.conditions(settings),
            "speculate": speculate,
            "candidates": [dataclasses.asdict(candidate) for candidate in ranked],
            "costs": found and dataclasses.asdict(found.costs),
            "corrections": found and found.corrections,
            "probes": found and found.probes,
            "device": jax.devices()[0].device_kind,
        }
        path = plan_files.write(Path(output_dir) / plan_files.FILE, content)
    return Plan(ranked, speculate, found, path)
