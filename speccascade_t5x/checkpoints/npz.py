"""A model as two plain files: `params.npz` (flat names) and `config.json` (fields of T5Config)."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import jax
import numpy as np

from speccascade_t5x.checkpoints import architecture, tree
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models.t5 import T5, T5Config, param_shapes

PARAMS_FILE = "params.npz"
CONFIG_FILE = "config.json"
_SUFFIX = ".npy"


def read(folder: Path) -> Bound:
    """Reads the folder. Nothing is unpickled, and no tensor is allocated before its shape is known.

    Raises:
      UserError: a file is missing or damaged, or the tensors are not those of the configuration.
    """
    fields = architecture.read_json_fields(folder / CONFIG_FILE)
    config = architecture.from_fields(fields, str(folder / CONFIG_FILE))
    return Bound(T5(config), _read_params(folder / PARAMS_FILE, config))


def _read_params(path: Path, config: T5Config) -> dict:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(_SUFFIX) for name in archive.namelist()]
            shapes = {name: _header(archive, name, path) for name in names}
            tree.require_match(param_shapes(config), shapes, str(path))
            flat = {}
            for name in names:
                with archive.open(name + _SUFFIX) as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
                flat[name] = tree.to_device(name, array, str(path))
            return tree.nest(flat)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged or not an npz file: {error}.") from error


def _header(archive: zipfile.ZipFile, name: str, path: Path) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one member, checked against the bytes that are really there."""
    with archive.open(name + _SUFFIX) as file:
        try:
            shape, dtype = _read_header(file)
            start = file.tell()
        except ValueError as error:
            raise UserError(f"{path}: {name!r} is not a numpy array: {error}.") from error
    if dtype.hasobject:
        raise UserError(f"{path}: {name!r} holds Python objects, which are never loaded.")
    size = archive.getinfo(name + _SUFFIX).file_size - start
    if int(np.prod(shape, dtype=object)) * dtype.itemsize != size:
        raise UserError(
            f"{path}: {name!r} is damaged: {size} bytes for shape {shape} of {dtype.name}."
        )
    return jax.ShapeDtypeStruct(shape, dtype)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"array format version {version} is not supported")
    shape, _, dtype = read_header(file)
    return shape, dtype
