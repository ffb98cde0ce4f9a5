"""The pair that travels with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import speccascade_t5x
from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import tree

PAIR = Path(speccascade_t5x.__file__).parent / "data" / "restore_de_pair"
MEGABYTE = 10**6


def test_it_is_whole_and_small():
    bundle = checkpoints.load_bundle(PAIR)
    assert tree.count(bundle.verifier.params) == 5_509_888
    assert tree.count(bundle.drafter.params) == 225_984
    assert bundle.feature_lengths == {"inputs": 80, "targets": 96}
    assert bundle.decode == {"draft_len": 5, "start_id": 0, "eos_id": 1, "pad_id": 0}
    assert bundle.vocabulary.kind == "byte"
    assert "T5X" in bundle.description
    sizes = [file.stat().st_size for file in PAIR.rglob("*") if file.is_file()]
    assert sum(sizes) <= 30 * MEGABYTE and max(sizes) < 15 * MEGABYTE


@pytest.mark.parametrize("name", ["drafter", "verifier"])
def test_it_is_the_trained_pair_to_the_bit(shared, name):
    with np.load(shared / "pair_t5x" / name / "params.npz") as archive:
        found = tree.flatten(checkpoints.load(PAIR / name).params)
        assert sorted(found) == sorted(archive.files)
        for key in found:
            np.testing.assert_array_equal(found[key], archive[key])
