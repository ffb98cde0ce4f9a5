"""A pair as one native T5X checkpoint: parameters below `drafter/` and `verifier/`, architectures in config.json.

T5X restores it into the parameter tree of `inference.t5x_model.PairModel`. Names and shapes of a member are ours, so a
member with a position table per layer is not stacked here, as it is where it stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.checkpoints import architecture, flat_params, folders, t5x_native
from speccascade_t5x.checkpoints.architecture import Model
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.common import schema, storage
from speccascade_t5x.interfaces import Bound, UserError

CONFIG_FILE = "config.json"
MEMBERS = ("drafter", "verifier")
_ADVICE = "write the pair with `speccascade export --format=t5x_pair`"


def write(
    folder: Path,
    members: Mapping[str, Bound],
    *,
    step: int = 0,
    dtype: str = "float32",
    chunk_bytes: int = t5x_native.CHUNK_BYTES,
) -> None:
    """Writes the files of a pair into an empty folder.

    Args:
      folder: where to.
      members: "drafter" and "verifier".
      step: training steps to note.
      dtype: what parameters are written as.
      chunk_bytes: largest file before compression.
    """
    wide = np.dtype(jnp.dtype(dtype))
    flat = {
        f"{role}/{name}": leaf for role in MEMBERS for name, leaf in flat_params.flatten(members[role].params).items()
    }
    values = ((name, np.asarray(leaf, wide)) for name, leaf in flat.items())
    t5x_native.write(folder, values, step=step, chunk_bytes=chunk_bytes)
    facts: dict[str, Any] = {"members": {}, "step": step}
    for role in MEMBERS:
        model = members[role].model
        config = {field: getattr(model.config, field) for field in sorted(architecture.FIELDS[_network(model)])}
        facts["members"][role] = {"network": _network(model), "start_id": model.start_id, "config": config}
    (folder / CONFIG_FILE).write_text(storage.to_json(facts, indent=1) + "\n", "utf-8")


def models(folder: str | Path) -> dict[str, Model]:
    """The architectures of a pair, by role; no tensor is read.

    Raises:
      UserError: the folder holds no pair, or its config.json is damaged.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no pair of ours: it has no {CONFIG_FILE}; {_ADVICE}")
    members = schema.read(path).get("members")
    if not isinstance(members, dict) or set(members) != set(MEMBERS):
        raise UserError(f"{path} does not describe a drafter and a verifier; {_ADVICE}")
    found = {}
    for role in MEMBERS:
        facts, source = members[role], f"{path} ({role})"
        fields = facts.get("config") if isinstance(facts, dict) else None
        if not isinstance(fields, dict) or not _is_network(facts.get("network")):
            raise UserError(f"{source} names no architecture this release knows")
        start_id = facts.get("start_id")
        config = architecture.from_fields(fields, source, facts["network"])
        if type(start_id) is not int or not 0 <= start_id < config.vocab_size:
            raise UserError(f"{source} says start_id = {schema.shown(start_id)}; it must be an id of the vocabulary")
        found[role] = architecture.model(config, start_id)
    return found


def is_pair(folder: str | Path) -> bool:
    """Whether a folder is a T5X checkpoint of a pair, by its files alone."""
    folder = Path(folder)
    if not (folder / t5x_native.INDEX_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        return False
    return "members" in schema.read(folder / CONFIG_FILE)


def open_members(folder: str | Path, *, verify: bool = True) -> dict[str, Opened]:
    """A pair in its files, by role: no tensor has been read.

    Args:
      folder: the checkpoint.
      verify: compare every file with its checksum where there are any.

    Raises:
      UserError: see `models`; or a tensor is missing, or of another shape.
    """
    folder = Path(folder)
    try:
        if verify:
            folders.check(folder)
        named = models(folder)
        step = schema.read(folder / CONFIG_FILE).get("step")
        found = t5x_native.read_tensors(folder)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error
    wanted = {f"{role}/{name}": s for role in MEMBERS for name, s in _shapes(named[role]).items()}
    flat_params.require_match(flat_params.nest(wanted), found, str(folder))
    leaves = {role: {name: found[f"{role}/{name}"] for name in _shapes(named[role])} for role in MEMBERS}
    step = step if type(step) is int else None
    return {role: Opened("t5x_pair", folder, named[role], leaves[role], step=step) for role in MEMBERS}


def load(folder: str | Path) -> dict[str, Bound]:
    """Reads a pair, float32, by role.

    Raises:
      UserError: see `open_members`; or a tensor is damaged.
    """
    return {role: opened.load() for role, opened in open_members(folder).items()}


def _is_network(name: Any) -> bool:
    return isinstance(name, str) and name in architecture.NETWORKS


def _network(model: Model) -> str:
    return architecture.network(model.config)


def _shapes(model: Model) -> dict[str, jax.ShapeDtypeStruct]:
    return flat_params.flatten(architecture.shapes(model.config))
