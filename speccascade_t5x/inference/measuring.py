"""Measures decodes and their parts so that drift of the machine affects all of them alike."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x import decoding
from speccascade_t5x.core import accounting, noise, probs
from speccascade_t5x.data import batching
from speccascade_t5x.decoding.compiled import CompiledDecoder
from speccascade_t5x.inference.generate import LoadedPair
from speccascade_t5x.interfaces import SOURCE_ACCEPTED, Bound

BLOCKS = (1, 2, 4, 8, 13)
_STEPS = 24
_CALLS = 7


@dataclasses.dataclass(frozen=True)
class Run:
    """A decode of all batches, timed without its compile and without reading the inputs.

    Attributes:
      seconds: time in the loop, of the fastest repeat.
      rounds: iterations of the loop, which the rows of a batch share.
      totals: counters.
      curve: acceptance rate at each draft position given that all tokens before it were accepted.
      outputs: tokens of each output.
    """

    seconds: float
    rounds: int
    totals: dict[str, Any]
    curve: tuple[float, ...]
    outputs: tuple[tuple[int, ...], ...]

    @property
    def tokens_per_s(self) -> float:
        return self.totals["committed"] / self.seconds

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each output."""
        return tuple(map(len, self.outputs))


def timed(
    pair: LoadedPair,
    programs: Sequence[decoding.Program],
    batches: Sequence[batching.Batch],
    seed: int,
    repeats: int = 3,
) -> list[Run]:
    """Decodes the batches with every program, once to compile and warm up, then `repeats` times.

    The programs take turns on every batch, so that a machine that gets slower meanwhile does so for all of them.
    """
    key = noise.from_seed(seed)
    seconds = np.zeros((repeats + 1, len(programs)))
    outputs: list[list[decoding.Output]] = []
    for repeat in range(repeats + 1):
        outputs = [[] for _ in programs]
        for batch in batches:
            for i, program in enumerate(programs):
                inputs = program.verifier.model.inputs(jnp.asarray(batch.encoder_input_tokens))
                decoder, _ = pair.compiled(program, inputs, CompiledDecoder)
                state = jax.block_until_ready(decoder.start(program, inputs, key, jnp.asarray(batch.example_ids)))
                begin = time.perf_counter()
                state = jax.block_until_ready(decoder.run(program, state))
                seconds[repeat, i] += time.perf_counter() - begin
                outputs[i].append(jax.device_get(decoder.finish(state)))
    best = seconds[1:].min(axis=0)
    return [_run(float(best[i]), program, batches, outputs[i]) for i, program in enumerate(programs)]


def _run(
    seconds: float, program: decoding.Program, batches: Sequence[batching.Batch], outputs: Sequence[decoding.Output]
) -> Run:
    kept = [(out, row) for out, b in zip(outputs, batches, strict=True) for row in _rows(b, program)]
    sources = [out.source[row, : out.lengths[row]].tolist() for out, row in kept]
    return Run(
        seconds=seconds,
        rounds=sum(int(output.counts.rounds.max()) for output in outputs),
        totals=accounting.total(out.counts.row(row) for out, row in kept),
        curve=continuation(sources, program.config.draft_len),
        outputs=tuple(tuple(out.tokens[row, : out.lengths[row]].tolist()) for out, row in kept),
    )


def _rows(batch: batching.Batch, program: decoding.Program) -> list[int]:
    samples = program.config.num_samples
    return [row * samples + s for row in np.flatnonzero(batch.valid).tolist() for s in range(samples)]


def continuation(sources: Iterable[Sequence[int]], draft_len: int) -> tuple[float, ...]:
    """Acceptance rate at each draft position given that all before it are accepted; an ended draft counts as rejected.

    Args:
      sources: source of each output token, row by row. Tokens cut off by a row's end are not counted.
      draft_len: G of the decode.
    """
    tried: Counter[int] = Counter()
    stood: Counter[int] = Counter()
    for source in sources:
        position = 0
        for writer in source:
            if position < draft_len:
                tried[position] += 1
                stood[position] += writer == SOURCE_ACCEPTED
            position = position + 1 if writer == SOURCE_ACCEPTED else 0
    # A position that no draft reached gets the rate of the one before it.
    curve: list[float] = []
    for i in range(draft_len):
        curve.append(stood[i] / tried[i] if tried[i] else (curve[-1] if curve else 0.0))
    return tuple(curve)


