"""The compiled decoder emits exactly the target law of its rule, shown on whole outputs.

Full-prefix tables (every prefix has laws of its own) with a rare EOS are decoded in one batch of
independent rows; the frequencies of whole outputs are compared with the law enumerated in float64.

Power and false alarms of one comparison: with 50,000 rows a law that is off by 0.045 in total variation is
found with probability 1 - 1e-7 or more, and one prefix whose probability is off by 0.03 likewise. A correct
decoder fails by chance with probability 2e-7 at most (1e-7 for each of the two tests), so below 1e-4 over
the 360 or so comparisons of this file, slow ones included. `test_mutations` shows what that means in bugs.

The covering set: 18 programs that every registered rule is in run every day; the slow set adds 32, so that every
rule meets both verifications and three draft lengths.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from core.cases import NOT_A_TABLE_RULE
from decoding.tables import EOS, decoder, exact_law, inputs, random_tables, tally
from oracles import rules as oracle_rules
from oracles import tables as oracle_tables
from oracles.tables import Agreement, agreement, prefix_law
from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.models import bigram

ROWS = 50_000
MAX_LEN = 4
ALPHAS = {
    "lossless": None,
    "bild": 1.2,
    "bild_fixed": 0.5,
    "chow": 0.45,
    "chow_log": 0.9,
    "cos": 0.4,
    "diff": 0.02,
    "diff_log": 0.05,
    "lossy_sd": 0.4,
    "min_p": 0.6,
    "opt": 0.3,
    "opt_log": 0.3,
    "token_v1": 0.25,
    "token_v2": 0.25,
    "token_v3": 0.6,
    "typical": 0.4,
}
TRUNCATIONS = {"off": {}, "top_k": {"top_k": 2}, "top_p": {"top_p": 0.7}}
# (rule, draft_len, verification, V): each is one compiled program.
PROGRAMS = [
    ("lossless", 0, "token", 3),
    ("lossless", 3, "token", 4),
    ("lossless", 2, "block", 3),
    ("bild", 3, "token", 3),
    ("bild_fixed", 2, "block", 3),
    ("chow", 3, "block", 4),
    ("chow_log", 1, "token", 3),
    ("cos", 2, "block", 3),
    ("diff", 2, "token", 4),
    ("diff_log", 3, "block", 3),
    ("lossy_sd", 2, "token", 3),
    ("opt", 0, "block", 3),
    ("opt_log", 2, "token", 3),
    ("token_v1", 1, "block", 3),
    ("token_v2", 3, "token", 3),
    ("token_v3", 2, "block", 4),
    ("typical", 1, "token", 3),
    ("min_p", 3, "block", 3),
]
SETTINGS = [(1.0, "off"), (0.5, "top_p"), (1.0, "top_k"), (0.0, "off")]
# Each rule once more with the other verification, and with another draft length.
OTHER = {"token": "block", "block": "token"}
MORE_PROGRAMS = [(rule, draft_len % 3 + 1, OTHER[how], 3) for rule, draft_len, how, _ in PROGRAMS[2:]]
MORE_PROGRAMS += [(rule, (draft_len + 2) % 4, how, 3) for rule, draft_len, how, _ in PROGRAMS[2:]]
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
    output = decoder(config, rule, ROWS)(alpha, *tables, sampling_of(temperature, truncation), jax.random.key(seed + 7))
    law = exact_law(rule, float(alpha), *tables, MAX_LEN, temperature, TRUNCATIONS[truncation])
    return agreement(tally(output, vocab), law)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: "-".join(map(str, p)))
def test_whole_outputs_follow_the_target_law(program):
    for setting in SETTINGS:
        found = check(program, setting)
        assert found.surely_detected < 0.045
        assert found.holds, f"{program} {setting}: {found}"


def test_lossy_sd_with_the_optimal_residual():
    q, p = random_tables(0, 4, MAX_LEN)
    alpha, options = ALPHAS["lossy_sd"], {"residual": "optimal"}

    def law_at(prefix):
        logits = (oracle_tables.lookup(table, prefix) for table in (q, p))
        return oracle_rules.draft_and_target("lossy_sd", *logits, alpha, 1.0, {}, **options)[1]

    program = decoding.speculative_program(
        bigram(q),
        bigram(p),
        rules.by_name("lossy_sd", alpha, **options),
        decoding.DecodeConfig(MAX_LEN, 2, eos_id=EOS),
        sampling_of(1.0, "off"),
    )
    output = decoding.decode(program, inputs(ROWS), jax.random.key(0), np.arange(ROWS))
    law = oracle_tables.output_law(law_at, MAX_LEN, EOS)
    assert agreement(tally(output, 4), law).holds
    shifted = exact_law("lossy_sd", alpha, q, p, MAX_LEN, 1.0, {})
    assert not agreement(tally(output, 4), shifted).holds


@pytest.mark.slow
@pytest.mark.parametrize("program", MORE_PROGRAMS, ids=lambda p: "-".join(map(str, p)))
def test_more_programs_follow_the_target_law(program):
    for setting in EVERY_SETTING:
        found = check(program, setting, seed=1)
        assert found.holds, f"{program} {setting}: {found}"


def test_every_registered_rule_is_in_a_program_of_every_day():
    assert {rule for rule, *_ in PROGRAMS} == set(rules.names()) - set(NOT_A_TABLE_RULE)


@pytest.mark.parametrize("rule", sorted(set(ALPHAS) - {"lossless"}))
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
