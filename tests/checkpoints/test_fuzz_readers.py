"""No mutated file of any format gives a traceback, a wait or memory; see `fuzz_readers`."""

from __future__ import annotations

import pytest

from . import fuzz_readers


@pytest.mark.parametrize("form", fuzz_readers.FORMATS)
def test_mutated_files(tmp_path, form):
    found = fuzz_readers.run(fuzz_readers.make(tmp_path / "checkpoint_3", form), form, 20, seed=0)
    assert found["refused"] > 3, found


@pytest.mark.slow
@pytest.mark.parametrize("form", fuzz_readers.FORMATS)
def test_10000_mutated_files(tmp_path, form):
    found = fuzz_readers.run(fuzz_readers.make(tmp_path / "checkpoint_3", form), form, 10_000, seed=1)
    print(form, found)
    assert found["refused"] > 2000, found
