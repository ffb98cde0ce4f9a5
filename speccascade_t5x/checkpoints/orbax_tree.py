"""Parameters in Orbax checkpoints: those of our bundles, and those `t5x.train` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from speccascade_t5x.checkpoints import architecture, tree
from speccascade_t5x.interfaces import Bound, PyTree, UserError
from speccascade_t5x.models.t5 import T5, param_shapes

# Small files travel well: many hosts of files refuse or slow down large ones.
_FILE_BYTES = 12 * 2**20
_CHUNK_BYTES = 8 * 2**20
_COMMIT_FILE = "commit_success.txt"
_LONGEST_REASON = 300
_TARGET = "target"  # where T5X keeps the parameters of a train state


def save(path: Path, params: PyTree) -> None:
    """Writes float32 parameters as one Orbax checkpoint that plain Orbax restores.

    Raises:
      UserError: the disk is full, or the place cannot be written.
    """
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
    arguments = ocp.args.PyTreeSave(
        params, save_args=save_args, ocdbt_target_data_file_size=_FILE_BYTES
    )
    try:
        with ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
        ) as writer:
            writer.save(path.resolve(), args=arguments)
        # Orbax notes the absolute path it wrote to, which means nothing where the files end up.
        if (path / _COMMIT_FILE).is_file():
            (path / _COMMIT_FILE).write_text("Checkpoint commit was successful.\n")
    except (ValueError, OSError) as error:  # tensorstore reports a full disk as a ValueError
        raise UserError(f"Cannot write the Orbax checkpoint {path}: {_reason(error)}") from error


def restore(path: Path, expected: PyTree, *, branch: str | None = None) -> PyTree:
    """Reads float32 arrays from one Orbax checkpoint.

    Args:
      path: the checkpoint folder.
      expected: nested dict of leaves with `shape`; compared before anything is read.
      branch: name of the top-level branch that holds the parameters, if they are not the whole.

    Raises:
      UserError: it is no Orbax checkpoint, is damaged, or holds other tensors.
    """
    tree.require_match(expected, shapes(path, branch=branch), str(path))
    sharding = jnp.zeros(()).sharding  # the default device
    item = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=sharding), expected
    )
    item = {branch: item} if branch else item
    arguments = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=bool(branch),
    )
    try:
        with ocp.PyTreeCheckpointer() as reader:
            params = reader.restore(path.resolve(), args=arguments)
    except Exception as error:  # Orbax wraps what goes wrong in a plain Exception
        raise UserError(f"The Orbax checkpoint {path} is damaged: {_reason(error)}") from error
    return params[branch] if branch else params


def shapes(path: Path, *, branch: str | None = None) -> dict[str, Any]:
    """Flat names to shape and dtype, from the checkpoint's metadata alone."""
    try:
        with ocp.PyTreeCheckpointer() as reader:
            metadata = reader.metadata(path.resolve()).item_metadata
    except Exception as error:  # as in `restore`
        raise UserError(f"{path} is not an Orbax checkpoint: {_reason(error)}") from error
    found = metadata.tree if metadata is not None else None
    if branch is not None and isinstance(found, dict):
        found = found.get(branch)
    if not isinstance(found, dict) or not found:
        raise UserError(
            f"The Orbax checkpoint {path} holds no "
            f"parameters{f' below {branch!r}' if branch else ''}."
        )
    return tree.flatten(found)


def _reason(error: Exception) -> str:
    """The first line of a message; tensorstore's go on for pages."""
    return str(error).split("\n")[0][:_LONGEST_REASON]


def read_t5x(folder: Path) -> Bound:
    """Reads the parameters of a `checkpoint_N` folder that T5X wrote with Orbax.

    Raises:
      UserError: see `restore`; or the model is not a supported T5.
    """
    state = folder / "state"
    found = shapes(state, branch=_TARGET)
    config = architecture.from_shapes(found, architecture.beside(folder), str(folder))
    params = restore(state, param_shapes(config), branch=_TARGET)
    for name, leaf in tree.flatten(params).items():
        tree.require_finite(name, np.asarray(leaf), str(folder))
    return Bound(T5(config), params)
