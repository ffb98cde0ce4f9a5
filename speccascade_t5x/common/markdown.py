"""Markdown that says what its texts say: a cell ends no row, opens no tag and follows no link."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKS = re.compile(r"[\\|`]|\](?=[(\[:])")
_TAGS = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_BREAKS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]+")


def text(value: object) -> str:
    """A value as one line that Markdown shows as it is."""
    return _MARKS.sub(r"\\\g<0>", _BREAKS.sub(" ", str(value)).translate(_TAGS))


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table.

    Args:
      header: a cell for each column.
      rows: their cells.
    """
    lines = [" | ".join(map(text, line)) for line in (header, *rows)]
    return [f"| {line} |" for line in (lines[0], " | ".join(["---"] * len(header)), *lines[1:])]
