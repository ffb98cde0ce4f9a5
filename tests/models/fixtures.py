"""Reads models and expected arrays that were made with the real T5X library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from flax import traverse_util

from speccascade_t5x.interfaces import Bound
from speccascade_t5x.models import T5, T5Config


def architecture(folder: Path) -> T5Config:
    """The architecture a fixture's config.json describes."""
    stored = json.loads((folder / "config.json").read_text())
    stored = stored.get("config", stored)
    known = {field: stored[field] for field in T5Config.__dataclass_fields__ if field in stored}
    return T5Config(**known)


def parameters(folder: Path) -> dict:
    """The nested parameters of params.npz, whose names are joined by '/'."""
    with np.load(folder / "params.npz") as stored:
        return traverse_util.unflatten_dict({name: stored[name] for name in stored.files}, sep="/")


def load(folder: Path, **changes) -> tuple[Bound, dict[str, np.ndarray]]:
    """(bound model, expected arrays) of a fixture."""
    config = T5Config(**{**vars(architecture(folder)), **changes})
    with np.load(folder / "expected.npz") as stored:
        expected = {name: stored[name] for name in stored.files}
    return Bound(T5(config), parameters(folder)), expected
