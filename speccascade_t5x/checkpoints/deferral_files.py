"""The learned part of a bundle on disk: heads and calibrations in one npz, described in bundle.json.

They belong to the very files of their pair: the fingerprint of a member is made of the checksums bundle.json gives for
its files, so nothing is read to compare it, and a head in another pair's bundle is rejected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speccascade_t5x.checkpoints import npz, tensors
from speccascade_t5x.common import schema, storage
from speccascade_t5x.deferral import fitted as fitted_lib
from speccascade_t5x.deferral.fitted import Fitted
from speccascade_t5x.interfaces import UserError

FILE, SECTION = "deferral.npz", "deferral"
_WIDTH = schema.whole(0, 2**20)
_FEATURES = schema.record({}, {"top": schema.whole(2, 1024), "classes": _WIDTH, "hidden_q": _WIDTH, "hidden_p": _WIDTH})
_DESCRIBED = schema.record(
    {
        "heads": schema.map_of(
            schema.record({"features": _FEATURES}, {"width": schema.whole(1, 2**16), "layers": schema.whole(1, 64)})
        ),
        "calibrations": schema.map_of(schema.list_of(schema.of(str), 2)),
        **dict.fromkeys(("drafter", "verifier", "vocabulary"), schema.of(str)),
        "about": schema.of(dict),
    }
)
# Of each kind of calibration: its arrays and their ranks.
_RANKS = {
    "identity": {},
    "temperature": {"temperature": 0},
    "vector": {"scale": 1, "bias": 1},
    "isotonic": {"knots": 1, "levels": 1},
}


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
    (folder / FILE).write_bytes(storage.npz(arrays))
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
        described = _DESCRIBED(manifest[SECTION], SECTION)
        arrays = _arrays(place, described)
        fitted = fitted_lib.from_files(arrays, described)
    except UserError as error:
        raise UserError(f"{place} is damaged ({error}); fit it again with `speccascade train_deferral`") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{place} is damaged ({error!r}); fit it again with `speccascade train_deferral`") from error
    drafter, verifier = (member_fingerprint(manifest, name) for name in ("drafter", "verifier"))
    fitted.check(drafter, verifier, vocabulary, f"the bundle {folder}")
    return fitted


def _arrays(place: Path, described: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays, once the ranks of the calibrations among them are known to be right."""
    found = npz.open_arrays(place)
    for kind, names in described["calibrations"].items():
        for side, name in zip("qp", names, strict=True):
            prefix = f"calibration/{kind}/{side}/"
            shapes = {key.removeprefix(prefix): x.shape for key, x in found.items() if key.startswith(prefix)}
            ranks = {key: len(shape) for key, shape in shapes.items()}
            if ranks != _RANKS.get(name) or len(set(shapes.values())) > 1:
                raise UserError(f"the {kind} calibration has arrays of shapes {shapes}")
    for name, tensor in found.items():
        if tensor.dtype.kind not in "fiu":
            raise UserError(f"{name} holds {tensor.dtype.name}")
    return {name: tensors.to_host(name, tensor, str(place), tensor.dtype) for name, tensor in found.items()}
