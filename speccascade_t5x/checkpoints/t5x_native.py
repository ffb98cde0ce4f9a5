"""Native T5X checkpoints: `checkpoint_N/` with a msgpack index and one zarr array per tensor.

Only the parameters are read. The files may come from anywhere, so they are data and nothing else:
no pickle, no path out of the folder, no storage driver but files, and no allocation before the
sizes have been compared with the architecture and with the bytes on disk. (zarr reads a missing
chunk as zeros without a word; here it is an error.)

Layout after the T5X source: index {"optimizer": {"target": <params>}}, each leaf a tensorstore spec
whose path is relative to the folder, or the array itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import msgpack
import numpy as np
import tensorstore

from speccascade_t5x.checkpoints import architecture, tree
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models.t5 import T5, param_shapes

INDEX_FILE = "checkpoint"
# T5X writes this bucket into the index of a checkpoint it saves to cloud storage, with the same
# relative path, so such a checkpoint can be read wherever it was copied to.
_PLACEHOLDER_BUCKET = "t5x-dummy-bucket"
_COMPRESSORS = ("gzip", "zlib")
_HIGHEST_RATIO = 1040  # deflate cannot do better than 1032:1
_ZARR_DTYPES = {"<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16"}
_INLINE_ARRAY = 1  # Flax's msgpack extension code of an ndarray


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A zarr array on disk, not yet read."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype


def read(folder: Path) -> Bound:
    """Reads one `checkpoint_N` folder.

    The architecture comes from the shapes, and from a config.json or config.gin in the folder or
    its parent where there is one. Without either, gated MLPs are taken to be T5 1.1 (gelu, linear).

    Raises:
      UserError: a file is missing, damaged or suspicious, or the model is not a supported T5.
    """
    source = str(folder)
    leaves = {
        name: _locate(folder, name, leaf) if isinstance(leaf, dict) else leaf
        for name, leaf in _flatten(_read_index(folder / INDEX_FILE), "").items()
    }
    config = architecture.from_shapes(leaves, architecture.beside(folder), source)
    tree.require_match(param_shapes(config), leaves, source)
    flat = {
        name: tree.to_device(name, _read_array(name, leaf), source) for name, leaf in leaves.items()
    }
    return Bound(T5(config), tree.nest(flat))


def _read_index(path: Path) -> Mapping[str, Any]:
    """The parameter part of the index: nested dicts of specs and arrays."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the checkpoint index {path}: {error.strerror}.") from error
    try:
        index = msgpack.unpackb(raw, raw=False, strict_map_key=True, ext_hook=_inline_array)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise UserError(
            f"The checkpoint index {path} is damaged or not one of T5X: {error}."
        ) from error
    optimizer = index.get("optimizer") if isinstance(index, dict) else None
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    if not isinstance(target, dict) or not target:
        raise UserError(f"The checkpoint index {path} names no parameters (no 'optimizer/target').")
    return target


def _inline_array(code: int, data: bytes) -> np.ndarray | msgpack.ExtType:
    """An array inside the index, as Flax packs it: (shape, dtype name, bytes)."""
    if code != _INLINE_ARRAY:
        return msgpack.ExtType(code, data)
    shape, dtype_name, buffer = msgpack.unpackb(data, raw=False)
    dtype = np.dtype(dtype_name)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(buffer):
        raise ValueError(
            f"an inline array of {len(buffer)} bytes is not {dtype_name} of shape {shape}"
        )
    return np.frombuffer(buffer, dtype).reshape(shape)


def _flatten(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Flat names to specs (still dicts) and arrays. A spec is told from a branch by its keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        is_spec = isinstance(value, dict) and isinstance(value.get("driver"), str)
        if isinstance(value, np.ndarray) or is_spec:
            flat[name] = value
        elif isinstance(value, dict):
            flat.update(_flatten(value, f"{name}/"))
        else:
            raise UserError(
                f"The checkpoint index holds a {type(value).__name__} for {name!r}, not a tensor."
            )
    return flat


def _locate(folder: Path, name: str, spec: Mapping[str, Any]) -> _Stored:
    """Follows a spec to its zarr array and checks that array's files."""
    where = _relative_path(name, spec)
    path = folder / where
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{folder}: tensor {name!r} points outside the checkpoint ({where}); refusing to "
            "read it."
        )
    if not (path / ".zarray").is_file():
        raise UserError(f"{folder}: the files of tensor {name!r} are missing ({where}/.zarray).")
    stored = _check_files(path, name)
    metadata = spec.get("metadata")
    indexed = metadata.get("shape") if isinstance(metadata, dict) else None
    if indexed is not None and tuple(indexed) != stored.shape:
        raise UserError(
            f"{folder}: tensor {name!r} has shape {tuple(indexed)} in the index but "
            f"{stored.shape} on disk."
        )
    return stored


