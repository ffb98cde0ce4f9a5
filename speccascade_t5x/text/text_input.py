"""Plain text as decoding input: a file of lines, a JSONL file, or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from speccascade_t5x.interfaces import UserError


class TextExample(NamedTuple):
    """One text to decode.

    Attributes:
      index: its place in the input, counted from 0; blank lines do not count.
      inputs_text: the text.
      targets_text: its reference, or None.
      where: file and line, for messages.
    """

    index: int
    inputs_text: str
    targets_text: str | None
    where: str


def read(source: str | Path, limit: int | None = None) -> list[TextExample]:
    """Reads the whole input, so that a bad line stops a run before it starts.

    Args:
      source: "-" for standard input, a `.jsonl` file of objects with "inputs" and perhaps "targets", or a
        file with one text per line. Blank lines are skipped, and so is a byte order mark.
      limit: maximum number of texts to read.

    Raises:
      UserError: the file cannot be read, a line is not such an object or not UTF-8, or there is no text at all.
    """
    parse = _json_line if str(source).endswith(".jsonl") else lambda text, _: (text, None)
    found: list[TextExample] = []
    for where, text in _lines(source):
        if limit is not None and len(found) == limit:
            break
        inputs, targets = parse(text, where)
        found.append(TextExample(len(found), inputs, targets, where))
    if not found:
        raise UserError(f"there is nothing to decode: {_name(source)} holds no text")
    return found


def check(source: str | Path) -> None:
    """Checks that a file can be opened, without reading it.

    Raises:
      UserError: the file cannot be opened.
    """
    try:
        open(source, "rb").close()
    except (OSError, ValueError) as error:
        raise UserError(f"the input {source} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _name(source: str | Path) -> str:
    return "standard input" if str(source) == "-" else str(source)


def _lines(source: str | Path) -> Iterator[tuple[str, str]]:
    """(place for messages, text) of each line that is not blank."""
    try:
        stream = sys.stdin.buffer if str(source) == "-" else open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"the input {source} cannot be read: {error.strerror}") from error
    with stream:
        for number, line in enumerate(stream, start=1):
            where = f"{_name(source)}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 ({error.reason})") from error
            if text.strip():
                yield where, text


def _json_line(text: str, where: str) -> tuple[str, str | None]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg})") from error
    if not isinstance(value, dict) or not isinstance(value.get("inputs"), str):
        raise UserError(f'{where} needs an object with a text under "inputs"')
    try:
        value["inputs"].encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise UserError(f'{where} has a text under "inputs" that is not Unicode ({error.reason})') from error
    targets = value.get("targets")
    if targets is not None and not isinstance(targets, str):
        raise UserError(f'{where} has a value under "targets" that is not a text')
    return value["inputs"], targets
