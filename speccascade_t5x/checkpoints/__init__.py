"""Checkpoints in, bundles out. The kind of a folder and the architecture in it are detected.

checkpoints.load(path) -> Bound             one model
checkpoints.load_bundle(path) -> Bundle     a pair with its vocabulary and settings
checkpoints.save_bundle(path, ...)
"""

from __future__ import annotations

import re
from pathlib import Path

from speccascade_t5x.checkpoints import npz, orbax_tree, t5x_native
from speccascade_t5x.checkpoints.bundle import (
    MANIFEST,
    Bundle,
    check_files,
    load_bundle,
    load_member,
    read_manifest,
    save_bundle,
)
from speccascade_t5x.interfaces import Bound, UserError

__all__ = ["Bundle", "detect", "load", "load_bundle", "save_bundle"]

_LOOKED_FOR = (
    f"a bundle ({MANIFEST}), an npz folder ({npz.PARAMS_FILE} and {npz.CONFIG_FILE}), a T5X "
    "checkpoint (a file "
    f"'{t5x_native.INDEX_FILE}' or a folder 'state'), or a folder holding checkpoint_<step>"
)


def detect(path: str | Path) -> str:
    """What kind of folder this is.

    Returns:
      "bundle", "member" (a model's folder inside a bundle), "npz", "t5x_native", "t5x_orbax",
      "t5x_steps" (a folder of checkpoint_<step> folders) or "huggingface".

    Raises:
      UserError: nothing is there, or nothing known; the message says what was looked for.
    """
    if "://" in str(path):
        raise UserError(f"{path} is a remote address; copy the checkpoint to a local folder first.")
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; a checkpoint is {_LOOKED_FOR}.")
    if (path / MANIFEST).is_file():
        return "bundle"
    if (path.resolve().parent / MANIFEST).is_file():
        return "member"
    if (path / npz.PARAMS_FILE).is_file():
        return "npz"
    if (path / t5x_native.INDEX_FILE).is_file():
        return "t5x_native"
    if (path / "state" / "_METADATA").is_file():
        return "t5x_orbax"
    if _steps(path):
        return "t5x_steps"
    if any(path.glob("*.safetensors")):
        return "huggingface"
    raise UserError(f"{path} holds no checkpoint; looked for {_LOOKED_FOR}.")


def load(path: str | Path) -> Bound:
    """One model, float32, on the default device.

    Of several checkpoint_<step> folders the newest is taken. A bundle is loaded here only if it
    holds one model; name a member (`<bundle>/verifier`) or use `load_bundle` otherwise.

    Raises:
      UserError: see `detect` and the readers; messages name the file or tensor.
    """
    kind, path = detect(path), Path(path)
    if kind == "bundle":
        bundle = load_bundle(path)
        if bundle.drafter is not None:
            raise UserError(
                f"{path} is a bundle of two models; name one: {path / 'verifier'} or "
                f"{path / 'drafter'}."
            )
        return bundle.verifier
    if kind == "member":
        path = path.resolve()
        manifest = read_manifest(path.parent)
        check_files(path.parent, manifest)
        return load_member(path.parent, path.name, manifest)
    if kind == "t5x_steps":
        newest = path / f"checkpoint_{max(_steps(path))}"
        if detect(newest) not in ("t5x_native", "t5x_orbax"):
            raise UserError(f"{newest} is not a T5X checkpoint.")
        return load(newest)
    if kind == "huggingface":
        raise UserError(
            f"{path} is a Hugging Face folder, which is not yet supported; convert it to T5X first."
        )
    readers = {"npz": npz.read, "t5x_native": t5x_native.read, "t5x_orbax": orbax_tree.read_t5x}
    return readers[kind](path)


def _steps(path: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder; unfinished ones have other names."""
    matches = (
        re.fullmatch(r"checkpoint_(\d+)", child.name)
        for child in path.glob("checkpoint_*")
        if child.is_dir()
    )
    return [int(match[1]) for match in matches if match]
