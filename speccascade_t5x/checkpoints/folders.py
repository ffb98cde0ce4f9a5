"""Folders that appear whole under their name, and the checksums of what lies in them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from speccascade_t5x.checkpoints import architecture, tensors
from speccascade_t5x.common import storage
from speccascade_t5x.interfaces import UserError

CHECKSUMS_FILE = "checksums.json"
_FORMAT = "speccascade_t5x.checksums"
_VERSION = 1


@contextlib.contextmanager
def published(path: Path, what: str) -> Iterator[Path]:
    """Gives a hidden folder beside `path`, which takes its place when the block ends well.

    Args:
      path: the name it shall have. A folder of that name is replaced.
      what: what is written, for messages.

    Raises:
      UserError: it cannot be written; nothing is left, and what was there before still is.
    """
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
        yield partial
        _publish(partial, path)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # tensorstore reports a full disk as a ValueError
        raise UserError(f"Cannot write the {what} {path}: {tensors.reason(error)}; nothing was kept.") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file in a folder, by relative name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files
    }


def write_checksums(folder: Path) -> None:
    """Notes the checksums of a folder in it."""
    facts = {"format": _FORMAT, "version": _VERSION, "files": checksums(folder)}
    (folder / CHECKSUMS_FILE).write_text(storage.to_json(facts, indent=1) + "\n", "utf-8")


def check(folder: Path) -> None:
    """Compares a folder with the checksums in it, if it has any.

    Raises:
      UserError: naming the first file that is missing, truncated or changed.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return
    facts = architecture.read_json(path)
    version = facts.get("version")
    if facts.get("format") != _FORMAT or type(version) is not int or not isinstance(facts.get("files"), dict):
        raise UserError(f"{path} is damaged; delete it to read the checkpoint without checksums.")
    if version > _VERSION:
        raise UserError(
            f"{path} has format version {version} but this release of speccascade_t5x reads up to {_VERSION}; "
            "upgrade the package."
        )
    check_files(folder, facts["files"], f"The checkpoint {folder}", path)


def check_files(folder: Path, files: Mapping[str, Any], what: str, source: Path) -> None:
    """Compares files with what `source` notes of them; see `check`."""
    for name, facts in files.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{source} lists the unsafe file name {name!r}.")
        size, digest = (facts.get("bytes"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
        file = folder / name
        if not file.is_file():
            raise UserError(f"{what} is incomplete: {name} is missing; copy it again.")
        try:
            found = file.stat().st_size
            if found != size:
                raise UserError(f"{what} is damaged: {name} has {found} of {size} bytes; copy it again.")
            if _sha256(file) != digest:
                raise UserError(f"{what} is damaged: the content of {name} has changed; copy it again.")
        except OSError as error:
            raise UserError(f"Cannot read {file}: {error.strerror}.") from error


def largest_file(folder: Path) -> tuple[int, str]:
    """(bytes, relative name) of the largest file."""
    return max((file.stat().st_size, str(file.relative_to(folder))) for file in folder.rglob("*") if file.is_file())


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _publish(partial: Path, path: Path) -> None:
    """Flushes every file, then gives the folder its name; an old one goes only after that."""
    for file in partial.rglob("*"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    partial.chmod(0o755)
    old = None
    if path.exists():
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
        os.replace(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        if old is not None:
            with contextlib.suppress(OSError):
                os.replace(old, path)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
