"""The learned part of a bundle on disk: heads and calibrations in one npz, described in bundle.json.

They belong to the very files of their pair: the fingerprint of a member is made of the checksums bundle.json gives for
its files, so nothing is read to compare it, and a head in another pair's bundle is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speccascade_t5x.deferral import fitted as fitted_lib
from speccascade_t5x.deferral.fitted import Fitted
from speccascade_t5x.interfaces import UserError

FILE, SECTION = "deferral.npz", "deferral"


def member_fingerprint(manifest: Mapping[str, Any], name: str) -> str:
    """sha256 over architecture, file names and checksums of a member of a bundle; empty where it has no such member."""
    member = manifest.get("members", {}).get(name)
    if member is None:
        return ""
    digest = hashlib.sha256(json.dumps(member, sort_keys=True).encode())
    for file, facts in sorted(manifest["files"].items()):
        if file.startswith(f"{name}/"):
            digest.update(f"{file} {facts['sha256']}\n".encode())
    return digest.hexdigest()


def write(folder: Path, manifest: dict[str, Any], fitted: Fitted) -> None:
    """Writes the file into a bundle's folder and notes it in the manifest."""
    arrays, described = fitted_lib.to_files(fitted)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    (folder / FILE).write_bytes(buffer.getvalue())
    manifest[SECTION] = described


def read(folder: Path, manifest: Mapping[str, Any], vocabulary: str) -> Fitted | None:
    """The learned part of a bundle; None where it has none.

    Args:
      folder: of the bundle.
      manifest: its bundle.json.
      vocabulary: fingerprint of its vocabulary.

    Raises:
      UserError: it is damaged, or was fitted for another pair or vocabulary.
    """
    if SECTION not in manifest:
        return None
    place = folder / FILE
    try:
        with np.load(place, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        fitted = fitted_lib.from_files(arrays, manifest[SECTION])
    except UserError as error:
        raise UserError(f"{place} is damaged ({error}); fit it again with `speccascade train_deferral`") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{place} is damaged ({error!r}); fit it again with `speccascade train_deferral`") from error
    members = (member_fingerprint(manifest, name) for name in ("drafter", "verifier"))
    fitted.check(*members, vocabulary, f"the bundle {folder}")
    return fitted
