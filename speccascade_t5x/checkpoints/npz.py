"""A model as two plain files: `params.npz` (flat names) and `config.json` (fields of the architecture)."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from speccascade_t5x.checkpoints import architecture, flat_params
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.checkpoints.tensors import Block, Tensor, count, row_bands
from speccascade_t5x.interfaces import UserError

PARAMS_FILE = "params.npz"
CONFIG_FILE = "config.json"
_SUFFIX = ".npy"


def open_model(folder: Path) -> Opened:
    """Checks the folder. Nothing is unpickled, and no tensor is allocated before its shape is known.

    Raises:
      UserError: a file is missing or damaged, or the tensors are not those of the configuration.
    """
    fields = architecture.read_json_fields(folder / CONFIG_FILE)
    if fields.get("scan_layers"):
        raise UserError(f"{folder / CONFIG_FILE} says scan_layers = True; npz folders with scanned layers are not read")
    config = architecture.from_fields(fields, str(folder / CONFIG_FILE))
    path = folder / PARAMS_FILE
    with _in_words(path), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(_SUFFIX) for name in archive.namelist()]
        leaves = {name: _tensor(archive, name, path) for name in names}
    flat_params.require_match(architecture.shapes(config), leaves, str(path))
    return Opened("npz", folder, architecture.model(config), leaves)


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or not an npz file: {error}") from error


def _tensor(archive: zipfile.ZipFile, name: str, path: Path) -> Tensor:
    """One member, its shape and dtype checked against the bytes that are really there."""
    with archive.open(name + _SUFFIX) as file:
        try:
            shape, fortran, dtype = _read_header(file)
            start = file.tell()
        except ValueError as error:
            raise UserError(f"{path}: {name!r} is not a numpy array: {error}") from error
    if dtype.hasobject:
        raise UserError(f"{path}: {name!r} holds Python objects, which are never loaded")
    size = archive.getinfo(name + _SUFFIX).file_size - start
    if int(np.prod(shape, dtype=object)) * dtype.itemsize != size:
        raise UserError(f"{path}: {name!r} is damaged: {size} bytes for shape {shape} of {dtype.name}")
    stored = shape[::-1] if fortran else shape
    return Tensor(shape, dtype, lambda: _blocks(path, name, start, stored, dtype), transposed=fortran)


def _blocks(path: Path, name: str, start: int, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Block]:
    """The values of one member in C order of `shape`; zip's checksum is verified at the end."""
    with _in_words(path), zipfile.ZipFile(path) as archive, archive.open(name + _SUFFIX) as file:
        file.read(start)
        for first, last in row_bands(shape, dtype.itemsize):
            size = (last - first) * count(shape[1:]) * dtype.itemsize
            rows = np.frombuffer(file.read(size), dtype)
            yield ((slice(first, last),), rows.reshape(-1, *shape[1:])) if shape else ((), rows.reshape(()))
        file.read(1)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"array format version {version} is not supported")
    return read_header(file)
