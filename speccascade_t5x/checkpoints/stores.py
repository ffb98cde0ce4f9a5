"""Arrays read through tensorstore: those of Orbax, and those a T5X index places where only the user may allow it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore

from speccascade_t5x.checkpoints import tensors
from speccascade_t5x.checkpoints.tensors import BLOCK_BYTES, Block, Tensor
from speccascade_t5x.interfaces import UserError

# What tensorstore raises for files that are missing, damaged, or of a kind it does not know.
FAILURES = (OSError, ValueError, LookupError, ArithmeticError, RuntimeError, TypeError)
_CHUNKED = ("zarr", "zarr3", "n5")


def blocks(store: tensorstore.TensorStore) -> Iterator[Block]:
    """The values of an array, in bands that hold whole chunks."""
    shape = tuple(store.shape)
    if not shape:
        yield (), np.asarray(store.read().result())
        return
    rows = max(1, store.chunk_layout.read_chunk.shape[0])
    row_bytes = max(1, tensors.count(shape[1:]) * store.dtype.numpy_dtype.itemsize)
    rows *= max(1, math.floor(BLOCK_BYTES / (rows * row_bytes)))
    for first in range(0, shape[0], rows):
        where = slice(first, min(first + rows, shape[0]))
        yield (where,), store[where].read().result()


def open_array(spec: Mapping[str, Any]) -> tensorstore.TensorStore:
    """Opens the array a spec names, to read it.

    Raises:
      FAILURES: it cannot be opened.
    """
    return tensorstore.open(dict(spec), open=True, read=True).result()


def read(spec: Mapping[str, Any], shape: tuple[int, ...]) -> Iterator[Block]:
    """The values of the array a spec names, which must have the shape that is known of it.

    Raises:
      FAILURES: it cannot be read, or has another shape.
    """
    store = open_array(spec)
    if tuple(store.shape) != shape:
        raise ValueError(f"its shape is {tuple(store.shape)} in the data but {shape} in the metadata")
    yield from blocks(store)


def open_foreign(name: str, spec: Mapping[str, Any], allowed: Collection[str]) -> Tensor:
    """An array outside its checkpoint's folder, or in another format, at the place its spec names.

    Args:
      name: of the tensor.
      spec: of tensorstore, from a file nobody vouches for; only `driver` and `kvstore` are followed.
      allowed: drivers the user has named, of arrays ("zarr", "zarr3", "n5") and of what stores them ("file", "gcs",
        "s3", "http"). "zarr" always is.

    Raises:
      UserError: a driver that is not among them, or an array that cannot be opened.
    """
    kvstore = spec.get("kvstore")
    if not isinstance(kvstore, dict):
        raise UserError(f"tensor {name!r} is stored in {kvstore!r}, which names no driver")
    followed = {"driver": spec["driver"], "kvstore": kvstore}
    for driver in _drivers(followed):
        if driver != "zarr" and driver not in allowed:
            named = ", ".join(sorted(allowed))
            raise UserError(f"tensor {name!r} is stored with driver {driver!r}, not one of those you allow: {named}")
    if spec["driver"] in _CHUNKED:
        followed["fill_missing_data_reads"] = False  # a chunk that is not there was lost: no zeros for it
    try:
        store = open_array(followed)
    except FAILURES as error:
        raise UserError(f"tensor {name!r} cannot be opened where it is stored: {tensors.reason(error)}") from error
    return Tensor(tuple(store.shape), store.dtype.numpy_dtype, lambda: blocks(store))


def _drivers(node: Any) -> Iterator[Any]:
    """Every driver a spec would use, however deep."""
    if isinstance(node, Mapping):
        if "driver" in node:
            yield node["driver"]
        for value in node.values():
            yield from _drivers(value)
    elif isinstance(node, list):
        for value in node:
            yield from _drivers(value)
