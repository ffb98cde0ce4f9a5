"""Writes the API reference: one page per public module, from the docstrings.

    python docs/build_reference.py FOLDER

Public is what `speccascade_t5x` and the `__init__` of each room list in `__all__`: objects, or modules with everything
in them whose name has no leading underscore. Needs pdoc, which the `test` extra installs.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "speccascade_t5x"
# Rooms with no public API of their own: verbs, and folders that hold data.
PRIVATE = {"cli", "gin_configs", "pretrained", "tasks"}


def rooms() -> list[types.ModuleType]:
    """The package and every room of it, nested ones included."""
    root = Path(importlib.import_module(PACKAGE).__file__).parent
    found = (file.parent.relative_to(root).parts for file in sorted(root.rglob("__init__.py")))
    return [importlib.import_module(".".join([PACKAGE, *parts])) for parts in found if not PRIVATE & set(parts)]


def public_modules() -> list[types.ModuleType]:
    """The rooms, and the modules they list, in the order of their names."""
    return sorted({module.__name__: module for module in _public_modules()}.values(), key=lambda m: m.__name__)


def _public_modules() -> Iterator[types.ModuleType]:
    yield importlib.import_module(f"{PACKAGE}.interfaces")
    for room in rooms():
        yield room
        for name in room.__all__:
            if isinstance(found := resolve(room, name), types.ModuleType):
                yield found


def resolve(room: types.ModuleType, name: str) -> object:
    """What a room's `__all__` means by a name: an object it holds, or a module of its folder.

    Raises:
      ImportError: neither.
    """
    return getattr(room, name) if hasattr(room, name) else importlib.import_module(f"{room.__name__}.{name}")


def build(folder: Path) -> list[Path]:
    """Writes the pages and an index into a folder, and returns their paths."""
    import pdoc.doc
    import pdoc.render

    pdoc.render.configure(docformat="google", search=False, show_source=False)
    pages = {module.__name__: pdoc.doc.Module(module) for module in public_modules()}
    written = {"index.html": pdoc.render.html_index(pages)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # types that a jitted function or a TYPE_CHECKING block keeps to itself
        for name, page in pages.items():
            written[f"{name.replace('.', '/')}.html"] = pdoc.render.html_module(page, pages)
        if search := pdoc.render.search_index(pages):
            written["search.js"] = search
    for name, text in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in written]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever else is installed
    print(f"wrote {len(build(Path(sys.argv[1])))} pages, to be read from {sys.argv[1]}/index.html")
