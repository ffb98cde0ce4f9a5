"""T5X-style gin flags: `--gin_file=...`, `--gin.NAME=VALUE`, `--gin_search_paths=...`, and errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import math
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import gin

from speccascade_t5x.cli import gin_files, topology
from speccascade_t5x.common import paths
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks.lengths import LENGTHS

ALLOW_DRIVERS = "further tensorstore drivers, separated by commas, that a T5X checkpoint you trust may use"
KIND = "how to read a folder that could be read in several ways: bundle, npz, t5x_native, orbax, huggingface, ..."
_BINDING = re.compile(r"--gin\.([^=\s]+)=(.*)", re.DOTALL)


def names(text: str) -> tuple[str, ...]:
    """ "gcs,s3" as its parts."""
    return tuple(part for part in text.split(",") if part)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that every gin-configured verb takes. `split` reads the bindings themselves."""
    group = parser.add_argument_group("gin (a gin file is code, also somebody else's config.gin: read it first)")
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
    group.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="MODULE",
        help="a Python module to import first, such as one of seqio tasks; the working directory is searched as well; "
        "may be repeated",
    )
    group.add_argument(
        "--gin_allow_module",
        action="append",
        default=[],
        metavar="MODULE",
        help="a further module that gin files may import and call; may be repeated",
    )
    # Only documented here: `split` takes bindings out before argparse sees them.
    group.add_argument(
        "--gin.NAME=VALUE",
        action="store_true",
        dest="_documented",
        help="one binding; texts need quotes of their own; may be repeated",
    )


