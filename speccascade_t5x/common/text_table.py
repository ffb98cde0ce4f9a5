"""Rows of texts as a table, and texts escaped for Markdown: a cell cannot end a row, open a tag or make a link."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BREAKS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]+")
_MARKS = re.compile(r"[\\|`]|\](?=[(\[:])")
_TAGS = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def plain(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of one width, two spaces apart, for a terminal; the first row is the head."""
    rows = [[_BREAKS.sub(" ", cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def escaped(value: object) -> str:
    """A value as one line that Markdown shows as it is."""
    return _MARKS.sub(r"\\\g<0>", _BREAKS.sub(" ", str(value)).translate(_TAGS))


def markdown(rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; the first row is the head."""
    head, *body = ["| " + " | ".join(map(escaped, row)) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]
