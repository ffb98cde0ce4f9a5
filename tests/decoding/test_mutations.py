"""Planted bugs: each must make the check fail that guards against it. What the law tests show is what they can miss.

| planted bug (each a mistake real engines have made)              | check that must fail                           |
|------------------------------------------------------------------|------------------------------------------------|
| bonus_from_the_verifier: the bonus token is drawn from p         | law, token_v3                                  |
| residual_of_the_verifier: norm(max(0, p - q)) after a rejection  | law, token_v3                                  |
| acceptance_by_the_verifier: min(1, p / d) instead of pi / d      | law, token_v3                                  |
| acceptance_at_equality: u d <= pi, wrong where u is exactly 0    | impossible outputs, at scripted uniforms of 0  |
| draft_law_before_truncation: d reported untruncated              | law, token_v3 with top-k                       |
| noise_by_absolute_position: a later round uses old noise again   | law, lossless by block verification            |
| low_confidence_token_thrown_away: dynamic drafts look at x       | law, lossless                                  |
| lengths_ignored: padding of a short draft is verified            | law, dynamic drafts by block verification      |
| rewriting_with_the_drafters_noise: one stream for both writings  | law, sequence cascade                          |
| no_rollback: slots of rejected tokens are not overwritten        | law, lossless                                  |
| last_draft_not_cached: the drafter misses its last drafted token | law, token_v3                                  |
| one_token_fed_back: the same where no bonus position is scored   | equal models never reject                      |
| end_not_trimmed: EOS is looked for at the end of a block only    | impossible outputs                             |
| alpha_along_the_vocabulary: [B] meets V instead of B             | alpha per row is alpha alone                   |
| verifier_not_caught_up: it sees the last kept token only         | law, token cascade                             |

Every check passes without the bug (`test_without_a_bug_every_check_passes`, some of them slow).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import executions
from decoding.executions import ALPHAS, MAX_LEN, TABLES, TRUNCATIONS, config_of, rule_of, sampling_of
from decoding.tables import exact_law, inputs, outputs, random_tables, tally
from optimized import optimized_jit
from oracles.tables import agreement
from speccascade_t5x import decoding
from speccascade_t5x.core import probs, rules, stopping, verify
from speccascade_t5x.decoding import emit, loop, rounds, sequential
from speccascade_t5x.drafting import ModelDrafter
from speccascade_t5x.models import bigram
from speccascade_t5x.models.table import TableModel

ROWS, VOCAB = 25_000, 4
WIDE = random_tables(0, VOCAB, MAX_LEN)


def fresh(program: decoding.Program, rows: int, seed: int = 3) -> decoding.Output:
    """Decodes in a program compiled for this call, so that patched functions are traced."""

    def decode(program, key):
        state = loop.init(program, inputs(rows), key, jnp.arange(rows))
        program = loop.per_row(program, state.done.shape[0])
        return decoding.finish(program.config, loop.run(program, state, program.max_rounds))

    return optimized_jit(decode)(program, jax.random.key(seed))


# Checks: each returns whether what it looks at is in order.


def speculation(rule: str, draft_len: int, how: str = "token", rows: int = ROWS, truncation: str = "off") -> bool:
    """Whole outputs follow the law of the rule."""
    program = decoding.speculative_program(
        *map(bigram, WIDE),
        rule_of(rule),
        config_of(draft_len, verification=how),
        sampling_of(1.0, truncation),
    )
    law = exact_law(rule, ALPHAS[rule], *WIDE, MAX_LEN, 1.0, TRUNCATIONS[truncation])
    return agreement(tally(fresh(program, rows), VOCAB), law).holds


def dynamic_drafts(rule: str = "lossless", how: str = "token") -> bool:
    """The same with a draft that stops where the drafter is not confident."""
    program = executions.dynamic("confidence", rule, config_of(verification=how))
    return agreement(tally(fresh(program, ROWS), 3), executions.law_of(rule)).holds


def token_cascade() -> bool:
    """Whole outputs of a token cascade follow the law of its rule."""
    program = executions.cascade("chow", config_of(1))
    return agreement(tally(fresh(program, ROWS), 3), executions.law_of("chow", tables=executions.KEEPING)).holds


def sequence_cascade() -> bool:
    """Whole outputs of a sequence cascade follow the mixture of both models' laws."""
    scores = executions.drafted_scores("mean", 0.0)
    drafter, verifier = (exact_law("lossless", None, t, t, MAX_LEN) for t in TABLES)
    threshold = executions.middle(scores, drafter)
    deferred = sum(share for output, share in drafter.items() if scores[output] < threshold)
    law = {
        output: (scores[output] >= threshold) * share + deferred * verifier[output] for output, share in drafter.items()
    }
    return agreement(tally(fresh(executions.sequence(threshold), ROWS), 3), law).holds


