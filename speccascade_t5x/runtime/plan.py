"""The `plan` job: which drafter, draft length and K matrix pay, predicted from what was measured or given."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from speccascade_t5x import drafting
from speccascade_t5x.core import rules
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.runtime import infer, measuring, options, plans
from speccascade_t5x.runtime.cost_model import (
    Acceptance,
    CascadeModel,
    Costs,
    block_time,
    ewif,
    round_law,
    tokens_per_round,
)
from speccascade_t5x.runtime.generate import LoadedPair, Runner
from speccascade_t5x.runtime.settings import Settings

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
_LONGEST = 12
# Called with what is being done, in a few words.
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to draft, and what it should gain.

    Attributes:
      drafter: "model", "max_gram" or "cascade".
      draft_len: tokens drafted per round; 0 does not speculate.
      k_matrix: of a cascade.
      tokens_per_round: expected.
      calls_per_token: of the verifier and of each model below it.
      gain: tokens per unit of time over the verifier alone; above 1 it pays.
      measured: the same, measured; None where it was not.
    """

    drafter: str
    draft_len: int
    k_matrix: tuple[tuple[int, ...], ...] | None
    tokens_per_round: float
    calls_per_token: tuple[float, ...]
    gain: float
    measured: float | None = None

    @property
    def label(self) -> str:
        """For people."""
        if self.draft_len == 0:
            return "no speculation"
        if self.k_matrix is None:
            return f"{self.drafter}, draft_len {self.draft_len}"
        return "cascade, K " + ";".join(",".join(map(str, row)) for row in self.k_matrix)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a `plan` job found.

    Attributes:
      candidates: best first; "no speculation" is among them.
      speculate: whether the best is expected to be faster than the verifier alone.
      measured: what the prediction rests on; None where figures were given.
      path: of plan.json; None where no output folder was named.
    """

    candidates: tuple[Candidate, ...]
    speculate: bool
    measured: measuring.Measured | None
    path: Path | None


def plan(
    pair: LoadedPair | None,
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
      pair: what shall decode; not read where acceptance and costs are given.
      settings: rule, sampling, batch size and lengths; what is planned is not read from them.
      output_dir: where plan.json goes, which draft_len="auto" follows; None writes none.
      task: a registered seqio task to measure on.
      split: of the task.
      input: text file, `.jsonl` file or "-", instead of a task.
      limit: measure on the first so many examples.
      acceptance: instead of measuring: row i is how often a token of each level below i stands at level i's review;
        levels are the verifier, its drafters, and Max-Gram last.
      costs: with acceptance: a step of each drafter model, in steps of the verifier.
      measure: decode with so many candidates, the best of each drafter first, and put the measured gain beside the
        prediction; these then rank first, by what was measured.
      progress: told what is going on.

    Raises:
      UserError: nothing to measure on, figures of the wrong shape, or settings the pair cannot be run with.
    """
    options.whole("measure", measure, 0)
    options.whole("limit", limit, 1)
    if (acceptance is None) != (costs is None):
        raise UserError("acceptance and costs belong together: give both, or neither to have them measured")
    if settings.method != "speculative":
        raise UserError(f"method={settings.method!r} is not planned: only speculative drafts")
    if settings.lenience is not None:
        raise UserError("lenience is not planned: cascades are ranked exact, so leave it out")
    settings = dataclasses.replace(settings, draft_len=None, drafter="model", k_matrix=None, trace=False, plan=None)
    rule = rules.by_name(settings.rule, settings.alpha, **settings.rule_options)
    if acceptance is not None:
        if measure:
            raise UserError("measure decodes with a pair, but acceptance and costs were given: leave one out")
        known, spent = _given(acceptance, costs)
        ranked = tuple(rank(known, spent, len(costs), rule.reads_drafter))
        return _finish(ranked, None, None, settings, output_dir)
    if (task is None) == (input is None):
        raise UserError(
            "name either a task or an input file to measure on (TASK or INPUT), or give acceptance and costs"
        )
    models = 0 if pair.drafter is None else 1 + len(pair.smaller)
    if not models and rule.reads_drafter:
        raise UserError(f"the rule {settings.rule!r} reads a drafter, but this bundle holds a verifier alone")
    settled = settings if models else dataclasses.replace(settings, drafter="max_gram")
    runner = Runner(pair, settled)
    batches = runner.batches(infer.read_dataset(runner, task, split, input, limit).prompts)
    progress("measuring acceptance and step costs")
    found = measuring.measure(pair, settings, batches)
    ranked = rank(found.acceptance, found.costs, models, rule.reads_drafter, found.alone.lengths)
    for i in _worth_measuring(ranked, measure):
        candidate = ranked[i]
        progress(f"decoding with {candidate.label}")
        chosen = dataclasses.replace(settings, **{name: getattr(candidate, name) for name in plans.CHOICE})
        run = measuring.timed(pair, Runner(pair, chosen).program, batches, settings.seed)
        ranked[i] = dataclasses.replace(candidate, measured=run.tokens_per_s / found.alone.tokens_per_s)
    return _finish(tuple(ranked), found, pair, settings, output_dir)


def _worth_measuring(ranked: Sequence[Candidate], most: int) -> list[int]:
    """The best of each drafter, then the best of all: a prediction that flatters one drafter shows at once."""
    drafting_ones = [i for i, candidate in enumerate(ranked) if candidate.draft_len]
    first = {ranked[i].drafter: i for i in reversed(drafting_ones)}
    return sorted([*sorted(first.values()), *(i for i in drafting_ones if i not in first.values())][:most])


