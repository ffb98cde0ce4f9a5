"""The speculative round: draft, score the block, build pi, verify, commit."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.core import probs, verify
from speccascade_t5x.core.accounting import Counts
from speccascade_t5x.core.noise import uniforms
from speccascade_t5x.core.rules import Pair
from speccascade_t5x.decoding.emit import Emission, emit
from speccascade_t5x.decoding.laws import rule_laws
from speccascade_t5x.decoding.state import Program, State, Trace
from speccascade_t5x.interfaces import (
    SOURCE_ACCEPTED,
    SOURCE_BONUS,
    SOURCE_DRAFTER,
    SOURCE_RESIDUAL,
    SOURCE_VERIFIER,
    Array,
    Proposal,
    PyTree,
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Speculative:
    """GenSpecSample of "Faster Cascades via Speculative Decoding"; plain autoregression where nothing is drafted.

    Attributes:
      solo: the model in the verifier's place if nothing is drafted: "verifier", "drafter" (a model alone,
        counted as such), or "oracle" (the verifier is charged only at the tokens a prefix rule defers, as if
        its test were free: Oracle[Diff]).
    """

    solo: str = "verifier"
    writings: ClassVar[int] = 1

    def begin(self, program: Program, first: Array) -> PyTree:
        """This execution has no progress to carry."""
        return None

    def round(self, program: Program, state: State) -> State:
        """One round; see Execution."""
        config = program.config
        draft_noise, accept_noise, residual_noise = noise(program, state)
        last_two, positions = last_tokens(state), state.first + state.committed
        proposal, drafter_state = propose(program, state, last_two, positions, draft_noise)
        block = jnp.concatenate([last_two[:, 1:], proposal.tokens], axis=1)
        verifier = program.verifier
        capture = ("hidden",) if program.rule.reads_hidden else ()
        found, cache = verifier.model.extend(verifier.params, state.verifier_cache, block, positions, capture)
        logits, hidden = (found[0], found[1]["hidden"]) if capture else (found, None)
        logits = logits[..., : program.width]
        judged = judge(program, proposal, logits, state.committed, accept_noise, residual_noise, hidden)
        outcome, deferral = judged.outcome, judged.deferral
        accepted = jnp.arange(config.draft_len + 1) < outcome.accepted[:, None]
        emission = Emission(
            tokens=judged.tokens,
            source=jnp.where(accepted, SOURCE_ACCEPTED, self._source(program, outcome, deferral)),
            grown=outcome.accepted + 1,
            prob_raw=judged.prob_raw,
            deferral=deferral if self.solo != "drafter" else jnp.zeros_like(deferral),
            trace=_as_drafter(judged.trace) if self.solo == "drafter" else judged.trace,
        )
        alive = ~state.done
        state = dataclasses.replace(state, verifier_cache=cache, drafter_state=drafter_state)
        state, grown = emit(program, state, emission)
        counts = self._count(program, state, alive, proposal, outcome, grown, deferral)
        return dataclasses.replace(commit_drafter(program, state), counts=counts)

    def _source(self, program: Program, outcome: verify.Verification, deferral: Array) -> Array:
        """[B, 1] who wrote the token after the accepted ones."""
        if program.config.draft_len or (program.rule.reads_drafter and self.solo != "oracle"):
            return jnp.where(outcome.bonus, SOURCE_BONUS, SOURCE_RESIDUAL)[:, None]
        if self.solo == "oracle":
            return jnp.where(deferral[:, :1] > 0, SOURCE_VERIFIER, SOURCE_DRAFTER)
        return jnp.full(deferral[:, :1].shape, SOURCE_DRAFTER if self.solo == "drafter" else SOURCE_VERIFIER)

    def _count(
        self,
        program: Program,
        state: State,
        alive: Array,
        proposal: Proposal,
        outcome: verify.Verification,
        grown: Array,
        deferral: Array,
    ) -> Counts:
        """The counters after a round in which the rows that were alive grew by `grown`."""
        drafts = program.config.draft_len
        calls: Array | int
        scored: Array | int
        calls, scored = {"verifier": (1, drafts + 1), "drafter": (0, 0)}.get(self.solo, (0, 0))
        if self.solo == "oracle":
            calls = scored = (deferral[:, 0] > 0).astype(jnp.int32)
        return state.counts.add(
            alive,
            rounds=1,
            drafter_calls=proposal.calls if program.drafter else int(self.solo == "drafter"),
            verifier_calls=calls,
            drafted=proposal.lengths,
            accepted=jnp.minimum(outcome.accepted, grown),
            examined=jnp.minimum(grown, outcome.accepted + ~outcome.bonus),
            scored=scored,
        )


def _as_drafter(trace: Trace | None) -> Trace | None:
    """Columns of a model in the verifier's place, moved to those of the drafter."""
    if trace is None:
        return None
    return dataclasses.replace(
        trace,
        max_q=trace.max_p,
        max_p=trace.max_q,
        entropy_q=trace.entropy_p,
        entropy_p=trace.entropy_q,
        deferral=jnp.zeros_like(trace.deferral),
    )


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The decisions of a round about one scored block; none of the arrays is as wide as the vocabulary.

    Attributes:
      outcome: how much of the draft is accepted, and the token after it.
      tokens: [B, G + 1] the accepted tokens, and after them the round's last one in every column.
      prob_raw: [B, G + 1] pi of each of `tokens` at temperature 1, untruncated; NaN if a distribution read was.
      deferral: [B, G + 1] probability that the rule turns to the verifier.
      trace: [B, G + 1] diagnostics, or None.
    """

    outcome: verify.Verification
    tokens: Array
    prob_raw: Array
    deferral: Array
    trace: Trace | None


trees.register(Judgement)


def judge(
    program: Program,
    proposal: Proposal,
    logits: Array,
    positions: Array,
    accept_noise: Array,
    residual_noise: Array,
    hidden: Array | None = None,
) -> Judgement:
    """Builds pi for a block of the verifier's logits [B, G + 1, V] from output positions [B] on; verifies the draft.

    `hidden` [B, G + 1, D] are its last hidden states, for rules that read them.

    If no row asks for a temperature or a truncation, the raw distributions are used as they are: the branch for that
    case makes no second copy. Distributions as wide as the vocabulary stay inside a branch, since outputs are copied.
    """
    p_raw = probs.raw(logits, program.config.vocab_size)
    position = positions[:, None] + jnp.arange(logits.shape[1])
    pair_raw = Pair(
        q=proposal.q_raw,
        p=p_raw,
        q_raw=proposal.q_raw,
        p_raw=p_raw,
        position=position,
        hidden_q=proposal.hidden,
        hidden_p=hidden,
    )
    column, padded = jnp.arange(logits.shape[1]), jnp.pad(proposal.tokens, ((0, 0), (0, 1)))

    def judged(plain: bool) -> Judgement:
        laws = rule_laws(program, pair_raw, logits, proposal.q, plain)
        outcome = verify.BY_NAME[program.config.verification](
            proposal.tokens, proposal.lengths, proposal.law, laws.target, accept_noise, residual_noise
        )
        tokens = jnp.where(column < outcome.accepted[:, None], padded, outcome.token[:, None])
        broken = laws.broken
        if program.config.verification != "token":  # reads the distributions of the whole draft
            broken = jnp.any(broken & (column <= proposal.lengths[:, None]), axis=1, keepdims=True)
        prob_raw = jnp.where(broken, jnp.nan, program.rule.target_at(pair_raw, tokens))
        return Judgement(outcome, tokens, prob_raw, laws.deferral, laws.trace)

    found = jax.lax.cond(probs.is_plain(program.sampling), lambda: judged(True), lambda: judged(False))
    return dataclasses.replace(found, prob_raw=jnp.where(_broken(proposal), jnp.nan, found.prob_raw))


def _broken(proposal: Proposal) -> Array:
    """[B, 1] bool: the draft came from an invalid distribution (NaN, or all zero), or its drafter reports it as broken.

    A NaN of the drafter would otherwise pass unseen under a rule whose pi does not read it. It shows at the drafted
    token: no token of probability 0 is ever drawn from a distribution, and a softmax with one NaN is NaN everywhere.
    """
    counted = jnp.arange(proposal.tokens.shape[1]) < proposal.lengths[:, None]
    found = jnp.any(counted & ~(probs.gather(proposal.law, proposal.tokens) > 0), axis=1, keepdims=True)
    return found if proposal.broken is None else found | proposal.broken[:, None]


def noise(program: Program, state: State) -> tuple[Array, Array, Array]:
    """This round's uniforms: [B, drafter's], [B, G] for accepting, [B, DRAW] for the residual or bonus token.

    Fresh per round: later drafts took part in choosing where the last round stopped, so noise indexed by a
    token's absolute position would make block verification wrong.
    """
    drafting = program.drafter.model.noise_size if program.drafter else 0
    drafts = program.config.draft_len
    found = row_uniforms(state, drafting + drafts + probs.DRAW)
    return found[:, :drafting], found[:, drafting : drafting + drafts], found[:, drafting + drafts :]


def row_uniforms(state: State, size: int) -> Array:
    """[B, size] uniforms of this round, from each row's key and the number of tokens it has committed."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.committed)
    return jax.vmap(lambda key: uniforms(key, size))(keys)


def last_tokens(state: State) -> Array:
    """[B, 2] the last two tokens of each row; the first token twice if there is no output yet."""
    return jax.vmap(lambda row, n: jax.lax.dynamic_slice(row, (n,), (2,)))(state.tokens, state.committed)


def propose(
    program: Program, state: State, last_two: Array, positions: Array, draft_noise: Array
) -> tuple[Proposal, PyTree]:
    """Asks the drafter for a proposal, or returns the empty proposal if there is no drafter."""
    if program.drafter is None:
        batch = last_two.shape[0]
        none = jnp.zeros(batch, jnp.int32)
        law = jnp.zeros((batch, 0, program.width), jnp.float32)
        return Proposal(jnp.zeros((batch, 0), jnp.int32), none, law, None, None, none), None
    drafter = program.drafter
    return drafter.model.propose(drafter.params, state.drafter_state, last_two, positions, draft_noise)


def commit_drafter(program: Program, state: State) -> State:
    """Tells the drafter how far each row has come."""
    if program.drafter is None:
        return state
    return dataclasses.replace(state, drafter_state=program.drafter.model.commit(state.drafter_state, state.committed))
