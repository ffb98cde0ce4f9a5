"""Parameters in Orbax checkpoints: those of our bundles and exports, and those `t5x.train` writes.

Orbax writes them. They are read by its metadata, a JSON file, and then, tensor by tensor, through tensorstore: Orbax's
own reader has threads and messages of its own for a damaged file, and takes a missing chunk for zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.checkpoints import folders, opened, stores, tensors
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.checkpoints.tensors import Tensor
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
_OCDBT_FILE = "manifest.ocdbt"
_ARRAYS = ("jax.Array", "np.ndarray", "scalar")  # value types of the metadata; others have no files
_LARGEST_METADATA = 64 * 2**20
_KEYS = schema.list_of(schema.record({"key": schema.of(str, int)}))
_VALUE = schema.record({"value_type": schema.of(str)})
_FLAG = schema.of(bool, type(None))
_METADATA = schema.record(
    {"tree_metadata": schema.map_of(schema.record({"key_metadata": _KEYS, "value_metadata": _VALUE}))},
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
    import orbax.checkpoint as ocp  # only here: it is slow to load, and nothing that is read needs it

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


def open_tensors(path: Path, *, branch: str | None = None) -> dict[str, Tensor]:
    """Flat names to the tensors of one Orbax checkpoint, none of them read yet.

    Raises:
      UserError: it is not an Orbax checkpoint, is damaged, or has no such branch.
    """
    return _Checkpoint(path).below(f"{branch}/" if branch else "")


def is_train_state(path: Path) -> bool:
    """Whether one Orbax checkpoint is a train state of T5X, as its metadata lists it; nothing else is read."""
    return any(keys and keys[0] == _TARGET for keys, _ in _listed(path, _read_metadata(path)))


def _read_metadata(path: Path) -> dict[str, Any]:
    return schema.read(path / METADATA_FILE, _METADATA, largest=_LARGEST_METADATA)


def _listed(path: Path, facts: Mapping[str, Any]) -> list[tuple[list[str], bool]]:
    """(keys from the root, whether it is an array) of every leaf of the tree."""
    leaves = []
    for entry in facts["tree_metadata"].values():
        keys = [str(key["key"]) for key in entry["key_metadata"]]
        unsafe = any(
            PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts or "\0" in key for key in keys
        )
        if unsafe or not all(keys):
            raise UserError(f"{path / METADATA_FILE} lists the unsafe name {schema.shown('/'.join(keys))}")
        leaves.append((keys, entry["value_metadata"]["value_type"] in _ARRAYS))
    return leaves


class _Checkpoint:
    """One Orbax checkpoint, known from its metadata; its arrays are opened through tensorstore when they are asked for.

    Args:
      path: its folder.

    Attributes:
      path: its folder.
      names: flat names of all arrays.
      others: flat names of what is not an array.

    Raises:
      UserError: it is not an Orbax checkpoint, or is damaged.
    """

    def __init__(self, path: Path):
        folders.require_inside(path)
        self.path = path
        self._facts = _read_metadata(path)
        leaves = [("/".join(keys), keys, is_array) for keys, is_array in _listed(path, self._facts)]
        if len({name for name, _, _ in leaves}) != len(leaves):
            raise UserError(f"{path / METADATA_FILE} is damaged: it lists a name twice")
        self._places = {name: f"{'.'.join(keys)}/" for name, keys, is_array in leaves if is_array}
        self.names = tuple(sorted(self._places))
        self.others = tuple(name for name, _, is_array in leaves if not is_array)

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Parameters: flat names below a prefix such as "target/", or all, to tensors that are not yet read.

        Raises:
          UserError: there are none, one is not an array, or they claim more than the files can hold.
        """
        no_arrays = [name for name in self.others if name.startswith(prefix)]
        if no_arrays:
            raise UserError(f"{self.path}: {no_arrays[0]!r} is not an array")
        found = {name.removeprefix(prefix): self.tensor(name) for name in self.names if name.startswith(prefix)}
        if not found:
            below = f" below {prefix[:-1]!r}" if prefix else ""
            raise UserError(f"the Orbax checkpoint {self.path} holds no parameters{below}")
        tensors.require_plausible(found, folders.size(self.path), str(self.path))
        return found

    def tensor(self, name: str, may_be_left_out: bool = False) -> Tensor:
        """One array, not yet read.

        Args:
          name: of the leaf.
          may_be_left_out: read chunks that are not there as zeros, where the metadata says that zeros were left out.
            No parameter of a trained model is a chunk of zeros, so for parameters a missing chunk is damage.

        Raises:
          UserError: its files are missing or damaged.
        """
        try:
            store = stores.open_array(self._spec(name, may_be_left_out))
        except stores.FAILURES as error:
            raise UserError(
                f"{self.path} is damaged: its {METADATA_FILE} lists {name!r}, but the files that hold it are missing "
                f"or cut short ({tensors.reason(error)}); copy it again"
            ) from error
        return Tensor(tuple(store.shape), store.dtype.numpy_dtype, lambda: stores.blocks(store))

    def _spec(self, name: str, may_be_left_out: bool) -> dict[str, Any]:
        folder = {"driver": "file", "path": f"{self.path.resolve()}/"}
        by_files = self._facts.get("use_ocdbt")
        if (self.path / _OCDBT_FILE).is_file() if by_files is None else by_files:
            kvstore: dict[str, Any] = {"driver": "ocdbt", "base": folder, "path": self._places[name]}
        else:
            kvstore = {**folder, "path": folder["path"] + self._places[name]}
        filled = may_be_left_out and not self._facts.get("store_array_data_equal_to_fill_value")
        driver = "zarr3" if self._facts.get("use_zarr3") else "zarr"
        return {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": filled}


class _Lazy(dict):
    """Names to tensors of an optimizer state, opened when asked for: a copy may well have left them behind."""

    def __init__(self, stored: _Checkpoint, names: Mapping[str, str]):
        super().__init__(names)
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self._stored.tensor(super().__getitem__(name), may_be_left_out=True)


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
    tops = {name.partition("/")[0] for name in (*stored.names, *stored.others)}
    whole_state = _TARGET in tops
    prefix = f"{_TARGET}/" if whole_state else f"{_PARAMS}/" if tops == {_PARAMS} else ""
    states = {name.removeprefix(_PARAM_STATES): name for name in stored.names if name.startswith(_PARAM_STATES)}
    return opened.from_t5x(
        "t5x_orbax" if whole_state else "orbax",
        folder,
        stored.below(prefix),
        step=_step(stored) if whole_state else _noted_step(folder),
        state=_Lazy(stored, states),
        state_others=tuple(name for name in stored.others if name.startswith(_PARAM_STATES)),
    )


def _step(stored: _Checkpoint) -> int | None:
    name = f"{_STATE}/step"
    tensor = stored.tensor(name, may_be_left_out=True) if name in stored.names else None
    if tensor is None or tensor.shape != ():
        return None
    return int(tensors.to_host(name, tensor, str(stored.path), np.int64))


def _noted_step(folder: Path) -> int | None:
    """The step that `checkpoints.export` notes beside parameters that stand alone, or a step folder's name."""
    path = folder / "config.json"
    step = schema.read(path).get("step") if path.is_file() else None
    if type(step) is int:
        return step
    return int(folder.name) if re.fullmatch(r"\d{1,18}", folder.name) else None
