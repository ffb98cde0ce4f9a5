"""Bundles by folder, or by the name of one that travels with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from speccascade_t5x.common import paths
from speccascade_t5x.interfaces import UserError


def bundle_dir(path: str | Path) -> Path:
    """The folder of a bundle.

    Args:
      path: the folder, or the name of a packaged bundle.

    Raises:
      UserError: it is neither.
    """
    if Path(path).exists():
        return Path(path)
    packaged = sorted(manifest.parent.name for manifest in paths.pretrained_dir().glob("*/bundle.json"))
    if str(path) not in packaged:
        near = difflib.get_close_matches(str(path), packaged, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the packaged ones are {', '.join(packaged)}"
        raise UserError(f"there is no bundle {str(path)!r}, neither a folder nor packaged: {hint}")
    return paths.pretrained_dir() / path
