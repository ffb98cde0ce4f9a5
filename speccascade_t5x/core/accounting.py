"""Per-row counters of a decode, and the rates derived from them.

Only what reached the output is counted: nothing after EOS or the length limit, and nothing for rows that had finished
before the round. Counters stay on the device and are fetched once.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.interfaces import SOURCE_ACCEPTED, SOURCE_RESIDUAL, Array


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counters, each [B] (int32; `deferred` is float32), and one that a cascade of drafters adds.

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
      level_calls: [B, N] drafter_calls of each of N models, from the largest; None where one model or none drafts.
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
    level_calls: Array | None = None

    @classmethod
    def zeros(cls, batch: int) -> Counts:
        """Counters of `batch` fresh rows."""
        counted: Any = {f.name: jnp.zeros(batch, jnp.int32) for f in dataclasses.fields(cls)[:-2]}
        return cls(**counted, deferred=jnp.zeros(batch, jnp.float32))

    def row(self, index: int) -> dict[str, Any]:
        """One row's counters as Python numbers; `level_calls` is a list, and absent if it is not counted."""
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: column[index].tolist() for name, column in columns.items() if column is not None}

    def add(self, alive: Array, **increments: Array | int) -> Counts:
        """Adds each named increment ([B] or scalar) in the rows that are alive."""
        changed = {
            name: getattr(self, name) + jnp.where(alive, value, 0).astype(getattr(self, name).dtype)
            for name, value in increments.items()
        }
        return dataclasses.replace(self, **changed)


trees.register(Counts)


def totals(counts: Counts) -> dict[str, Any]:
    """Sums each counter over rows, as Python numbers (`deferred` a float, the rest ints, `level_calls` a list)."""
    fetched = jax.device_get(counts)
    columns = {f.name: getattr(fetched, f.name) for f in dataclasses.fields(Counts)}
    return {name: column.sum(axis=0).tolist() for name, column in columns.items() if column is not None}


def total(counted: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds up counters that are already Python numbers: rows, or totals of batches. Lists add entry by entry."""
    found: dict[str, Any] = {}
    for counts in counted:
        for name, value in counts.items():
            if isinstance(value, Sequence):
                so_far = found.get(name, [0] * len(value))
                found[name] = [a + b for a, b in zip(so_far, value, strict=True)]
            else:
                found[name] = found.get(name, 0) + value
    return found


def rates(total: Mapping[str, Any]) -> dict[str, Any]:
    """Rates from summed counters; 0 where the denominator is 0.

    Returns:
      acceptance: accepted / examined.
      block_efficiency: committed tokens per round.
      verifier_calls_per_token, drafter_calls_per_token, scored_per_token: costs per committed token.
      deferral_rate: share of committed positions deferred to the verifier.
      level_calls_per_token: where a cascade of drafters ran, the calls of each model, from the largest.
    """

    def ratio(above: str, below: str) -> float:
        return total[above] / total[below] if total[below] else 0.0

    found: dict[str, Any] = {
        "acceptance": ratio("accepted", "examined"),
        "block_efficiency": ratio("committed", "rounds"),
        "verifier_calls_per_token": ratio("verifier_calls", "committed"),
        "drafter_calls_per_token": ratio("drafter_calls", "committed"),
        "scored_per_token": ratio("scored", "committed"),
        "deferral_rate": ratio("deferred", "committed"),
    }
    if "level_calls" in total:
        found["level_calls_per_token"] = [calls / (total["committed"] or 1) for calls in total["level_calls"]]
    return found


def standardised_improvement(total: Mapping[str, Any], costs: Sequence[float]) -> float:
    """Standardised walltime improvement: committed tokens per unit of cost, a call of the verifier costing 1.

    committed / (verifier_calls + sum_i costs[i] level_calls[i]), so that the verifier alone has 1. It only counts
    calls, ignoring wider blocks, copying, verification and the machine: report it beside wall time, never instead.
    Source: "Cascade Speculative Drafting" (Chen et al., NeurIPS 2024), which takes the coefficients in two ways: as
    measured times of a step (Leviathan et al.'s c), or as ratios of parameter counts. Copying costs nothing in both.

    Args:
      total: summed counters of a decode with one drafter, or with a cascade of them.
      costs: of each model of the drafter, from the largest, in calls of the verifier.
    """
    calls = total["level_calls"] if "level_calls" in total else [total["drafter_calls"]]
    if len(calls) != len(costs):
        raise ValueError(f"{len(costs)} costs for {len(calls)} models")
    spent = total["verifier_calls"] + sum(cost * count for cost, count in zip(costs, calls, strict=True))
    return total["committed"] / spent if spent else 0.0


def acceptance_by_position(sources: Iterable[Sequence[int]]) -> list[float]:
    """Share of examined drafts that were accepted, per draft position, read off who wrote each output token.

    A round shows as accepted tokens followed by a residual (the draft was rejected there) or a bonus token; the
    end of a row may cut it short.

    Args:
      sources: `source` of each row, without padding.

    Returns:
      One rate per draft position that was ever examined.
    """
    examined: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for source in sources:
        position = 0
        for writer in source:
            examined[position] += writer in (SOURCE_ACCEPTED, SOURCE_RESIDUAL)
            accepted[position] += writer == SOURCE_ACCEPTED
            position = position + 1 if writer == SOURCE_ACCEPTED else 0
    return [accepted[i] / examined[i] for i in sorted(examined) if examined[i]]
