"""Escapes what a terminal would interpret; the only module that does so.

Descriptions, paths, predictions and messages may hold anything: escape sequences that redraw or retitle a terminal,
carriage returns that overwrite earlier output, controls that change the reading direction, tabs and line breaks that
forge columns and lines. `line` turns a text into one line wherever it is written. `guard` shows control characters as
codes on terminals, such as \\u001b for an escape. Pipes and files get the other characters as they are.
"""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO

# Controls but for line feed and tab; marks, embeddings, overrides and isolates of direction; tags; halves of pairs.
_STEERING = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
# Characters at which some reader ends a line or a column, and those that no encoding can write.
_BREAKING = re.compile("[\t\n\x0b\x0c\r\x1c-\x1e\x85\u2028\u2029\ud800-\udfff]")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}
# How libraries redraw their progress bars, at the beginning of what they write.
_REDRAWN = re.compile("\r|(?:\x1b\\[A)*")


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    code = f"\\u{ord(character):04x}" if ord(character) <= 0xFFFF else f"\\U{ord(character):08x}"
    return _SHORT.get(character, code)


def line(value: Any) -> str:
    """A value's text in one line: tabs and line breaks as \\t, \\n, \\r or their code. The rest stays as it is."""
    return _BREAKING.sub(_escape, str(value))


def lines(found: Any) -> Any:
    """JSON-like data with all its texts, keys as well, as `line` makes them."""
    if isinstance(found, dict):
        return {line(name): lines(value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [lines(value) for value in found]
    return line(found) if isinstance(found, str) else found


def clean(text: str) -> str:
    """Text that is safe to print on a terminal: line feeds, tabs and printable characters stay, others become codes."""
    return _STEERING.sub(_escape, text)


class _Guarded:
    """A terminal's stream that escapes what is written."""

    def __init__(self, raw: TextIO):
        self.raw = raw

    def write(self, text: str) -> int:
        redrawn = _REDRAWN.match(text)  # it matches nothing as well
        drawn = redrawn[0] if redrawn else ""
        self.raw.write(drawn + clean(text[len(drawn) :]))
        return len(text)

    def writelines(self, texts: Any) -> None:
        for text in texts:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def guard() -> None:
    """Guards standard output and error if they are terminals, for the rest of the process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Guarded) and stream.isatty():
            setattr(sys, name, _Guarded(stream))


def console(*, stderr: bool = False, **options: Any) -> Any:
    """rich's console over standard output or error: it may control the terminal, the texts that it prints may not."""
    from rich.console import Console

    class Clean(Console):
        def print(self, *objects: Any, **how: Any) -> None:
            shown = (clean(each) if isinstance(each, str) and self.is_terminal else each for each in objects)
            super().print(*shown, **how)

    stream = sys.stderr if stderr else sys.stdout
    options = {"highlight": False, "markup": False, "emoji": False, **options}
    return Clean(file=getattr(stream, "raw", stream), **options)


# For rich's live displays: its own wrapper of the streams would pass escapes on.
LIVE = {"redirect_stdout": False, "redirect_stderr": False}
