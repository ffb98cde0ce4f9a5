"""Standard streams as verbs find them: closed, full, or of an encoding that lacks letters; and how a process ends.

Standard library only, so that a verb can say what is wrong before anything else is loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

_OF_STREAMS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def settle() -> None:
    """Makes standard output and error usable.

    What their encoding lacks is written as an escape, and so is a byte of a file's name that is no UTF-8. The place of
    a closed stream is taken, or the next file that is opened would get what is printed: output then fails as a full
    disk does, and messages go nowhere.
    """
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, flags)
            if number:
                # No context: it stays open as long as the process lives.
                setattr(sys, name, open(opened, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def failure(met: OSError | None = None) -> OSError | None:
    """Why standard output cannot be written; None where it can. What it holds back is then given up.

    Args:
      met: an error somebody has met; one of a stream names no file.
    """
    found = met if met is not None and met.filename is None and met.errno in _OF_STREAMS else None
    try:
        sys.stdout.flush()
    except OSError as error:
        found = error
    if found is not None:
        silence()
    return found


def silence() -> None:
    """Sends what standard output holds back, and what is still printed, nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with contextlib.suppress(OSError):
        sys.stdout.flush()


def show(lines: Iterable[str]) -> None:
    """Prints the results of a long job; where that fails they go to a file.

    Raises:
      UserError: standard output cannot be written; it names the file.
    """
    text = "".join(f"{line}\n" for line in lines)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, and wants no more
        raise
    except OSError as error:
        from speccascade_t5x.common import storage
        from speccascade_t5x.interfaces import UserError

        kept = storage.write_text(Path(tempfile.mkdtemp(prefix="speccascade-")) / "predictions.txt", text)
        silence()
        raise UserError(
            f"standard output cannot be written ({error.strerror}): the predictions are kept in {kept}"
        ) from error


def end(code: int) -> NoReturn:
    """Ends the process with this code, without the interpreter's own end.

    There, threads of native libraries may wait for an interpreter that has stopped, and the process would stay for
    ever: TensorFlow's do where an iterator over a Python generator is left early. What is to be done at exit is done.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
