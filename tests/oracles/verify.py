"""The exact law of one speculative round, by enumeration of drafts and branches. No sampling.

A prefix is a tuple of token ids. `draft_law` and `target_law` map a prefix to a law. A round
commits a non-empty tuple: the accepted part of the draft and one more token.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from . import sampler

Prefix = tuple[int, ...]
LawAt = Callable[[Prefix], Sequence[float]]
StopAt = Callable[[Prefix], bool]


@dataclasses.dataclass(frozen=True)
class Branches:
    """What a round does with one draft of length n.

    Attributes:
      thresholds: n numbers; the i-th test succeeds iff its uniform is below the i-th of them.
      weights: n + 1 numbers; the probability that exactly i tokens of the draft are kept.
      next_laws: n + 1 laws; the law of the token after i kept ones.
    """

    thresholds: list[float]
    weights: list[float]
    next_laws: list[np.ndarray]


def positive_part(pi: Sequence[float], d: Sequence[float], scale: float = 1.0) -> list[float]:
    """max(0, scale * pi - d) per token."""
    return [max(0.0, scale * b - a) for a, b in zip(d, pi, strict=True)]


def after_rejection(pi: Sequence[float], d: Sequence[float], scale: float = 1.0) -> np.ndarray:
    """norm(max(0, scale * pi - d)), or pi where that is zero everywhere."""
    gain = positive_part(pi, d, scale)
    return sampler.normalise(gain if math.fsum(gain) > 0 else pi)


def token_branches(draft: Prefix, laws: Sequence[Sequence[float]], targets: Sequence[Sequence[float]]) -> Branches:
    """Token verification: test the drafted tokens in order, stop at the first that fails."""
    thresholds = [min(1.0, targets[i][x] / laws[i][x]) for i, x in enumerate(draft)]
    weights, next_laws, reached = [], [], 1.0
    for i, threshold in enumerate(thresholds):
        weights.append(reached * (1.0 - threshold))
        next_laws.append(after_rejection(targets[i], laws[i]))
        reached *= threshold
    weights.append(reached)
    next_laws.append(sampler.normalise(targets[len(draft)]))
    return Branches(thresholds, weights, next_laws)


def block_branches(draft: Prefix, laws: Sequence[Sequence[float]], targets: Sequence[Sequence[float]]) -> Branches:
    """Block verification: keep up to the LAST position whose test succeeds."""
    n = len(draft)
    scales = [1.0]
    for i, x in enumerate(draft):
        scales.append(min(1.0, scales[-1] * targets[i][x] / laws[i][x]))
    thresholds = []
    for i in range(1, n + 1):
        if i == n or scales[i] == 1.0:
            thresholds.append(scales[i])
        else:
            left = math.fsum(positive_part(targets[i], laws[i], scales[i]))
            thresholds.append(left / (left + 1.0 - scales[i]))
    weights = [0.0] * (n + 1)
    none_later = 1.0
    for i in range(n, 0, -1):
        weights[i] = none_later * thresholds[i - 1]
        none_later *= 1.0 - thresholds[i - 1]
    weights[0] = none_later
    next_laws = [after_rejection(targets[i], laws[i], scales[i]) for i in range(n)]
    next_laws.append(sampler.normalise(targets[n]))
    return Branches(thresholds, weights, next_laws)


BRANCHES = {"token": token_branches, "block": block_branches}


def fixed_length(draft_len: int) -> StopAt:
    """Stops after `draft_len` tokens."""
    return lambda prefix: len(prefix) >= draft_len


def drafts(draft_law: LawAt, stop: StopAt, prefix: Prefix = ()) -> Iterator[tuple[Prefix, float]]:
    """Every draft of positive probability, with it. `stop` sees all tokens drafted so far."""
    if stop(prefix):
        yield prefix, 1.0
        return
    for x, chance in enumerate(draft_law(prefix)):
        if chance > 0:
            for draft, rest in drafts(draft_law, stop, (*prefix, x)):
                yield draft, chance * rest


def round_law(draft_law: LawAt, target_law: LawAt, draft_len: int | StopAt, verification: str) -> dict[Prefix, float]:
    """{committed tokens: probability} of one round that begins at the empty prefix."""
    stop = fixed_length(draft_len) if isinstance(draft_len, int) else draft_len
    law: dict[Prefix, float] = {}
    for draft, chance in drafts(draft_law, stop):
        laws = [draft_law(draft[:i]) for i in range(len(draft))]
        targets = [target_law(draft[:i]) for i in range(len(draft) + 1)]
        branches = BRANCHES[verification](draft, laws, targets)
        for kept, weight in enumerate(branches.weights):
            for x, probability in enumerate(branches.next_laws[kept]):
                if weight * probability > 0:
                    committed = (*draft[:kept], x)
                    law[committed] = law.get(committed, 0.0) + chance * weight * probability
    return law


def tokens_per_round(law: dict[Prefix, float]) -> float:
    """Expected number of committed tokens."""
    return math.fsum(len(committed) * chance for committed, chance in law.items())


def autoregressive(target_law: LawAt, length: int, prefix: Prefix = ()) -> dict[Prefix, float]:
    """{sequence of `length` tokens: probability} when pi is followed one token at a time."""
    size = len(target_law(()))
    law = {}
    for rest in itertools.product(range(size), repeat=length - len(prefix)):
        tokens, chance = prefix, 1.0
        for x in rest:
            chance *= target_law(tokens)[x]
            tokens = (*tokens, x)
        law[tokens] = chance
    return law


def round_then_target(round_: dict[Prefix, float], target_law: LawAt, length: int) -> dict[Prefix, float]:
    """The law of the first `length` tokens: one round, then pi one token at a time."""
    law: dict[Prefix, float] = {}
    for committed, chance in round_.items():
        if len(committed) >= length:
            start = committed[:length]
            law[start] = law.get(start, 0.0) + chance
            continue
        for tokens, rest in autoregressive(target_law, length, committed).items():
            law[tokens] = law.get(tokens, 0.0) + chance * rest
    return law


def distance(one: dict[Prefix, float], other: dict[Prefix, float]) -> float:
    """Largest absolute difference of two laws over sequences."""
    return max(abs(one.get(k, 0.0) - other.get(k, 0.0)) for k in {*one, *other})
