"""Baselines that run the two models in sequence, as rounds of the same loop: token and sequence cascades."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.core import probs
from speccascade_t5x.decoding.emit import Emission, emit, trim, write_rows
from speccascade_t5x.decoding.laws import describe
from speccascade_t5x.decoding.rounds import commit_drafter, last_tokens, noise, propose, row_uniforms
from speccascade_t5x.decoding.state import OFFSET, Program, State
from speccascade_t5x.interfaces import SOURCE_DRAFTER, SOURCE_VERIFIER, Array, PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TokenCascade:
    """TokenCascade: the drafter writes until the rule defers, then the verifier writes one token.

    It supports only rules whose test reads the drafter alone (Chow, ChowLog). The drafter's `stop` is that test, so a
    draft is exactly what the rule keeps and nothing is verified. The verifier runs only if a row defers; its cache then
    catches up over the tokens it has not seen, in chunks of draft_len + 1, each counted as a call.
    `progress` is {"seen": [B]}: how many positions the verifier's cache holds.
    """

    writings: ClassVar[int] = 1

    def begin(self, program: Program, first: Array) -> PyTree:
        """The verifier has seen nothing."""
        return {"seen": jnp.zeros_like(first)}

    def round(self, program: Program, state: State) -> State:
        """One draft, and one token of the verifier in the rows that defer; see Execution."""
        alive = ~state.done
        program = _without_bonus(program)
        draft_noise, _, verifier_noise = noise(program, state)
        positions = state.first + state.committed
        proposal, drafter_state = propose(program, state, last_tokens(state), positions, draft_noise)
        lengths = proposal.lengths
        drafted = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
        width = program.config.draft_len + 1
        column = jnp.arange(width)
        written = write_rows(state.tokens, drafted, OFFSET + state.committed)
        _, ended = trim(program.config, written, state.committed, lengths, width)
        defers = (lengths < program.config.draft_len) & alive & ~ended
        state = dataclasses.replace(state, drafter_state=drafter_state, tokens=written)
        state, logits, calls, scored = _catch_up(program, state, state.committed + lengths, defers)
        sampling, vocab_size = program.sampling, program.config.vocab_size
        p_raw = probs.raw(logits, vocab_size)
        p = probs.tempered(logits, sampling.temperature, vocab_size, p_raw)
        token = probs.sample(probs.truncate(p, sampling), verifier_noise)
        turn = column == lengths[:, None]
        tokens = jnp.where(turn, token[:, None], drafted)
        by_drafter = jnp.pad(probs.gather(proposal.q_raw, tokens[:, :-1]), ((0, 0), (0, 1)))
        by_verifier = jnp.take_along_axis(p_raw, token[:, None], axis=-1)
        # The drafter's distribution is read even where the rule defers.
        broken = jnp.pad(probs.is_broken(proposal.q_raw), ((0, 0), (0, 1)))
        broken |= turn & probs.is_broken(p_raw)[:, None]
        trace = None
        if program.config.trace:
            here, there = (jnp.where(turn[:, :-1, None], x[:, None], jnp.nan) for x in (p, p_raw))
            trace = describe(proposal.q, here, proposal.q_raw, there)
            # Nothing is ever written in the last column: after a draft of full length the round ends.
            trace = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1)), constant_values=jnp.nan), trace)
            trace = dataclasses.replace(trace, deferral=turn.astype(jnp.float32))
        emission = Emission(
            tokens=tokens,
            source=jnp.where(turn, SOURCE_VERIFIER, SOURCE_DRAFTER),
            grown=lengths + defers,
            prob_raw=jnp.where(broken, jnp.nan, jnp.where(turn, by_verifier, by_drafter)),
            deferral=turn.astype(jnp.float32),
            trace=trace,
        )
        state, _ = emit(program, state, emission)
        counts = state.counts.add(
            alive, rounds=1, drafter_calls=proposal.calls, drafted=lengths, verifier_calls=calls, scored=scored
        )
        return dataclasses.replace(commit_drafter(program, state), counts=counts)


def _without_bonus(program: Program) -> Program:
    """The program with a drafter that scores no bonus position: after a full draft the verifier writes nothing."""
    drafter: Any = program.drafter  # a token cascade has one
    model = dataclasses.replace(drafter.model, score_bonus=False, report_q=True)
    return dataclasses.replace(program, drafter=dataclasses.replace(drafter, model=model))


def _catch_up(program: Program, state: State, target: Array, wanted: Array) -> tuple[State, Array, Array, Array]:
    """Feeds the verifier every unseen token up to position `target` in the rows that want it.

    Returns:
      (state, logits [B, V] after the target, calls [B], scored [B]). Rows that want nothing keep their place.
    """
    chunk, verifier = program.config.draft_len + 1, program.verifier
    start_column = OFFSET - 1  # the token at decoder position `first` is the last one before the output
    batch = target.shape[0]

    def unfinished(carry):
        return jnp.any(wanted & (carry[1] <= target))

    def feed(carry):
        cache, seen, logits, calls, scored = carry
        active = wanted & (seen <= target)
        take = lambda row, at: jax.lax.dynamic_slice(row, (at,), (chunk,))  # noqa: E731
        block = jax.vmap(take)(state.tokens, start_column + seen)
        found, cache = verifier.model.extend(verifier.params, cache, block, state.first + seen)
        offset = target - seen
        here = active & (offset < chunk)
        column = jnp.clip(offset, 0, chunk - 1)
        picked = jnp.take_along_axis(found[..., : program.width], column[:, None, None], axis=1)[:, 0]
        logits = jnp.where(here[:, None], picked.astype(jnp.float32), logits)
        seen = jnp.where(active, jnp.minimum(seen + chunk, target + 1), seen)
        return cache, seen, logits, calls + active, scored + active * chunk

    none = jnp.zeros(batch, jnp.int32)
    carry = (
        state.verifier_cache,
        state.progress["seen"],
        jnp.zeros((batch, program.width), jnp.float32),
        none,
        none,
    )
    cache, seen, logits, calls, scored = jax.lax.while_loop(unfinished, feed, carry)
    return dataclasses.replace(state, verifier_cache=cache, progress={"seen": seen}), logits, calls, scored


@dataclasses.dataclass(frozen=True)
class SequenceCascade:
    """SeqCascade: the drafter writes the whole output; below a threshold of its confidence the verifier rewrites it.

    Confidences of a written sequence (Gupta et al. 2024), from the drafter's log-probabilities at temperature 1:
    "sum", "mean" (length-normalised), or "quantile" of the per-token log-probabilities. `progress` is
    {"rewriting": [B] bool, "log_probs": [B, N]}.

    Attributes:
      threshold: a log-probability, scalar or [B]; below it the sequence is deferred. Traced.
      quantile: 0 takes the least likely token, 1 the most likely; read by "quantile" only. Traced.
      confidence: the measure of confidence; static.
    """

    threshold: Array | float
    quantile: Array | float = 0.0
    confidence: str = "mean"
    writings: ClassVar[int] = 2

    def begin(self, program: Program, first: Array) -> PyTree:
        """Every row begins with the drafter."""
        width = program.config.max_len + program.config.draft_len + 1
        return {
            "rewriting": jnp.zeros(first.shape, bool),
            "log_probs": jnp.zeros((first.shape[0], width), jnp.float32),
        }

    def round(self, program: Program, state: State) -> State:
        """One token of each row, from the model whose turn it is; see Execution."""
        alive, rewriting = ~state.done, state.progress["rewriting"]
        # Two streams, because the choice to rewrite depends on the first one and the second writing needs its own.
        both = row_uniforms(state, 2 * probs.DRAW)
        uniforms = jnp.where(rewriting[:, None], both[:, probs.DRAW :], both[:, : probs.DRAW])
        block, positions = last_tokens(state)[:, 1:], state.first + state.committed
        q_logits, drafter_state = _step(program.drafter, state.drafter_state, block, positions, alive & ~rewriting)
        p_logits, cache = _step(program.verifier, state.verifier_cache, block, positions, alive & rewriting)
        width = program.width
        logits = jnp.where(rewriting[:, None], p_logits[:, :width], q_logits[:, :width])
        sampling, vocab_size = program.sampling, program.config.vocab_size
        law_raw = probs.raw(logits, vocab_size)
        law = probs.tempered(logits, sampling.temperature, vocab_size, law_raw)
        token = probs.sample(probs.truncate(law, sampling), uniforms)[:, None]
        prob_raw = jnp.take_along_axis(law_raw, token, axis=-1)
        state = dataclasses.replace(state, verifier_cache=cache, drafter_state=drafter_state)
        log_probs = write_rows(state.progress["log_probs"], jnp.log(prob_raw), state.committed)
        deferral = rewriting[:, None].astype(jnp.float32)
        trace = None
        if program.config.trace:
            of = lambda mine: jnp.where(mine[:, None, None], law_raw[:, None], jnp.nan)  # noqa: E731
            trace = dataclasses.replace(describe(None, None, of(~rewriting), of(rewriting)), deferral=deferral)
        emission = Emission(
            tokens=token,
            source=jnp.where(rewriting[:, None], SOURCE_VERIFIER, SOURCE_DRAFTER),
            grown=jnp.ones_like(state.committed),
            prob_raw=prob_raw,
            deferral=deferral,
            trace=trace,
        )
        state, _ = emit(program, state, emission)
        state = dataclasses.replace(
            state,
            progress={"rewriting": rewriting, "log_probs": log_probs},
            counts=state.counts.add(
                alive, rounds=1, drafter_calls=~rewriting, verifier_calls=rewriting, scored=rewriting
            ),
        )
        deferred = state.done & alive & ~rewriting & (self._score(log_probs, state.committed) < self.threshold)
        return _rewrite(state, deferred)

    def _score(self, log_probs: Array, lengths: Array) -> Array:
        """[B] confidence of the sequences [B, N] of these lengths."""
        inside = jnp.arange(log_probs.shape[1]) < lengths[:, None]
        total = jnp.sum(jnp.where(inside, log_probs, 0.0), axis=1)
        if self.confidence == "sum":
            return total
        if self.confidence == "mean":
            return total / jnp.maximum(lengths, 1)
        ordered = jnp.sort(jnp.where(inside, log_probs, jnp.inf), axis=1)
        place = jnp.asarray(self.quantile, jnp.float32) * (lengths - 1)
        below = jnp.floor(place).astype(jnp.int32)
        above = jnp.minimum(below + 1, lengths - 1)
        pick = lambda at: jnp.take_along_axis(ordered, at[:, None], axis=1)[:, 0]  # noqa: E731
        return pick(below) + (place - below) * (pick(above) - pick(below))


trees.register(SequenceCascade, static=["confidence"])


def _step(bound, cache: PyTree, block: Array, positions: Array, rows: Array) -> tuple[Array, PyTree]:
    """One step of a model, [B, V] logits; skipped if no row needs it."""
    run = lambda cache: bound.model.extend(bound.params, cache, block, positions)  # noqa: E731
    shape = jax.eval_shape(run, cache)[0]
    idle = lambda cache: (jnp.zeros(shape.shape, shape.dtype), cache)  # noqa: E731
    logits, cache = jax.lax.cond(jnp.any(rows), run, idle, cache)
    return logits[:, 0].astype(jnp.float32), cache


def _rewrite(state: State, rows: Array) -> State:
    """Resets rows to their beginning, so that the verifier writes them again; their cost stays counted."""
    counts = dataclasses.replace(
        state.counts,
        committed=jnp.where(rows, 0, state.counts.committed),
        deferred=jnp.where(rows, 0.0, state.counts.deferred),
    )
    return dataclasses.replace(
        state,
        committed=jnp.where(rows, 0, state.committed),
        done=state.done & ~rows,
        # A NaN of the drafter stays: the choice to rewrite was made on it.
        log_probs=jnp.where(rows & ~jnp.isnan(state.log_probs), 0.0, state.log_probs),
        counts=counts,
        progress={**state.progress, "rewriting": state.progress["rewriting"] | rows},
    )