def nothing_impossible(setting: Callable[[], tuple]) -> bool:
    """No output that the verifier would never write."""
    truncation, program = setting()
    law = exact_law("lossless", None, *WIDE, MAX_LEN, 1.0, truncation)
    return not agreement(tally(fresh(program, 500), VOCAB), law).impossible


def one_token_laws() -> tuple:
    """Top-1 laws of two models: a draft they differ on has target probability 0."""
    sampling = dataclasses.replace(sampling_of(), top_k=np.int32(1))
    return {"top_k": 1}, decoding.speculative_program(*map(bigram, WIDE), rules.Lossless(), config_of(2), sampling)


def untruncated_laws() -> tuple:
    return {}, decoding.speculative_program(*map(bigram, WIDE), rules.Lossless(), config_of(3), sampling_of())


def equal_models_never_reject() -> bool:
    model = bigram(WIDE[0])
    program = decoding.speculative_program(model, model, rules.Lossless(), config_of(2), sampling_of())
    counts = fresh(program, 500).counts
    return bool((counts.accepted == counts.examined).all())


def alpha_per_row() -> bool:
    """As many rows as tokens in the vocabulary, each of whose alphas is its own."""
    alphas = np.linspace(0.05, 0.95, VOCAB).astype(np.float32)

    def decode(alpha, seed):
        return outputs(_decode_v3(alpha, jax.random.key(seed)))

    @jax.jit
    def _decode_v3(alpha, key):
        program = decoding.speculative_program(
            *map(bigram, WIDE), rules.TokenV3(alpha), config_of(2, max_len=8), sampling_of()
        )
        state = loop.init(program, inputs(VOCAB), key, jnp.arange(VOCAB))
        return decoding.finish(program.config, loop.run(program, state, program.max_rounds))

    for seed in range(12):
        together = decode(alphas, seed)
        if together != [decode(alpha, seed)[i] for i, alpha in enumerate(alphas)]:
            return False
    return True


# Planted bugs: each takes pytest's monkeypatch.

REAL_LAWS, REAL_TRIM, REAL_NOISE = rounds.rule_laws, stopping.trim, rounds.noise
REAL_PROPOSE, REAL_START = ModelDrafter.propose, TableModel.start
REAL_UNIFORMS, REAL_CATCH_UP = sequential.row_uniforms, sequential._catch_up


def _verifier_laws(program, *scored):
    return REAL_LAWS(dataclasses.replace(program, rule=rules.Lossless()), *scored)


def bonus_from_the_verifier(patch):
    def laws(program, *scored):
        right = REAL_LAWS(program, *scored)
        wrong = _verifier_laws(program, *scored).target[:, -1:]
        return dataclasses.replace(right, target=jnp.concatenate([right.target[:, :-1], wrong], 1))

    patch.setattr(rounds, "rule_laws", laws)


def _with_verifier(patch, token):
    """Token verification that is also handed the verifier's laws."""
    verifiers = []

    def laws(program, *scored):
        verifiers.append(_verifier_laws(program, *scored).target)
        return REAL_LAWS(program, *scored)

    patch.setattr(rounds, "rule_laws", laws)
    patch.setitem(verify.BY_NAME, "token", lambda *parts: token(verifiers[-1], *parts))


def residual_of_the_verifier(patch):
    def token(p, draft, lengths, law, target, accept_noise, residual_noise):
        right = verify.token(draft, lengths, law, target, accept_noise, residual_noise)
        at = jnp.minimum(right.accepted, law.shape[1] - 1)[:, None, None]
        wrong = jnp.take_along_axis(jnp.maximum(p[:, :-1] - law, 0.0), at, axis=1)[:, 0]
        redrawn = probs.sample(wrong, residual_noise)
        return dataclasses.replace(right, token=jnp.where(right.bonus, right.token, redrawn))

    _with_verifier(patch, token)


