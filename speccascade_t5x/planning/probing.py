"""Measures acceptances and times of a pair in short decodes with a few drafters, from which `plan` predicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from speccascade_t5x import decoding, drafting
from speccascade_t5x.core import rules
from speccascade_t5x.data import batching
from speccascade_t5x.drafting import KMatrix
from speccascade_t5x.inference import drafters
from speccascade_t5x.inference.generate import LoadedPair, program_config
from speccascade_t5x.inference.measuring import Run, block_times, copy_times, timed
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import Bound
from speccascade_t5x.planning.cost_model import (
    Acceptance,
    CascadeModel,
    Costs,
    block_time,
    fit_reviews,
    predict_cascade,
    round_law,
    tokens_per_round,
)

PROBE_LEN = 8


@dataclasses.dataclass(frozen=True)
class Measured:
    """All measurements.

    Attributes:
      alone: decode of the verifier by itself.
      acceptance: acceptance between levels, with exact cascades.
      lenient: the same with lenience between drafters; None if it was not requested.
      costs: costs in seconds.
      corrections: per kind of drafter (see `kind_of`), the gain of its probe over its predicted gain. It is 1 if the
        model is right; predictions are multiplied by it.
      probes: results and predictions of each probe, in human-readable form.
    """

    alone: Run
    acceptance: Acceptance
    lenient: Acceptance | None
    costs: Costs
    corrections: dict[str, float]
    probes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Cascade:
    """A cascade probe: K matrix, its models, lenience between its drafters, whether the rule reads q, its decode."""

    k: tuple[tuple[int, ...], ...]
    models: int
    copies: bool
    lenience: float | None
    reads: bool
    run: Run

    @property
    def plan(self) -> KMatrix:
        return drafting.k_matrix(self.k, self.models, self.copies)

    @property
    def calls(self) -> list[float]:
        """Calls per round of each model, without the additional one of the largest for reading its distribution."""
        first, *rest = (count / self.run.totals["rounds"] for count in self.run.totals["level_calls"])
        return [first - self.reads, *rest]


class Probes:
    """The decodes that are measured: the verifier alone, each pair of levels, and whole cascades.

    The acceptance of a level by a reviewer is measured by letting the level draft for that reviewer; between two
    drafters under the lossless rule, because cascades are exact. With lenience the reviewer's own tokens change as
    well, so there a cascade of the two drafts for the verifier: the verifier's acceptance follows from the output, and
    the drafters' from the number of reviews per draft.
    """

    def __init__(self, pair: LoadedPair, settings: Settings, lenience: float | None):
        """Makes the programs; nothing is compiled yet. `settings` name rule, sampling and batch size."""
        self.pair, self.lenience = pair, lenience
        self.settings = dataclasses.replace(
            settings, drafter="model", k_matrix=None, lenience=None, draft_len=PROBE_LEN
        )
        self.models = pair.drafters
        self.levels = [pair.verifier, *self.models]
        self.copier = len(self.levels)
        self.rule = rules.by_name(settings.rule, settings.alpha, **settings.rule_options)
        self.config = dataclasses.replace(program_config(pair, settings), draft_len=PROBE_LEN)
        self.alone = decoding.autoregressive_program(pair.verifier, self.config, settings.sampling())
        self.programs: dict[Any, decoding.Program] = {"alone": self.alone}
        for reviewer in range(len(self.levels)):
            for writer in range(reviewer + 1, self.copier + 1):
                self.programs[reviewer, writer] = self._two_levels(reviewer, writer)
        if not self.models:
            return
        count = len(self.models)
        for k in calibration_matrices(count):
            for chosen in (None, lenience) if lenience else (None,):
                self.programs[k, chosen] = self._cascade(self.models, k, chosen)
        if lenience:
            k = ((PROBE_LEN, 0), (0, PROBE_LEN))
            for reviewer in range(1, count + 1):
                for writer in range(reviewer + 1, self.copier + 1):
                    self.programs["lenient", reviewer, writer] = self._cascade(
                        self.levels[reviewer : reviewer + 1] + self.levels[writer : writer + 1], k, lenience
                    )

    def _two_levels(self, reviewer: int, writer: int) -> decoding.Program:
        """`writer` drafts for `reviewer`."""
        copies = writer == self.copier
        by_rule = self.rule if reviewer == 0 and not (copies and self.rule.reads_drafter) else rules.Lossless()
        upper, used = self.levels[reviewer], self.config
        if copies:
            lower, used = self._built("max_gram", upper, [], by_rule)
        else:
            lower = self.levels[writer]
        return decoding.speculative_program(lower, upper, by_rule, used, self.settings.sampling())

    def _cascade(
        self, models: Sequence[Bound], k: tuple[tuple[int, ...], ...], lenience: float | None
    ) -> decoding.Program:
        lower, used = self._built("cascade", self.pair.verifier, models, self.rule, k_matrix=k, lenience=lenience)
        return decoding.speculative_program(lower, self.pair.verifier, self.rule, used, self.settings.sampling())

    def _built(
        self, drafter: str, upper: Bound, models: Sequence[Bound], rule: rules.Rule, **options: Any
    ) -> tuple[Bound, decoding.DecodeConfig]:
        settings = dataclasses.replace(self.settings, drafter=drafter, **options)
        if rule is not self.rule:
            settings = dataclasses.replace(settings, rule="lossless", alpha=None, rule_options={})
        return drafters.build(settings, upper, models, self.pair.table, rule, self.config)

    def copying(self) -> Any:
        """Max-Gram as the probes use it."""
        return self.programs[0, self.copier].drafter


def calibration_matrices(models: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Two different cascades: a purely vertical one with short copies, and a mixed one with long copies."""
    mixed = [[0] * (models + 1) for _ in range(models + 1)]
    for level in range(models):
        mixed[level][level] = 2
    mixed[0][models], mixed[models][models] = 4, PROBE_LEN
    return drafters.default_k_matrix(5, models), tuple(map(tuple, mixed))


