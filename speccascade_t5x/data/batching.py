"""Turns prompts of many lengths into batches of few shapes.

Every new shape needs a compile. `make_batches` gives all batches the same number of rows and pads
their prompts to one of a few bucket lengths, so the number of distinct shapes (= compiles) is at
most `len(buckets)`, whatever the number of examples.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from speccascade_t5x.data.examples import Example
from speccascade_t5x.interfaces import UserError

_SMALLEST_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts padded to one shape.

    Attributes:
      encoder_input_tokens: [B, S] int32 prompts, of whichever kind of model, padded with `pad_id` on the
        right; S is `bucket`.
      example_ids: [B] int32, `index` of each row's example.
      valid: [B] bool, False for the rows that only fill up the last batch of a bucket. They repeat
        the first row, so that they end when it ends and need no further round.
      bucket: the padded length S.
    """

    encoder_input_tokens: np.ndarray
    example_ids: np.ndarray
    valid: np.ndarray
    bucket: int


def default_buckets(feature_length: int) -> tuple[int, ...]:
    """32, 64, 128, ... up to `feature_length`, which is always the last."""
    if feature_length < 1:
        raise UserError(f"the feature length of the inputs must be at least 1, not {feature_length}")
    buckets = []
    length = _SMALLEST_BUCKET
    while length < feature_length:
        buckets.append(length)
        length *= 2
    return (*buckets, feature_length)


def make_batches(
    examples: Iterable[Example],
    *,
    batch_size: int,
    feature_length: int,
    buckets: Sequence[int] | None = None,
    pad_id: int = 0,
) -> list[Batch]:
    """Groups prompts by length bucket into batches of exactly `batch_size` rows.

    Short buckets come first; inside a bucket the order of `examples` is kept. The result depends on
    the arguments alone, so chunk numbers have the same meaning after a restart.

    Args:
      examples: the prompts.
      batch_size: B.
      feature_length: maximum length of a prompt, see `examples.fit`.
      buckets: padded lengths, increasing, the last one `feature_length`; `default_buckets` if None.
      pad_id: id of padding.

    Raises:
      UserError: no examples, or a bad batch size or bucket list.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, not {batch_size}")
    lengths = tuple(buckets) if buckets is not None else default_buckets(feature_length)
    _check_buckets(lengths, feature_length)
    groups: dict[int, list[tuple[int, np.ndarray]]] = {length: [] for length in lengths}
    for example in examples:
        bucket = next(length for length in lengths if len(example.inputs) <= length)
        groups[bucket].append((example.index, example.inputs))
    if not any(groups.values()):
        raise UserError("there is nothing to decode: the data set holds no examples")
    return [
        _batch(group[start : start + batch_size], batch_size, bucket, pad_id)
        for bucket, group in groups.items()
        for start in range(0, len(group), batch_size)
    ]


def _check_buckets(buckets: tuple[int, ...], feature_length: int) -> None:
    increasing = all(a < b for a, b in itertools.pairwise(buckets))
    if not buckets or buckets[0] < 1 or not increasing or buckets[-1] != feature_length:
        raise UserError(f"the length buckets {buckets} must increase and end with the feature length {feature_length}")


def _batch(rows: list[tuple[int, np.ndarray]], batch_size: int, bucket: int, pad_id: int) -> Batch:
    valid = np.arange(batch_size) < len(rows)
    rows = rows + [rows[0]] * (batch_size - len(rows))
    tokens = np.full((batch_size, bucket), pad_id, np.int32)
    for row, (_, inputs) in zip(tokens, rows, strict=True):
        row[: len(inputs)] = inputs
    example_ids = np.array([index for index, _ in rows], np.int32)
    return Batch(tokens, example_ids, valid, bucket)
