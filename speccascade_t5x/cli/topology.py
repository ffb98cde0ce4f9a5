"""`--topology=NAME`: a TPU slice, or a mesh given by its sizes."""

from __future__ import annotations

import re

from speccascade_t5x.common import paths
from speccascade_t5x.interfaces import UserError

HELP = "a mesh of devices: a TPU slice (v4-8), gpu_8, cpu_8, or DATAxMODEL, such as 4x2"
_FOLDER, _ANY = "topologies", "any"
_DEVICES = "partitioning.Topology.devices"


def configured(name: str | None) -> tuple[list[str], dict[str, int]]:
    """The gin files and bindings that a topology adds to a configuration; both are empty for None.

    Args:
      name: a slice of `distributed.slices`, "cpu_N" or "gpu_N", "DATAxMODEL", or a file of gin_configs/topologies/.

    Raises:
      UserError: no topology has that name.
    """
    if name is None:
        return [], {}
    general = [f"{_FOLDER}/{_ANY}.gin"]
    sizes = re.fullmatch(r"(\d+)x(\d+)", name)
    if sizes:
        return general, {f"partitioning.Topology.{axis}": int(sizes[i]) for i, axis in ((1, "data"), (2, "model"))}
    if (paths.gin_configs_dir() / _FOLDER / f"{name}.gin").is_file():
        return [f"{_FOLDER}/{name}.gin"], {}
    counted = re.fullmatch(r"(?:cpu|gpu)[-_](\d+)", name)
    if counted:
        return general, {_DEVICES: int(counted[1])}
    from speccascade_t5x.distributed import slices  # loads JAX, as its room does

    try:
        return general, {_DEVICES: slices.named(name).devices}
    except UserError as error:
        raise UserError(f"{error} (or give the sizes of the mesh, DATAxMODEL, such as 4x2)") from error


def instead_of(file: str) -> str:
    """What to write instead of a gin file that named a slice ("topologies/v4_8.gin"); "" for any other file."""
    found = re.search(rf"(?:^|/){_FOLDER}/(\w+)\.gin$", file)
    try:
        bindings = configured(found[1])[1] if found else {}
    except UserError:
        bindings = {}
    if found is None or _DEVICES not in bindings:
        return ""
    return f"--gin_file={_FOLDER}/{_ANY}.gin --gin.{_DEVICES}={bindings[_DEVICES]}, or --topology={found[1]}"
