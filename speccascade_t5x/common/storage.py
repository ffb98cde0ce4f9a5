"""Files that are written atomically, and JSON that is the same on every run.

A file is written under a temporary name beside its final one, flushed to disk and renamed, so that no reader sees a
partial file.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speccascade_t5x.interfaces import UserError


def file_stem(task: str) -> str:
    """The task name as used in file names: ':' and '/' become '_'."""
    return task.replace(":", "_").replace("/", "_")


def as_utf8(text: str) -> str:
    """The text with escapes for what UTF-8 cannot represent, such as an invalid byte of a file name."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def one_writer(folder: str | Path, job: str, holds: bool = True) -> Iterator[None]:
    """Locks a folder for one job of this process, so that a second job started there is rejected.

    The lock is one of the operating system, on a file that is removed at the end: the lock of a killed process is
    released, and the file it leaves blocks no other job. If the file system has no locks, as some network file systems,
    nothing is locked.

    Args:
      folder: where the job writes; created if missing, and removed if it is still empty at the end.
      job: name of the job that must not run there twice. Jobs of different names do not exclude each other.
      holds: whether this host takes the lock; False does nothing.

    Raises:
      UserError: another process, or another call in this one, is working there.
    """
    if not holds:
        yield
        return
    path = Path(folder) / f".{file_stem(job)}.lock"
    there = path.parent.exists()
    handle = _locked(path, job)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink()  # while the lock is held, or another process could hold the removed file
                if not there:
                    path.parent.rmdir()  # of a job that failed before it wrote anything
            os.close(handle)


def _locked(path: Path, job: str) -> int | None:
    """The open file of a lock; None if no lock can be taken."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # the next write there will raise the error
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"another process is at work on {job} in {path.parent}: wait until it has ended, or use another output "
                "folder"
            ) from None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(handle)
            return None
        os.close(handle)  # the holder has just ended, and removed the file


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Reads a file of records.

    Raises:
      UserError: the file is missing or a line of it is not JSON; the message names the line.
    """
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield from_json(line)
                except ValueError as error:
                    said = getattr(error, "msg", error)
                    raise UserError(f"{path}, line {number} is not a JSON record ({said})") from error
    except OSError as error:
        raise UserError(f"the records {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the records {path} are not UTF-8 ({error.reason})") from error


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text that is the same on every run: keys in the given order, floats as `repr`.

    Numpy and jax scalars and arrays become plain numbers and lists.

    Raises:
      UserError: a NaN, an infinity, or a value without a JSON form.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent, default=_plain)
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:  # half a surrogate pair: no UTF-8 exists, but an escape does
        return json.dumps(value, ensure_ascii=True, allow_nan=False, indent=indent, default=_plain)
    except TypeError as error:
        raise UserError(f"a record cannot be written as JSON: {error}") from error
    except ValueError as error:
        raise UserError(
            f"a record holds a NaN or an infinity ({_first_bad_key(value)}): check the checkpoint and the dtype of the "
            "model, whose logits were probably not finite"
        ) from error


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text from outside.

    Raises:
      ValueError: it is not JSON, nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ValueError("it holds a number with too many digits") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a growing file of JSON lines; empty if there is no file. An unfinished last line is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(from_json(line))
            except ValueError:
                continue
    return rows


def write_bytes(path: str | Path, chunks: Iterable[bytes]) -> Path:
    """Writes a file atomically: to a temporary file, which is flushed to disk and renamed.

    Raises:
      UserError: the disk is full, or the file cannot be written. Nothing is left behind.
    """
    path = Path(path)
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        partial = Path(name)
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())
        os.replace(partial, path)
        partial = None
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written, and nothing of it was kept: {error.strerror or error}") from error
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink()
    return path


def npz(arrays: Mapping[str, Any], compress: bool = True) -> bytes:
    """The content of an .npz file of named arrays."""
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def write_text(path: str | Path, text: str) -> Path:
    """`write_bytes` of UTF-8 text; see `as_utf8`."""
    return write_bytes(path, [as_utf8(text).encode("utf-8")])


def write_json(path: str | Path, value: Any) -> Path:
    """`write_bytes` of indented JSON."""
    return write_text(path, to_json(value, indent=2) + "\n")


def _plain(value: Any) -> Any:
    """Numpy and jax values as Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _first_bad_key(value: Any) -> str:
    if isinstance(value, Mapping):
        for key, part in value.items():
            try:
                json.dumps(part, allow_nan=False, default=_plain)
            except ValueError:
                return f"in {key!r}"
    return "somewhere in it"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, on file systems that support it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
