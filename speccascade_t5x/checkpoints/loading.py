"""From a folder of any kind to one model: what kind it is, what it holds, its parameters on devices."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from speccascade_t5x.checkpoints import folders, huggingface, npz, orbax_tree, remote, safetensors_files, t5x_native
from speccascade_t5x.checkpoints.bundle import MANIFEST, check_files, open_member, read_manifest
from speccascade_t5x.checkpoints.opened import Opened, Placing
from speccascade_t5x.checkpoints.tensors import Placement
from speccascade_t5x.interfaces import Bound, UserError

_LOOKED_FOR = (
    f"a bundle ({MANIFEST}), an npz folder ({npz.PARAMS_FILE} and {npz.CONFIG_FILE}), a T5X "
    f"checkpoint (a file '{t5x_native.INDEX_FILE}' or a folder 'state'), a folder holding checkpoint_<step>, an Orbax "
    f"checkpoint ({orbax_tree.METADATA_FILE}), or a Hugging Face folder ({huggingface.CONFIG_FILE} and *.safetensors)"
)
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "flax_model*.msgpack")


def detect(path: str | Path) -> str:
    """What kind of folder this is.

    Returns:
      "bundle", "member" (a model's folder inside a bundle), "npz", "t5x_native", "t5x_orbax", "orbax" (one Orbax
      checkpoint), "t5x_steps" (a folder of checkpoint_<step> folders) or "huggingface".

    Raises:
      UserError: nothing is there, or nothing known; the message says what was looked for.
    """
    if remote.is_remote(path):
        raise UserError(f"{path} is a remote address; copy the checkpoint to a local folder first")
    path = Path(path)
    try:
        return _detect(path)
    except OSError as error:
        raise UserError(f"cannot look into {path}: {error.strerror or error}") from error


def _detect(path: Path) -> str:
    if not path.exists():
        raise UserError(f"{path} does not exist; a checkpoint is {_LOOKED_FOR}")
    if (path / MANIFEST).is_file():
        return "bundle"
    if (path.resolve().parent / MANIFEST).is_file():
        return "member"
    if (path / npz.PARAMS_FILE).is_file():
        return "npz"
    if (path / t5x_native.INDEX_FILE).is_file():
        return "t5x_native"
    if (path / "state" / orbax_tree.METADATA_FILE).is_file():
        return "t5x_orbax"
    if (path / orbax_tree.METADATA_FILE).is_file():
        return "orbax"
    if _steps(path):
        return "t5x_steps"
    suffixes = (safetensors_files.SUFFIX, safetensors_files.INDEX_SUFFIX)
    if any(any(path.glob(f"*{suffix}")) for suffix in suffixes):
        return "huggingface"
    pickles = [file.name for pattern in _PICKLES for file in path.glob(pattern)]
    if pickles:
        raise UserError(
            f"{path} holds {pickles[0]}, which may run code when opened and is never read; "
            "save the model as safetensors"
        )
    raise UserError(f"{path} holds no checkpoint; looked for {_LOOKED_FOR}")


def open_model(path: str | Path, *, verify: bool = True, allow_drivers: Collection[str] = ()) -> Opened:
    """One model in its files: its architecture is known and its tensors fit it, but none has been read.

    Args:
      path: see `load`; local.
      verify: compare every file with its checksum where there are any. It reads them twice.
      allow_drivers: see `load`.

    Raises:
      UserError: see `load`.
    """
    kind, path = detect(path), Path(path)
    if kind == "bundle":
        members = read_manifest(path).get("members")
        if not isinstance(members, dict) or set(members) != {"verifier"}:
            raise UserError(f"{path} is a bundle of two models; name one: {path / 'verifier'} or {path / 'drafter'}")
        return open_model(path / "verifier", verify=verify)
    if kind == "member":
        path = path.resolve()
        manifest = read_manifest(path.parent)
        if verify:
            check_files(path.parent, manifest)
        return open_member(path.parent, path.name, manifest)
    if kind == "t5x_steps":
        newest = path / f"checkpoint_{max(_steps(path))}"
        if detect(newest) not in ("t5x_native", "t5x_orbax", "orbax"):
            raise UserError(f"{newest} is not a T5X checkpoint")
        return open_model(newest, verify=verify, allow_drivers=allow_drivers)
    if verify:
        folders.check(path)
    openers = {
        "npz": npz.open_model,
        "t5x_native": lambda folder: t5x_native.open_model(folder, allow_drivers),
        "t5x_orbax": orbax_tree.open_t5x,
        "orbax": orbax_tree.open_t5x,
        "huggingface": huggingface.open_model,
    }
    try:
        return openers[kind](path)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from error


def load(
    path: str | Path,
    *,
    placement: Placement | None = None,
    placing: Placing | None = None,
    allow_drivers: Collection[str] = (),
) -> Bound:
    """One model, float32, read tensor by tensor to where it shall live.

    Of several checkpoint_<step> folders the newest is taken. A bundle is loaded here only if it
    holds one model; name a member (`<bundle>/verifier`) or use `load_bundle` otherwise.

    Args:
      path: a folder, or a gs:// address, which is copied to a temporary folder first.
      placement: (flat name, shape) -> sharding; the default device where it is None or gives None.
      placing: the same for whatever architecture is found: model -> placement.
      allow_drivers: tensorstore drivers ("gcs", "s3", "http", "file") with which a native T5X checkpoint may place
        arrays outside its folder. Name one only where you trust the checkpoint: its index says what is read.

    Raises:
      UserError: see `detect` and the readers; messages name the file or tensor.
    """
    with remote.local_copy(path) as local:
        opened = open_model(local, allow_drivers=allow_drivers)
        return opened.load(placement if placing is None else placing(opened.model))


def _steps(path: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder; unfinished ones have other names."""
    matches = (re.fullmatch(r"checkpoint_(\d+)", child.name) for child in path.glob("checkpoint_*") if child.is_dir())
    return [int(match[1]) for match in matches if match]
