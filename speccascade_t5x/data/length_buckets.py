"""Decides which examples share a row or a shape, from their lengths alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from speccascade_t5x.common import checks
from speccascade_t5x.interfaces import UserError


def best_buckets(lengths: np.ndarray, count: int, points: int = 128) -> list[tuple[int, int]]:
    """Chooses at most `count` (inputs, targets) lengths that together hold all examples with least padding.

    Examples are sorted by the sum of their lengths and cut into `count` runs, each as wide as its longest: the best
    cuts among up to 2 * `points` candidates, found by dynamic programming.

    Args:
      lengths: [examples, 2] lengths of inputs and targets.
      count: maximum number of buckets.
      points: number of candidates for a cut; the work grows with its square.

    Returns:
      Lengths that grow in both numbers.
    """
    order = np.argsort(lengths.sum(axis=1), kind="stable")
    # Running maxima make every bucket hold what the earlier ones hold.
    widest = np.maximum.accumulate(np.maximum(lengths[order], 1), axis=0)
    widths = widest.sum(axis=1)
    # Candidates at even counts, and at even widths for the sake of a thin tail of long examples.
    by_count = np.linspace(0, len(order), points + 1).round().astype(int)[1:]
    by_width = np.searchsorted(widths, np.linspace(widths[0], widths[-1], points), side="right")
    ends = np.unique(np.concatenate([by_count, by_width, [len(order)]]))
    ends = ends[ends > 0]
    width = widths[ends - 1]
    starts = np.concatenate([[0], ends])
    # cost[j]: least slots for the first j candidate runs; runs i..j form one bucket as wide as its last.
    cost = np.concatenate([[0.0], np.full(len(ends), np.inf)])
    choices = []
    for _ in range(min(count, len(ends))):
        options_of = cost[:, None] + (starts[None, 1:] - starts[:, None]) * width[None, :]
        options_of[np.arange(len(starts))[:, None] > np.arange(len(ends))[None, :]] = np.inf
        choices.append(options_of.argmin(axis=0))
        cost = np.concatenate([[0.0], options_of.min(axis=0)])
    found, at = [], len(ends)
    for choice in reversed(choices):
        if at == 0:
            break
        found.append(tuple(widest[ends[at - 1] - 1].tolist()))
        at = int(choice[at - 1])
    return sorted(set(found))


def first_fit(taken: np.ndarray, rooms: tuple[int, int]) -> list[np.ndarray]:
    """Groups examples into rows that hold them: longest first, each into the first row with room on both sides."""
    order = np.argsort(-(taken / np.array(rooms)).max(axis=1), kind="stable")
    left = [np.full(len(taken), room, np.int32) for room in rooms]
    row_of = np.empty(len(taken), np.int64)
    count = 0
    for index, (inputs, targets) in zip(order.tolist(), taken[order].tolist(), strict=True):
        fits = (left[0][:count] >= inputs) & (left[1][:count] >= targets)
        row = int(fits.argmax()) if count else 0
        if row == count or not fits[row]:
            row, count = count, count + 1
        left[0][row] -= inputs
        left[1][row] -= targets
        row_of[index] = row
    by_row = np.argsort(row_of, kind="stable")
    return np.split(by_row, np.cumsum(np.bincount(row_of, minlength=count))[:-1])


def given_buckets(buckets: Sequence[tuple[int, int]], rooms: tuple[int, int]) -> list[tuple[int, int]]:
    """Checks buckets that were given, cut to the longest lengths `rooms`, and adds these as the last bucket.

    Raises:
      UserError: a bucket that is not a pair of lengths, or lengths that do not grow together.
    """
    found = []
    for pair in checks.sequence("buckets", buckets):
        pair = checks.sequence("a bucket", pair)
        if len(pair) != 2:
            raise UserError(f"the bucket {pair!r} is not a pair of lengths: write (inputs, targets)")
        for value in pair:
            checks.whole("a bucket's length", value, 1)
        found.append((min(int(pair[0]), rooms[0]), min(int(pair[1]), rooms[1])))
    found = sorted({*found, rooms})
    if any(later[1] < earlier[1] for earlier, later in itertools.pairwise(found)):
        raise UserError(f"the buckets {found} must grow in inputs and targets alike")
    return found


def rows(tokens_per_batch: int, lengths: tuple[int, int], multiple_of: int) -> int:
    """The number of rows of these lengths in a batch of `tokens_per_batch` ids.

    Raises:
      UserError: there is no room for `multiple_of` rows.
    """
    count = tokens_per_batch // sum(lengths) // multiple_of * multiple_of
    if not count:
        raise UserError(
            f"tokens_per_batch={tokens_per_batch} has no room for {multiple_of} rows of {lengths[0]} + {lengths[1]} "
            f"ids: raise it to {multiple_of * sum(lengths)} or more"
        )
    return count
