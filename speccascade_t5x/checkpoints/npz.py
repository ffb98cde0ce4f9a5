"""A model as two plain files: `params.npz` (flat names) and `config.json` (fields of the architecture)."""

from __future__ import annotations

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from speccascade_t5x.checkpoints import architecture, flat_params, folders, tensors
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.checkpoints.tensors import Block, Tensor, count, require_plausible, row_bands
from speccascade_t5x.interfaces import UserError

PARAMS_FILE = "params.npz"
CONFIG_FILE = "config.json"
_SUFFIX = ".npy"


def open_model(folder: Path) -> Opened:
    """Checks the folder. Nothing is unpickled, and no tensor is allocated before its shape is known.

    Raises:
      UserError: a file is missing or damaged, or the tensors are not those of the configuration.
    """
    folders.require_inside(folder, (PARAMS_FILE, CONFIG_FILE))
    fields = architecture.read_json_fields(folder / CONFIG_FILE)
    if fields.get("scan_layers"):
        raise UserError(f"{folder / CONFIG_FILE} says scan_layers = True; npz folders with scanned layers are not read")
    config = architecture.from_fields(fields, str(folder / CONFIG_FILE))
    leaves = open_arrays(folder / PARAMS_FILE)
    flat_params.require_match(architecture.shapes(config), leaves, str(folder / PARAMS_FILE))
    return Opened("npz", folder, architecture.model(config), leaves)


def open_arrays(path: Path) -> dict[str, Tensor]:
    """Names to arrays of an npz file, none of which has been read: only their headers are unpacked.

    Raises:
      UserError: it is missing or damaged, or claims more than a file of its size can hold.
    """
    with _in_words(path):
        on_disk = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename.removesuffix(_SUFFIX) for entry in entries]
            if len(set(names)) != len(names):
                raise zipfile.BadZipFile("a name is there twice")
            leaves = {name: _tensor(archive, entry, name, path) for name, entry in zip(names, entries, strict=True)}
    require_plausible(leaves, on_disk, str(path))
    return leaves


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, LookupError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or not an npz file: {tensors.reason(error)}") from error


def _tensor(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, path: Path) -> Tensor:
    """One member, its shape and dtype checked against the bytes that are really there."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{name!r} is compressed in a way numpy does not use")
    with archive.open(entry) as file:
        try:
            shape, fortran, dtype = _read_header(file)
            start = file.tell()
        except Exception as error:  # numpy parses the header as Python, and raises what the tokenizer does
            raise UserError(f"{path}: {name!r} is not a numpy array: {tensors.reason(error)}") from error
    if dtype.hasobject:
        raise UserError(f"{path}: {name!r} holds Python objects, which are never loaded")
    size = entry.file_size - start
    if min(shape, default=0) < 0 or count(shape) * dtype.itemsize != size:
        raise UserError(f"{path}: {name!r} is damaged: {size} bytes for shape {shape} of {dtype.name}")
    stored = shape[::-1] if fortran else shape
    return Tensor(shape, dtype, lambda: _blocks(path, entry.filename, start, stored, dtype), transposed=fortran)


def _blocks(path: Path, name: str, start: int, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Block]:
    """The values of one member in C order of `shape`; zip's checksum is verified at the end."""
    with _in_words(path), zipfile.ZipFile(path) as archive, archive.open(name) as file:
        file.read(start)
        for first, last in row_bands(shape, dtype.itemsize):
            size = (last - first) * count(shape[1:]) * dtype.itemsize
            rows = np.frombuffer(file.read(size), dtype)
            yield ((slice(first, last),), rows.reshape(-1, *shape[1:])) if shape else ((), rows.reshape(()))
        file.read(1)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # headers of 64 KB at most; later versions may claim one of 4 GB
        raise ValueError(f"array format version {version} is not supported")
    return np.lib.format.read_array_header_1_0(file)
