"""Native T5X checkpoints: `checkpoint_N/` with a msgpack index and one zarr array per tensor.

The files may come from anywhere, so they are data and nothing else: no pickle, no path out of the folder and no storage
driver but files unless the user has named it, and no allocation before the sizes have been compared with the
architecture and with the bytes on disk.

Layout after the T5X source: index {"version": 3, "optimizer": {"target": <params>, "state": {"step", "param_states"}}},
each leaf a tensorstore spec whose path is relative to the folder, or the array itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import flax.serialization
import msgpack
import numpy as np

from speccascade_t5x.checkpoints import flat_params, folders, opened, stores, tensors, zarr
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.checkpoints.tensors import Tensor
from speccascade_t5x.common import schema
from speccascade_t5x.interfaces import UserError

INDEX_FILE = "checkpoint"
VERSION = 3
CHUNK_BYTES = 64 * 2**20
# T5X writes this bucket into the index of a checkpoint it saves to cloud storage, with the same
# relative path, so such a checkpoint can be read wherever it was copied to.
_PLACEHOLDER_BUCKET = "t5x-dummy-bucket"
_INLINE_ARRAY = 1  # Flax's msgpack extension code of an ndarray
_INLINE_SCALAR = 3  # and of a numpy scalar
_INLINE_DTYPES = ("float32", "float16", "bfloat16", "float64", "int32", "int64", "uint32", "bool")
_LARGEST_INDEX = 2**30
_LONGEST = 2**17  # of a list or a branch in the index
_DEEPEST = 64  # branches below each other
_UNLESS = "; if you trust its origin, allow drivers by name"


def open_model(folder: Path, allow_drivers: Collection[str] = ()) -> Opened:
    """Finds and checks everything in one `checkpoint_N` folder without reading an array.

    The architecture comes from the shapes, and from a config.json or config.gin in the folder or
    its parent where there is one. Without either, gated MLPs are taken to be T5 1.1 (gelu, linear).

    Args:
      folder: the checkpoint.
      allow_drivers: tensorstore drivers whose arrays are read wherever the index says they are, see
        `stores.open_foreign`.

    Raises:
      UserError: a file is missing, damaged or suspicious, or the model is not a supported T5.
    """
    optimizer = _read_index(folder / INDEX_FILE)
    found = _tensors(folder, _flatten(optimizer["target"], ""), allow_drivers)
    state = optimizer.get("state")
    step, entries, others = _read_state(state if isinstance(state, dict) else {})
    return opened.from_t5x(
        "t5x_native",
        folder,
        found,
        step=step,
        # Opened only when asked for: a copy may well have left the optimizer's files behind.
        state=_Lazy(folder, entries, allow_drivers),
        state_others=others,
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The parameters in a `checkpoint_N` folder, whatever network they belong to: flat names to tensors, not yet read.

    Raises:
      UserError: a file is missing, damaged or suspicious.
    """
    return _tensors(folder, _flatten(_read_index(folder / INDEX_FILE)["target"], ""))


class _Lazy(dict):
    """Names to tensors, whose files are looked at when a tensor is asked for."""

    def __init__(self, folder: Path, entries: Mapping[str, Any], allow_drivers: Collection[str]):
        super().__init__(entries)
        self._folder, self._allow_drivers = folder, allow_drivers

    def __getitem__(self, name: str) -> Tensor:
        return _tensors(self._folder, {name: super().__getitem__(name)}, self._allow_drivers)[name]


def _tensors(folder: Path, entries: Mapping[str, Any], allow_drivers: Collection[str] = ()) -> dict[str, Tensor]:
    found = {
        name: _locate(folder, name, entry, allow_drivers) if isinstance(entry, dict) else tensors.in_memory(entry)
        for name, entry in entries.items()
    }
    if not allow_drivers:  # else arrays may lie anywhere, by the user's leave
        tensors.require_plausible(found, folders.size(folder), str(folder))
    return found


