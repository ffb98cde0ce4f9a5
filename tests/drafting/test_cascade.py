"""Cascades of drafters write the drafts the oracle enumerates, with its laws and probabilities."""

from __future__ import annotations

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drafting import cascades
from oracles.tables import agreement
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.interfaces import Drafter

ROWS = 20_000
CLOSE = 3e-6  # float32 laws against float64 ones


def sampling_of(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    return Sampling(np.float32(temperature), np.int32(top_k), np.float32(top_p), np.float32(0))


@functools.cache
def proposer(name: str, lenient: bool):
    """A compiled first proposal of ROWS rows: (lenience, sampling, noise) -> Proposal."""
    inputs = cascades.inputs(ROWS)

    @jax.jit
    def propose(lenience, sampling, noise):
        bound = cascades.bound(name, lenience if lenient else None, sampling)
        state = bound.model.start(bound.params, inputs, ROWS, 12)
        zero = jnp.zeros(ROWS, jnp.int32)
        return bound.model.propose(bound.params, state, jnp.zeros((ROWS, 2), jnp.int32), zero, noise)[0]

    return propose


def merged(leaves) -> tuple[dict, dict]:
    """({tokens: laws [ways, n, V]}, {(*tokens, way): probability}); ways that differ in nothing visible are one."""
    ways: dict[tuple, list] = {}
    chances: dict[tuple, float] = {}
    for leaf in leaves:
        known, laws = ways.setdefault(leaf.tokens, []), np.array(leaf.laws)
        same = [i for i, other in enumerate(known) if np.abs(other - laws).max() < 1e-9]
        if not same:
            known.append(laws)
        key = (*leaf.tokens, (same or [len(known) - 1])[0])
        chances[key] = chances.get(key, 0.0) + leaf.chance
    return {tokens: np.array(known) for tokens, known in ways.items()}, chances


SETTINGS = {
    "exact": (1.0, {}),
    "lenient": (2.5, {}),
    "cool": (2.5, {"temperature": 0.6, "top_p": 0.85}),
    "top_k": (1.5, {"top_k": 2}),
    "greedy": (4.0, {"temperature": 0.0}),
}


SLOW = ("three_models", "rules_between")  # more of the same, and minutes of compiling in all


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in cascades.CASCADES])
def test_drafts_are_the_oracles(name, setting):
    """Every reported law is one of the oracle's ways for that draft, and each way is as frequent as it should be."""
    lenience, options = SETTINGS[setting]
    lenient = cascades.CASCADES[name][3][0] is None
    rest = {k: v for k, v in options.items() if k != "temperature"}
    temperature = options.get("temperature", 1.0)
    ways, chances = merged(cascades.oracle(name, lenience if lenient else None, temperature, rest).leaves())
    bound = cascades.bound(name, None, Sampling())
    assert isinstance(bound.model, Drafter)
    noise = np.random.default_rng(0).random((ROWS, bound.model.noise_size), np.float32)
    proposal = jax.device_get(proposer(name, lenient)(np.float32(lenience), sampling_of(**options), noise))
    seen: Counter = Counter()
    for row in range(ROWS):
        size = proposal.lengths[row]
        tokens = tuple(proposal.tokens[row, :size].tolist())
        assert tokens in ways, f"the oracle cannot draft {tokens}"
        distance = np.abs(ways[tokens] - proposal.law[row, :size]).max(axis=(1, 2))
        assert distance.min() < CLOSE, f"{tokens} has laws {proposal.law[row, :size]}, not one of {ways[tokens]}"
        seen[(*tokens, int(distance.argmin()))] += 1
    assert agreement(seen, chances).holds
    assert setting != "lenient" or len(chances) > len(ways) or not lenient


def test_several_ways_to_one_draft_exist():
    """Guards the test above: with lenience the same tokens come with different laws, so d is no law of the prefix."""
    ways, _ = merged(cascades.oracle("three_levels", 2.5).leaves())
    assert max(len(laws) for laws in ways.values()) > 1
