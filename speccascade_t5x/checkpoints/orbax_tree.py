"""Parameters in Orbax checkpoints: those of our bundles and exports, and those `t5x.train` writes.

Orbax writes them. Reading goes through its metadata and then, tensor by tensor, through tensorstore, so that no more
than one tensor is on its way at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from speccascade_t5x.checkpoints import architecture, flat_params, opened, stores, tensors
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.checkpoints.tensors import Block, Placement, Tensor
from speccascade_t5x.interfaces import PyTree, UserError

# Small files travel well: many hosts of files refuse or slow down large ones.
FILE_BYTES = 12 * 2**20
_CHUNK_BYTES = 8 * 2**20
METADATA_FILE = "_METADATA"
_COMMIT_FILE = "commit_success.txt"
_TARGET = "target"  # where T5X keeps the parameters of a train state
_STATE = "state"
_PARAM_STATES = f"{_STATE}/param_states/"
_HIGHEST_RATIO = 2**16  # no real tensor is compressed further, zeros included


def save(path: Path, params: PyTree, *, dtype: Any = np.float32, file_bytes: int = FILE_BYTES) -> None:
    """Writes parameters as one Orbax checkpoint that plain Orbax restores.

    Args:
      path: the folder to make.
      params: nested arrays.
      dtype: what floats are written as; None leaves each as it is.
      file_bytes: the largest data file, where its tensors can be cut that finely.

    Raises:
      UserError: the disk is full, or the place cannot be written.
    """
    as_written = lambda leaf: np.asarray(leaf, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else None)  # noqa: E731
    params = jax.tree.map(as_written, params)
    # A data file is closed by the write that takes it past its target: one chunk more. As much again is left for the
    # nodes of the index, which are written to the same files.
    chunk_bytes = min(_CHUNK_BYTES, file_bytes // 6)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), params)
    arguments = ocp.args.PyTreeSave(
        params, save_args=save_args, ocdbt_target_data_file_size=file_bytes - 2 * chunk_bytes
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as writer:
            writer.save(path.resolve(), args=arguments)
        # Orbax notes the absolute path it wrote to, which means nothing where the files end up.
        if (path / _COMMIT_FILE).is_file():
            (path / _COMMIT_FILE).write_text("Checkpoint commit was successful.\n")
    except (ValueError, OSError) as error:  # tensorstore reports a full disk as a ValueError
        raise UserError(f"cannot write the Orbax checkpoint {path}: {tensors.reason(error)}") from error


def restore(path: Path, expected: PyTree, *, branch: str | None = None, placement: Placement | None = None) -> PyTree:
    """Reads float32 arrays from one Orbax checkpoint.

    Args:
      path: the checkpoint folder.
      expected: nested dict of leaves with `shape`; compared before anything is read.
      branch: name of the top-level branch that holds the parameters, if they are not the whole.
      placement: where each array shall live.

    Raises:
      UserError: it is no Orbax checkpoint, is damaged, or holds other tensors.
    """
    found = open_tensors(path, branch=branch)
    flat_params.require_match(expected, found, str(path))
    return flat_params.nest(tensors.to_devices(found, str(path), placement))


def open_tensors(path: Path, *, branch: str | None = None) -> dict[str, Tensor]:
    """Flat names to the tensors of one Orbax checkpoint, none of them read yet.

    Raises:
      UserError: it is no Orbax checkpoint, is damaged, or has no such branch.
    """
    found, facts = _open(path)
    if branch is not None:
        found = {name.removeprefix(f"{branch}/"): leaf for name, leaf in found.items() if name.startswith(f"{branch}/")}
    if not found:
        raise UserError(f"the Orbax checkpoint {path} holds no parameters{f' below {branch!r}' if branch else ''}")
    prefix = f"{branch}/" if branch else ""
    return {name: _tensor(path, prefix + name, leaf, facts) for name, leaf in found.items()}


def _open(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Flat names to shape and dtype, and how the arrays are stored, from the checkpoint's metadata alone."""
    facts = architecture.read_json(path / METADATA_FILE)
    try:
        with _quietly(), ocp.PyTreeCheckpointer() as reader:
            metadata = reader.metadata(path.resolve()).item_metadata
    except Exception as error:  # Orbax raises whatever it stumbles over
        raise UserError(f"{path} is not an Orbax checkpoint, or damaged: {tensors.reason(error)}") from error
    found = metadata.tree if metadata is not None else None
    if not isinstance(found, dict) or not found:
        raise UserError(f"the Orbax checkpoint {path} holds no parameters")
    flat = flat_params.flatten(found)
    on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    for name, leaf in flat.items():
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None:
            continue  # neither a parameter nor an optimizer state; whoever asks for it is told
        if tensors.count(tuple(shape)) * np.dtype(dtype).itemsize > on_disk * _HIGHEST_RATIO:
            raise UserError(f"{path}: tensor {name!r} of shape {tuple(shape)} cannot lie in {on_disk} bytes")
    return flat, facts


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Orbax's warning that T5X keeps one of its files a folder higher."""
    drop = lambda record: "Metadata file does not exist" not in str(record.msg)  # noqa: E731
    logger = logging.getLogger("absl")
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def _tensor(path: Path, name: str, leaf: Any, facts: Mapping[str, Any]) -> Tensor:
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or dtype is None:
        raise UserError(f"{path}: {name!r} is a {type(leaf).__name__}, not an array")
    return Tensor(tuple(shape), np.dtype(dtype), lambda: _blocks(path, name, tuple(shape), facts))


