"""The bundles that come with the package."""

from __future__ import annotations

from speccascade_t5x.common import paths


def names() -> list[str]:
    """Their names, sorted. A verb that takes a bundle's folder takes such a name as well."""
    return sorted(manifest.parent.name for manifest in paths.pretrained_dir().glob("*/bundle.json"))
