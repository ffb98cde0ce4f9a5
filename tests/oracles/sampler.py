"""The sampler in float64: logits -> law -> truncated law, one prefix at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def argmax(values: Sequence[float]) -> int:
    """Index of the largest value; the lowest such index on ties."""
    best = 0
    for index in range(1, len(values)):
        if values[index] > values[best]:
            best = index
    return best


def descending(law: Sequence[float]) -> list[int]:
    """Ids from the most to the least probable; ties by ascending id."""
    return sorted(range(len(law)), key=lambda v: (-law[v], v))


def normalise(weights: Sequence[float]) -> np.ndarray:
    """Weights scaled to sum to 1. The total must be positive."""
    total = math.fsum(weights)
    if not total > 0:
        raise ValueError(f"cannot normalise weights that sum to {total}")
    return np.array([w / total for w in weights], dtype=np.float64)


def tempered(logits: Sequence[float], temperature: float = 1.0, vocab_size: int | None = None) -> np.ndarray:
    """softmax(logits / temperature) over the first `vocab_size` ids; one-hot argmax at 0."""
    size = len(logits) if vocab_size is None else vocab_size
    allowed = [float(value) for value in logits[:size]]
    law = np.zeros(len(logits))
    if temperature == 0:
        law[argmax(allowed)] = 1.0
        return law
    top = max(allowed)
    law[:size] = normalise([math.exp((value - top) / temperature) for value in allowed])
    return law


def truncate(law: Sequence[float], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Tr(law): top-k, renormalise, top-p, min-p, renormalise.

    Top-p keeps an id iff the mass of the ids strictly before it (in descending order) is < top_p.
    Min-p keeps an id iff its probability is at least min_p times the largest. The defaults are off.
    """
    kept = np.array(law, dtype=np.float64)
    if top_k > 0:
        for v in descending(kept)[top_k:]:
            kept[v] = 0.0
        kept = normalise(kept)
    if top_p < 1.0:
        before = 0.0
        after_top_p = np.zeros_like(kept)
        for v in descending(kept):
            if before < top_p:
                after_top_p[v] = kept[v]
            before += kept[v]
        kept = after_top_p
    if min_p > 0:
        largest = max(kept)
        for v in range(len(kept)):
            if kept[v] < min_p * largest:
                kept[v] = 0.0
    return normalise(kept)


def inverse_cdf(law: Sequence[float], uniform: float) -> int:
    """The id whose stretch of the cumulative law holds `uniform`; never one of probability 0."""
    below = 0.0
    last = None
    for v in range(len(law)):
        if law[v] <= 0:
            continue
        below += law[v]
        last = v
        if uniform < below:
            return v
    return last
