"""Files of a `train_deferral` job: Orbax checkpoints of its fits, curves, and calibrations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.common import fingerprints, storage
from speccascade_t5x.deferral import fitting
from speccascade_t5x.deferral.calibration import Calibration, PairCalibration
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.training import train_checkpoints


class OrbaxStore:
    """States of one fit in Orbax checkpoints; see `fitting.Store`."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int):
        self._inner = train_checkpoints.Checkpoints(folder, identity, keep)

    def latest(self) -> int | None:
        """The newest step."""
        return self._inner.latest()

    def restore(self, like: fitting.FitState) -> fitting.FitState:
        """The newest state."""
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        found = self._inner.restore(train_checkpoints.TrainState(like.step, like.params, like.opt_state), here)
        return fitting.FitState(found.step, found.params, found.opt_state)

    def save(self, step: int, state: fitting.FitState) -> None:
        """Writes a state atomically."""
        self._inner.save(step, train_checkpoints.TrainState(state.step, state.params, state.opt_state))

    def close(self) -> None:
        """Releases the resources of Orbax."""
        self._inner.close()


class Curves(fitting.Observer):
    """Writes every evaluation to a file of JSON lines and forwards it."""

    def __init__(self, path: Path, then: fitting.Observer):
        self._path, self._then = path, then

    def started(self, seed: int, step: int, steps: int) -> None:
        # Evaluations of steps after the checkpoint will be made again.
        kept = [row for row in storage.read_rows(self._path) if row["seed"] != seed or row["step"] <= step]
        storage.write_text(self._path, "".join(storage.to_json(row) + "\n" for row in kept))
        self._then.started(seed, step, steps)

    def looked(self, seed: int, step: int, metrics: Mapping[str, float]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(storage.to_json({"seed": seed, "step": step, **metrics}) + "\n")
        self._then.looked(seed, step, metrics)


def digest(calibrations: Mapping[str, PairCalibration]) -> dict[str, Any]:
    """A short text of each, which differs if the values differ."""
    return {kind: fingerprints.of_tree(both) for kind, both in calibrations.items()}


def write_calibrations(path: Path, found: Mapping[str, PairCalibration]) -> None:
    """Writes calibrations atomically."""
    arrays = {
        f"{kind}/{side}/{name}": np.asarray(value)
        for kind, both in found.items()
        for side in "qp"
        for name, value in getattr(both, side).values.items()
    }
    storage.write_bytes(path, [storage.npz(arrays, compress=False)])


def read_calibrations(path: Path) -> dict[str, PairCalibration]:
    """Reads the file of `write_calibrations`.

    Raises:
      UserError: it is damaged.
    """
    values: dict[str, dict[str, dict[str, Any]]] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                kind, side, part = name.split("/")
                values.setdefault(kind, {}).setdefault(side, {})[part] = jnp.asarray(file[name])
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and start again") from error
    return {kind: PairCalibration(*(Calibration(kind, sides[side]) for side in "qp")) for kind, sides in values.items()}
