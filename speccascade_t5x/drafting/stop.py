"""Stop tests of drafters, which give every row its own draft length in every round.

A stop test reads the drafter's distribution at a position BEFORE a token is sampled there. Whether to draft on may
depend on everything already drafted, but a sampled token always stays in the draft: throwing away a token for
its low confidence would bias the emitted distribution.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.core import divergences
from speccascade_t5x.core.rules import Pair, PrefixRule
from speccascade_t5x.interfaces import Array


class DraftStop(Protocol):
    """A pytree whose thresholds are traced, so that sweeping them does not recompile."""

    def stops(self, q_raw: Array) -> Array:
        """[B, V] distribution of the drafter at temperature 1 -> [B] bool: whether drafting ends here."""


@dataclasses.dataclass(frozen=True)
class Confidence:
    """Stops where max q_raw < threshold (scalar or [B]): BiLD's fallback test."""

    threshold: Array | float

    def stops(self, q_raw: Array) -> Array:
        """See DraftStop."""
        return jnp.max(q_raw, axis=-1) < jnp.asarray(self.threshold, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Entropy:
    """Stops where H(q_raw) > threshold, in nats (scalar or [B])."""

    threshold: Array | float

    def stops(self, q_raw: Array) -> Array:
        """See DraftStop."""
        return divergences.entropy(q_raw) > jnp.asarray(self.threshold, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Deferral:
    """Stops where a rule whose test reads the drafter alone defers: the draft is exactly what it keeps."""

    rule: PrefixRule

    def stops(self, q_raw: Array) -> Array:
        """See DraftStop."""
        return self.rule.defers(Pair(q=None, p=None, q_raw=q_raw, p_raw=None))


for _cls in (Confidence, Entropy, Deferral):
    trees.register(_cls)
