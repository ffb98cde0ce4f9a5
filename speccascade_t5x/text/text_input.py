"""Plain text as decoding input: a file of lines, a file of JSON, or standard input."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from speccascade_t5x.common import storage
from speccascade_t5x.interfaces import UserError

# How the names of files of JSON lines end; a file of JSON may also hold one list. Case does not matter.
_JSON_LINES, _JSON = (".jsonl", ".ndjson", ".jsonlines"), ".json"


class TextExample(NamedTuple):
    """One text to decode.

    Attributes:
      index: its place in the input, counted from 0; blank lines do not count.
      inputs_text: the text.
      targets_text: its reference, or None.
      where: file and line, for messages.
    """

    index: int  # type: ignore[assignment]  # nobody calls tuple.index on an example
    inputs_text: str
    targets_text: str | None
    where: str


def read(source: str | Path, limit: int | None = None) -> list[TextExample]:
    """Reads the whole input, so that a bad line stops a run before it starts.

    Args:
      source: "-" for standard input; a `.jsonl` file of objects with "inputs" and perhaps "targets", or a `.json` file
        of these, one a line or in a list; or a file with one text per line. Blank lines are skipped, and so is a byte
        order mark.
      limit: read at most so many texts.

    Raises:
      UserError: the file cannot be read, a line is not such an object or not UTF-8, or there is no text at all.
    """
    suffix = Path(source).suffix.lower()
    if suffix in _JSON_LINES or suffix == _JSON:
        entries = _of_json(_lines(source), suffix == _JSON, source)
        texts = ((where, *_fields(value, where)) for where, value in entries)
    else:
        texts = ((where, text, None) for where, text in _lines(source))
    found = [
        TextExample(index, inputs, targets, where)
        for index, (where, inputs, targets) in enumerate(itertools.islice(texts, limit))
    ]
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
    if str(source) == "-" and sys.stdin is None:
        raise UserError("standard input is closed: name a file with --input, or give it something to read")
    try:
        stream = sys.stdin.buffer if str(source) == "-" else open(source, "rb")  # noqa: SIM115
        with stream:
            for number, line in enumerate(stream, start=1):
                where = f"{_name(source)}, line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
                except UnicodeDecodeError as error:
                    raise UserError(f"{where} is not UTF-8 ({error.reason})") from error
                if text.strip():
                    yield where, text
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a folder, a file that has gone, an input that was closed
        said = getattr(error, "strerror", None) or error
        raise UserError(f"the input {_name(source)} cannot be read: {said}") from error


def _of_json(lines: Iterator[tuple[str, str]], may_be_list: bool, source: str | Path) -> Iterator[tuple[str, Any]]:
    """(place for messages, value) of lines of JSON, or of the entries of one list."""
    for number, (where, text) in enumerate(lines):
        if may_be_list and number == 0 and text.lstrip().startswith("["):
            whole = _parsed("\n".join([text, *(rest for _, rest in lines)]), _name(source))
            yield from ((f"{_name(source)}, entry {i}", value) for i, value in enumerate(whole, start=1))
            return
        yield where, _parsed(text, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return storage.from_json(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({getattr(error, 'msg', error)})") from error


def _fields(value: Any, where: str) -> tuple[str, str | None]:
    """(inputs, targets) of an entry."""
    if not isinstance(value, dict) or not isinstance(value.get("inputs"), str):
        raise UserError(f'{where} needs an object with a text under "inputs"')
    targets = value.get("targets")
    if targets is not None and not isinstance(targets, str):
        raise UserError(f'{where} has a value under "targets" that is not a text')
    for name in ("inputs", "targets"):
        try:
            (value.get(name) or "").encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half a character
            raise UserError(f'{where} has a text under "{name}" that is not Unicode ({error.reason})') from error
    return value["inputs"], targets
