"""Folders that appear whole under their name, and the checksums of what lies in them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from speccascade_t5x.checkpoints import tensors
from speccascade_t5x.common import schema, storage
from speccascade_t5x.interfaces import UserError

CHECKSUMS_FILE = "checksums.json"
_FORMAT = "speccascade_t5x.checksums"
_VERSION = 1
_LARGEST_LIST = 64 * 2**20
# What a list of files says of each: its size and its content.
FILES = schema.map_of(schema.record({"bytes": schema.whole(0, 2**62), "sha256": schema.of(str)}))


@contextlib.contextmanager
def published(path: Path, what: str) -> Iterator[Path]:
    """Gives a hidden folder beside `path`, which takes its place when the block ends well.

    Args:
      path: the name it shall have. A folder of that name is replaced.
      what: what is written, for messages.

    Raises:
      UserError: the name is a link, or it cannot be written; nothing is left, and what was there before still is.
    """
    partial = None
    if path.is_symlink():
        raise UserError(f"{path} is a link, which is not written through: name the folder it leads to, or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
        yield partial
        _publish(partial, path)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # tensorstore reports a full disk as a ValueError
        raise UserError(f"cannot write the {what} {path}: {tensors.reason(error)}; nothing was kept") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def require_inside(folder: Path, names: Collection[str] | None = None) -> None:
    """Rejects links that lead out of a checkpoint, and what is neither a file nor a folder.

    The folder itself may be a link. In a snapshot of a Hugging Face hub cache, links to its `blobs` are followed.

    Args:
      folder: the checkpoint.
      names: files in it that are looked at; None looks at everything below it.

    Raises:
      UserError: naming the first link that leads elsewhere, or the first pipe, socket or device.
    """
    try:
        root = folder.resolve()
        if names is not None:
            found = [root / name for name in names]
        else:
            found = [Path(place) / name for place, *inside in os.walk(root) for names in inside for name in names]
        for path in found:
            if path.is_symlink() and not _leads_inside(path.resolve(), root):
                raise UserError(
                    f"{path} is a link that leads out of its checkpoint, so it is not read: put the file itself there"
                )
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError(f"{path} is neither a file nor a folder")
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UserError(f"cannot look into {folder}: {tensors.reason(error)}") from error


def _leads_inside(target: Path, root: Path) -> bool:
    if target.is_relative_to(root):
        return True
    caches = [place.parent for place in (root, *root.parents) if place.name == "snapshots"]
    return any(cache.name.startswith("models--") and target.parent == cache / "blobs" for cache in caches)


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
    wanted = schema.record({"files": FILES})
    facts = schema.read_versioned(path, _VERSION, "a list of checksums", wanted, format=_FORMAT, largest=_LARGEST_LIST)
    check_files(folder, facts["files"], f"the checkpoint {folder}", path)


def check_files(folder: Path, files: Mapping[str, Any], what: str, source: Path) -> None:
    """Compares files with what `source` notes of them; see `check`."""
    for name, facts in files.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\0" in name:
            raise UserError(f"{source} lists the unsafe file name {schema.shown(name)}")
        size, digest = facts["bytes"], facts["sha256"]
        file = folder / name
        try:
            if not file.is_file():
                raise UserError(f"{what} is incomplete: {name} is missing; copy it again")
            found = file.stat().st_size
            if found != size:
                raise UserError(f"{what} is damaged: {name} has {found} of {size} bytes; copy it again")
            if _sha256(file) != digest:
                raise UserError(f"{what} is damaged: the content of {name} has changed; copy it again")
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from error


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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
