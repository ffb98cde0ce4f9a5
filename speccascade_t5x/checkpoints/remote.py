"""Checkpoints at addresses such as gs://bucket/folder, through etils.epath.

Whatever is remote is copied as a whole: readers and writers see local folders only, and so do their checks. The file
that makes a folder a checkpoint goes last, so that a copy cut short is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from speccascade_t5x.checkpoints.tensors import reason
from speccascade_t5x.interfaces import UserError

# Files that make a folder a checkpoint.
_MARKS = ("bundle.json", "checkpoint", "_METADATA", "config.json")


def is_remote(path: str | Path) -> bool:
    """Whether this is an address and not a local path."""
    return "://" in str(path)


@contextlib.contextmanager
def local_copy(path: str | Path) -> Iterator[Path]:
    """A local folder with what is at `path`, which may be a remote address.

    Raises:
      UserError: nothing is there, or it cannot be fetched.
    """
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="speccascade_t5x.") as folder:
        with _in_words(f"fetch {path}"):
            root = _remote_path(path)
            if not root.is_dir():
                raise UserError(f"{path} does not exist, or cannot be reached with the credentials of this machine")
            # Inside a folder of the same name, as the name may say the step.
            local = Path(folder) / (root.name or "checkpoint")
            _fetch(root, local)
        yield local


def publish(folder: Path, address: str, overwrite: bool) -> None:
    """Copies a finished local folder to an address.

    Raises:
      UserError: something is there already, or it cannot be written.
    """
    with _in_words(f"write {address}"):
        root = _remote_path(address)
        if root.exists():
            if not overwrite:
                raise UserError(f"{address} already exists; choose another name, or allow it to be overwritten")
            root.rmtree()
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        for file in sorted(files, key=lambda file: file.name in _MARKS):
            place = root / file.relative_to(folder).as_posix()
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "rb") as source, place.open("wb") as target:
                shutil.copyfileobj(source, target, 2**22)


def _fetch(source, target: Path) -> None:
    """Copies a remote folder."""
    target.mkdir(parents=True)
    for child in source.iterdir():
        if child.name in ("", ".", "..") or "/" in child.name:
            raise UserError(f"{source} holds the unsafe name {child.name!r}")
        if child.is_dir():
            _fetch(child, target / child.name)
            continue
        with child.open("rb") as remote, open(target / child.name, "wb") as local:
            shutil.copyfileobj(remote, local, 2**22)


def _remote_path(path: str | Path):
    from etils import epath  # only here: it is slow to load, and most checkpoints are local

    return epath.Path(str(path))


@contextlib.contextmanager
def _in_words(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every storage library has errors of its own
        raise UserError(f"cannot {what}: {type(error).__name__}: {reason(error)}") from error
