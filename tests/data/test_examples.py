"""Texts and ids that fit their feature length."""

from __future__ import annotations

import numpy as np
import pytest

from speccascade_t5x.data.examples import PromptForm, cut, fit
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary


def ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def test_what_fits_stays_as_it_is():
    for room in (None, 3, 4):
        assert fit(np.array([5, 6, 1]), room, "x", truncate=False, eos_id=1).tolist() == [5, 6, 1]


def test_what_is_cut_ends_with_the_eos_where_there_is_one():
    long = np.array([5, 6, 7, 8, 1])
    assert cut(long, 3, 1).tolist() == [5, 6, 1]
    assert cut(long, 3, None).tolist() == [5, 6, 7]
    assert cut(long, 0, 1).tolist() == []
    assert long.tolist() == [5, 6, 7, 8, 1]
    assert fit(long, 2, "x", truncate=True, eos_id=1).tolist() == [5, 1]


def test_what_is_too_long_is_refused_by_name():
    with pytest.raises(UserError, match="^line 7 has 5 tokens, EOS included, more than the feature length 4"):
        fit(np.array([5, 6, 7, 8, 1]), 4, "line 7", truncate=False, eos_id=1)
    with pytest.raises(UserError, match="^line 7 has 5 tokens, more than"):
        fit(np.array([5, 6, 7, 8, 1]), 4, "line 7", truncate=False, eos_id=None)


def test_a_text_becomes_a_prompt():
    form = PromptForm(ByteVocabulary(0), 4)
    example = form.encode(9, "abc", "text 9", "ABC")
    assert (example.index, example.inputs_text, example.targets_text) == (9, "abc", "ABC")
    assert example.inputs.tolist() == [*ids("abc"), 1]
    assert example.inputs.dtype == np.int32
    with pytest.raises(UserError, match="text 1 has 5 tokens"):
        form.encode(1, "abcd", "text 1")
    assert PromptForm(ByteVocabulary(0), 4, truncate=True).encode(0, "abcd", "").inputs.tolist() == [*ids("abc"), 1]
    assert PromptForm(ByteVocabulary(0), 4, eos=False).encode(0, "abcd", "").inputs.tolist() == ids("abcd")
    with pytest.raises(UserError, match="text 2 is not a text but int"):
        form.encode(2, 5, "text 2")
