"""Times and acceptances of a pair, measured on prompts: what `plan` predicts from."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x import decoding, drafting
from speccascade_t5x.core import accounting, rules
from speccascade_t5x.interfaces import SOURCE_ACCEPTED, Bound
from speccascade_t5x.runtime import batching, drafters
from speccascade_t5x.runtime.cost_model import Acceptance, Costs, block_time
from speccascade_t5x.runtime.generate import LoadedPair, program_config
from speccascade_t5x.runtime.settings import Settings

PROBE_LEN = 8
_BLOCKS = (1, 2, 4, 8, 13)
_STEPS = 24


@dataclasses.dataclass(frozen=True)
class Run:
    """A decode of all batches, timed without its compile and without reading the inputs.

    Attributes:
      seconds: in the loop, the fastest of the repeats.
      rounds: iterations of the loop; the rows of a batch share them.
      totals: counters.
      curve: acceptance at each draft position given that all before it stood.
      lengths: tokens of each output.
    """

    seconds: float
    rounds: int
    totals: dict[str, Any]
    curve: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def tokens_per_s(self) -> float:
        return self.totals["committed"] / self.seconds


def timed(
    pair: LoadedPair, program: decoding.Program, batches: Sequence[batching.Batch], seed: int, repeats: int = 3
) -> Run:
    """Decodes the batches `repeats` times and once before, to compile and to warm up."""
    key, seconds, outputs = jax.random.key(seed), [], []
    for repeat in range(repeats + 1):
        spent, outputs = 0.0, []
        for batch in batches:
            inputs = program.verifier.model.inputs(jnp.asarray(batch.encoder_input_tokens))
            decoder, _ = pair.compiled(program, inputs)
            state = jax.block_until_ready(decoder.start(program, inputs, key, jnp.asarray(batch.example_ids)))
            begin = time.perf_counter()
            state = jax.block_until_ready(decoder.run(program, state))
            spent += time.perf_counter() - begin
            outputs.append(jax.device_get(decoder.finish(state)))
        if repeat:
            seconds.append(spent)
    kept = [(out, row) for out, b in zip(outputs, batches, strict=True) for row in _rows(b, program)]
    sources = [out.source[row, : out.lengths[row]].tolist() for out, row in kept]
    return Run(
        seconds=min(seconds),
        rounds=sum(int(output.counts.rounds.max()) for output in outputs),
        totals=accounting.total(out.counts.row(row) for out, row in kept),
        curve=continuation(sources, program.config.draft_len),
        lengths=tuple(map(len, sources)),
    )


def _rows(batch: batching.Batch, program: decoding.Program) -> list[int]:
    samples = program.config.num_samples
    return [row * samples + s for row in np.flatnonzero(batch.valid).tolist() for s in range(samples)]


def continuation(sources: Iterable[Sequence[int]], draft_len: int) -> tuple[float, ...]:
    """Acceptance at each draft position given that all before it stand; a draft that has ended counts as rejected.

    Args:
      sources: who wrote each output token, row by row. What a row's end cuts off is not counted either way.
      draft_len: G of the decode.
    """
    tried, stood = Counter(), Counter()
    for source in sources:
        position = 0
        for writer in source:
            if position < draft_len:
                tried[position] += 1
                stood[position] += writer == SOURCE_ACCEPTED
            position = position + 1 if writer == SOURCE_ACCEPTED else 0
    # A position nobody reached is taken to be as good as the one before it.
    curve: list[float] = []
    for i in range(draft_len):
        curve.append(stood[i] / tried[i] if tried[i] else (curve[-1] if curve else 0.0))
    return tuple(curve)


def block_times(bound: Bound, batch: batching.Batch, samples: int, room: int, blocks: Sequence[int] = _BLOCKS) -> dict:
    """{block: seconds of `extend`}, each the fastest of three chains of blocks that depend on one another."""
    inputs = bound.model.inputs(jnp.asarray(batch.encoder_input_tokens))
    rows = len(batch.valid) * samples
    _, first = bound.model.first(inputs)
    first = jnp.repeat(first, samples)
    start = jax.jit(lambda params: bound.model.start(params, inputs, rows, room))
    found = {}
    for block in blocks:
        places = max((room - block) // block, 1)

        def chain(params, cache, block=block, places=places):
            def step(i, carry):
                tokens, cache = carry
                logits, cache = bound.model.extend(params, cache, tokens, first + (i % places) * block)
                return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

            return jax.lax.fori_loop(0, _STEPS, step, (jnp.ones((rows, block), jnp.int32), cache))[0]

        run, cache = jax.jit(chain), start(bound.params)
        jax.block_until_ready(run(bound.params, cache))
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            jax.block_until_ready(run(bound.params, cache))
            seconds.append(time.perf_counter() - begin)
        found[block] = min(seconds) / _STEPS
    return found


def step_seconds(bound: Bound) -> float:
    """Seconds of one token of one row, after a prompt of one padded block: a coefficient, not a time of a run."""
    rows = batching.Batch(np.ones((1, 32), np.int32), np.zeros(1, np.int32), np.ones(1, bool), 32)
    return block_times(bound, rows, 1, 32, blocks=(1,))[1]


@dataclasses.dataclass(frozen=True)
class Measured:
    """All that was measured.

    Attributes:
      alone: the verifier by itself.
      acceptance: between levels.
      costs: in seconds.
      probes: what each probe did, for people.
    """

    alone: Run
    acceptance: Acceptance
    costs: Costs
    probes: dict[str, Any]


def measure(pair: LoadedPair, settings: Settings, batches: Sequence[batching.Batch]) -> Measured:
    """Runs the verifier alone, one probe per pair of levels, and chains of blocks.

    What a level's tokens are worth to a reviewer is measured by letting it draft for that reviewer; between two
    drafters under the lossless rule, as cascades are ranked exact. Whatever a probe's round takes beyond its blocks
    is what sampling and verification cost.

    Args:
      pair: to be measured.
      settings: rule, sampling and batch size; their drafter and draft length are not read.
      batches: of the prompts.
    """
    plain = dataclasses.replace(settings, drafter="model", k_matrix=None, draft_len=PROBE_LEN)
    models = [] if pair.drafter is None else [pair.drafter, *pair.smaller]
    lossless = dataclasses.replace(plain, rule="lossless", alpha=None, rule_options={})
    rule = rules.by_name(settings.rule, settings.alpha, **settings.rule_options)
    config = dataclasses.replace(program_config(pair, settings), draft_len=PROBE_LEN)
    alone_program = decoding.autoregressive_program(pair.verifier, config, settings.sampling())
    alone = timed(pair, alone_program, batches, settings.seed)
    step = alone.seconds / alone.rounds
    widest = max(batches, key=lambda batch: batch.bucket)
    levels = [pair.verifier, *models]
    chains = [block_times(bound, widest, settings.num_samples, config.room) for bound in levels]
    verifier, curves, probes = chains[0], {}, {}

    def probe(reviewer: int, writer: int) -> Run:
        """`writer` drafts for `reviewer`."""
        by_rule = rule if reviewer == 0 and (writer <= len(models) or not rule.reads_drafter) else rules.Lossless()
        options = plain if by_rule is rule else lossless
        upper = levels[reviewer]
        if writer > len(models):
            options = dataclasses.replace(options, drafter="max_gram")
            lower, used = drafters.build(options, upper, [], pair.table, by_rule, config)
        else:
            lower, used = levels[writer], config
        program = decoding.speculative_program(lower, upper, by_rule, used, settings.sampling())
        run = timed(pair, program, batches, settings.seed)
        curves[reviewer, writer] = run.curve
        probes[f"{_name(writer, models)} for {_name(reviewer, models)}"] = {
            "acceptance_by_position": list(run.curve),
            "round_s": run.seconds / run.rounds,
            "tokens_per_round": run.totals["committed"] / run.totals["rounds"],
        }
        return run

    last = len(models) + 1
    copied = probe(0, last)
    whole = block_time(verifier, PROBE_LEN + 1)
    round_s = max(copied.seconds / copied.rounds - whole, 0.0)
    drafter_step = review = 0.0
    if models:
        drafted = probe(0, 1)
        steps = PROBE_LEN + rule.reads_drafter
        drafter_step = max((drafted.seconds / drafted.rounds - whole - round_s) / steps, chains[1][1])
        for reviewer in range(len(models) + 1):
            for writer in range(reviewer + 1, last + 1):
                if (reviewer, writer) not in curves:
                    probe(reviewer, writer)
        review = _review_cost(pair, settings, models, rule, config, batches, verifier, chains[1:], round_s, probes)
    costs = Costs(step, verifier, tuple(chains[1:]), drafter_step, round_s, review)
    return Measured(alone, Acceptance(curves), costs, probes)


def _review_cost(
    pair: LoadedPair,
    settings: Settings,
    models: Sequence[Bound],
    rule: rules.Rule,
    config: decoding.DecodeConfig,
    batches: Sequence[batching.Batch],
    verifier: dict[int, float],
    chains: Sequence[dict[int, float]],
    round_s: float,
    probes: dict[str, Any],
) -> float:
    """Seconds per token of an inner review beyond its block: what nothing else in a cascade's round explains."""
    k = drafters.default_k_matrix(5, len(models))
    options = dataclasses.replace(settings, drafter="cascade", k_matrix=k, draft_len=5)
    lower, used = drafters.build(options, pair.verifier, models, pair.table, rule, config)
    program = decoding.speculative_program(lower, pair.verifier, rule, used, settings.sampling())
    run = timed(pair, program, batches, settings.seed)
    plan = drafting.k_matrix(k, len(models), True)
    each = [count / run.totals["rounds"] for count in run.totals["level_calls"]]
    spent = run.seconds / run.rounds - round_s - block_time(verifier, used.draft_len + 1)
    for drafter, calls in enumerate(each):
        spent -= calls * block_time(chains[drafter], plan.length(drafter + 1) + 1)
    probes["cascade"] = {"k_matrix": k, "round_s": run.seconds / run.rounds, "level_calls_per_round": each}
    scored = sum(calls * (plan.length(i + 1) + 1) for i, calls in enumerate(each))
    return max(spent, 0.0) / scored


def _name(level: int, models: Sequence[Bound]) -> str:
    """A level for people."""
    if level > len(models):
        return "max_gram"
    return "verifier" if level == 0 else "drafter" if level == 1 else f"smaller drafter {level - 2}"