def measure(
    pair: LoadedPair, settings: Settings, batches: Sequence[batching.Batch], lenience: float | None = None
) -> Measured:
    """Decodes with every probe, alternating between them, and times blocks and copies separately.

    Args:
      pair: to be measured.
      settings: rule, sampling and batch size; their drafter and draft length are not read.
      batches: of the prompts.
      lenience: L between drafters to measure as well; None measures exact cascades only.
    """
    probes = Probes(pair, settings, lenience)
    runs = dict(zip(probes.programs, timed(pair, [*probes.programs.values()], batches, settings.seed), strict=True))
    alone, count = runs.pop("alone"), len(probes.models)
    acceptance = Acceptance({key: run.curve for key, run in runs.items() if isinstance(key[0], int)})
    reads = probes.rule.reads_drafter
    cascades = [
        _Cascade(key[0], count, True, key[1], reads, run) for key, run in runs.items() if isinstance(key[0], tuple)
    ]
    lenient = _lenient(probes, runs, acceptance) if lenience and count else None
    costs = _costs(probes, batches, alone, runs, cascades)
    shown = {_label(key, count): _shown(run) for key, run in runs.items()}
    corrections: dict[str, float] = {}
    for probe in cascades:
        curves = acceptance if probe.lenience is None or lenient is None else lenient
        expected = predict_cascade(probe.plan, curves, costs, alone.lengths, reads)
        corrections[kind_of("cascade", probe.k, probe.lenience)] = _gain(probe.run, alone) / expected.gain
        shown[_label((probe.k, probe.lenience), count)] |= {
            "expected_tokens_per_round": expected.tokens,
            "expected_level_calls_per_round": list(expected.calls),
            "expected_round_s": expected.seconds,
            "explained_round_s": costs.cascade(probe.plan, probe.calls),
        }
    for kind, writer in ((("model", 1),) if count else ()) + (("max_gram", probes.copier),):
        corrections[kind] = _plain_ratio(runs[0, writer], alone, costs, writer, probes)
    return Measured(alone, acceptance, lenient, costs, corrections, shown)


def kind_of(drafter: str, k: Sequence[Sequence[int]] | None = None, lenience: float | None = None) -> str:
    """Kind of a candidate for corrections: a drafter, or cascades with or without a final copy and lenience."""
    if k is None:
        return drafter
    return f"{'mixed' if k[0][-1] else 'vertical'} {drafter}" + ("" if lenience is None else ", lenient")


