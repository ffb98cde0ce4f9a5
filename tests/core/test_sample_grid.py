"""What `probs.sample` really draws: its law over every pair of uniforms there is, counted, not sampled.

Uniforms are multiples of 2^-24, so there are 2^48 pairs. Both draws are monotone in their uniform, and where an index
first appears is found by bisection of the grid; so every one of the pairs is accounted for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimized import optimized_jit
from speccascade_t5x.core import noise, probs

GRID = 2**24
LAWS = ("softmax", "zipf", "flat")


def law_of(kind: str, vocab: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    weights = {
        "softmax": lambda: np.exp(2.5 * rng.normal(size=vocab)),
        "zipf": lambda: rng.permutation(1.0 / np.arange(1, vocab + 1)),
        "flat": lambda: np.ones(vocab),
    }[kind]()
    return (weights / weights.sum()).astype(np.float32)


def shares(index_at, size: int) -> np.ndarray:
    """[..., size] how many of the grid's uniforms draw each index, over GRID.

    `index_at` takes grid places [..., size - 1] and returns the index drawn at each; it is monotone along the grid.
    """
    wanted = np.arange(1, size)
    low = np.zeros(np.shape(index_at(np.zeros(size - 1, np.int64))), np.int64)  # lowest place that may draw >= wanted
    high = np.full_like(low, GRID)
    while (low < high).any():
        middle = (low + high) // 2
        reached = index_at(np.minimum(middle, GRID - 1)) >= wanted
        low, high = np.where(reached | (low >= high), low, middle + 1), np.where(reached, middle, high)
    edges = np.concatenate([np.zeros_like(low[..., :1]), low, np.full_like(low[..., :1], GRID)], axis=-1)
    return np.diff(edges, axis=-1) / GRID


def drawn(law: np.ndarray, draw) -> np.ndarray:
    """[V] the law of draw(law, uniforms [N, 2]) over all pairs of uniforms."""
    vocab, width = len(law), probs.chunk_width(len(law))
    chunks = -(-vocab // width)
    many = optimized_jit(lambda uniforms: draw(jnp.asarray(law), uniforms))

    def ids(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
        pairs = np.stack([outer.ravel(), inner.ravel()], axis=-1) / np.float32(GRID)
        return np.asarray(many(pairs.astype(np.float32))).reshape(outer.shape)

    outer = shares(lambda place: ids(np.broadcast_to(place, (chunks - 1,)), np.zeros(chunks - 1)) // width, chunks)
    ends = np.cumsum(np.round(outer * GRID).astype(np.int64))
    found = np.zeros(chunks * width)
    for begin in range(0, chunks, 64):
        part = slice(begin, begin + 64)
        inside = np.maximum(ends[part] - 1, 0)[:, None]  # a uniform that draws the chunk, if any does

        def place_in(place, inside=inside):
            shape = (len(inside), width - 1)
            return ids(np.broadcast_to(inside, shape), np.broadcast_to(place, shape)) % width

        part_of = shares(place_in, width)
        found.reshape(chunks, width)[part] = outer[part, None] * part_of
    return found[:vocab]


def distance(found: np.ndarray, law: np.ndarray) -> float:
    wanted = law.astype(np.float64)
    assert found.sum() == pytest.approx(1, abs=1e-9)
    return 0.5 * np.abs(found - wanted / wanted.sum()).sum()


def bound(vocab: int) -> float:
    """(chunks + width) / 2^25 from the grid, and as much again for float32 sums."""
    width = probs.chunk_width(vocab)
    return 2 * (-(-vocab // width) + width) / 2**25


@pytest.mark.parametrize(
    ("vocab", "kind"),
    [*((384, kind) for kind in LAWS), (32_128, "softmax"), pytest.param(256_000, "zipf", marks=pytest.mark.slow)],
)
def test_every_pair_of_uniforms_counted(vocab, kind):
    law = law_of(kind, vocab)
    found = drawn(law, jax.vmap(probs.sample, in_axes=(None, 0)))
    print(f"V = {vocab}, {kind}: {distance(found, law):.1e} off, {(found == 0).sum()} ids of no uniform")
    assert distance(found, law) < bound(vocab)


def test_one_uniform_would_not_do():
    """The count sees what is mended: one uniform of 23 bits over all ids, its sums exact."""
    law = law_of("softmax", 32_128).astype(np.float64)
    edges = np.ceil(np.cumsum(law / law.sum()).clip(0, 1) * 2**23)
    found = np.diff(edges, prepend=0) / edges[-1]
    assert (found == 0).sum() > 1000
    assert distance(found, law) > 20 * bound(32_128)


def test_uniforms_are_the_grid():
    found = np.asarray(noise.uniforms(noise.from_seed(0), 1_000_000)).astype(np.float64)
    places = found * GRID
    np.testing.assert_array_equal(places, np.round(places))
    assert 0 <= places.min() < 200 and GRID - 200 < places.max() < GRID
    assert (np.round(places) % 2 == 1).mean() == pytest.approx(0.5, abs=0.005)  # the last bit is in use
    assert found.mean() == pytest.approx(0.5, abs=0.002)