def _relative_path(name: str, spec: Mapping[str, Any]) -> str:
    """The array's folder as the spec names it, once that is known to be harmless."""
    kvstore = spec.get("kvstore")
    if spec["driver"] != "zarr" or not isinstance(kvstore, dict):
        raise UserError(
            f"Tensor {name!r} is stored with driver {spec['driver']!r}; only zarr is read."
        )
    driver = kvstore.get("driver")
    if driver != "file" and not (driver == "gcs" and kvstore.get("bucket") == _PLACEHOLDER_BUCKET):
        raise UserError(
            f"Tensor {name!r} is stored with driver {driver!r}; only files in the folder are read."
        )
    where = kvstore.get("path") or spec.get("path")
    if not isinstance(where, str) or not where.strip("/"):
        raise UserError(f"The checkpoint index gives no path for tensor {name!r}.")
    path = PurePosixPath(where)
    if path.is_absolute() or ".." in path.parts or "\\" in where or "\0" in where:
        raise UserError(
            f"Tensor {name!r} has the unsafe path {where!r}; only paths inside the checkpoint "
            "are read."
        )
    return str(path)


def _check_files(path: Path, name: str) -> _Stored:
    """Reads .zarray and checks that every chunk is there and could hold what it claims."""
    header = architecture.read_json(path / ".zarray")
    shape, chunks = header.get("shape"), header.get("chunks")
    for numbers, least in ((shape, 0), (chunks, 1)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= least for n in numbers):
            raise UserError(f"{path}/.zarray is damaged: shape {shape!r}, chunks {chunks!r}.")
    if len(shape) != len(chunks) or any(c > max(n, 1) for c, n in zip(chunks, shape, strict=True)):
        raise UserError(f"{path}/.zarray is damaged: chunks {chunks} do not fit shape {shape}.")
    dtype_name = _ZARR_DTYPES.get(
        header.get("dtype") if isinstance(header.get("dtype"), str) else ""
    )
    if dtype_name is None:
        raise UserError(
            f"Tensor {name!r} holds {header.get('dtype')!r}; only {', '.join(_ZARR_DTYPES)} "
            "are read."
        )
    compressor = header.get("compressor")
    if compressor is not None and (
        not isinstance(compressor, dict) or compressor.get("id") not in _COMPRESSORS
    ):
        raise UserError(f"Tensor {name!r} is compressed in a way T5X does not use: {compressor!r}.")
    dtype = np.dtype(dtype_name)
    needed = math.prod(chunks) * dtype.itemsize
    least = needed / _HIGHEST_RATIO if compressor else needed
    counts = [math.ceil(n / c) for n, c in zip(shape, chunks, strict=True)]
    if math.prod(counts) > sum(
        1 for _ in path.rglob("*")
    ):  # before any loop over a count we were told
        raise UserError(
            f"{path}: {math.prod(counts)} chunks of tensor {name!r} were saved, fewer are "
            "here; copy it again."
        )
    if not math.prod(shape):
        return _Stored(path, tuple(shape), dtype)
    separator = "/" if header.get("dimension_separator") == "/" else "."
    for index in itertools.product(*map(range, counts)):
        chunk = path / (separator.join(map(str, index)) or "0")
        if not chunk.is_file():
            raise UserError(
                f"{path}: chunk {chunk.name!r} of tensor {name!r} is missing; copy the "
                "checkpoint again."
            )
        if chunk.stat().st_size < least:
            raise UserError(
                f"{path}: chunk {chunk.name!r} of tensor {name!r} is too short to hold "
                f"{needed} bytes."
            )
    return _Stored(path, tuple(shape), dtype)


def _read_array(name: str, leaf: _Stored | np.ndarray) -> np.ndarray:
    if isinstance(leaf, np.ndarray):
        return leaf
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{leaf.path.resolve()}/"}}
    try:
        return tensorstore.open(spec, open=True, read=True).result().read().result()
    except (ValueError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{leaf.path}: tensor {name!r} cannot be read: {reason}") from error
