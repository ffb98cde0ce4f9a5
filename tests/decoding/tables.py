"""Small table models to decode, and the exact laws that belong to them."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np

from optimized import optimized_jit
from oracles import rules as oracle_rules
from oracles import tables as oracle_tables
from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.models import bigram

EOS = 1


def inputs(rows: int) -> dict[str, np.ndarray]:
    """Inputs of a table model: it reads only how many rows there are."""
    return {"encoder_input_tokens": np.ones((rows, 1), np.int32)}


@functools.cache
def random_tables(seed: int, vocab: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Drafter's and verifier's logits, alike but far from equal, with a rare EOS."""
    rng = np.random.default_rng(seed)
    shape = (vocab,) * (order + 1)
    common = rng.normal(0.0, 0.7, shape)
    drafter, verifier = (common + rng.normal(0.0, 1.0, shape) for _ in range(2))
    drafter[..., EOS] -= 1.5
    verifier[..., EOS] -= 1.0
    return drafter.astype(np.float32), verifier.astype(np.float32)


def exact_law(
    rule: str,
    alpha: float | None,
    drafter: np.ndarray,
    verifier: np.ndarray,
    max_len: int,
    temperature: float = 1.0,
    truncation: dict | None = None,
) -> dict[tuple[int, ...], float]:
    """{whole output: probability} under the rule's target law, by enumeration in float64."""

    def law_at(prefix):
        q, p = (oracle_tables.lookup(table, prefix) for table in (drafter, verifier))
        return oracle_rules.draft_and_target(rule, q, p, alpha, temperature, truncation)[1]

    return oracle_tables.output_law(law_at, max_len, EOS)


def outputs(output: decoding.Output) -> list[tuple[int, ...]]:
    """The tokens of every row, without padding."""
    tokens, lengths = np.asarray(output.tokens), np.asarray(output.lengths)
    return [tuple(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]


def tally(output: decoding.Output, vocab: int) -> Counter[tuple[int, ...]]:
    """How often each whole output occurs. Checks that rows hold padding after their end and nothing else."""
    tokens, lengths = np.asarray(output.tokens), np.asarray(output.lengths)
    assert not tokens[np.arange(tokens.shape[1]) >= lengths[:, None]].any()
    weights = (vocab + 1) ** np.arange(tokens.shape[1])
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    codes = np.where(inside, (tokens + 1) * weights, 0).sum(axis=1)
    _, index, numbers = np.unique(codes, return_index=True, return_counts=True)
    return Counter({tuple(tokens[i][: lengths[i]].tolist()): int(n) for i, n in zip(index, numbers, strict=True)})


@functools.cache
def decoder(config: decoding.DecodeConfig, rule: str, rows: int):
    """A compiled decode (alpha, drafter, verifier, sampling, key) -> Output of `rows` independent rows."""
    takes_alpha = rules.get(rule).alpha_range is not None

    @optimized_jit
    def run(alpha, drafter, verifier, sampling, key):
        return decoding.speculative(
            drafter=bigram(drafter),
            verifier=bigram(verifier),
            rule=rules.get(rule)(alpha=alpha) if takes_alpha else rules.get(rule)(),
            inputs=inputs(rows),
            config=config,
            sampling=sampling,
            key=key,
            example_ids=np.arange(rows),
        )

    return run
