"""`--topology=NAME`: a packaged topology, or a mesh given by its sizes."""

from __future__ import annotations

import difflib
import re

from speccascade_t5x.common import paths
from speccascade_t5x.interfaces import UserError

HELP = "a mesh of devices: a file of gin_configs/topologies (v4_8, cpu_8, ...), or DATAxMODEL, such as 4x2"
_FOLDER, _ANY = "topologies", "any"


def configured(name: str | None) -> tuple[list[str], dict[str, int]]:
    """What a topology adds to a configuration: (gin files, bindings); nothing for None.

    Raises:
      UserError: no topology has that name.
    """
    if name is None:
        return [], {}
    sizes = re.fullmatch(r"(\d+)x(\d+)", name)
    if sizes:
        chosen = dict(zip(("data", "model"), map(int, sizes.groups()), strict=True))
        return [f"{_FOLDER}/{_ANY}.gin"], {f"partitioning.Topology.{axis}": size for axis, size in chosen.items()}
    known = sorted(path.stem for path in (paths.gin_configs_dir() / _FOLDER).glob("*.gin"))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use DATAxMODEL, such as 4x2, or one of {', '.join(known)}"
        raise UserError(f"there is no topology {name!r}: {hint}")
    return [f"{_FOLDER}/{name}.gin"], {}
