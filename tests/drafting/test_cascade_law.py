"""Whole outputs of compiled cascades follow the target law: the verifier's, or pi of three models under rules.

Power and false alarms of a comparison are those `oracles.tables.agreement` states; each test checks them.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from decoding.tables import EOS, tally
from drafting import cascades
from optimized import optimized_jit
from oracles import rules as rule_oracle
from oracles import sampler
from oracles.tables import agreement, output_law
from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.models import bigram

ROWS, MAX_LEN = 10_000, 5
# cascade, lenience, whose law the rule reads, rule, verification
PROGRAMS = [
    ("three_levels", 2.5, None, "lossless", "block"),
    ("rule_between", None, 0, "token_v3", "token"),
]
MORE = [
    ("three_levels", 2.5, None, "lossless", "token"),
    ("three_levels", 2.5, 1, "token_v3", "token"),
    ("three_models", 3.0, 0, "cos", "block"),
    ("rule_between", None, 0, "opt", "block"),
    ("rule_between", None, 1, "lossy_sd", "token"),
    ("rules_between", None, 0, "diff", "block"),
]
SETTINGS = [(1.0, {}), (0.5, {"top_p": 0.85}), (0.0, {})]


@functools.cache
def decoder(name: str, lenience: float | None, reads: int | None, rule: str, how: str):
    config = decoding.DecodeConfig(MAX_LEN, cascades.length(name), eos_id=EOS, verification=how)

    @optimized_jit
    def run(lenient, sampling, key):
        return decoding.speculative(
            drafter=cascades.bound(name, None if lenience is None else lenient, sampling, reads),
            verifier=bigram(cascades.tables()[cascades.VERIFIER]),
            rule=rules.by_name(rule, cascades.ALPHAS[rule]),
            inputs=cascades.inputs(ROWS),
            config=config,
            sampling=sampling,
            key=key,
            example_ids=np.arange(ROWS),
        )

    return run


def check(program: tuple, temperature: float, truncation: dict) -> None:
    name, lenience, reads, rule, _ = program
    cascade = cascades.oracle(name, lenience, temperature, truncation)
    verifier = cascades.logits(cascades.VERIFIER)

    @functools.cache
    def pi(prefix):
        p, p_raw = sampler.tempered(verifier(prefix), temperature), sampler.tempered(verifier(prefix))
        if rule == "lossless":
            return sampler.truncate(p, **truncation)
        q, q_raw, _ = cascade.law(reads, prefix)
        greedy, cuts_first = temperature == 0, rule in rule_oracle.TRUNCATES_INPUTS
        if cuts_first:
            q, p = sampler.truncate(q, **truncation), sampler.truncate(p, **truncation)
        law = rule_oracle.target(rule, q, p, q_raw, p_raw, cascades.ALPHAS[rule], greedy=greedy)
        return law if cuts_first else sampler.truncate(law, **truncation)

    options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **truncation}
    kinds = {"top_k": np.int32, "top_p": np.float32, "min_p": np.float32}
    sampling = decoding.Sampling(temperature=np.float32(temperature), **{k: kinds[k](v) for k, v in options.items()})
    output = decoder(*program)(np.float32(lenience or 1), sampling, jax.random.key(1))
    found = agreement(tally(output, cascades.VOCAB), output_law(pi, MAX_LEN, EOS))
    assert found.surely_detected < 0.17
    assert found.holds, f"{program} {temperature} {truncation}: {found}"
    accepted, examined = (int(np.sum(x)) for x in (output.counts.accepted, output.counts.examined))
    assert accepted > 0
    assert accepted < examined or temperature < 1


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: "-".join(map(str, p)))
def test_whole_outputs_follow_the_target_law(program):
    for temperature, truncation in SETTINGS[:2]:
        check(program, temperature, truncation)


@pytest.mark.slow
@pytest.mark.parametrize("program", MORE, ids=lambda p: "-".join(map(str, p)))
def test_more_programs_follow_the_target_law(program):
    for temperature, truncation in SETTINGS:
        check(program, temperature, truncation)
