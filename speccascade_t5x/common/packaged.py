"""Bundles by folder, or by the name of one that travels with the package."""

from __future__ import annotations

from pathlib import Path

from speccascade_t5x.common import checks, paths
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
        hint = checks.suggestion(str(path), packaged)
        raise UserError(f"there is no bundle {str(path)!r}, neither a folder nor packaged: {hint}")
    return paths.pretrained_dir() / path
