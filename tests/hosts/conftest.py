"""Folders that tests share, with what one host makes of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from hosts import jobs


@pytest.fixture(scope="session")
def decoding(tmp_path_factory) -> Path:
    """See `jobs.for_decoding`."""
    return jobs.for_decoding(tmp_path_factory.mktemp("decoding"))


@pytest.fixture(scope="session")
def training(tmp_path_factory) -> Path:
    """See `jobs.for_training`."""
    return jobs.for_training(tmp_path_factory.mktemp("training"))
