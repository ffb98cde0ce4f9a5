"""Sparse, smoothed bigram and trigram tables: next-token distributions that cost no model call.

A context keeps its most frequent successors; the remaining mass goes to the next shorter context, down to single
tokens with add-one smoothing. Every token therefore has a positive probability in every context, and a table of a 32k
vocabulary takes a few megabytes where a dense [V, V] table would take gigabytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x import trees
from speccascade_t5x.interfaces import Array, UserError


@dataclasses.dataclass(frozen=True)
class NGramTable:
    """P(v | context) = sum_k shares[k] 1[v = successors[k]] + (1 - sum_k shares[k]) P(v | shorter context).

    Attributes:
      unigram: [V] distribution of single tokens, positive everywhere.
      successors: [V, K] ids after one token of context; -1 where there are fewer.
      shares: [V, K] their shares of the mass; 0 where there is no successor.
      starts: [V + 1] where the pairs that begin with each token start in `seconds`; None in a bigram table.
      seconds: [C] the second token of each pair of context, ascending below its first; None likewise.
      pair_successors: [C, K] ids after two tokens of context, likewise.
      pair_shares: [C, K] their shares.
    """

    unigram: Array
    successors: Array
    shares: Array
    starts: Array | None = None
    seconds: Array | None = None
    pair_successors: Array | None = None
    pair_shares: Array | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.unigram.shape[-1]

    def law(self, before: Array, last: Array) -> Array:
        """The distribution of the next token, [B, V] float32.

        Args:
          before: [B] the token before the last; -1 where there is none. A bigram table does not read it.
          last: [B] the last token.
        """
        law = jnp.broadcast_to(self.unigram, (*last.shape, self.vocab_size))
        rows = jnp.arange(last.shape[0])[:, None]
        for ids, shares in reversed(self._levels(before, last)):
            law = law * (1.0 - jnp.sum(shares, axis=-1, keepdims=True))
            law = law.at[rows, jnp.maximum(ids, 0)].add(shares)
        return law

    def best(self, before: Array, last: Array, below: int | None = None) -> Array:
        """The most probable next token of id < `below`, ties to the lower id: [B] int32. Builds no [B, V] array.

        Arguments are those of `law`.
        """
        levels = self._levels(before, last)
        allowed = self.unigram if below is None else self.unigram[:below]
        common = jnp.broadcast_to(jnp.argmax(allowed).astype(jnp.int32), (*last.shape, 1))
        # A token with no share at any level ranks by its unigram probability, so one such candidate is enough.
        candidates = jnp.concatenate([common, *(ids for ids, _ in levels)], axis=-1)
        known = (candidates >= 0) & (candidates < self.vocab_size if below is None else candidates < below)
        chance = self.unigram[jnp.maximum(candidates, 0)]
        for ids, shares in reversed(levels):
            here = candidates[..., :, None] == ids[..., None, :]
            chance = chance * (1.0 - jnp.sum(shares, axis=-1, keepdims=True))
            chance = chance + jnp.sum(jnp.where(here, shares[..., None, :], 0.0), axis=-1)
        chance = jnp.where(known, chance, -1.0)
        leads = chance == jnp.max(chance, axis=-1, keepdims=True)
        return jnp.min(jnp.where(leads, candidates, self.vocab_size), axis=-1).astype(jnp.int32)

    def _levels(self, before: Array, last: Array) -> list[tuple[Array, Array]]:
        """(ids [B, K], shares [B, K]) of each context that is known, longest first."""
        token = jnp.clip(last, 0, self.vocab_size - 1)
        levels = [(self.successors[token], self.shares[token])]
        starts, seconds, successors, shares = self.starts, self.seconds, self.pair_successors, self.pair_shares
        if starts is None or seconds is None or successors is None or shares is None or not seconds.shape[0]:
            return levels
        index, found = _find_pair(starts, seconds, before, token)
        return [(successors[index], jnp.where(found[:, None], shares[index], 0.0)), *levels]


def _find_pair(starts: Array, seconds: Array, before: Array, last: Array) -> tuple[Array, Array]:
    """([B] row of the context (before, last), [B] whether it is known): a binary search below `before`."""
    first = jnp.clip(before, 0, starts.shape[0] - 2)
    low, end = starts[first], starts[first + 1]
    high = end
    for _ in range(int(seconds.shape[0]).bit_length()):
        middle = (low + high) // 2
        smaller = seconds[jnp.minimum(middle, seconds.shape[0] - 1)] < last
        searching = low < high
        low, high = jnp.where(searching & smaller, middle + 1, low), jnp.where(searching & ~smaller, middle, high)
    index = jnp.minimum(low, seconds.shape[0] - 1)
    return index, (before >= 0) & (low < end) & (seconds[index] == last)


trees.register(NGramTable)


def write_rows(history: Array, tokens: Array, index: Array) -> Array:
    """history [B, N, ...] with tokens [B, T, ...] written from index[b] on."""
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(
        history, tokens.astype(history.dtype), index, 0
    )


def token_before(history: Array, index: Array, back: int, absent: int) -> Array:
    """history[b, index[b, t] - back] of [B, N] tokens, [B, T]; `absent` where that lies before the first token."""
    slot = index - back
    return jnp.where(slot < 0, absent, jnp.take_along_axis(history, jnp.maximum(slot, 0), axis=1))


def build_table(
    sequences: Iterable[Sequence[int] | np.ndarray],
    vocab_size: int,
    *,
    order: int = 2,
    successors: int = 16,
    discount: float = 0.5,
    start_id: int = 0,
) -> NGramTable:
    """Counts a corpus into a table (numpy only, on the host).

    Shares are (count - discount) / total of the context: interpolated absolute discounting.

    Args:
      sequences: token ids of each output without padding, with EOS if it should be drafted.
      vocab_size: V.
      order: 2 for a bigram table, 3 for a trigram table on top of it.
      successors: K, most successors kept per context.
      discount: count that each successor gives up to the shorter context, strictly between 0 and 1.
      start_id: put before every sequence, as the decoder start token is.

    Raises:
      UserError: an option out of range, an empty corpus, or an id outside the vocabulary.
    """
    if order not in (2, 3):
        raise UserError(f"order={order} is not supported: use 2 (bigram) or 3 (trigram)")
    if not 0.0 < discount < 1.0:
        raise UserError(f"discount={discount} is out of range: it must lie strictly between 0 and 1")
    if successors < 1:
        raise UserError(f"successors={successors} is too small: it must be 1 or more")
    text, begins = _joined(sequences, vocab_size, start_id)
    tokens = np.delete(text, begins)
    unigram = np.bincount(tokens, minlength=vocab_size) + 1.0
    inside = np.ones(len(text), bool)
    inside[begins] = False  # a token that begins a sequence is nobody's successor
    follows = np.flatnonzero(inside)
    contexts, ids, shares = _shares(text[follows - 1], text[follows], vocab_size, successors, discount)
    every: Any = np.full((vocab_size, ids.shape[1]), -1, np.int32)
    mass: Any = np.zeros((vocab_size, ids.shape[1]), np.float32)
    every[contexts], mass[contexts] = ids, shares
    table = NGramTable((unigram / unigram.sum()).astype(np.float32), every, mass)
    if order == 2:
        return table
    follows = follows[inside[follows - 1]]
    pairs = text[follows - 2] * vocab_size + text[follows - 1]
    contexts, ids, shares = _shares(pairs, text[follows], vocab_size, successors, discount)
    starts: Any = np.searchsorted(contexts // vocab_size, np.arange(vocab_size + 1)).astype(np.int32)
    seconds = (contexts % vocab_size).astype(np.int32)
    return dataclasses.replace(
        table, starts=starts, seconds=seconds, pair_successors=ids, pair_shares=shares.astype(np.float32)
    )


def _joined(
    sequences: Iterable[Sequence[int] | np.ndarray], vocab_size: int, start_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """All sequences joined, each after `start_id`, and where each begins."""
    parts = [np.asarray(sequence, np.int64).ravel() for sequence in sequences]
    if not sum(part.size for part in parts):
        raise UserError("the corpus of an n-gram table is empty: give it at least one token")
    begins = np.cumsum([0] + [part.size + 1 for part in parts[:-1]])
    text = np.concatenate([np.append(np.int64(start_id), part) for part in parts])
    if text.min() < 0 or text.max() >= vocab_size:
        odd = text[(text < 0) | (text >= vocab_size)][0]
        raise UserError(
            f"the corpus of an n-gram table holds the id {odd}, but the vocabulary has {vocab_size} ids: tokenise it "
            "with that vocabulary"
        )
    return text, begins


def _shares(
    contexts: np.ndarray, tokens: np.ndarray, vocab_size: int, most: int, discount: float
) -> tuple[Any, Any, Any]:
    """Known contexts [C] ascending, their `most` frequent successors [C, K] (ties to the lower id), shares [C, K]."""
    known, row = np.unique(contexts, return_inverse=True)
    # Pairs of (row of the context, token) fit 64 bits for any vocabulary, which (context, token) might not.
    pairs, counts = np.unique(row.astype(np.int64) * vocab_size + tokens, return_counts=True)
    rows, successors = pairs // vocab_size, pairs % vocab_size
    totals = np.bincount(rows, counts, len(known))
    order = np.lexsort((successors, -counts, rows))
    rows, successors, counts = rows[order], successors[order], counts[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = rank < most
    width = int(rank[kept].max()) + 1
    ids = np.full((len(known), width), -1, np.int32)
    shares = np.zeros((len(known), width))
    ids[rows[kept], rank[kept]] = successors[kept]
    shares[rows[kept], rank[kept]] = (counts[kept] - discount) / totals[rows[kept]]
    return known, ids, shares