def block_times(bound: Bound, batch: batching.Batch, samples: int, room: int, blocks: Sequence[int] = BLOCKS) -> dict:
    """{block: seconds of `extend`}, each from the fastest of some chains of blocks that depend on one another."""
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

        found[block] = _fastest(jax.jit(chain), bound.params, start(bound.params)) / _STEPS
    return found


def copy_times(
    copier: Bound,
    batch: batching.Batch,
    outputs: Sequence[Sequence[int]],
    samples: int,
    room: int,
    sizes: Sequence[int] = BLOCKS,
) -> dict[int, float]:
    """{tokens: seconds of copying and filling so many}, with Max-Gram after every place of real outputs, one by one.

    Args:
      copier: a bound MaxGram.
      batch: the prompts.
      outputs: a text for each row of the batch to continue; the first one for the rows beyond them.
      samples: rows per prompt.
      room: longest output.
      sizes: how many tokens to draft.
    """
    rows = len(batch.valid) * samples
    history = np.zeros((rows, room + max(sizes) + 1), np.int32)
    ends = np.ones(rows, np.int32)
    for row in range(rows):
        text = outputs[row if row < len(outputs) else 0][: room - 1]
        history[row, 1 : len(text) + 1] = text
        ends[row] = max(len(text), 1)
    prompt = copier.model.prompt_of({copier.model.prompt: jnp.asarray(batch.encoder_input_tokens)}, rows)
    found = {}
    for size in sizes:

        def chain(params, history, size=size):
            def step(i, carry):
                # The text depends on the copy before; otherwise the compiler could run the copies in parallel.
                history, last = carry
                history = history.at[:, 0].set(jnp.minimum(last, 0))
                draws = jnp.full((rows, size * probs.DRAW), 0.5)
                tokens, _, law = copier.model.draft(params, prompt, history, 1 + i % ends, size, draws)
                return history, tokens[:, 0] + law[:, 0, 0].astype(jnp.int32)

            return jax.lax.fori_loop(0, _STEPS, step, (history, jnp.zeros(rows, jnp.int32)))

        found[size] = _fastest(jax.jit(chain), copier.params, jnp.asarray(history)) / _STEPS
    return found


def _fastest(run: Any, *arguments: Any) -> float:
    """Seconds of the fastest call after the one that compiles: other processes can only add time."""
    jax.block_until_ready(run(*arguments))
    seconds = []
    for _ in range(_CALLS):
        begin = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def parameter_count(bound: Bound) -> int:
    """Number of parameters of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(bound.params))


def published_costs(verifier: Bound, models: Sequence[Bound]) -> dict[str, list[float]]:
    """A call of each drafter model in calls of the verifier, in both conventions of `standardised_improvement`.

    "by_parameters" charges a call the model's number of parameters, "by_step" a measured time of one step. The paper
    takes the latter from earlier work on T5; here it is measured on the models themselves.
    """
    levels = [verifier, *models]
    sizes, steps = ([measure(bound) for bound in levels] for measure in (parameter_count, step_seconds))
    return {"by_parameters": [n / sizes[0] for n in sizes[1:]], "by_step": [s / steps[0] for s in steps[1:]]}


def step_seconds(bound: Bound) -> float:
    """Seconds of one token of one row, after a prompt of one padded block: a coefficient, not a time of a run."""
    rows = batching.Batch(np.ones((1, 32), np.int32), np.zeros(1, np.int32), np.ones(1, bool), 32)
    return block_times(bound, rows, 1, 32, blocks=(1,))[1]