def acceptance_by_the_verifier(patch):
    def token(p, draft, lengths, law, target, accept_noise, residual_noise):
        stopped = verify.token(draft, lengths, law, p, accept_noise, residual_noise)
        return verify._next_token(
            stopped.accepted, lengths, law, target, jnp.ones(len(draft), jnp.float32), residual_noise
        )

    _with_verifier(patch, token)


def zero_noise(patch):
    """No bug: uniforms of exactly 0, as happens once in 2**24 draws."""

    def noise(program, state):
        drafting, accepting, residual = REAL_NOISE(program, state)
        return drafting, jnp.zeros_like(accepting), residual

    patch.setattr(rounds, "noise", noise)


def acceptance_at_equality(patch):
    def token(draft, lengths, law, target, accept_noise, residual_noise):
        nudged = jnp.where(accept_noise[..., None] == 0, jnp.maximum(target[:, :-1], 1e-20), target[:, :-1])
        target = jnp.concatenate([nudged, target[:, -1:]], axis=1)
        return verify.token(draft, lengths, law, target, accept_noise, residual_noise)

    zero_noise(patch)
    patch.setitem(verify.BY_NAME, "token", token)


def draft_law_before_truncation(patch):
    def propose(self, *args):
        proposal, state = REAL_PROPOSE(self, *args)
        return dataclasses.replace(proposal, law=proposal.q[:, :-1]), state

    patch.setattr(ModelDrafter, "propose", propose)


def noise_by_absolute_position(patch):
    """Later drafts took part in choosing where a round stopped: their noise is not fresh any more."""

    def noise(program, state):
        at = state.committed[:, None] + jnp.arange(program.config.draft_len + 1)

        def row(key, positions):
            keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)
            return jax.vmap(lambda k: jax.random.uniform(k, (1 + 2 * probs.DRAW,)))(keys)

        found = jax.vmap(row)(state.keys, at)
        drafting, accepting, residual = jnp.split(found, [probs.DRAW, probs.DRAW + 1], axis=-1)
        return drafting[:, :-1].reshape(len(at), -1), accepting[:, :-1, 0], residual[:, 0]

    patch.setattr(rounds, "noise", noise)


def low_confidence_token_thrown_away(patch):
    """The draft ends before the first token whose own probability is below the threshold."""

    def propose(self, *args):
        whole = dataclasses.replace(self, stop=None)
        proposal, state = REAL_PROPOSE(whole, *args)
        drawn = jnp.take_along_axis(proposal.law, proposal.tokens[..., None], axis=-1)[..., 0]
        kept = jnp.cumprod((drawn >= self.stop.threshold).astype(jnp.int32), axis=1).sum(1)
        return dataclasses.replace(proposal, lengths=kept), state

    patch.setattr(ModelDrafter, "propose", propose)


def lengths_ignored(patch):
    def block(draft, lengths, *rest):
        return verify.block(draft, jnp.full_like(lengths, draft.shape[1]), *rest)

    def propose(self, *args):  # the padding is drafted, but of no law the row has been told of
        proposal, state = REAL_PROPOSE(self, *args)
        inside = jnp.arange(self.draft_len) < proposal.lengths[:, None]
        return dataclasses.replace(proposal, tokens=jnp.where(inside, proposal.tokens, 0)), state

    patch.setitem(verify.BY_NAME, "block", block)
    patch.setattr(ModelDrafter, "propose", propose)


def rewriting_with_the_drafters_noise(patch):
    patch.setattr(
        sequential, "row_uniforms", lambda state, size: jnp.repeat(REAL_UNIFORMS(state, size)[:, :1], size, 1)
    )


def no_rollback(patch):
    """A slot that was filled once keeps its token; -1 marks the slots that never were."""

    def start(self, *args):
        return {"tokens": REAL_START(self, *args)["tokens"] - 1 - self.start_id}

    real = TableModel.extend

    def extend(self, params, cache, tokens, positions, capture=()):
        slots = positions[:, None] + jnp.arange(tokens.shape[1])
        stored = jnp.take_along_axis(cache["tokens"], slots, axis=1)
        return real(self, params, cache, jnp.where(stored >= 0, stored, tokens), positions, capture)

    patch.setattr(TableModel, "start", start)
    patch.setattr(TableModel, "extend", extend)


