"""A pair as one native T5X checkpoint: parameters below `drafter/` and `verifier/`, architectures in config.json.

T5X restores it into the parameter tree of `runtime.t5x_model.PairModel`. Names and shapes of a member are ours, so a
member with a position table per layer is not stacked here, as it is where it stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import architecture, bundle, folders, t5x_native, tree
from speccascade_t5x.checkpoints.architecture import Model
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.runtime import records

CONFIG_FILE = "config.json"
MEMBERS = ("drafter", "verifier")
_DTYPES = ("float32", "bfloat16", "float16")


def export(
    source: str | Path,
    target: str | Path,
    *,
    drafter: str | Path | None = None,
    dtype: str = "float32",
    step: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes a pair as one T5X checkpoint. It is read back and compared before it gets its name.

    Args:
      source: a bundle of two models, or the verifier's checkpoint of any kind.
      target: the folder to make; T5X looks for `checkpoint_<step>`.
      drafter: the drafter's checkpoint, where `source` is the verifier's.
      dtype: what parameters are written as: float32, bfloat16 or float16.
      step: training steps to note.
      overwrite: replace a pair that is already there.

    Returns:
      The folder.

    Raises:
      UserError: a bad argument, a checkpoint that cannot be read, a target in the way or that cannot be written, or
        one that reads back as something else. Nothing is left then.
    """
    if dtype not in _DTYPES:
        raise UserError(f"parameters cannot be written as {dtype!r}: use one of {', '.join(_DTYPES)}.")
    if type(step) is not int or step < 0:
        raise UserError(f"step = {step!r} is not usable: it must be a whole number from 0 on.")
    target = Path(target)
    if target.exists() and not (overwrite and (target / t5x_native.INDEX_FILE).is_file()):
        raise UserError(f"{target} already exists; choose another name, or allow a T5X checkpoint to be overwritten.")
    members = _members(source, drafter)
    with folders.published(target, "t5x checkpoint") as partial:
        write(partial, members, step=step, dtype=dtype)
        folders.write_checksums(partial)
        _require_same(members, load(partial), dtype, target)
    return target


def write(folder: Path, members: Mapping[str, Bound], *, step: int = 0, dtype: str = "float32") -> None:
    """Writes the files of a pair into an empty folder.

    Args:
      folder: where to.
      members: "drafter" and "verifier".
      step: training steps to note.
      dtype: what parameters are written as.
    """
    wide = np.dtype(jnp.dtype(dtype))
    flat = {f"{role}/{name}": leaf for role in MEMBERS for name, leaf in tree.flatten(members[role].params).items()}
    t5x_native.write(folder, ((name, np.asarray(leaf, wide)) for name, leaf in flat.items()), step=step)
    facts: dict[str, Any] = {"members": {}, "step": step}
    for role in MEMBERS:
        model = members[role].model
        config = {field: getattr(model.config, field) for field in sorted(architecture.FIELDS[_network(model)])}
        facts["members"][role] = {"network": _network(model), "start_id": model.start_id, "config": config}
    (folder / CONFIG_FILE).write_text(records.to_json(facts, indent=1) + "\n", "utf-8")


def models(folder: str | Path) -> dict[str, Model]:
    """The architectures of a pair, by role; no tensor is read.

    Raises:
      UserError: the folder holds no pair, or its config.json is damaged.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no pair of ours: it has no {CONFIG_FILE}; make one with `t5x_pair.export`.")
    members = architecture.read_json(path).get("members")
    if not isinstance(members, dict) or set(members) != set(MEMBERS):
        raise UserError(f"{path} does not describe a drafter and a verifier; make the pair with `t5x_pair.export`.")
    found = {}
    for role in MEMBERS:
        facts, source = members[role], f"{path} ({role})"
        fields = facts.get("config") if isinstance(facts, dict) else None
        if not isinstance(fields, dict) or facts.get("network") not in architecture.NETWORKS:
            raise UserError(f"{source} names no architecture this release knows.")
        start_id = facts.get("start_id")
        config = architecture.from_fields(fields, source, facts["network"])
        if type(start_id) is not int or not 0 <= start_id < config.vocab_size:
            raise UserError(f"{source} says start_id = {start_id!r}; it must be an id of the vocabulary.")
        found[role] = architecture.model(config, start_id)
    return found


def is_pair(folder: str | Path) -> bool:
    """Whether a folder is a T5X checkpoint of a pair, by its files alone."""
    folder = Path(folder)
    if not (folder / t5x_native.INDEX_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        return False
    return "members" in architecture.read_json(folder / CONFIG_FILE)


def open_members(folder: str | Path, *, verify: bool = True) -> dict[str, Opened]:
    """A pair in its files, by role: no tensor has been read.

    Args:
      folder: the checkpoint.
      verify: compare every file with its checksum where there are any.

    Raises:
      UserError: see `models`; or a tensor is missing, or of another shape.
    """
    folder = Path(folder)
    if verify:
        folders.check(folder)
    named = models(folder)
    step = architecture.read_json(folder / CONFIG_FILE).get("step")
    found = t5x_native.read_tensors(folder)
    wanted = {f"{role}/{name}": s for role in MEMBERS for name, s in _shapes(named[role]).items()}
    tree.require_match(tree.nest(wanted), found, str(folder))
    leaves = {role: {name: found[f"{role}/{name}"] for name in _shapes(named[role])} for role in MEMBERS}
    step = step if type(step) is int else None
    return {role: Opened("t5x_pair", folder, named[role], leaves[role], step=step) for role in MEMBERS}


def load(folder: str | Path) -> dict[str, Bound]:
    """Reads a pair, float32, by role.

    Raises:
      UserError: see `open_members`; or a tensor is damaged.
    """
    return {role: opened.load() for role, opened in open_members(folder).items()}


def _network(model: Model) -> str:
    return architecture.network(model.config)


def _shapes(model: Model) -> dict[str, jax.ShapeDtypeStruct]:
    return tree.flatten(architecture.shapes(model.config))


def _members(source: str | Path, drafter: str | Path | None) -> dict[str, Bound]:
    if checkpoints.detect(source) != "bundle":
        if drafter is None:
            raise UserError(f"{source} is one model: name the drafter's checkpoint too, or a bundle of two models.")
        return {"drafter": checkpoints.load(drafter), "verifier": checkpoints.load(source)}
    if drafter is not None:
        raise UserError(f"{source} is a bundle and has its own members; leave the drafter out.")
    found = bundle.load_bundle(source)
    if found.drafter is None:
        raise UserError(f"{source} holds a verifier alone; name its folder as source and a drafter.")
    return {"drafter": found.drafter, "verifier": found.verifier}


def _require_same(members: Mapping[str, Bound], found: Mapping[str, Bound], dtype: str, target: Path) -> None:
    for role in MEMBERS:
        if found[role].model != members[role].model:
            raise UserError(f"{target} reads back another {role}: {found[role].model}; it was not kept.")
        again = tree.flatten(found[role].params)
        for name, leaf in tree.flatten(members[role].params).items():
            rounded = np.asarray(jnp.asarray(leaf).astype(dtype).astype(jnp.float32))
            if not np.isfinite(rounded).all():
                raise UserError(f"tensor '{role}/{name}' has values {dtype} cannot hold: write it as bfloat16.")
            if not np.array_equal(rounded, np.asarray(again[name])):
                raise UserError(f"{target}: tensor '{role}/{name}' reads back with other values; it was not kept.")
