"""The one decoding loop. A round is: draft, score the block, build pi, verify, commit.

Everything here is jittable and sees models only through their Protocols. With draft_len 0 a round is one
step of plain autoregression. Callers may compose the parts:

    state = init(program, inputs, key, example_ids)
    state = run(program, state, max_rounds)      # may be called again
    state = refill(program, state, rows, inputs, key, example_ids)   # new inputs into finished rows
    output = harvest(program.config, state)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from speccascade_t5x.core import probs, stopping, verify
from speccascade_t5x.core.accounting import Counts
from speccascade_t5x.core.rules import Pair
from speccascade_t5x.decoding.state import OFFSET, Program, State
from speccascade_t5x.interfaces import (
    SOURCE_ACCEPTED,
    SOURCE_BONUS,
    SOURCE_DRAFTER,
    SOURCE_PAD,
    SOURCE_RESIDUAL,
    Array,
    Proposal,
    PyTree,
)


@dataclasses.dataclass(frozen=True)
class Laws:
    """What the rule makes of one scored block: [B, G + 1, V] each, `deferral` [B, G + 1].

    Attributes:
      target: pi, tempered and truncated: what is emitted.
      target_raw: pi of the raw pair: what log-probabilities are taken of.
      deferral: probability that the rule turns to the verifier.
    """

    target: Array
    target_raw: Array
    deferral: Array


def init(program: Program, inputs: PyTree, key: Array, example_ids: Array) -> State:
    """Reads the inputs and returns the state before the first round.

    Args:
      program: what will run.
      inputs: named arrays with one row per example.
      key: random key. A row's noise depends on (key, example id, sample index, committed tokens) alone.
      example_ids: [rows] ids that name the examples, whatever batch they travel in.
    """
    config = program.config
    first_token, first = program.verifier.model.first(inputs)
    samples = config.num_samples
    batch = first_token.shape[0] * samples
    first_token, first, ids = (jnp.repeat(x, samples) for x in (first_token, first, example_ids))
    per_sample = jnp.tile(jnp.arange(samples), batch // samples)
    keys = jax.vmap(lambda i, s: jax.random.fold_in(jax.random.fold_in(key, i), s))(ids, per_sample)
    width = config.max_len + config.draft_len + 1
    tokens = jnp.full((batch, OFFSET + width), config.pad_id, jnp.int32)
    drafter = program.drafter
    return State(
        tokens=tokens.at[:, :OFFSET].set(first_token[:, None]),
        source=jnp.full((batch, width), SOURCE_PAD, jnp.int32),
        committed=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        first=first,
        keys=keys,
        log_probs=jnp.zeros(batch, jnp.float32),
        counts=Counts.zeros(batch),
        verifier_cache=program.verifier.model.start(program.verifier.params, inputs, batch, config.room),
        drafter_state=drafter and drafter.model.start(drafter.params, inputs, batch, config.room),
    )


def refill(
    program: Program, state: State, rows: Array, inputs: PyTree, key: Array, example_ids: Array
) -> State:
    """Replaces rows by fresh ones. Input shapes must be those of `init`, so that nothing recompiles.

    Args:
      program: what runs.
      state: the state to change.
      rows: [B] bool, which rows are replaced. All samples of an example must be replaced together.
      inputs: as for `init`, full batch; only the replaced rows are read.
      key: as for `init`.
      example_ids: as for `init`.
    """
    fresh = init(program, inputs, key, example_ids)
    choose = lambda new, old: jnp.where(probs.expand_right(rows, new.ndim), new, old)  # noqa: E731
    return jax.tree.map(choose, fresh, state)


def run(
    program: Program, state: State, max_rounds: int | Array, loop: Literal["lax", "python"] = "lax"
) -> State:
    """Runs rounds until every row is done, or `max_rounds` of them.

    Args:
      program: what runs.
      state: from `init`, `refill` or an earlier `run`.
      max_rounds: bound for this call; traced.
      loop: "python" runs the same round eagerly, for breakpoints and tests.
    """
    if loop == "python":
        for _ in range(int(max_rounds)):
            if bool(jnp.all(state.done)):
                break
            state = advance(program, state)
        return state

    def unfinished(carry: tuple[Array, State]) -> Array:
        return (carry[0] < max_rounds) & ~jnp.all(carry[1].done)

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        return carry[0] + 1, advance(program, carry[1])

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def advance(program: Program, state: State) -> State:
    """One round for every row; rows that are done do not change."""
    config = program.config
    draft_noise, accept_noise, residual_noise = _noise(program, state)
    last_two = jax.vmap(lambda row, n: jax.lax.dynamic_slice(row, (n,), (2,)))(state.tokens, state.committed)
    positions = state.first + state.committed
    proposal, drafter_state = _propose(program, state, last_two, positions, draft_noise)
    block = jnp.concatenate([last_two[:, 1:], proposal.tokens], axis=1)
    verifier = program.verifier
    logits, cache = verifier.model.extend(verifier.params, state.verifier_cache, block, positions)
    laws = rule_laws(program, proposal, logits[..., : program.width], positions)
    outcome = verify.BY_NAME[config.verification](
        proposal.tokens, proposal.lengths, proposal.law, laws.target, accept_noise, residual_noise
    )
    state = dataclasses.replace(state, verifier_cache=cache, drafter_state=drafter_state)
    return _commit(program, state, proposal, laws, outcome)


def _noise(program: Program, state: State) -> tuple[Array, Array, Array]:
    """This round's uniforms: [B, drafter's], [B, G] for accepting, [B] for the residual or bonus token.

    Fresh per round: later drafts took part in choosing where the last round stopped, so noise indexed by a
    token's absolute position would make block verification wrong.
    """
    drafting = program.drafter.model.noise_size if program.drafter else 0
    drafts = program.config.draft_len
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.committed)
    noise = jax.vmap(lambda k: jax.random.uniform(k, (drafting + drafts + 1,)))(keys)
    return noise[:, :drafting], noise[:, drafting : drafting + drafts], noise[:, -1]


def _propose(
    program: Program, state: State, last_two: Array, positions: Array, noise: Array
) -> tuple[Proposal, PyTree]:
    """Asks the drafter, or returns the empty proposal where there is none."""
    if program.drafter is None:
        batch = last_two.shape[0]
        empty = jnp.zeros((batch, 0), jnp.int32)
        law = jnp.zeros((batch, 0, program.width), jnp.float32)
        return Proposal(empty, jnp.zeros(batch, jnp.int32), law, None, None), None
    drafter = program.drafter
    return drafter.model.propose(drafter.params, state.drafter_state, last_two, positions, noise)


def rule_laws(program: Program, proposal: Proposal, logits: Array, positions: Array) -> Laws:
    """Builds pi for a scored block.

    Args:
      program: its rule, sampling and vocabulary size are used.
      proposal: its q and q_raw are read where the rule reads the drafter.
      logits: [B, G + 1, V] of the verifier.
      positions: [B] of the block's first token.
    """
    rule, sampling, vocab_size = program.rule, program.sampling, program.config.vocab_size
    p_raw = probs.raw(logits, vocab_size)
    p = probs.tempered(logits, sampling.temperature, vocab_size)
    q, q_raw = proposal.q, proposal.q_raw
    if rule.truncates_inputs:
        p, q = probs.truncate(p, sampling), q if q is None else probs.truncate(q, sampling)
    position = positions[:, None] + jnp.arange(logits.shape[1])
    greedy = jnp.asarray(sampling.temperature) == 0.0
    pair = Pair(q=q, p=p, q_raw=q_raw, p_raw=p_raw, greedy=greedy, position=position)
    target = rule.target(pair)
    if not rule.truncates_inputs:
        target = probs.truncate(target, sampling)
    raw_pair = Pair(q=q_raw, p=p_raw, q_raw=q_raw, p_raw=p_raw, position=position)
    return Laws(target, rule.target(raw_pair), rule.deferral(pair))


def _commit(
    program: Program, state: State, proposal: Proposal, laws: Laws, outcome: verify.Verification
) -> State:
    """Writes what the round emitted, cut at each row's end, and counts it."""
    config, alive = program.config, ~state.done
    width = config.draft_len + 1
    column, stop = jnp.arange(width), outcome.accepted[:, None]
    drafted = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    block = jnp.where(column < stop, drafted, outcome.token[:, None])
    after = jnp.where(outcome.bonus, SOURCE_BONUS, SOURCE_RESIDUAL) if config.draft_len else program.solo_source
    source = jnp.where(column < stop, SOURCE_ACCEPTED, jnp.broadcast_to(after, alive.shape)[:, None])
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    tokens = put(state.tokens, block, OFFSET + state.committed)
    grown, ended = stopping.trim(
        tokens,
        state.committed,
        outcome.accepted + 1,
        offset=OFFSET,
        width=width,
        max_len=config.max_len,
        eos_id=config.eos_id,
        stop_sequences=config.stop_sequences,
    )
    grown = jnp.where(alive, grown, 0)
    kept = column < grown[:, None]
    emitted = jnp.take_along_axis(laws.target_raw, block[..., None], axis=-1)[..., 0]
    tiny = jnp.finfo(jnp.float32).tiny  # a law at temperature 1 may underflow where the sampled one did not
    log_probs = jnp.sum(jnp.where(kept, jnp.log(jnp.maximum(emitted, tiny)), 0.0), axis=1)
    # A drafter that runs alone sits in the verifier's place of the loop, but its calls are a drafter's.
    verified = program.solo_source != SOURCE_DRAFTER
    counts = state.counts.add(
        alive,
        rounds=1,
        drafter_calls=program.drafter.model.calls_per_round if program.drafter else int(not verified),
        verifier_calls=int(verified),
        drafted=proposal.lengths,
        accepted=jnp.minimum(outcome.accepted, grown),
        examined=jnp.minimum(grown, outcome.accepted + ~outcome.bonus),
        committed=grown,
        scored=width if verified else 0,
        deferred=jnp.sum(jnp.where(kept, laws.deferral, 0.0), axis=1) if verified else 0.0,
    )
    committed = state.committed + grown
    drafter_state = state.drafter_state
    if program.drafter:
        drafter_state = program.drafter.model.commit(drafter_state, committed)
    return dataclasses.replace(
        state,
        tokens=tokens,
        source=put(state.source, source, state.committed),
        committed=committed,
        done=state.done | ended,
        log_probs=state.log_probs + log_probs,
        counts=counts,
        drafter_state=drafter_state,
    )