def last_draft_not_cached(patch):
    def propose(self, params, state, tokens, positions, noise):
        proposal, after = REAL_PROPOSE(self, params, state, tokens, positions, noise)
        stored = after["cache"]["tokens"]
        slot = positions[:, None] + self.draft_len
        stored = jnp.where(jnp.arange(stored.shape[1]) == slot, 0, stored)
        return proposal, {**after, "cache": {"tokens": stored}}

    patch.setattr(ModelDrafter, "propose", propose)


def one_token_fed_back(patch):
    def catch_up(self, params, state, tokens, positions):
        found, cache = self._extend(params, state["cache"], tokens[:, 1:], positions)
        return jax.tree.map(lambda x: x[:, 0], found), cache

    patch.setattr(ModelDrafter, "_catch_up", catch_up)


def end_not_trimmed(patch):
    def trim(buffer, committed, grown, **options):
        last = committed + grown - 1
        _, done = REAL_TRIM(buffer, last, jnp.ones_like(grown), **options)
        return jnp.minimum(grown, options["max_len"] - committed), done | (last + 1 >= options["max_len"])

    patch.setattr(emit.stopping, "trim", trim)


def alpha_along_the_vocabulary(patch):
    patch.setattr(rules.AlphaRule, "_alpha", lambda self, rank: jnp.asarray(self.alpha, jnp.float32))


def verifier_not_caught_up(patch):
    def catch_up(program, state, target, wanted):
        seen = jnp.where(wanted, target, state.progress["seen"])
        return REAL_CATCH_UP(program, dataclasses.replace(state, progress={"seen": seen}), target, wanted)

    patch.setattr(sequential, "_catch_up", catch_up)


V3 = functools.partial(speculation, "token_v3", 2)
V3_SHORT = functools.partial(speculation, "token_v3", 1)
V3_TOP_K = functools.partial(speculation, "token_v3", 2, truncation="top_k")
LOSSLESS = functools.partial(speculation, "lossless", 2)
LOSSLESS_BLOCK = functools.partial(speculation, "lossless", 3, "block", 4 * ROWS)
DYNAMIC_BLOCK = functools.partial(dynamic_drafts, "lossless", "block")
TOP_1 = functools.partial(nothing_impossible, one_token_laws)
POSSIBLE = functools.partial(nothing_impossible, untruncated_laws)

# (planted bug, the check that must find it)
BUGS = [
    (bonus_from_the_verifier, V3_SHORT),
    (residual_of_the_verifier, V3),
    (acceptance_by_the_verifier, V3),
    (acceptance_at_equality, TOP_1),
    (draft_law_before_truncation, V3_TOP_K),
    (noise_by_absolute_position, LOSSLESS_BLOCK),
    (low_confidence_token_thrown_away, dynamic_drafts),
    (lengths_ignored, DYNAMIC_BLOCK),
    (rewriting_with_the_drafters_noise, sequence_cascade),
    (no_rollback, LOSSLESS),
    (last_draft_not_cached, V3),
    (one_token_fed_back, equal_models_never_reject),
    (end_not_trimmed, POSSIBLE),
    (alpha_along_the_vocabulary, alpha_per_row),
    (verifier_not_caught_up, token_cascade),
]


# Of the bugs that one check finds, one is planted every day.
RARE = (
    *(draft_law_before_truncation, lengths_ignored, rewriting_with_the_drafters_noise, last_draft_not_cached),
    *(end_not_trimmed, verifier_not_caught_up),
)


@pytest.mark.parametrize(
    ("bug", "check"),
    [pytest.param(*p, marks=pytest.mark.slow if p[0] in RARE else (), id=p[0].__name__) for p in BUGS],
)
def test_a_planted_bug_is_found(bug, check, monkeypatch):
    bug(monkeypatch)
    assert not check()


CHECKS = list(dict.fromkeys(check for _, check in BUGS))
# The others look at what test_law and test_executions see every day.
DAILY = (V3, TOP_1, POSSIBLE, equal_models_never_reject, alpha_per_row)


def _name(check: Callable) -> str:
    """The same in every process: no address of a function in it."""
    parts = getattr(check, "args", None) or (check,)
    return "-".join(getattr(part, "__name__", str(part)) for part in parts)


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, marks=() if check in DAILY else pytest.mark.slow) for check in CHECKS],
    ids=_name,
)
def test_without_a_bug_every_check_passes(check, monkeypatch):
    if check is TOP_1:
        zero_noise(monkeypatch)
    assert check()
