"""The compiled decoder emits exactly the target law of its rule, shown on whole outputs.

Full-prefix tables (every prefix has laws of its own) with a rare EOS are decoded in one batch of
independent rows; the frequencies of whole outputs are compared with the law enumerated in float64.
With 50,000 rows a law that is off by 0.045 in total variation is found with certainty (bar 1e-7), and a
single prefix whose probability is off by 0.03 likewise. The planted bugs below show what that means.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.tables import EOS, decoder, exact_law, inputs, random_tables, tally
from oracles.tables import Agreement, agreement, prefix_law
from speccascade_t5x import decoding
from speccascade_t5x.core import probs, rules, verify
from speccascade_t5x.decoding import loop, rounds
from speccascade_t5x.drafting import ModelDrafter
from speccascade_t5x.models import bigram

ROWS = 50_000
MAX_LEN = 4
ALPHAS = {
    "lossless": None,
    "chow": 0.45,
    "diff": 0.02,
    "opt": 0.3,
    "token_v3": 0.6,
    "min_p": 0.6,
}
TRUNCATIONS = {"off": {}, "top_k": {"top_k": 2}, "top_p": {"top_p": 0.7}}
# (rule, draft_len, verification, V): each is one compiled program.
PROGRAMS = [
    ("lossless", 0, "token", 3),
    ("lossless", 3, "token", 4),
    ("lossless", 2, "block", 3),
    ("chow", 1, "token", 3),
    ("chow", 3, "block", 4),
    ("diff", 2, "token", 4),
    ("diff", 1, "block", 3),
    ("opt", 0, "block", 3),
    ("opt", 3, "token", 3),
    ("token_v3", 2, "block", 4),
    ("token_v3", 1, "token", 3),
    ("min_p", 3, "block", 3),
    ("min_p", 1, "token", 4),
]
SETTINGS = [(1.0, "off"), (0.5, "top_p"), (1.0, "top_k"), (0.0, "off")]
EVERY_PROGRAM = [
    (rule, draft_len, verification, 3)
    for rule in ALPHAS
    for draft_len in (0, 1, 2, 3)
    for verification in (("token", "block") if draft_len else ("token",))
]
EVERY_SETTING = [(t, truncation) for t in (0.0, 0.5, 1.0) for truncation in TRUNCATIONS]


def sampling_of(temperature: float, truncation: str) -> decoding.Sampling:
    """All fields as arrays of one dtype, so that every setting meets the same compiled program."""
    values = {"top_k": 0, "top_p": 1.0, **TRUNCATIONS[truncation]}
    return decoding.Sampling(
        temperature=np.float32(temperature),
        top_k=np.int32(values["top_k"]),
        top_p=np.float32(values["top_p"]),
        min_p=np.float32(0.0),
    )


def check(program, setting, seed: int = 0) -> Agreement:
    rule, draft_len, verification, vocab = program
    temperature, truncation = setting
    tables = random_tables(seed, vocab, MAX_LEN)
    config = decoding.DecodeConfig(MAX_LEN, draft_len, eos_id=EOS, verification=verification)
    alpha = np.float32(ALPHAS[rule] if ALPHAS[rule] is not None else 0.0)
    output = decoder(config, rule, ROWS)(
        alpha, *tables, sampling_of(temperature, truncation), jax.random.key(seed + 7)
    )
    law = exact_law(rule, float(alpha), *tables, MAX_LEN, temperature, TRUNCATIONS[truncation])
    return agreement(tally(output, vocab), law)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: "-".join(map(str, p)))
def test_whole_outputs_follow_the_target_law(program):
    for setting in SETTINGS:
        found = check(program, setting)
        assert found.surely_detected < 0.045
        assert found.holds, f"{program} {setting}: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("program", EVERY_PROGRAM, ids=lambda p: "-".join(map(str, p)))
def test_every_combination_follows_the_target_law(program):
    for setting in EVERY_SETTING:
        found = check(program, setting, seed=1)
        assert found.holds, f"{program} {setting}: {found}"


@pytest.mark.parametrize("rule", ["chow", "diff", "opt", "token_v3", "min_p"])
@pytest.mark.parametrize("vocab", [3, 4])
def test_the_alphas_are_neither_end_of_their_rule(rule, vocab):
    """Guards the tests above: the law they check must differ from the verifier's and the drafter's."""
    q, p = random_tables(0, vocab, MAX_LEN)
    law = exact_law(rule, ALPHAS[rule], q, p, MAX_LEN)
    for other in (
        exact_law("lossless", None, q, p, MAX_LEN),
        exact_law("lossless", None, p, q, MAX_LEN),
    ):
        assert 0.5 * sum(abs(law.get(o, 0.0) - other[o]) for o in other) > 0.05


def test_the_checker_passes_the_law_itself_and_the_oracle_sums_to_one():
    q, p = random_tables(0, 4, MAX_LEN)
    law = exact_law("token_v3", 0.6, q, p, MAX_LEN)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-12)
    assert sum(v for k, v in prefix_law(law).items() if len(k) == 1) == pytest.approx(1.0)
    names = list(law)
    drawn = np.random.default_rng(0).multinomial(ROWS, [law[n] for n in names])
    assert agreement(dict(zip(names, map(int, drawn), strict=True)), law).holds


# Planted bugs. Each is a mistake that real engines have made; the same check must fail.


def mutant_agreement(
    rule: str,
    draft_len: int,
    verification: str,
    vocab: int = 4,
    rows: int = ROWS // 2,
    truncation: str = "off",
) -> Agreement:
    """As `check` at temperature 1, but compiled afresh, so that patched functions are traced."""
    q, p = random_tables(0, vocab, MAX_LEN)
    config = decoding.DecodeConfig(MAX_LEN, draft_len, eos_id=EOS, verification=verification)
    alpha = None if ALPHAS[rule] is None else np.float32(ALPHAS[rule])
    program = decoding.speculative_program(
        bigram(q), bigram(p), rules.by_name(rule, alpha), config, sampling_of(1.0, truncation)
    )

    def decode(program, key):
        state = loop.init(program, inputs(rows), key, jnp.arange(rows))
        return decoding.finish(program.config, loop.run(program, state, MAX_LEN))

    output = jax.jit(decode)(program, jax.random.key(3))
    law = exact_law(rule, ALPHAS[rule], q, p, MAX_LEN, 1.0, TRUNCATIONS[truncation])
    return agreement(tally(output, vocab), law)


def _verifier_laws(program, *scored):
    return REAL_LAWS(dataclasses.replace(program, rule=rules.Lossless()), *scored)


REAL_LAWS = rounds.rule_laws


def test_unpatched_program_passes():
    assert mutant_agreement("token_v3", 2, "token").holds
    assert mutant_agreement("token_v3", 2, "token", truncation="top_k").holds
    assert mutant_agreement("lossless", 3, "block", rows=2 * ROWS).holds


def test_bonus_from_the_verifier_instead_of_pi_is_found(monkeypatch):
    def laws(program, *scored):
        right = REAL_LAWS(program, *scored)
        wrong = _verifier_laws(program, *scored).target[:, -1:]
        return dataclasses.replace(right, target=jnp.concatenate([right.target[:, :-1], wrong], 1))

    monkeypatch.setattr(rounds, "rule_laws", laws)
    found = mutant_agreement("token_v3", 1, "token")
    assert not found.holds and found.total_variation > found.most_allowed


def test_residual_of_p_minus_q_is_found(monkeypatch):
    """Published code of plain speculative decoding resamples from norm(max(0, p - q)); pi - d is right."""
    verifiers = []

    def laws(program, *scored):
        verifiers.append(_verifier_laws(program, *scored).target)
        return REAL_LAWS(program, *scored)

    def token(draft, lengths, law, target, accept_noise, residual_noise):
        right = verify.token(draft, lengths, law, target, accept_noise, residual_noise)
        wrong = jnp.maximum(verifiers[-1][:, :-1] - law, 0.0)
        at = jnp.minimum(right.accepted, law.shape[1] - 1)[:, None, None]
        wrong = jnp.take_along_axis(wrong, at, axis=1)[:, 0]
        redrawn = probs.sample(wrong, residual_noise)
        return dataclasses.replace(right, token=jnp.where(right.bonus, right.token, redrawn))

    monkeypatch.setattr(rounds, "rule_laws", laws)
    monkeypatch.setitem(verify.BY_NAME, "token", token)
    found = mutant_agreement("token_v3", 2, "token")
    assert not found.holds and found.total_variation > found.most_allowed


def _noise_by_absolute_position(program, state):
    """Uniforms that belong to an output position, whatever round looks at it."""
    drafts = program.config.draft_len
    at = state.committed[:, None] + jnp.arange(drafts + 1)

    def row(key, positions):
        keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)
        return jax.vmap(lambda k: jax.random.uniform(k, (3,)))(keys)

    noise = jax.vmap(row)(state.keys, at)
    return noise[:, :-1, 0], noise[:, :-1, 1], noise[:, 0, 2]


def test_noise_by_absolute_position_is_found_in_block_verification(monkeypatch):
    """Later drafts took part in choosing where the round stopped: using their noise again biases the law."""
    monkeypatch.setattr(rounds, "noise", _noise_by_absolute_position)
    assert not mutant_agreement("lossless", 3, "block", rows=2 * ROWS).holds


def test_draft_law_reported_before_truncation_is_found(monkeypatch):
    """The law handed to the verifier must be the one that was sampled from."""
    propose = ModelDrafter.propose

    def misreport(self, *args):
        proposal, state = propose(self, *args)
        return dataclasses.replace(proposal, law=proposal.q[:, :-1]), state

    monkeypatch.setattr(ModelDrafter, "propose", misreport)
    found = mutant_agreement("token_v3", 2, "token", truncation="top_k")
    assert not found.holds and found.total_variation > found.most_allowed
