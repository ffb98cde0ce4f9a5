"""The public API: every room lists it, every name of it has a docstring, and the reference is built from it."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "speccascade_t5x"


def _load_builder() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("build_reference", ROOT / "docs" / "build_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = _load_builder()
ROOMS = builder.rooms()


def undocumented(name: str, found: object) -> Iterator[str]:
    """Yields the public names at and below `found` that have no docstring of their own.

    A method that overrides a documented one may leave the words to it; a class may not, and the signature that
    `dataclass` puts in place of a missing docstring is none.
    """
    if isinstance(found, types.ModuleType):
        if not inspect.getdoc(found):
            yield name
        for inner, value in vars(found).items():
            if not inner.startswith("_") and getattr(value, "__module__", None) == found.__name__:
                yield from undocumented(f"{name}.{inner}", value)
    elif isinstance(found, type):
        own = found.__dict__.get("__doc__") or ""
        if not own or own.startswith(f"{found.__name__}("):
            yield name
        for inner, value in vars(found).items():
            function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if inner.startswith("_") or not isinstance(
                function, (types.FunctionType, property, functools.cached_property)
            ):
                continue
            if not inspect.getdoc(getattr(found, inner)):
                yield f"{name}.{inner}"
    elif callable(found) and not inspect.getdoc(found):
        yield name


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_every_room_lists_its_public_names(room):
    assert room.__doc__, f"{room.__name__} does not say what it is for"
    assert hasattr(room, "__all__"), f"{room.__name__}.__all__ is missing: list what users may import"
    assert len(set(room.__all__)) == len(room.__all__)
    for name in room.__all__:
        builder.resolve(room, name)


def test_every_public_name_has_a_docstring():
    missing = set()
    for module in builder.public_modules():
        missing |= set(undocumented(module.__name__, module))
    for room in ROOMS:
        for name in room.__all__:
            missing |= set(undocumented(f"{room.__name__}.{name}", builder.resolve(room, name)))
    assert sorted(missing) == []


def test_a_missing_docstring_is_seen(tmp_path, monkeypatch):
    file = tmp_path / "planted.py"
    file.write_text(
        '"""A module."""\nimport dataclasses\n\n\ndef bare(): ...\n\n\n@dataclasses.dataclass\nclass Record:\n'
        '    size: int = 0\n\n    def method(self): ...\n\n\nclass Base:\n    """Documented."""\n\n'
        '    def run(self):\n        """Runs."""\n\n\nclass Child(Base):\n    def run(self): ...\n\n\n'
        "def _private(): ...\n"
    )
    spec = importlib.util.spec_from_file_location("planted", file)
    planted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "planted", planted)  # where `inspect` looks for the class of a method
    spec.loader.exec_module(planted)
    found = set(undocumented("planted", planted))
    assert found == {"planted.bare", "planted.Record", "planted.Record.method", "planted.Child"}


def test_the_reference_is_built(tmp_path):
    pages = {page.relative_to(tmp_path).as_posix(): page for page in builder.build(tmp_path)}
    assert {f"{room.__name__.replace('.', '/')}.html" for room in ROOMS} < set(pages)
    assert "index.html" in pages
    rules = pages[f"{PACKAGE}/core/rules.html"].read_text(encoding="utf-8")
    assert "Token-specific V3" in rules
    assert "min(1, pi / q)" in rules  # a docstring of a module the room only exports
