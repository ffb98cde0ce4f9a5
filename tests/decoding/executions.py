"""Programs of every execution on small table models, and the laws that belong to them."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np

from decoding.tables import EOS, exact_law, inputs, random_tables, tally
from optimized import optimized_jit
from oracles import sampler
from oracles.tables import agreement, lookup
from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.drafting import Confidence, Entropy
from speccascade_t5x.models import bigram

ROWS, VOCAB, MAX_LEN = 50_000, 3, 4
TABLES = random_tables(0, VOCAB, MAX_LEN)
# For token cascades: the rules keep two tokens and more before they defer, so the verifier has to catch up.
KEEPING = random_tables(27, VOCAB, MAX_LEN)
ALPHAS = {"lossless": None, "chow": 0.45, "chow_log": 0.9, "token_v3": 0.6, "bild": 1.2, "diff": 0.02}
# Thresholds that stop about half of the drafts of these tables.
STOPS = {"confidence": (Confidence, 0.6), "entropy": (Entropy, 0.9)}
TRUNCATIONS = {"off": {}, "top_k": {"top_k": 2}, "top_p": {"top_p": 0.7}}


def sampling_of(temperature: float = 1.0, truncation: str = "off") -> decoding.Sampling:
    """All fields as arrays of one dtype, so that every setting meets the same compiled program."""
    values = {"top_k": 0, "top_p": 1.0, **TRUNCATIONS[truncation]}
    return decoding.Sampling(
        np.float32(temperature), np.int32(values["top_k"]), np.float32(values["top_p"]), np.float32(0)
    )


def config_of(draft_len: int = 3, **options) -> decoding.DecodeConfig:
    return decoding.DecodeConfig(**{"max_len": MAX_LEN, "draft_len": draft_len, "eos_id": EOS, **options})


def rule_of(name: str, alpha=None) -> rules.Rule:
    alpha = ALPHAS[name] if alpha is None else alpha
    return rules.by_name(name, None if alpha is None else np.asarray(alpha, np.float32))


def dynamic(stop: str, rule: str = "token_v3", config=None, sampling=None, threshold=None) -> decoding.Program:
    """Speculation whose drafts end early."""
    cls, usual = STOPS[stop]
    halt = cls(np.asarray(usual if threshold is None else threshold, np.float32))
    return decoding.speculative_program(
        *map(bigram, TABLES), rule_of(rule), config or config_of(), sampling or sampling_of(), halt
    )


def bild(config=None, sampling=None, rollback=None) -> decoding.Program:
    """BiLD as published: the draft stops where the rule falls back."""
    rule = rule_of("bild", rollback)
    stop = Confidence(np.float32(rule.fallback))
    parts = (config or config_of(), sampling or sampling_of(), stop)
    return decoding.speculative_program(*map(bigram, TABLES), rule, *parts)


def cascade(rule: str, config=None, sampling=None, oracle: bool = False, alpha=None) -> decoding.Program:
    """A token cascade, or the oracle."""
    tables = TABLES if oracle else KEEPING
    return decoding.token_cascade_program(
        *map(bigram, tables), rule_of(rule, alpha), config or config_of(2), sampling or sampling_of(), oracle
    )


def sequence(threshold=-0.8, config=None, sampling=None, confidence: str = "mean", quantile=0.25) -> decoding.Program:
    """A sequence cascade."""
    return decoding.sequence_cascade_program(
        *map(bigram, TABLES), config or config_of(), sampling or sampling_of(), threshold, confidence, quantile
    )


def decode(program: decoding.Program, rows: int = ROWS, seed: int = 0) -> decoding.Output:
    return _decoder(rows)(program, jax.random.key(seed))


@functools.cache
def _decoder(rows: int):
    return optimized_jit(lambda program, key: decoding.decode(program, inputs(rows), key, np.arange(rows)))


def check(program, law: dict, output=None) -> decoding.Output:
    """The outputs of `program` agree with `law`."""
    output = decode(program) if output is None else output
    found = agreement(tally(output, VOCAB), law)
    assert found.surely_detected < 0.045
    assert found.holds, found
    return output


def law_of(rule: str, temperature: float = 1.0, truncation: str = "off", tables=TABLES) -> dict:
    return exact_law(rule, ALPHAS[rule], *tables, MAX_LEN, temperature, TRUNCATIONS[truncation])


def drafted_scores(confidence: str, quantile: float) -> dict:
    """{whole output: the drafter's confidence in it}, from its laws at temperature 1."""
    measure = {"sum": np.sum, "mean": np.mean, "quantile": lambda x: np.quantile(x, quantile)}[confidence]
    scores = {}
    for output in exact_law("lossless", None, TABLES[0], TABLES[0], MAX_LEN):
        laws = [sampler.tempered(lookup(TABLES[0], output[:i])) for i in range(len(output))]
        scores[output] = float(measure([math.log(law[x]) for law, x in zip(laws, output, strict=True)]))
    return scores


def middle(scores: dict, law: dict) -> float:
    """A threshold that defers about half of the mass, as far as can be from the scores beside it."""
    ordered = sorted(law, key=scores.__getitem__)
    at = int(np.searchsorted(np.cumsum([law[o] for o in ordered]), 0.5))
    threshold = (scores[ordered[at]] + scores[ordered[at + 1]]) / 2
    assert min(abs(score - threshold) for score in scores.values()) > 1e-4
    return threshold
