"""zarr arrays as T5X writes them: version 2, C order, gzip or nothing, one file per chunk.

tensorstore reads and writes them. Before it reads, header and files are compared here, since zarr takes a missing chunk
for zeros and any shape at its word.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from speccascade_t5x.checkpoints import stores
from speccascade_t5x.checkpoints.tensors import Tensor, count
from speccascade_t5x.common import schema
from speccascade_t5x.interfaces import UserError

HEADER_FILE = ".zarray"
_COMPRESSORS = ("gzip", "zlib")
_HIGHEST_RATIO = 1040  # deflate cannot do better than 1032:1
_HEADER = schema.record(
    {"shape": schema.list_of(schema.whole(0, 2**62)), "chunks": schema.list_of(schema.whole(1, 2**62))}
)
_DTYPES = {"<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16", "<i4": "int32", "<i8": "int64", "|b1": "bool"}


def open_array(path: Path, name: str) -> Tensor:
    """An array folder, once its header and its files are known to fit each other.

    Raises:
      UserError: a file is missing or damaged, or claims what it cannot hold.
    """
    header = schema.read(path / HEADER_FILE, _HEADER)
    shape, chunks = header["shape"], header["chunks"]
    if len(shape) != len(chunks) or any(c > max(n, 1) for c, n in zip(chunks, shape, strict=True)):
        raise UserError(f"{path}/.zarray is damaged: chunks {chunks} do not fit shape {shape}")
    for key, wanted in (("zarr_format", 2), ("order", "C"), ("filters", None)):
        if header.get(key, wanted) != wanted:
            raise UserError(f"{path}/.zarray says {key} = {schema.shown(header[key])}, where T5X writes {wanted!r}")
    dtype_name = _DTYPES.get(str(header.get("dtype")))
    if dtype_name is None:
        raise UserError(
            f"tensor {name!r} holds {schema.shown(header.get('dtype'))}; only {', '.join(_DTYPES)} are read"
        )
    compressor = header.get("compressor")
    if compressor is not None and (not isinstance(compressor, dict) or compressor.get("id") not in _COMPRESSORS):
        raise UserError(f"tensor {name!r} is compressed in a way T5X does not use: {schema.shown(compressor)}")
    separator = "/" if header.get("dimension_separator") == "/" else "."
    dtype = np.dtype(dtype_name)
    _check_chunks(path, name, shape, chunks, dtype, compressor is not None, separator)
    spec = {"driver": "zarr", "kvstore": _kvstore(path), "fill_missing_data_reads": False}
    return Tensor(tuple(shape), dtype, lambda: stores.read(spec, tuple(shape)))


def _check_chunks(
    path: Path, name: str, shape: list[int], chunks: list[int], dtype: np.dtype, packed: bool, separator: str
) -> None:
    """Every chunk must be there and could hold what the header claims."""
    needed = count(tuple(chunks)) * dtype.itemsize
    counts = [-(-n // c) for n, c in zip(shape, chunks, strict=True)]
    if math.prod(counts) > sum(1 for _ in path.rglob("*")):  # before any loop over a count we were told
        raise UserError(
            f"{path}: {math.prod(counts)} chunks of tensor {name!r} were saved, fewer are here; copy it again"
        )
    if not math.prod(shape):
        return
    for index in itertools.product(*map(range, counts)):
        chunk = path / _chunk_name(index, separator)
        if not chunk.is_file():
            raise UserError(f"{path}: chunk {chunk.name!r} of tensor {name!r} is missing; copy the checkpoint again")
        if chunk.stat().st_size < (needed / _HIGHEST_RATIO if packed else needed):
            raise UserError(f"{path}: chunk {chunk.name!r} of tensor {name!r} is too short to hold {needed} bytes")


def _chunk_name(index: tuple[int, ...], separator: str) -> str:
    return separator.join(map(str, index)) or "0"


def write_array(path: Path, values: np.ndarray, chunk_bytes: int) -> dict[str, Any]:
    """Writes an array folder.

    Args:
      path: the folder to make.
      values: what goes into it.
      chunk_bytes: largest chunk before compression, if a row of axis 0 is no larger.

    Returns:
      The metadata part of its tensorstore spec.

    Raises:
      OSError, ValueError: it cannot be written.
    """
    chunks = list(values.shape)
    if chunks:
        chunks[0] = min(max(1, chunks[0]), max(1, chunk_bytes // max(1, values.itemsize * count(values.shape[1:]))))
    metadata = {"shape": list(values.shape), "chunks": chunks, "compressor": {"id": "gzip", "level": 1}}
    names = {name: ours for ours, name in _DTYPES.items()}
    spec = {
        "driver": "zarr",
        "kvstore": _kvstore(path),
        "metadata": {**metadata, "dtype": names[values.dtype.name]},
        "store_data_equal_to_fill_value": True,
    }
    store = tensorstore.open(spec, create=True).result()
    rows = chunks[0] if chunks else 1
    for first in range(0, values.shape[0] if chunks else 1, rows):
        where = slice(first, min(first + rows, values.shape[0])) if chunks else ...
        store[where].write(np.ascontiguousarray(values[where])).result()
    return metadata


def _kvstore(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{path.resolve()}/"}
