"""Parameters in Orbax checkpoints: those of our bundles and exports, and those `t5x.train` writes.

Orbax writes them. Reading goes through its metadata and then, tensor by tensor, through tensorstore, so that no more
than one tensor is on its way at a time.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from speccascade_t5x.checkpoints import flat_params, folders, opened, stores, tensors
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.checkpoints.tensors import Placement, Tensor
from speccascade_t5x.common import schema
from speccascade_t5x.interfaces import PyTree, UserError

# Small files travel well: many hosts of files refuse or slow down large ones.
FILE_BYTES = 12 * 2**20
_CHUNK_BYTES = 8 * 2**20
METADATA_FILE = "_METADATA"
_COMMIT_FILE = "commit_success.txt"
_TARGET = "target"  # where T5X keeps the parameters of a train state
_STATE = "state"
_PARAM_STATES = f"{_STATE}/param_states/"
_PARAMS = "params"  # where Flax keeps the parameters among the variables of a module
_LARGEST_METADATA = 64 * 2**20
_KEYS = schema.list_of(schema.record({"key": schema.of(str, int)}))
_FLAG = schema.of(bool, type(None))
_METADATA = schema.record(
    {"tree_metadata": schema.map_of(schema.record({"key_metadata": _KEYS}))},
    {"use_ocdbt": _FLAG, "use_zarr3": _FLAG, "store_array_data_equal_to_fill_value": _FLAG},
)


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
    return _Checkpoint(path).tensors(branch)


def is_train_state(path: Path) -> bool:
    """Whether one Orbax checkpoint is a train state of T5X, as its metadata lists it; nothing else is read."""
    listed = schema.read(path / METADATA_FILE, _METADATA, largest=_LARGEST_METADATA)["tree_metadata"]
    keys = (entry["key_metadata"] for entry in listed.values())
    return any(key and key[0]["key"] == _TARGET for key in keys)


class _Checkpoint:
    """One Orbax checkpoint, known from its metadata.

    Args:
      path: its folder.

    Raises:
      UserError: it is no Orbax checkpoint, or is damaged.
    """

    def __init__(self, path: Path):
        folders.require_inside(path)
        self.path = path
        self.facts = schema.read(path / METADATA_FILE, _METADATA, largest=_LARGEST_METADATA)
        try:
            with _quietly(), ocp.PyTreeCheckpointer() as reader:
                metadata = reader.metadata(path.resolve()).item_metadata
        except Exception as error:  # Orbax raises whatever it stumbles over
            raise UserError(f"{path} is not an Orbax checkpoint, or damaged: {tensors.reason(error)}") from error
        found = metadata.tree if metadata is not None else None
        listed = len(self.facts["tree_metadata"])
        if not found and listed:
            raise UserError(
                f"{path} is damaged: its {METADATA_FILE} lists {listed} arrays but the files that hold them are "
                "missing or cut short; copy it again"
            )
        if not isinstance(found, dict) or not found:
            raise UserError(f"the Orbax checkpoint {path} holds no parameters")
        self.leaves = flat_params.flatten(found)

    def tensors(self, branch: str | None = None) -> dict[str, Tensor]:
        """Flat names below a branch, or all of them, to tensors.

        Raises:
          UserError: there are none, one is no array, or they claim more than the files can hold.
        """
        prefix = f"{branch}/" if branch else ""
        found = {name.removeprefix(prefix): self.tensor(name) for name in self.leaves if name.startswith(prefix)}
        if not found:
            below = f" below {branch!r}" if branch else ""
            raise UserError(f"the Orbax checkpoint {self.path} holds no parameters{below}")
        tensors.require_plausible(found, folders.size(self.path), str(self.path))
        return found

    def tensor(self, name: str, may_be_left_out: bool = False) -> Tensor:
        """One array, not yet read.

        Args:
          name: of the leaf.
          may_be_left_out: read chunks that are not there as zeros, where the metadata says that zeros were left out.
            No parameter of a trained model is a chunk of zeros, so for parameters a missing chunk is damage.
        """
        leaf = self.leaves[name]
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None:
            raise UserError(f"{self.path}: {name!r} is a {type(leaf).__name__}, not an array")
        shape = tuple(shape)
        return Tensor(shape, np.dtype(dtype), lambda: stores.read(self._spec(name, may_be_left_out), shape))

    def _spec(self, name: str, may_be_left_out: bool) -> dict[str, Any]:
        folder = {"driver": "file", "path": f"{self.path.resolve()}/"}
        place = f"{name.replace('/', '.')}/"
        if self.facts.get("use_ocdbt") is not False:
            kvstore: dict[str, Any] = {"driver": "ocdbt", "base": folder, "path": place}
        else:
            kvstore = {**folder, "path": folder["path"] + place}
        filled = may_be_left_out and not self.facts.get("store_array_data_equal_to_fill_value")
        driver = "zarr3" if self.facts.get("use_zarr3") else "zarr"
        return {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": filled}


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


def open_t5x(place: Path, folder: Path | None = None) -> Opened:
    """Opens one Orbax checkpoint: parameters, or a train state of T5X with its parameters below "target".

    Args:
      place: the folder with Orbax's metadata.
      folder: the checkpoint it belongs to, with configuration files in it or beside it; `place` itself if None.

    Raises:
      UserError: see `open_tensors`; or the model is not a supported T5.
    """
    folder = place if folder is None else folder
    if folder != place:
        folders.require_inside(folder)
    stored = _Checkpoint(place)
    tops = {name.partition("/")[0] for name in stored.leaves}
    whole_state = _TARGET in tops
    branch = _TARGET if whole_state else _PARAMS if tops == {_PARAMS} else None
    states = [name for name in stored.leaves if name.startswith(_PARAM_STATES)]
    others = tuple(name for name in states if not hasattr(stored.leaves[name], "shape"))
    state = {
        name.removeprefix(_PARAM_STATES): stored.tensor(name, may_be_left_out=True)
        for name in states
        if name not in others
    }
    return opened.from_t5x(
        "t5x_orbax" if whole_state else "orbax",
        folder,
        stored.tensors(branch),
        step=_step(stored) if whole_state else _noted_step(folder),
        state=state,
        state_others=others,
    )


def _step(stored: _Checkpoint) -> int | None:
    name = f"{_STATE}/step"
    leaf = stored.leaves.get(name)
    if leaf is None or tuple(getattr(leaf, "shape", (1,))) != ():
        return None
    return int(tensors.to_host(name, stored.tensor(name, may_be_left_out=True), str(stored.path), np.int64))


def _noted_step(folder: Path) -> int | None:
    """The step that `checkpoints.export` notes beside parameters that stand alone, or a step folder's name."""
    path = folder / "config.json"
    step = schema.read(path).get("step") if path.is_file() else None
    if type(step) is int:
        return step
    return int(folder.name) if re.fullmatch(r"\d{1,18}", folder.name) else None
