"""Rows of texts as a table."""

from __future__ import annotations

from collections.abc import Sequence


def plain(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of one width, two spaces apart, for a terminal; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is the head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]
