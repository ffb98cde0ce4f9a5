"""T5X-style gin flags: `--gin_file=...`, `--gin.NAME=VALUE`, `--gin_search_paths=...`, and errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin

from speccascade_t5x.interfaces import UserError
from speccascade_t5x.runtime import paths

_BINDING = re.compile(r"--gin\.([^=\s]+)=(.*)", re.DOTALL)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags every gin-configured verb takes. Bindings themselves are read by `split`."""
    group = parser.add_argument_group("gin")
    group.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file, searched in the working directory and then among the packaged ones; may be repeated",
    )
    group.add_argument(
        "--gin_search_paths", default="", metavar="DIR,DIR", help="folders to search before the packaged gin files"
    )
    group.add_argument("--gin.NAME=VALUE", action="append", dest="_documented", help="one binding; may be repeated")


def split(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses flags. Returns (namespace, bindings "NAME = VALUE" of the `--gin.` flags in order).

    Raises:
      UserError: a flag nobody knows; the message names the nearest.
    """
    bindings, rest = [], []
    for argument in argv:
        match = _BINDING.fullmatch(argument)
        if argument.startswith("--gin.") and not match:
            raise UserError(f"{argument!r} is no binding: write --gin.NAME=VALUE, texts in quotes of their own")
        if match:
            bindings.append(f"{match[1]} = {match[2]}")
        else:
            rest.append(argument)
    namespace, unknown = parser.parse_known_args(rest)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        raise UserError(f"unknown flag {unknown[0]!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    return namespace, bindings


def load(files: Iterable[str], bindings: Iterable[str], search_paths: str = "") -> str:
    """Parses gin files and then bindings, replacing whatever was configured. Returns the resolved config.

    Args:
      files: names searched in the working directory, `search_paths` and the packaged files.
      bindings: "NAME = VALUE" lines, parsed last.
      search_paths: comma-separated folders.

    Raises:
      UserError: a missing file, a syntax error, an unknown binding or import, or a required one left unset. The
        message names file or binding and the nearest valid name.
    """
    gin.clear_config()
    cwd, packaged = paths.gin_search_paths()
    folders = [cwd, *(Path(p) for p in search_paths.split(",") if p), packaged]
    with _search_quietly(folders):
        for file in files:
            found = next((folder / file for folder in folders if (folder / file).is_file()), None)
            if found is None:
                raise UserError(f"the gin file {file} was not found in {', '.join(map(str, folders))}")
            _parse(gin.parse_config_file, str(found), f"the gin file {file}")
        macros = _macros()
        for binding in bindings:
            name = binding.partition(" = ")[0]
            if "." not in name and name not in macros:
                near = difflib.get_close_matches(name, macros, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"the gin files know {', '.join(sorted(macros))}"
                raise UserError(f"the binding {binding!r} sets {name}, which no gin file reads: {hint}")
            _parse(gin.parse_config, binding, f"the binding {binding!r}")
    with _in_one_line("the configuration"):
        gin.finalize()
    return gin.config_str()


def literal(values: Mapping[str, Any]) -> list[str]:
    """Bindings of Python values: {"LIMIT": 3} -> ["LIMIT = 3"]; None is left out."""
    return [f"{name} = {value!r}" for name, value in values.items() if value is not None]


def _macros() -> set[str]:
    """Macros the parsed files define or refer to."""
    text = gin.config_str()
    return set(re.findall(r"^([A-Za-z_]\w*) = ", text, re.MULTILINE)) | set(re.findall(r"%([A-Za-z_]\w*)", text))


@contextlib.contextmanager
def _search_quietly(folders: Iterable[Path]):
    """Lets `include` search the folders; gin logs an error for each that lacks the file, found or not."""
    for folder in folders:
        gin.add_config_file_search_path(str(folder))
    drop = lambda record: not str(record.msg).startswith("Path not found")  # noqa: E731
    root = logging.getLogger()
    root.addFilter(drop)
    try:
        yield
    finally:
        root.removeFilter(drop)


def _parse(parse: Any, argument: str, what: str) -> None:
    with _in_one_line(what):
        parse(argument)


@contextlib.contextmanager
def _in_one_line(what: str):
    """Turns gin's errors into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, SyntaxError, ImportError, AttributeError, TypeError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{what} is not usable: {text}{_nearest(str(error))}") from error


def _nearest(message: str) -> str:
    """A hint for an unknown configurable or parameter, from gin's message."""
    parameter = re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", message)
    configurable = re.search(r"No configurable matching '([^']+)'", message)
    required = re.search(r"(\w+)/macro\.value set to `%gin\.REQUIRED`", message)
    if required:
        return f" Set it with --gin.{required[1]}=VALUE."
    if parameter:
        known = list(inspect.signature(gin.get_configurable(parameter[1])).parameters)
        wanted = parameter[2]
    elif configurable:
        known = re.findall(r"^# Parameters for (\S+):", gin.config_str(), re.MULTILINE)
        wanted = configurable[1]
    else:
        return ""
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
