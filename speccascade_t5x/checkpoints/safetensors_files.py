"""safetensors files: 8 bytes of header length, a JSON header, the values.

They are read and written here, a few megabytes at a time: the safetensors library maps whole files into memory, asks
for all tensors of a file at once to write it, and has no bfloat16 in numpy.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from speccascade_t5x.checkpoints.tensors import Block, Tensor, count, row_bands
from speccascade_t5x.common import schema
from speccascade_t5x.interfaces import UserError

INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}
_LARGEST_HEADER = 100 * 10**6  # the format's own limit
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


def open_folder(folder: Path) -> dict[str, Tensor]:
    """Names to tensors of a folder that holds `model.safetensors`, or shards and their index.

    Raises:
      UserError: a file is missing or damaged, or index and files disagree.
    """
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if len(indexes) > 1 or (not indexes and len(files) != 1):
        names = ", ".join(path.name for path in indexes or files)
        raise UserError(f"{folder} holds several models ({names}); leave only the one to be read")
    if not indexes:
        return open_file(files[0])
    wanted = schema.record({"weight_map": schema.map_of(schema.of(str))})
    listed = schema.read(indexes[0], wanted, largest=_LARGEST_HEADER)["weight_map"]
    found: dict[str, Tensor] = {}
    for file in sorted(set(listed.values())):
        if Path(file).name != file or not file.endswith(SUFFIX):
            raise UserError(f"{indexes[0]} names the unsafe file {file!r}; only shards beside it are read")
        if not (folder / file).is_file():
            raise UserError(f"{folder} is incomplete: the shard {file} is missing; copy it again")
        found |= open_file(folder / file)
    if set(found) != set(listed):
        name = min(set(found) ^ set(listed))
        where = "in no shard" if name in listed else f"not in {indexes[0].name}"
        raise UserError(f"{folder} is damaged: tensor {name!r} is {where}; copy it again")
    return found


def open_file(path: Path) -> dict[str, Tensor]:
    """Names to tensors of one file, once its header is known to describe every byte of it.

    Raises:
      UserError: the file cannot be read, or is damaged.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH.size), "little")
            if size < _LENGTH.size or length > min(size - _LENGTH.size, _LARGEST_HEADER):
                raise UserError(f"{path} is damaged or no safetensors file: {size} bytes, a header of {length}")
            header = schema.parse(file.read(length), f"{path} is damaged: its header")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} is damaged: its header is not an object")
    header.pop(_METADATA, None)
    begin = _LENGTH.size + length
    spans = sorted((_checked(path, name, entry), name) for name, entry in header.items())
    end = 0
    for (first, last), name in spans:
        if first != end:
            raise UserError(f"{path} is damaged: tensor {name!r} begins at byte {first}, expected {end}")
        end = last
    if begin + end != size:
        raise UserError(f"{path} is damaged: it has {size} bytes but its header describes {begin + end}; copy it again")
    return {name: _tensor(path, header[name], begin + first) for (first, _), name in spans}


def _checked(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """(first byte, last + 1) of a tensor after the header."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UserError(
            f"{path}: tensor {name!r} holds {schema.shown(dtype)}; only {', '.join(_DTYPES)} are understood"
        )
    where = f"{path} is damaged: its header: {schema.shown(name)}"
    schema.list_of(schema.whole(0, 2**62))(shape, f"{where}.shape")
    schema.list_of(schema.whole(0, 2**62), 2)(span, f"{where}.data_offsets")
    if span[1] - span[0] != count(tuple(shape)) * _DTYPES[dtype].itemsize:
        raise UserError(f"{path} is damaged: tensor {name!r}, {dtype} of shape {shape}, is said to be at {span}")
    return span[0], span[1]


def _tensor(path: Path, entry: Mapping[str, Any], begin: int) -> Tensor:
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
    return Tensor(shape, dtype, lambda: _blocks(path, begin, shape, dtype))


def _blocks(path: Path, begin: int, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Block]:
    with open(path, "rb") as file:
        file.seek(begin)
        for first, last in row_bands(shape, dtype.itemsize):
            values = np.frombuffer(file.read((last - first) * count(shape[1:]) * dtype.itemsize), dtype)
            yield ((slice(first, last),), values.reshape(-1, *shape[1:])) if shape else ((), values.reshape(()))


def write(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Callable[[str], np.ndarray],
    dtype: np.dtype,
    shard_bytes: int,
) -> None:
    """Writes tensors as `model.safetensors`, or as shards with an index where one file would be too large.

    Args:
      folder: where.
      shapes: of every tensor.
      values: gives one tensor's values; asked for one at a time, in the order of the files.
      dtype: of all of them.
      shard_bytes: largest file, unless a single tensor is larger.

    Raises:
      OSError: it cannot be written.
    """
    sizes = {name: count(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}{SUFFIX}" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [f"model{SUFFIX}"]
    for file, shard in zip(names, shards, strict=True):
        _write_file(folder / file, {name: shapes[name] for name in shard}, values, dtype)
    if len(shards) > 1:
        listed = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": listed}
        (folder / f"model{INDEX_SUFFIX}").write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Names in order, a new shard begun before one would become too large. A header needs about 150 bytes a tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        size += 100 + len(name)
        if shards[-1] and filled + size > shard_bytes - 1024:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], values: Callable[[str], np.ndarray], dtype: np.dtype
) -> None:
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + count(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        for name, shape in shapes.items():
            array = values(name)
            if array.shape != tuple(shape):
                raise ValueError(f"tensor {name!r} has shape {array.shape}, announced as {shape}")
            for part in _row_parts(array):
                file.write(np.ascontiguousarray(part, dtype).tobytes())


def _row_parts(array: np.ndarray) -> Sequence[np.ndarray]:
    return [array[a:b] for a, b in row_bands(array.shape, array.itemsize)] if array.ndim else [array]
