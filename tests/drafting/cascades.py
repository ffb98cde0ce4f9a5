"""Cascades of small tables that several tests draft with: as the oracle sees them, and as the package does."""

from __future__ import annotations

import functools

import numpy as np

from decoding.tables import EOS
from oracles import cascade as cascade_oracle
from oracles import sampler
from oracles.tables import lookup
from speccascade_t5x import drafting
from speccascade_t5x.core import rules
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.interfaces import Bound
from speccascade_t5x.models import bigram

VOCAB, VERIFIER, ORDER = 3, 0, 3
ALPHAS = {"lossless": None, "token_v3": 0.4, "opt": -0.2, "lossy_sd": 0.4, "cos": 0.4, "diff": -0.1}
# K matrix, models (0 is the verifier), whether a copying drafter stands last, rules between drafters.
CASCADES = {
    "three_levels": ([[2, 1, 1], [0, 1, 1], [0, 0, 1]], (1, 2), True, (None, None)),
    "three_models": ([[3, 0, 1], [0, 1, 1], [0, 0, 1]], (1, 2, 3), False, (None, None, None)),
    "rule_between": ([[3, 0], [0, 2]], (1, 2), False, (("token_v3", 0.4), None)),
    "rules_between": ([[2, 0, 0], [0, 2, 0], [0, 0, 1]], (1, 2, 3), False, (("token_v3", 0.3), ("opt", 0.2), None)),
}


def length(name: str) -> int:
    return sum(CASCADES[name][0][0])


@functools.cache
def tables() -> list[np.ndarray]:
    """Logits of the verifier and of three drafters, alike but far from equal, with a rare EOS."""
    rng = np.random.default_rng(5)
    shape = (VOCAB,) * (ORDER + 1)
    common = rng.normal(0.0, 0.8, shape)
    common[..., EOS] -= 1.0
    return [(common + rng.normal(0.0, 0.9, shape)).astype(np.float32) for _ in range(4)]


@functools.cache
def logits(model: int):
    """prefix -> logits of one model."""
    return functools.cache(lambda prefix: lookup(tables()[model], prefix))


PROMPT = (2, 1, 2, 2, 1, 1)
CORPUS = ((2, 1, 2, 2, 1), (1, 1, 2, 1, 0, 2), (2, 2, 0, 1))


def match(prefix: tuple[int, ...], most: int) -> tuple[int, ...]:
    """What followed the longest earlier match of the last tokens, the first of equally long ones."""
    output = (0, *prefix)
    best, found = 0, ()
    for text, last in ((PROMPT, len(PROMPT) - 1), (output, len(output) - 1)):
        for end in range(last):
            size = 0
            while size <= min(end, len(output) - 1) and text[end - size] == output[len(output) - 1 - size]:
                size += 1
            if size > best:
                best, found = size, text[end + 1 : end + 1 + most]
    return found


@functools.cache
def table() -> drafting.NGramTable:
    return drafting.build_table(CORPUS, VOCAB)


@functools.cache
def bigram_law(last: int) -> np.ndarray:
    """Interpolated absolute discounting (0.5) over add-one unigrams, counted by hand."""
    unigram = np.ones(VOCAB)
    pairs = np.zeros((VOCAB, VOCAB))
    for line in CORPUS:
        for before, token in zip((0, *line), line, strict=False):
            unigram[token] += 1
            pairs[before, token] += 1
    unigram /= unigram.sum()
    if not pairs[last].sum():
        return unigram
    share = np.where(pairs[last] > 0, pairs[last] - 0.5, 0.0) / pairs[last].sum()
    return share + (1 - share.sum()) * unigram


def oracle(name: str, lenience: float | None, temperature: float = 1.0, truncation: dict | None = None):
    """The oracle's cascade; `lenience` on every edge that has a draft below it."""
    k, models, copies, between = CASCADES[name]
    truncation = truncation or {}

    @functools.cache
    def fill(prefix):
        law = bigram_law((0, *prefix)[-1])
        return sampler.truncate(sampler.tempered(np.log(law), temperature), **truncation)

    return cascade_oracle.Cascade(
        logits=[logits(model) for model in models],
        k=k,
        match=match if copies else None,
        fill=fill if copies else None,
        lenience=[lenience] * len(models),
        rules=between,
        temperature=temperature,
        truncation=truncation,
    )


def bound(name: str, lenience, sampling: Sampling, reads: int | None = None) -> Bound:
    """The package's cascade."""
    k, models, copies, between = CASCADES[name]
    return drafting.cascade(
        [bigram(tables()[model]) for model in models],
        k,
        copier=drafting.max_gram(1, VOCAB, table(), fill="sample") if copies else None,
        lenience=lenience,
        rules=[rule and rules.by_name(rule[0], rule[1]) for rule in between],
        sampling=sampling,
        reads=reads,
    )


def inputs(rows: int) -> dict[str, np.ndarray]:
    """The prompt that `match` searches, padded."""
    return {"encoder_input_tokens": np.tile(np.array((*PROMPT, 0, 0), np.int32), (rows, 1))}
