"""Meshes: which devices share the work."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh

from speccascade_t5x.interfaces import UserError
from speccascade_t5x.runtime import options


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh of the first so many local devices, all if None, over which batches are split.

    Raises:
      UserError: there are not that many.
    """
    found = jax.devices()
    if devices is not None:
        options.whole("devices", devices, 1)
        if devices > len(found):
            raise UserError(f"devices={devices} was asked for, and this machine has {len(found)}")
    count = len(found) if devices is None else devices
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=found[:count])
