"""Reads JSON from untrusted sources: parsed strictly, checked against a schema, rejected with a clear error.

    facts = schema.read_versioned(path, 1, "the plan", schema.record({"alpha": schema.number(0, 1)}))

A check takes a value and its place ("plan.json: alpha"), and returns the value or raises a UserError that names the
place. Parsing rejects what is not JSON or what programs interpret differently: NaN, repeated names, numbers beyond the
range of a float, half surrogate pairs, a byte order mark, and nesting beyond Python's recursion limit.
"""

from __future__ import annotations

import collections
import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from speccascade_t5x.interfaces import UserError

Check = Callable[[Any, str], Any]

LARGEST_FILE = 4 * 2**20
WIDEST = 2**31 - 1  # the largest whole number that survives int32, as arrays of ids and lengths are
_MOST_DIGITS = 100  # some writers give "no limit" as 10**30
_LONGEST_SHOWN = 60
_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    """An error found by a hook of the parser, and the characters it was found in."""

    def __init__(self, what: str, token: str = ""):
        super().__init__(what)
        self.token = token


def parse(text: str | bytes, source: str) -> Any:
    """The value of a JSON text.

    Args:
      text: the JSON, as text or as its UTF-8 bytes.
      source: its place for messages: a file, or a file and a line.

    Raises:
      UserError: it is not valid JSON, or has content that is rejected, see above.
    """
    if isinstance(text, bytes):
        text = _decoded(text, source)
    elif text.startswith("\ufeff"):
        raise UserError(f"{source} begins with a byte order mark; save it as UTF-8 without one")
    hooks: dict[str, Any] = {
        "parse_int": _whole,
        "parse_float": _float,
        "parse_constant": _constant,
        "object_pairs_hook": _without_doubles,
    }
    try:
        value = json.loads(text, **hooks)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{source} is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from error
    except _Refused as error:
        at = text.find(error.token) if error.token else -1
        line = f" (line {text.count(chr(10), 0, at) + 1})" if at >= 0 else ""
        raise UserError(f"{source} is not usable JSON: {error}{line}") from error
    except RecursionError as error:
        raise UserError(f"{source} is not usable JSON: its lists and objects are nested too deeply") from error
    surrogate = _ESCAPED_SURROGATE.search(text)
    if surrogate and not _is_text(value):
        row = text.count("\n", 0, surrogate.start()) + 1
        raise UserError(f"{source} is not usable JSON: half a surrogate pair is not a character (line {row})")
    return value