def parser(
    verb: str, usage: Sequence[str], description: str, epilog: str, flags: Mapping[str, tuple[Any, str]]
) -> argparse.ArgumentParser:
    """The parser of a verb, without the gin flags, which come last in its help: see `add_flags`.

    Args:
      verb: its name.
      usage: the forms of what may follow "speccascade VERB", one per line.
      description: what the verb does.
      epilog: end of the help, printed as it is.
      flags: name -> (type, help).
    """
    made = argparse.ArgumentParser(
        prog=f"speccascade {verb}",
        usage="\n       ".join(f"speccascade {verb} {line}" for line in usage),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, (kind, text) in flags.items():
        made.add_argument(f"--{name}", type=kind, help=text)
    return made


def default_file(verb: str, task: str | None) -> str:
    """The run file that a verb reads by default: the packaged one for its task, else the general one.

    The text tasks share `runs/infer_text_task.gin`; a few-shot task has the file of the plain one.
    """
    names = [f"{verb}_{(task or '').removesuffix('_few_shot')}", *([f"{verb}_text_task"] if task in LENGTHS else [])]
    packaged = [f"runs/{name}.gin" for name in names]
    return next((file for file in packaged if (paths.gin_configs_dir() / file).is_file()), f"runs/{verb}.gin")


def job(function: Callable[..., Any], needed: Mapping[str, str]) -> Callable[..., Any]:
    """The function with the bindings of the loaded gin files.

    Args:
      function: the configurable.
      needed: bindings that its run files make -> advice for a configuration without them.

    Raises:
      UserError: the gin files configure another job or none.
    """
    for binding, advice in needed.items():
        try:
            gin.query_parameter(binding)
        except ValueError as error:
            raise UserError(f"no gin file binds {binding}: {advice}") from error
    return gin.get_configurable(function)


def configured(binding: str) -> Any:
    """The value of a loaded binding: the result of its `@configurable()`, or its plain value."""
    value = gin.query_parameter(binding)
    return value.scoped_configurable_fn() if isinstance(value, gin.config.ConfigurableReference) else value


def settled(macro: str, binding: str, config_text: str) -> str:
    """The config with the plain value of a macro that a function computes: other jobs read the written file.

    Args:
      macro: its name.
      binding: the parameter that reads it.
      config_text: what `load` returned.
    """
    value = bound(f"{macro}/gin.macro.value", None)
    if not isinstance(value, gin.config.ConfigurableReference):
        return config_text
    with _in_one_line(f"the binding {macro} = {value}"), gin.unlock_config():
        gin.bind_parameter(f"{macro}/gin.macro.value", configured(binding))
    return gin.config_str()


def bound(binding: str, default: Any) -> Any:
    """The value a loaded file or flag gives a binding, or the default."""
    try:
        return gin.query_parameter(binding)
    except ValueError:
        return default


def split(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses flags. Returns (namespace, bindings "NAME = VALUE" of the `--gin.` flags in order).

    What the flags let gin files reach holds until the next call: see `gin_files`.

    Raises:
      UserError: a flag is unknown (the message names the nearest one), or a value has the wrong type.
    """
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print its usage and exit
    bindings, rest, modules = [], [], []
    for argument in argv:
        match = _BINDING.fullmatch(argument)
        if argument.startswith("--gin.") and not match:
            raise UserError(f"{argument!r} is not a binding: write --gin.NAME=VALUE, texts in quotes of their own")
        if match and match[1] == gin_files.MODULE_MACRO:
            modules.append(match[2].strip("'\""))
        elif match:
            bindings.append(f"{match[1]} = {match[2]}")
        else:
            rest.append(argument)
    namespace, unknown = parser.parse_known_args(rest)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        raise UserError(f"unknown flag {unknown[0]!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    if "gin_file" in namespace:
        named = (namespace.gin_file, namespace.module + modules, namespace.gin_allow_module)
        gin_files.ask(gin_files.Asked(*map(tuple, named)))
    return namespace, bindings


def load(files: Iterable[str], bindings: Iterable[str], search_paths: str = "") -> str:
    """Parses gin files and then bindings, replacing whatever was configured. Returns the resolved config.

    Args:
      files: names searched in `search_paths` and the packaged files; those of --gin_file in the working directory
        first.
      bindings: "NAME = VALUE" lines, parsed last.
      search_paths: comma-separated folders.

    Raises:
      UserError: a missing file, a syntax error, an unknown binding or import, or a required one left unset. The
        message names file or binding and the nearest valid name.
    """
    gin.clear_config()
    folders = [Path(folder) for folder in names(search_paths)]
    gin_files.import_modules()
    with gin_files.fenced(folders):
        for file in files:
            found = gin_files.find(file, folders, _moved(file))
            _parse(gin.config.parse_config_file, str(found), f"the gin file {file}")
        macros = _macros()
        for binding in bindings:
            name = binding.partition(" = ")[0]
            if "." not in name and name not in macros:
                hint = _hint(name, macros) if macros else ": begin with a run file, such as --gin_file=runs/infer.gin"
                raise UserError(f"the binding {binding!r} sets {name}, which no gin file reads{hint}")
            _parse(gin.parse_config, binding, f"the binding {binding!r}")
    _check_complete()
    gin_files.check_module_macro(bound(f"{gin_files.MODULE_MACRO}/gin.macro.value", None))
    return gin.config_str()


def literal(values: Mapping[str, Any]) -> list[str]:
    """Bindings of Python values: {"LIMIT": 3} -> ["LIMIT = 3"]; None is left out.

    Raises:
      UserError: an infinity or NaN, which a gin file cannot hold.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value} cannot be written in a gin file: give a finite number")
    return [f"{name} = {value!r}" for name, value in values.items() if value is not None]


def _moved(file: str) -> str:
    """The replacement of a packaged file of an earlier release, as the end of an error message."""
    task = re.search(r"(?:^|/)runs/infer_(\w+)\.gin$", file)
    if task and task[1] in LENGTHS:
        return f": use --gin_file=runs/infer_text_task.gin --task={task[1]} instead"
    instead = topology.instead_of(file)
    return f": use {instead} instead" if instead else ""


def _macros() -> set[str]:
    """Macros the parsed files define or refer to."""
    text = gin.config_str()
    return set(re.findall(r"^([A-Za-z_]\w*) = ", text, re.MULTILINE)) | set(re.findall(r"%([A-Za-z_]\w*)", text))


def _refuse(message: str) -> NoReturn:
    raise UserError(message)


def _check_complete() -> None:
    """Refuses a configuration that lacks required values, reads a macro nothing sets, or defines a value by itself."""
    _check_cycles()
    missing = re.findall(r"^(\S+) = \\?\s*%gin\.REQUIRED", gin.config_str(), re.MULTILINE)
    if missing:
        flags = " ".join(f"--gin.{name}=VALUE" for name in missing)
        raise UserError(f"the configuration needs {', '.join(missing)}: set {flags}")
    with _in_one_line("the configuration"):
        gin.finalize()


def _check_cycles() -> None:
    """Refuses a macro or a call whose value needs that very value: gin would look it up for ever."""
    needs = {
        key: [reference.config_key for reference in gin.config.iterate_references(bound) if reference.evaluate]
        for key, bound in gin.config._CONFIG.items()
    }
    whole: set[tuple[str, str]] = set()

    def visit(key: tuple[str, str], path: tuple[tuple[str, str], ...]) -> None:
        if key in path:
            names = [scope if selector == "gin.macro" else selector for scope, selector in (*path, key)]
            raise UserError(f"the configuration defines {names[-1]} by itself ({' needs '.join(names)})")
        if key not in whole:
            for other in needs.get(key, ()):
                visit(other, (*path, key))
            whole.add(key)

    for key in needs:
        visit(key, ())


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
    except (
        ValueError,
        SyntaxError,
        tokenize.TokenError,
        ImportError,
        AttributeError,
        TypeError,
        OSError,
        RuntimeError,
    ) as error:
        place = re.search(r'In file "([^"]+)", line (\d+)', str(error))
        if place:
            what = f"the gin file {place[1]}, line {place[2]}"
        elif isinstance(error, SyntaxError) and error.filename:
            what = f"the gin file {error.filename}, line {error.lineno}"
        raise UserError(f"{what} is not usable: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """A known message of gin in plain words, with the nearest valid name; the first line of any other message."""
    text = str(error)
    parameter = re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", text)
    if parameter:
        known = _parameters(gin.get_configurable(parameter[1]))
        return f"{parameter[1]} has no parameter {parameter[2]!r}{_hint(parameter[2], known)}"
    configurable = re.search(r"No configurable matching (?:reference )?'@?([^'()]+)", text)
    if configurable:
        return f"there is no {configurable[1]!r}{_hint(configurable[1], _configurables())}"
    macro = re.search(r"No bindings specified for '(\w+)/gin.macro'", text)
    if macro:
        return f"it reads %{macro[1]}, which nothing sets{_hint(macro[1], _macros() - {macro[1]})}"
    included = re.search(r"Unable to open file: (\S+?)\. Searched", text)
    if included:
        return f"it includes {included[1]}, which is not there{_moved(included[1])}"
    bare = re.search(r"Failed to parse token '([^']+)'", text)
    if bare:
        return f"{bare[1]!r} is not a value: a text needs quotes of its own, \"'{bare[1]}'\" in a shell"
    if isinstance(error, tokenize.TokenError):
        return "a bracket or a quote is not closed"
    if isinstance(error, SyntaxError):
        return f"syntax error ({error.msg.splitlines()[0].strip(' .')})"
    return text.splitlines()[0].strip() if text else type(error).__name__


def _hint(wanted: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wanted, list(known), n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else f": known are {', '.join(sorted(known))}"


def _parameters(configurable: Any) -> list[str]:
    """Parameter names of what a user wrote; gin's own subclass of a class shows none of them."""
    for written in inspect.getmro(configurable) if inspect.isclass(configurable) else [configurable]:
        names = list(inspect.signature(written).parameters)
        if names != ["args", "kwargs"]:
            return names
    return []


def _configurables() -> set[str]:
    """Public functions and classes in the modules the gin files import, as a binding names them.

    A module's own ones and those it takes from elsewhere in its package; not those of other libraries.
    """
    found = set()
    for package, name in re.findall(r"^from (\S+) import (\w+)$", gin.config_str(), re.MULTILINE):
        module = sys.modules.get(f"{package}.{name}")
        for attribute, value in vars(module).items() if module else ():
            home = str(getattr(value, "__module__", None)).partition(".")[0]
            if callable(value) and home == package.partition(".")[0] and not attribute.startswith("_"):
                found.add(f"{name}.{attribute}")
    return found