def _costs(
    probes: Probes, batches: Sequence[batching.Batch], alone: Run, runs: dict[Any, Run], cascades: Sequence[_Cascade]
) -> Costs:
    """Costs of blocks and copies, measured separately, and the remaining costs, from whole rounds."""
    widest = max(range(len(batches)), key=lambda i: batches[i].bucket)
    samples, room = probes.settings.num_samples, probes.config.room
    blocks = [block_times(bound, batches[widest], samples, room) for bound in probes.levels]
    before = sum(int(batch.valid.sum()) for batch in batches[:widest]) * samples
    copies = copy_times(probes.copying(), batches[widest], alone.outputs[before:], samples, room)
    whole, copied = block_time(blocks[0], PROBE_LEN + 1), runs[0, probes.copier]
    round_s = max(copied.seconds / copied.rounds - whole - block_time(copies, PROBE_LEN), 0.0)
    step = 0.0
    if probes.models:
        drafted = runs[0, 1]
        steps = PROBE_LEN + probes.rule.reads_drafter
        step = max((drafted.seconds / drafted.rounds - whole - round_s) / steps, blocks[1][1])
    costs = Costs(alone.seconds / alone.rounds, blocks[0], tuple(blocks[1:]), step, round_s, copies)
    if not cascades:
        return costs
    reviews, left = [], []
    for probe in cascades:
        spent = sum(costs.cascade(probe.plan, probe.calls).values())
        if probes.rule.reads_drafter:
            spent += block_time(blocks[1], probe.plan.length(0) + 1)
        tokens = sum(n * probe.plan.block(i) for i, n in enumerate(probe.calls))
        reviews.append((sum(probe.calls), tokens))
        left.append(probe.run.seconds / probe.run.rounds - spent)
    review, review_token = fit_reviews(reviews, left)
    return dataclasses.replace(costs, review=review, review_token=review_token)


def _lenient(probes: Probes, runs: dict[Any, Run], exact: Acceptance) -> Acceptance:
    """Acceptance with lenience between drafters; the verifier is exact, and its acceptance of copies is unchanged."""
    curves = {(0, probes.copier): exact.curves[0, probes.copier]}
    for key, run in runs.items():
        if key[0] != "lenient":
            continue
        _, reviewer, writer = key
        copies = writer == probes.copier
        k, reads = ((PROBE_LEN, 0), (0, PROBE_LEN)), probes.rule.reads_drafter
        probe = _Cascade(k, 1 if copies else 2, copies, probes.lenience, reads, run)
        curves[reviewer, writer] = (_acceptance_by_calls(probe),)
        if copies:
            curves[0, reviewer] = run.curve
    return Acceptance(curves)


def _acceptance_by_calls(probe: _Cascade) -> float:
    """The acceptance between the two drafters of a probe at which predicted and measured reviews agree."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2.0
        between = Acceptance({(0, 1): probe.run.curve, (1, 2): (middle,)})
        if CascadeModel(probe.plan, between).expected().calls[0] > probe.calls[0]:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0


def _plain_ratio(run: Run, alone: Run, costs: Costs, writer: int, probes: Probes) -> float:
    """Measured over predicted gain of one drafter's probe for the verifier."""
    tokens = tokens_per_round(round_law(run.curve, PROBE_LEN), alone.lengths)
    drafting_s = costs.copy(PROBE_LEN)
    if writer != probes.copier:
        drafting_s = (PROBE_LEN + probes.rule.reads_drafter) * costs.drafter_step
    spent = costs.round + block_time(costs.verifier, PROBE_LEN + 1) + drafting_s
    return _gain(run, alone) * spent / (tokens * costs.step)


def _gain(run: Run, alone: Run) -> float:
    return run.tokens_per_s / alone.tokens_per_s


def _shown(run: Run) -> dict[str, Any]:
    """Results of a probe in human-readable form."""
    found = {
        "acceptance_by_position": list(run.curve),
        "round_s": run.seconds / run.rounds,
        "tokens_per_round": run.totals["committed"] / run.totals["rounds"],
    }
    if "level_calls" in run.totals:
        found["level_calls_per_round"] = [count / run.totals["rounds"] for count in run.totals["level_calls"]]
    return found


def _label(key: Any, models: int) -> str:
    """Human-readable name of a probe."""
    if isinstance(key[0], tuple):
        k, lenience = key
        exact = "cascade K " + ";".join(",".join(map(str, row)) for row in k)
        return exact if lenience is None else f"{exact}, lenience {lenience:g}"
    *lenient, reviewer, writer = key
    text = f"{_name(writer, models)} for {_name(reviewer, models)}"
    return f"{text}, with lenience" if lenient else text


def _name(level: int, models: int) -> str:
    if level > models:
        return "max_gram"
    return "verifier" if level == 0 else "drafter" if level == 1 else f"smaller drafter {level - 2}"