def rank(
    acceptance: Acceptance, costs: Costs, models: int, reads: bool, lengths: Sequence[int] = ()
) -> list[Candidate]:
    """Every candidate with its predicted gain, best first.

    Args:
      acceptance: between levels.
      costs: of steps and blocks.
      models: how many drafter models there are.
      reads: whether the rule reads a drafter's law, which then is wanted at the bonus position too.
      lengths: tokens of typical outputs; see `cost_model.tokens_per_round`.
    """
    found = [_candidate("model", 0, None, 1.0, [0.0] * models, costs, models, reads)]
    for length in LENGTHS:
        if models:
            calls = [float(length + reads), *[0.0] * (models - 1)]
            tokens = tokens_per_round(round_law(acceptance.curves[0, 1], length), lengths)
            found.append(_candidate("model", length, None, tokens, calls, costs, models, reads))
        if not reads and (0, models + 1) in acceptance.curves:
            tokens = tokens_per_round(round_law(acceptance.curves[0, models + 1], length), lengths)
            found.append(_candidate("max_gram", length, None, tokens, [0.0] * models, costs, models, reads))
    if (0, models + 1) in acceptance.curves:
        for k in k_matrices(models):
            expected = CascadeModel(drafting.k_matrix(k, models, True), acceptance).expected()
            tokens = tokens_per_round(expected.law, lengths)
            found.append(_candidate("cascade", sum(k[0]), k, tokens, expected.calls, costs, models, reads))
    return sorted(found, key=lambda candidate: -candidate.gain)


def k_matrices(models: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """The K matrices that are ranked: every row gives its first drafter a share, and perhaps the copier the rest."""
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


def _candidate(
    drafter: str,
    length: int,
    k: tuple[tuple[int, ...], ...] | None,
    tokens: float,
    calls: Sequence[float],
    costs: Costs,
    models: int,
    reads: bool,
) -> Candidate:
    """gain = tokens per round x step / (drafting + block of G + 1 + what else a round takes)."""
    calls = list(calls)
    if length == 0 and not reads:  # nothing is drafted: the verifier alone
        return Candidate(drafter, 0, None, 1.0, (1.0, *calls), 1.0)
    spent = costs.round + (costs.step if length == 0 else block_time(costs.verifier, length + 1))
    if k is None:
        if length == 0:
            calls[0] = 1.0
        spent += (calls[0] if models else 0.0) * costs.drafter_step
    else:
        plan = drafting.k_matrix(k, models, True)
        for i, count in enumerate(calls):
            block = plan.length(i + 1) + 1
            spent += count * (costs.review * block + block_time(costs.drafters[i], block))
        if reads:
            spent += block_time(costs.drafters[0], length + 1)
            calls[0] += 1.0
    each = tuple(count / tokens for count in (1.0, *calls))
    return Candidate(drafter, length, k, tokens, each, tokens * costs.step / spent)


def _given(acceptance: Sequence[Sequence[float]], costs: Sequence[float]) -> tuple[Acceptance, Costs]:
    """Figures a user gave, checked."""
    rows = [options.sequence("acceptance", row) for row in options.sequence("acceptance", acceptance)]
    levels = len(costs) + 2
    shape = [len(row) for row in rows]
    if shape == [levels - 2 - i for i in range(len(rows))] and len(rows) == levels - 2:
        levels -= 1  # no Max-Gram
    elif shape != [levels - 1 - i for i in range(levels - 1)]:
        whole, bare = (list(range(size, 0, -1)) for size in (levels - 1, levels - 2))
        raise UserError(
            f"acceptance has rows of {shape} figures, but {len(costs)} drafter model(s) and Max-Gram need rows of "
            f"{whole}, or {bare} without Max-Gram"
        )
    for value in (value for row in rows for value in row):
        options.real("acceptance", value, 0.0, 1.0)
    for value in costs:
        options.real("costs", value, 0.0)
    curves = {(i, i + 1 + j): (float(value),) for i, row in enumerate(rows) for j, value in enumerate(row)}
    return Acceptance(curves), Costs.relative([float(cost) for cost in costs])


def _finish(
    ranked: tuple[Candidate, ...],
    found: measuring.Measured | None,
    pair: LoadedPair | None,
    settings: Settings,
    output_dir: str | Path | None,
) -> Plan:
    """Writes plan.json. Where the best were measured, the measured ones are ranked by what was measured, first."""
    ranked = tuple(sorted(ranked, key=lambda c: (c.measured is None, -(c.measured or c.gain))))
    alone = next(c for c in ranked if c.draft_len == 0)
    best = ranked[0]
    gain = best.gain if best.measured is None else best.measured
    if gain <= (alone.measured or alone.gain) and best is not alone:
        ranked = (alone, *(c for c in ranked if c is not alone))
    speculate = ranked[0].draft_len > 0 and gain > 1.0
    path = None
    if output_dir is not None:
        content = {
            "pair": pair and plans.identity(pair),
            "conditions": plans.conditions(settings),
            "speculate": speculate,
            "candidates": [dataclasses.asdict(candidate) for candidate in ranked],
            "costs": found and dataclasses.asdict(found.costs),
            "probes": found and found.probes,
            "device": jax.devices()[0].device_kind,
        }
        path = plans.write(Path(output_dir) / plans.FILE, content)
    return Plan(ranked, speculate, found, path)


def leviathan(found: measuring.Measured, candidate: Candidate) -> float | None:
    """The i.i.d. form of a plain candidate: `cost_model.ewif` of the mean acceptance; None of others."""
    if candidate.drafter != "model" or not candidate.draft_len:
        return None
    curve = found.acceptance.curves[0, 1]
    return ewif(sum(curve) / len(curve), candidate.draft_len, found.costs.drafter_step / found.costs.step)