def _read_index(path: Path) -> Mapping[str, Any]:
    """The 'optimizer' part of the index: nested dicts of specs and arrays."""
    folders.require_inside(path.parent)
    raw = schema.read_bytes(path, _LARGEST_INDEX)
    try:
        index = msgpack.unpackb(
            raw, raw=False, strict_map_key=True, ext_hook=_inline_array, max_array_len=_LONGEST, max_map_len=_LONGEST
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise UserError(f"the checkpoint index {path} is damaged or not one of T5X: {tensors.reason(error)}") from error
    version = index.get("version") if isinstance(index, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise UserError(
            f"the checkpoint index {path} has format version {version} but this release of speccascade_t5x reads up "
            f"to {VERSION}; upgrade the package"
        )
    optimizer: Any = index.get("optimizer") if isinstance(index, dict) else None
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    if not isinstance(target, dict) or not target:
        raise UserError(f"the checkpoint index {path} names no parameters (no 'optimizer/target')")
    return optimizer


def _inline_array(code: int, data: bytes) -> np.ndarray | msgpack.ExtType:
    """An array inside the index, as Flax packs it: (shape, dtype name, bytes)."""
    if code not in (_INLINE_ARRAY, _INLINE_SCALAR):
        return msgpack.ExtType(code, data)
    shape, dtype_name, buffer = msgpack.unpackb(data, raw=False, max_array_len=_LONGEST)
    if dtype_name not in _INLINE_DTYPES:
        raise ValueError(f"an inline array of {schema.shown(dtype_name)}")
    dtype = np.dtype(dtype_name)
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(buffer):
        raise ValueError(f"an inline array of {len(buffer)} bytes is not {dtype_name} of shape {shape}")
    return np.frombuffer(buffer, dtype).reshape(shape)


def _flatten(node: Mapping[str, Any], prefix: str, others: list[str] | None = None) -> dict[str, Any]:
    """Flat names to specs (still dicts) and arrays. A spec is told from a branch by its keys.

    Names of what is neither go to `others`; without such a list they are an error.
    """
    flat: dict[str, Any] = {}
    if prefix.count("/") > _DEEPEST:
        raise UserError(f"the checkpoint index is nested more than {_DEEPEST} levels deep, which none of T5X is")
    for key, value in node.items():
        name = f"{prefix}{key}"
        is_spec = isinstance(value, dict) and isinstance(value.get("driver"), str)
        if isinstance(value, np.ndarray) or is_spec:
            flat[name] = value
        elif isinstance(value, dict) and (value or others is None):
            flat.update(_flatten(value, f"{name}/", others))
        elif others is not None:
            others.append(name)
        else:
            raise UserError(f"the checkpoint index holds a {type(value).__name__} for {name!r}, not a tensor")
    return flat


def _read_state(state: Mapping[str, Any]) -> tuple[int | None, dict[str, Any], tuple[str, ...]]:
    """(step, optimizer state, names in it that hold no array) of the index."""
    others: list[str] = []
    entries = state.get("param_states")
    entries = _flatten(entries, "", others) if isinstance(entries, dict) else {}
    step: Any = state.get("step")
    whole = isinstance(step, np.ndarray) and step.shape == () and np.issubdtype(step.dtype, np.integer)
    return (int(step) if whole or type(step) is int else None), entries, tuple(others)


def _locate(folder: Path, name: str, spec: Mapping[str, Any], allow_drivers: Collection[str]) -> Tensor:
    """Follows a spec to its zarr array and checks that array's files."""
    if allow_drivers and _is_foreign(spec):
        return stores.open_foreign(name, spec, allow_drivers)
    where = _relative_path(name, spec)
    path = folder / where
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: tensor {name!r} points outside the checkpoint ({where}): copy its files there")
    if not (path / zarr.HEADER_FILE).is_file():
        raise UserError(f"{folder}: the files of tensor {name!r} are missing ({where}/.zarray)")
    tensor = zarr.open_array(path, name)
    metadata = spec.get("metadata")
    indexed = metadata.get("shape") if isinstance(metadata, dict) else None
    if indexed is not None and (not isinstance(indexed, list) or tuple(indexed) != tensor.shape):
        shown = tuple(indexed) if isinstance(indexed, list) else indexed
        raise UserError(f"{folder}: tensor {name!r} has shape {shown} in the index but {tensor.shape} on disk")
    return tensor


def _relative_path(name: str, spec: Mapping[str, Any]) -> str:
    """The array's folder as the spec names it, once that is known to be harmless."""
    kvstore = spec.get("kvstore")
    if spec["driver"] != "zarr" or not isinstance(kvstore, dict):
        raise UserError(f"tensor {name!r} is stored with driver {spec['driver']!r}; only zarr is read{_UNLESS}")
    if not _is_local(kvstore):
        driver = kvstore.get("driver")
        raise UserError(f"tensor {name!r} is stored with driver {driver!r}; only files in the folder are read{_UNLESS}")
    where = kvstore.get("path") or spec.get("path")
    if not isinstance(where, str) or not where.strip("/"):
        raise UserError(f"the checkpoint index gives no path for tensor {name!r}")
    path = PurePosixPath(where)
    if path.is_absolute() or ".." in path.parts or "\\" in where or "\0" in where:
        raise UserError(
            f"tensor {name!r} has the unsafe path {where!r}; only paths inside the checkpoint are read{_UNLESS}"
        )
    return str(path)


def _is_local(kvstore: Mapping[str, Any]) -> bool:
    """Whether an array's files are meant to lie in the checkpoint, as far as the driver tells."""
    driver = kvstore.get("driver")
    return driver in ("file", "gfile") or (driver == "gcs" and kvstore.get("bucket") == _PLACEHOLDER_BUCKET)


def _is_foreign(spec: Mapping[str, Any]) -> bool:
    """Whether an array is in another format than zarr, or somewhere else than below the checkpoint's folder."""
    kvstore = spec.get("kvstore")
    if spec["driver"] != "zarr" or not isinstance(kvstore, dict) or not _is_local(kvstore):
        return True
    return str(kvstore.get("path")).startswith("/")


def write(
    folder: Path,
    params: Iterable[tuple[str, np.ndarray]],
    *,
    step: int,
    state: Iterable[tuple[str, np.ndarray]] = (),
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Writes what T5X's own reader restores.

    Args:
      folder: an empty folder, `checkpoint_<step>` once it has its name.
      params: flat names and values.
      step: training steps.
      state: flat names and values below `param_states`; without any the checkpoint serves for inference and for
        starting a new run, as T5X's own parameters-only checkpoints do.
      chunk_bytes: largest chunk of an array before compression.

    Raises:
      OSError, ValueError: it cannot be written.
    """
    target = {name: _store(folder, f"target/{name}", values, chunk_bytes) for name, values in params}
    kept = {name: _store(folder, f"state/param_states/{name}", values, chunk_bytes) for name, values in state}
    training: dict[str, Any] = {"step": np.asarray(step, np.int32)}
    if kept:  # T5X's `load_t5x_checkpoint` stumbles over an empty one
        training["param_states"] = flat_params.nest(kept)
    index = flax.serialization.msgpack_serialize(
        {"version": VERSION, "optimizer": {"target": flat_params.nest(target), "state": training}}
    )
    (folder / INDEX_FILE).write_bytes(index)


def _store(folder: Path, name: str, values: np.ndarray, chunk_bytes: int) -> Any:
    """Writes one array. Returns what the index holds for it."""
    if values.size <= 1:  # T5X keeps step counters and Adafactor's placeholders in the index
        return values
    place = name.replace("/", ".")
    metadata = zarr.write_array(folder / place, values, chunk_bytes)
    return {
        "driver": "zarr",
        "dtype": values.dtype.name,
        "kvstore": {"driver": "file", "path": f"{place}/"},
        "metadata": metadata,
    }
