"""Running gcloud: printed, recorded, streamed, and never killed by the Ctrl-C that is meant for the launcher."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple, TextIO

from .outcomes import USAGE, Interrupted, LaunchError


class Done(NamedTuple):
    """A gcloud command that has ended."""

    code: int
    out: str
    errors: str

    @property
    def reason(self) -> str:
        """gcloud's own last words, on one line."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        return (errors or lines or [f"gcloud exited with {self.code}"])[-1]

    @property
    def not_found(self) -> bool:
        return bool(re.search(r"NOT_FOUND|not found|notFound", self.errors))

    @property
    def already_exists(self) -> bool:
        return bool(re.search(r"ALREADY_EXISTS|already exists", self.errors))


class Signals:
    """Turns SIGINT, SIGTERM and SIGHUP (a closed terminal) into Interrupted, raised in the main thread."""

    def __init__(self) -> None:
        self._holds = 0
        self._pending: int | None = None
        self._heard = False

    def install(self) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._arrived)

    def _arrived(self, signum: int, _frame: object) -> None:
        if self._holds or self._heard:
            self._pending = signum
            tell("[launch] Signal taken; finishing what must not be left half done.", sys.stderr)
            return
        self._heard = True
        raise Interrupted(signum)

    def close(self) -> None:
        """From now on signals are only noted: what remains is the clean-up."""
        self._heard = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block signals only leave a note, which is acted on after it."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if not self._holds and self._pending is not None and not self._heard:
            self._heard = True
            raise Interrupted(self._pending)


class Gcloud:
    """Runs gcloud, or with `dry_run` prints what would run.

    Every command is a list of words after `gcloud`. Its process is in a session of its own, so that a Ctrl-C in the
    terminal reaches the launcher alone.
    """

    def __init__(self, dry_run: bool = False):
        self.dry_run = dry_run
        self.signals = Signals()

    def say(self, text: str) -> None:
        """A line for people: on standard error, or as a comment between the commands of a dry run."""
        if self.dry_run:
            tell(f"# {text}", sys.stdout)
        else:
            tell(f"[launch] {text}", sys.stderr)

    def pause(self, seconds: float) -> None:
        if not self.dry_run:
            time.sleep(seconds)

    def run(self, words: list[str], quiet: bool = False, assume: str = "") -> Done:
        """Runs to the end.

        Args:
          words: what follows `gcloud`.
          quiet: a mere question, not worth a line; a dry run prints it all the same.
          assume: the answer in a dry run.

        Raises:
          LaunchError: there is no gcloud.
        """
        if self.dry_run:
            print(pretty(words), flush=True)
            return Done(0, assume, "")
        if not quiet:
            self.say(" ".join(["gcloud", *map(_quoted, words)]))
        with self._started(words, stderr=subprocess.PIPE) as process:
            out, errors = process.communicate()
        if not quiet:
            for text in (out, errors):
                if text.strip():
                    tell(text.rstrip("\n"), sys.stderr)
        return Done(process.returncode, out, errors)

    def stream(self, words: list[str], tick_seconds: float) -> Iterator[str | None]:
        """Yields each line of standard output as it comes, None whenever `tick_seconds` have passed; in between the
        caller may look after other things. Closing the generator ends the command."""
        if self.dry_run:
            print(pretty(words), flush=True)
            return
        with self._started(words, stderr=None) as process:
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
            tick = time.monotonic() + tick_seconds
            while True:
                left = tick - time.monotonic()
                try:
                    if left <= 0:  # however fast the lines come
                        raise queue.Empty
                    line = lines.get(timeout=left)
                except queue.Empty:
                    yield None
                    tick = time.monotonic() + tick_seconds  # from now, or slow looks would leave the lines no turn
                    continue
                if line is None:
                    return
                yield line

    @contextlib.contextmanager
    def _started(self, words: list[str], stderr: int | None) -> Iterator[subprocess.Popen]:
        try:
            process = subprocess.Popen(
                ["gcloud", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
                text=True, encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise LaunchError(
                f"gcloud cannot be run ({error.strerror or error}): install the Google Cloud CLI and put it on PATH.",
                USAGE,
            ) from error
        try:
            yield process
        finally:
            if process.poll() is None:
                # The whole group: gcloud's own children hold the connections.
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def tell(text: str, file: TextIO) -> None:
    """Prints, but a terminal that was closed must not keep the launcher from deleting what is billed."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file, flush=True)


def pretty(words: list[str]) -> str:
    """The command as one would type it, a flag a line where it is long."""
    line = " ".join(["gcloud", *map(_quoted, words)])
    if len(line) <= 110:
        return line
    rows = ["gcloud"]
    flags = False
    for word in words:
        flags = flags or word.startswith("--")
        if flags:
            rows.append("    " + _quoted(word))
        else:
            rows[-1] += " " + _quoted(word)
    return " \\\n".join(rows)


def _quoted(word: str) -> str:
    """`--flag='a value'` rather than `'--flag=a value'`, which is the same to a shell."""
    flag, equals, value = word.partition("=")
    return f"{flag}={shlex.quote(value)}" if equals and word.startswith("--") else shlex.quote(word)


def _pump(source: TextIO, lines: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError):  # the pipe was closed under us: the command was ended
        for line in source:
            lines.put(line.rstrip("\n"))
    lines.put(None)