def read(path: str | Path, check: Check | None = None, *, largest: int = LARGEST_FILE) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      path: the file.
      check: the check of its members; None accepts any object.
      largest: maximum size in bytes; a larger file is rejected without being read.

    Raises:
      UserError: the file cannot be read, is not JSON, does not hold an object, or does not pass the check.
    """
    value = parse(read_bytes(path, largest), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {_kind(value)} where an object is expected")
    return value if check is None else check(value, str(path))


def read_versioned(
    path: str | Path,
    version: int,
    what: str,
    check: Check | None = None,
    *,
    format: str | None = None,
    largest: int = LARGEST_FILE,
) -> dict[str, Any]:
    """The object in a JSON file that holds the version of its format.

    Args:
      path: the file.
      version: the newest version that can be read.
      what: name of the file's kind in messages: "the plan".
      check: the check of its members other than "version".
      format: the required value of its member "format", if it has one.
      largest: maximum size in bytes; a larger file is rejected without being read.

    Raises:
      UserError: see `read`; or the file is of another kind, or was written by a newer release.
    """
    value = read(path, largest=largest)
    found = value.get("version")
    if type(found) is not int or found < 0 or (format is not None and value.get("format") != format):
        said = f" (format {shown(value.get('format'))})" if format is not None else ""
        raise UserError(f"{path} is not {what} of this package, or damaged{said}: it names no version of its format")
    if found > version:
        raise UserError(
            f"{path} has format version {found} but this release of speccascade_t5x reads up to {version}; upgrade the "
            "package"
        )
    return value if check is None else check(value, str(path))


def read_text(path: str | Path, largest: int = LARGEST_FILE) -> str:
    """A small text file in UTF-8.

    Raises:
      UserError: it cannot be read, is too large, or is not text.
    """
    return _decoded(read_bytes(path, largest), str(path))


def read_bytes(path: str | Path, largest: int = LARGEST_FILE) -> bytes:
    """The bytes of a small file. Only a regular file is opened, because a pipe or a device would block the reader.

    Raises:
      UserError: it cannot be read, or is too large.
    """
    path = Path(path)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise UserError(f"{path} is not a file")
        if facts.st_size > largest:
            raise UserError(f"{path} is larger than {largest} bytes, which no such file is")
        with open(path, "rb") as file:
            return file.read(facts.st_size)  # a larger limit would be allocated as it is
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def whole(least: int = 0, most: int = WIDEST) -> Check:
    """A check for a whole number in a range; true and 1.0 do not pass."""

    def check(value: Any, where: str) -> Any:
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"{where} must be a whole number from {least} to {most}, found {shown(value)}")
        return value

    return check


def number(least: float = -math.inf, most: float = math.inf) -> Check:
    """A check for a finite number in a range; true does not pass."""

    def check(value: Any, where: str) -> Any:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not least <= value <= most or abs(value) > 1e300:
            limits = "" if (least, most) == (-math.inf, math.inf) else f" from {least:g} to {most:g}"
            raise UserError(f"{where} must be a number{limits}, found {shown(value)}")
        return value

    return check


def of(*kinds: type) -> Check:
    """A value of one of these types: str, bool, dict, list, type(None)."""

    def check(value: Any, where: str) -> Any:
        if type(value) not in kinds:
            raise UserError(f"{where} must be {' or '.join(map(_kind, kinds))}, found {shown(value)}")
        return value

    return check


def file_name() -> Check:
    """The name of a file or folder beside the JSON file: a path could lead out of its folder."""

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, str) or value in ("", ".", "..") or re.search(r"[/\\\0]", value):
            raise UserError(f"{where} must be a plain file name, found {shown(value)}")
        return value

    return check


def one_of(*values: Any) -> Check:
    """One of a few values, compared with their type."""

    def check(value: Any, where: str) -> Any:
        if not any(type(value) is type(known) and value == known for known in values):
            raise UserError(f"{where} must be {' or '.join(map(repr, values))}, found {shown(value)}")
        return value

    return check


def list_of(element: Check, length: int | None = None) -> Check:
    """A list whose elements pass a check, of a given length if there is one."""

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, list) or (length is not None and len(value) != length):
            of_length = "" if length is None else f" of {length}"
            raise UserError(f"{where} must be a list{of_length}, found {shown(value)}")
        return [element(x, f"{where}[{i}]") for i, x in enumerate(value)]

    return check


def map_of(element: Check) -> Check:
    """An object whose every member passes a check."""

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be an object, found {shown(value)}")
        return {name: element(x, _member(where, name)) for name, x in value.items()}

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with given members. Others are kept as they are, for a newer release may have written them."""
    optional = optional or {}

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be an object, found {shown(value)}")
        missing = [name for name in required if name not in value]
        if missing:
            raise UserError(f"{where} has no member {missing[0]!r}")
        checks = {**optional, **required}
        return {name: checks[name](x, _member(where, name)) if name in checks else x for name, x in value.items()}

    return check


def _member(where: str, name: str) -> str:
    """'bundle.json: decode.eos_id', with the file before the colon."""
    name = name if len(name) <= _LONGEST_SHOWN and name.isprintable() else shown(name)
    return f"{where}.{name}" if ": " in where else f"{where}: {name}"


def _kind(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(kind, "a number")


def shown(value: Any) -> str:
    """A value as shown in a message: escaped, and shortened."""
    if isinstance(value, dict | list):
        return f"{_kind(value)} of {len(value)}"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _decoded(raw: bytes, source: str) -> str:
    if raw.startswith(_MARKS):
        raise UserError(f"{source} begins with a byte order mark; save it as UTF-8 without one")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source} is not a text file in UTF-8 (line {line})") from error


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise _Refused(f"a whole number of {len(digits)} digits", digits)
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Refused(f"{shown(digits)} is beyond any number", digits)
    return value


def _constant(name: str) -> float:
    raise _Refused(f"{name} is not a number in JSON")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        double = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _Refused(f"the member {shown(double)} is there twice")
    return members


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False