def _blocks(path: Path, name: str, shape: tuple[int, ...], facts: Mapping[str, Any]) -> Iterator[Block]:
    """The values of one array, in bands that hold whole chunks."""
    folder = {"driver": "file", "path": f"{path.resolve()}/"}
    place = f"{name.replace('/', '.')}/"
    if facts.get("use_ocdbt", True):
        kvstore: dict[str, Any] = {"driver": "ocdbt", "base": folder, "path": place}
    else:
        kvstore = {**folder, "path": folder["path"] + place}
    spec = {"driver": "zarr3" if facts.get("use_zarr3") else "zarr", "kvstore": kvstore}
    if facts.get("store_array_data_equal_to_fill_value"):
        spec["fill_missing_data_reads"] = False  # no chunk was left out, so one that is missing was lost
    return stores.read(spec, shape)


def open_t5x(folder: Path) -> Opened:
    """Opens a `checkpoint_N` folder that T5X wrote with Orbax, or a folder that is one Orbax checkpoint.

    Raises:
      UserError: see `open_tensors`; or the model is not a supported T5.
    """
    inside = (folder / _STATE / METADATA_FILE).is_file()
    place = folder / _STATE if inside else folder
    found, facts = _open(place)
    whole_state = inside or any(name.startswith(f"{_TARGET}/") for name in found)
    params = open_tensors(place, branch=_TARGET if whole_state else None)
    others = tuple(
        name for name, leaf in found.items() if name.startswith(_PARAM_STATES) and not hasattr(leaf, "shape")
    )
    state = {
        name.removeprefix(_PARAM_STATES): _tensor(place, name, leaf, facts)
        for name, leaf in found.items()
        if name.startswith(_PARAM_STATES) and name not in others
    }
    return opened.from_t5x(
        "t5x_orbax" if inside else "orbax",
        folder,
        params,
        step=_step(place, found, facts, folder) if whole_state else _noted_step(folder),
        state=state,
        state_others=others,
    )


def _step(place: Path, found: Mapping[str, Any], facts: Mapping[str, Any], folder: Path) -> int | None:
    leaf = found.get(f"{_STATE}/step")
    if leaf is None or tuple(getattr(leaf, "shape", (1,))) != ():
        return None
    return int(tensors.to_host("state/step", _tensor(place, f"{_STATE}/step", leaf, facts), str(folder), np.int64))


def _noted_step(folder: Path) -> int | None:
    """The step that `checkpoints.export` notes beside parameters that stand alone."""
    try:
        step = json.loads((folder / "config.json").read_text("utf-8")).get("step")
    except (OSError, ValueError, AttributeError):
        return None
    return step if type(step) is int else None
