"""Where the package finds its gin files, its tasks and its data, however it was installed.

`tasks/` and `gin_configs/` are top-level folders of a checkout; an installed package has them as
`speccascade_t5x.tasks` and `speccascade_t5x.gin_configs`. Python started
inside a clone imports the clone's `speccascade_t5x/`, which has neither folder inside, even where
the package is installed as well. So a package that runs from a checkout puts a finder for these two
names before all others: they resolve to the checkout's own folders, even if an editable install
of another clone also has them. The names are the same in every case, so no task is registered
twice.

Standard library only: this module is loaded by `import speccascade_t5x`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_PACKAGE = __name__.partition(".")[0]
_PACKAGE_DIR = Path(__file__).resolve().parents[1]
_CHECKOUT_FOLDERS = ("tasks", "gin_configs")


class CheckoutFinder(importlib.abc.MetaPathFinder):
    """Finds `<package>.tasks` and `<package>.gin_configs` in the root of a checkout.

    Args:
      root: the folder that holds `speccascade_t5x/`, `tasks/` and `gin_configs/`.
    """

    def __init__(self, root: Path):
        self.root = root
        self._folders = {f"{_PACKAGE}.{name}": root / name for name in _CHECKOUT_FOLDERS}

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of one of the two packages; modules below them need no help."""
        folder = self._folders.get(fullname)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def checkout_dir() -> Path | None:
    """Returns the root of the checkout this package runs from; None if it was installed."""
    root = _PACKAGE_DIR.parent
    # setup.py tells a checkout from a site-packages folder that happens to hold a `tasks` package.
    whole = all((root / name / "__init__.py").is_file() for name in _CHECKOUT_FOLDERS)
    return root if whole and (root / "setup.py").is_file() else None


def install_checkout_finder() -> None:
    """Makes `speccascade_t5x.tasks` and `.gin_configs` importable from a bare checkout.

    Called once by `speccascade_t5x/__init__.py`. Does nothing in an installed package.
    """
    root = checkout_dir()
    if root is None or any(isinstance(f, CheckoutFinder) for f in sys.meta_path):
        return
    sys.meta_path.insert(0, CheckoutFinder(root))


def gin_configs_dir() -> Path:
    """Returns the folder of the packaged gin files (`models/`, `pairs/`, `rules/`, `runs/`, ...).

    Raises:
      FileNotFoundError: this copy of the package has none, so it was not installed whole.
    """
    candidates = [_PACKAGE_DIR / "gin_configs"]
    if checkout_dir() is not None:
        candidates.append(_PACKAGE_DIR.parent / "gin_configs")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{_PACKAGE} in {_PACKAGE_DIR} has no gin_configs: install it again with `pip install`")


def pretrained_dir() -> Path:
    """Returns the folder of the packaged bundles and of the demo's texts."""
    return _PACKAGE_DIR / "pretrained"
