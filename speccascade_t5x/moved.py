"""Modules that moved in release 0.2: the old paths resolve for this release, and say what the new name is.

Saved `config.gin` files and gin files of users import modules by path, `from speccascade_t5x.runtime import generate`
among them. Release 0.3 drops this file. Standard library only: `import speccascade_t5x` loads this module.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from typing import Any

_PACKAGE = __name__.partition(".")[0]
_ROOMS = {
    "common": "fingerprints packaged paths",
    "text": "text_input vocabulary",
    "data": "batching cache mixing packing shards",
    "distributed": "collectives hosts partitioning",
    "inference": "drafters generate infer measuring methods records refill settings t5x_model",
    "training": "losses optimizers tables teacher_forcing train train_checkpoints train_loop train_step",
    "training.deferral": "train_deferral",
    "planning": "cost_model plan probing",
}
_RENAMED = {
    "runtime.data": "data.seqio_tasks",
    "runtime.deferral_data": "training.deferral.collection",
    "runtime.deferral_scoring": "training.deferral.pair_scores",
    "runtime.deferral_store": "training.deferral.fit_store",
    "runtime.fitting": "data.length_buckets",
    "runtime.options": "common.checks",
    "runtime.plans": "inference.plan_files",
    "tpu.cells": "tpu.slice_cells",
    "tpu.roofline": "planning.roofline",
    "tpu.slice_plan": "planning.slice_plan",
}
# Old path -> new path, both below the package.
MOVED = {f"runtime.{name}": f"{room}.{name}" for room, names in _ROOMS.items() for name in names.split()} | _RENAMED


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the module that took the place of an old one."""

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of an old path; None for every other module."""
        old = fullname.removeprefix(f"{_PACKAGE}.")
        if old != "runtime" and old not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=old == "runtime")

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """The new module itself, so that both paths name the same objects; an empty package for `runtime`."""
        old = spec.name.removeprefix(f"{_PACKAGE}.")
        if old == "runtime":
            return None
        new = f"{_PACKAGE}.{MOVED[old]}"
        warnings.warn(f"{spec.name} is {new} now; the old path goes with release 0.3", FutureWarning, stacklevel=2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: Any) -> None:
        """Gives the module its own spec back, which the import system has replaced by the old path's."""
        if module.__spec__.loader_state is not None:
            module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Makes the old paths importable. Called once by `speccascade_t5x/__init__.py`."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
