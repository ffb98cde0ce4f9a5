"""What gin files may reach: the files they include, the modules they import, and the names behind those.

A gin file is code: it calls whatever it names. Files that the user did not name are therefore read from the package
only, and names must belong to this package, to seqio, or to a module that the user named; see docs/security.md.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gin import config

from speccascade_t5x.common import paths
from speccascade_t5x.interfaces import UserError

# This package and the library its configs use.
_LIBRARIES = ("speccascade_t5x", "seqio")
# Closed to gin files nevertheless: the runner of programs, and the verbs.
_CLOSED = ("speccascade_t5x.tasks.sandbox", "speccascade_t5x.cli")
# T5X's name for a module of tasks: on the command line it means --module.
MODULE_MACRO = "MIXTURE_OR_TASK_MODULE"
_BUILTINS = ("gin.macro", "gin.constant", "gin.singleton")


class Asked(NamedTuple):
    """The gin-related flags of this process.

    Attributes:
      files: values of --gin_file.
      modules: of --module.
      allowed: of --gin_allow_module.
    """

    files: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


_asked = Asked()


def ask(asked: Asked) -> None:
    """Stores the flags, replacing those stored before."""
    global _asked
    _asked = asked


def import_modules() -> None:
    """Imports the modules of --module as Python does for a script of the working directory.

    Raises:
      UserError: one cannot be imported.
    """
    here = str(Path.cwd())
    for name in _asked.modules:
        sys.path.insert(0, here)
        try:
            importlib.import_module(name)
        except Exception as error:
            said = str(error).strip().splitlines()
            raise UserError(
                f"--module={name} cannot be imported ({type(error).__name__}{f': {said[0]}' if said else ''}): "
                f"it must be a Python module in {here} or an installed one"
            ) from error
        finally:
            sys.path.remove(here)
    if _asked.modules and here not in sys.path:
        sys.path.append(here)  # for what they import later; last, so that it takes no other module's place


def check_module_macro(name: str | None) -> None:
    """Rejects a module of tasks that a gin file names and the user does not.

    Raises:
      UserError: a gin file names such a module.
    """
    if name and name not in _asked.modules and not _below(name, _LIBRARIES):
        raise UserError(f"a gin file wants the module {name} of tasks: add --module={name} if you trust it")


def find(name: str, search_paths: Sequence[Path], hint: str = "") -> Path:
    """The file of this name. One that the user named is looked for in the working directory first.

    Args:
      name: as it was given.
      search_paths: folders the user named.
      hint: end of the error message, which says what to do if the file does not exist.

    Raises:
      UserError: no such file exists.
    """
    packaged = paths.gin_configs_dir()
    folders = [*search_paths, packaged]
    if name in _asked.files:
        folders = [Path.cwd(), *folders]
    found = _first(name, folders)
    if found is None:
        raise UserError(f"the gin file {name} was not found in {', '.join(map(str, folders))}{hint}")
    if found == Path.cwd() / name and found != packaged / name and (packaged / name).is_file():
        print(f"{name} of the working directory is read, not the packaged file of this name", file=sys.stderr)
    return found


def _first(name: str, folders: Sequence[Path]) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


@contextlib.contextmanager
def fenced(search_paths: Sequence[Path]) -> Iterator[None]:
    """Context in which gin can only parse what this module allows."""
    original = config.ParseContext, config.parse_config_file
    config.ParseContext, config.parse_config_file = _Context, _includer(search_paths, original[1])
    try:
        yield
    finally:
        config.ParseContext, config.parse_config_file = original


def _includer(search_paths: Sequence[Path], parse: Any) -> Any:
    """gin's `parse_config_file` with our search: a packaged file always includes packaged files."""
    packaged = paths.gin_configs_dir().resolve()
    reading: list[Path] = []

    def parse_config_file(name: str, *options: Any, **more: Any) -> Any:
        folders = [*search_paths, packaged]
        if reading and not reading[-1].is_relative_to(packaged):
            folders += [reading[-1].parent, Path.cwd()]
        found = _first(name, folders)
        if found is None:
            raise OSError(f"Unable to open file: {name}. Searched {folders}")
        if found.resolve() in reading:
            raise ValueError(f"{name} includes itself")
        reading.append(found.resolve())
        try:
            return parse(str(found), *options, **more)
        finally:
            reading.pop()

    return parse_config_file


def _named() -> tuple[str, ...]:
    return (*_asked.modules, *_asked.allowed)


def _below(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _check_module(name: str, what: str) -> None:
    """Raises ImportError, which `gin_flags` reports with file and line, unless gin files may use the module."""
    if not _below(name, _named()) and (not _below(name, _LIBRARIES) or _below(name, _CLOSED)):
        raise ImportError(f"{what}, which gin files may not reach: add --gin_allow_module={name} if you trust it")


class _Context(config.ParseContext):
    """gin's context of a file: what it imports, and how a name is resolved."""

    def process_import(self, statement: Any) -> None:
        # gin itself makes a context with an import manager, to write a configuration as text.
        if self._import_manager is None and not statement.module.startswith("__gin__"):
            _check_module(statement.module, f"it imports {statement.module}")
        super().process_import(statement)

    def _resolve_selector(self, selector: str) -> Any:
        """Resolves a name as gin does, but checks each step, because a module holds the modules that it imports."""
        names = selector.split(".")
        found = None
        for end, name in enumerate(names, start=1):
            found = super()._resolve_selector(".".join(names[:end]))
            if selector in _BUILTINS:
                continue
            if name.startswith("_"):
                raise ImportError(f"it names {selector}: gin files may use no name that begins with an underscore")
            value = found[1][-1]
            if end > 1 and inspect.ismodule(found[1][-2]) and _below(found[1][-2].__name__, _named()):
                break  # what a module gives that the user trusts
            last = end == len(names)
            if not inspect.ismodule(value) and not inspect.isclass(value) and not (last and callable(value)):
                raise ImportError(f"it names {selector}, and {name} is not a module, class or function")
            _check_module(_home(value), f"it names {selector}, which is of {_home(value)}")
        return super()._resolve_selector(selector)

    def get_configurable(self, selector: str) -> Any:
        found = super().get_configurable(selector)
        macro = found is not None and _home(found.wrapped) == config.__name__
        if found is not None and not macro and not self._dynamic_registration:
            _check_module(_home(found.wrapped), f"it names {selector}, which is of {_home(found.wrapped)}")
        return found


def _home(value: Any) -> str:
    return value.__name__ if inspect.ismodule(value) else str(getattr(value, "__module__", None))
