"""Per-row counters of a decode, and the rates derived from them.

Only what reached the output is counted: nothing after EOS or the length limit, and nothing of rows that
were finished before the round. Counters live on the device and are fetched once.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from speccascade_t5x.interfaces import SOURCE_ACCEPTED, SOURCE_RESIDUAL, Array


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counters, each [B] (int32; `deferred` is float32).

    Attributes:
      rounds: draft-and-verify rounds in which the row was alive.
      drafter_calls: drafter blocks run for it.
      verifier_calls: verifier blocks run for it.
      drafted: tokens drafted.
      accepted: drafted tokens that were accepted and committed.
      examined: drafted tokens looked at: the accepted ones and the first rejected one.
      committed: output tokens.
      scored: verifier positions paid for.
      deferred: sum over committed positions of the probability that the rule turned to the verifier there.
    """

    rounds: Array
    drafter_calls: Array
    verifier_calls: Array
    drafted: Array
    accepted: Array
    examined: Array
    committed: Array
    scored: Array
    deferred: Array

    @classmethod
    def zeros(cls, batch: int) -> Counts:
        """Counters of `batch` fresh rows."""
        ints = [jnp.zeros(batch, jnp.int32) for _ in dataclasses.fields(cls)[:-1]]
        return cls(*ints, jnp.zeros(batch, jnp.float32))

    def add(self, alive: Array, **increments: Array | int) -> Counts:
        """Adds each named increment ([B] or scalar) in the rows that are alive."""
        changed = {
            name: getattr(self, name) + jnp.where(alive, value, 0).astype(getattr(self, name).dtype)
            for name, value in increments.items()
        }
        return dataclasses.replace(self, **changed)


jax.tree_util.register_dataclass(
    Counts, data_fields=[f.name for f in dataclasses.fields(Counts)], meta_fields=[]
)


def totals(counts: Counts) -> dict[str, float]:
    """Sums each counter over rows, as Python numbers (`deferred` a float, the rest ints)."""
    fetched = jax.device_get(counts)
    sums = {f.name: getattr(fetched, f.name).sum() for f in dataclasses.fields(Counts)}
    return {name: float(value) if name == "deferred" else int(value) for name, value in sums.items()}


def rates(total: dict[str, float]) -> dict[str, float]:
    """Rates from summed counters; 0 where the denominator is 0.

    Returns:
      acceptance: accepted / examined.
      block_efficiency: committed tokens per round.
      verifier_calls_per_token, drafter_calls_per_token, scored_per_token: costs per committed token.
      deferral_rate: share of committed positions deferred to the verifier.
    """

    def ratio(above: str, below: str) -> float:
        return total[above] / total[below] if total[below] else 0.0

    return {
        "acceptance": ratio("accepted", "examined"),
        "block_efficiency": ratio("committed", "rounds"),
        "verifier_calls_per_token": ratio("verifier_calls", "committed"),
        "drafter_calls_per_token": ratio("drafter_calls", "committed"),
        "scored_per_token": ratio("scored", "committed"),
        "deferral_rate": ratio("deferred", "committed"),
    }


def acceptance_by_position(sources: Iterable[Sequence[int]]) -> list[float]:
    """Share of examined drafts that were accepted, per draft position, read off who wrote each output token.

    A round shows as accepted tokens followed by a residual (the draft was rejected there) or a bonus token; the
    end of a row may cut it short.

    Args:
      sources: `source` of each row, without padding.

    Returns:
      One rate per draft position that was ever examined.
    """
    examined, accepted = Counter(), Counter()
    for source in sources:
        position = 0
        for writer in source:
            examined[position] += writer in (SOURCE_ACCEPTED, SOURCE_RESIDUAL)
            accepted[position] += writer == SOURCE_ACCEPTED
            position = position + 1 if writer == SOURCE_ACCEPTED else 0
    return [accepted[i] / examined[i] for i in sorted(examined) if examined[i]]
