"""Prompts to batches."""

from __future__ import annotations

import numpy as np
import pytest

from speccascade_t5x.data.batching import default_buckets, make_batches
from speccascade_t5x.data.examples import Example
from speccascade_t5x.interfaces import UserError


def examples(*lengths):
    """Examples whose tokens say which example they belong to."""
    return [Example(i, np.full(length, i + 1, np.int32)) for i, length in enumerate(lengths)]


def test_default_buckets_end_with_the_feature_length():
    assert default_buckets(80) == (32, 64, 80)
    assert default_buckets(64) == (32, 64)
    assert default_buckets(7) == (7,)


def test_every_example_is_in_one_valid_row_of_its_smallest_bucket():
    lengths = [3, 32, 33, 64, 65, 80, 1, 0, 40]
    batches = make_batches(examples(*lengths), batch_size=2, feature_length=80)
    seen = {}
    for batch in batches:
        assert batch.encoder_input_tokens.dtype == np.int32
        assert batch.encoder_input_tokens.shape == (2, batch.bucket)
        for row, index, valid in zip(batch.encoder_input_tokens, batch.example_ids, batch.valid, strict=True):
            if valid:
                assert index not in seen
                seen[int(index)] = batch.bucket
                assert (row[: lengths[index]] == index + 1).all() and (row[lengths[index] :] == 0).all()
    assert seen == {0: 32, 1: 32, 2: 64, 3: 64, 4: 80, 5: 80, 6: 32, 7: 32, 8: 64}
    assert len({b.encoder_input_tokens.shape for b in batches}) == 3


def test_order_is_stable_and_short_batches_repeat_their_first_row():
    batches = make_batches(examples(5, 4, 3), batch_size=2, feature_length=8, pad_id=9)
    assert [b.example_ids.tolist() for b in batches] == [[0, 1], [2, 2]]
    assert batches[1].valid.tolist() == [True, False]
    np.testing.assert_array_equal(batches[1].encoder_input_tokens, [[3, 3, 3] + [9] * 5] * 2)


@pytest.mark.parametrize("buckets", [(), (8, 4, 16), (4, 8), (4, 4, 16), (0, 16), (4, 32)])
def test_bad_buckets_are_refused(buckets):
    with pytest.raises(UserError, match="buckets"):
        make_batches(examples(3), batch_size=1, feature_length=16, buckets=buckets)


def test_nothing_to_decode_and_bad_batch_size():
    with pytest.raises(UserError, match="no examples"):
        make_batches([], batch_size=2, feature_length=8)
    with pytest.raises(UserError, match="batch size"):
        make_batches(examples(1), batch_size=0, feature_length=8)
