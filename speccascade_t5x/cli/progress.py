"""Progress of a verb: a live line on stderr, and scalars for TensorBoard."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from speccascade_t5x.cli import terminal


@contextlib.contextmanager
def live(*columns: Any) -> Iterator[Any]:
    """A rich `Progress` on stderr, which draws nothing if stderr is not a terminal.

    Args:
      columns: columns of rich, or texts, each of which makes a `TextColumn`.
    """
    from rich.progress import Progress, TextColumn

    made = [TextColumn(column) if isinstance(column, str) else column for column in columns]
    console = terminal.console(stderr=True)
    with Progress(*made, console=console, disable=not console.is_terminal, **terminal.LIVE) as shown:
        yield shown


@contextlib.contextmanager
def bar(*texts: str) -> Iterator[Any]:
    """`live` with the columns of a bar: the first text, the bar, the count, further texts, time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    with live(texts[0], BarColumn(), MofNCompleteColumn(), *texts[1:], TimeRemainingColumn()) as shown:
        yield shown


class Scalars:
    """TensorBoard files of several curves, written through clu; without clu, one line reports that none are written.

    Args:
      say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say, self._missing = say, False
        self._writers: dict[Path, Any] = {}

    def write(self, folder: Path, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the scalars of a step to the curve in `folder`."""
        if self._missing:
            return
        try:
            # First, because it loads TensorFlow quietly and keeps it off accelerators.
            importlib.import_module("speccascade_t5x.data.seqio_tasks")
            from clu import metric_writers
        except ImportError as error:
            self._missing = True
            self._say(f"no TensorBoard files are written: {error.name} is not installed")
            return
        if folder not in self._writers:
            self._writers[folder] = metric_writers.SummaryWriter(str(folder))
        self._writers[folder].write_scalars(step, dict(scalars))
        self._writers[folder].flush()
