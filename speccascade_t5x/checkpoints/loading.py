"""From a folder of any kind to a model, or to a pair: what it is, what it holds, its parameters on devices."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from speccascade_t5x.checkpoints import bundle, folders, huggingface, npz, orbax_tree, remote, t5x_native
from speccascade_t5x.checkpoints.bundle import Bundle
from speccascade_t5x.checkpoints.kinds import KINDS, Found, identify
from speccascade_t5x.checkpoints.opened import Opened, Placing
from speccascade_t5x.checkpoints.tensors import Placement
from speccascade_t5x.interfaces import Bound, UserError


def detect(path: str | Path) -> str:
    """The kind of a checkpoint, a key of `kinds.KINDS`; "t5x_steps" for a folder of steps.

    Raises:
      UserError: see `identify`.
    """
    found = identify(path)
    return "t5x_steps" if found.of_steps else found.kind


def bundle_folder(path: str | Path) -> Path:
    """The folder of a bundle.

    Args:
      path: the folder, or the name of a packaged bundle.

    Raises:
      UserError: it is something else; the message says what makes a bundle of it.
    """
    found = identify(path)
    if found.kind != "bundle":
        raise UserError(
            f"{path} is not a bundle but a {KINDS[found.kind]}: make one with `speccascade export --format=bundle`, "
            "with a drafter and a vocabulary"
        )
    return found.folder


def load_bundle(path: str | Path, **options: Any) -> Bundle:
    """Reads a bundle by folder or packaged name; see `bundle.load_bundle` for the options.

    Raises:
      UserError: see `bundle_folder` and `bundle.load_bundle`.
    """
    return bundle.load_bundle(bundle_folder(path), **options)


def open_model(
    path: str | Path, *, verify: bool = True, allow_drivers: Collection[str] = (), kind: str | None = None
) -> Opened:
    """One model in its files: its architecture is known and its tensors fit it, but none has been read.

    Args:
      path: see `load`; local.
      verify: compare every file with its checksum where there are any. It reads them twice.
      allow_drivers: see `load`.
      kind: see `load`.

    Raises:
      UserError: see `load`.
    """
    return open_found(identify(path, kind), verify=verify, allow_drivers=allow_drivers)


def open_found(found: Found, *, verify: bool = True, allow_drivers: Collection[str] = ()) -> Opened:
    """`open_model` of what `identify` found."""
    folder = found.folder
    if found.kind == "bundle":
        if set(bundle.read_manifest(folder)["members"]) != {"verifier"}:
            raise UserError(f"{folder} is a bundle of two models; name one: {folder}/verifier or {folder}/drafter")
        return open_model(folder / "verifier", verify=verify)
    if found.kind == "member":
        manifest = bundle.read_manifest(folder.parent)
        if verify:
            bundle.check_files(folder.parent, manifest)
        return bundle.open_member(folder.parent, folder.name, manifest)
    if found.kind == "t5x_pair":
        raise UserError(f"{folder} holds a pair of models: export it as a bundle, whose members can be named")
    try:
        if verify:
            folders.check(folder)
        if found.item is not None:
            return orbax_tree.open_t5x(found.item, folder)
        if found.kind == "t5x_native":
            return t5x_native.open_model(folder, allow_drivers)
        return {"npz": npz.open_model, "huggingface": huggingface.open_model}[found.kind](folder)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error


def load(
    path: str | Path,
    *,
    placement: Placement | None = None,
    placing: Placing | None = None,
    allow_drivers: Collection[str] = (),
    kind: str | None = None,
) -> Bound:
    """One model, float32, read tensor by tensor to where it shall live.

    Of several steps the newest is taken. A bundle is loaded here only if it holds one model; name a member
    (`<bundle>/verifier`) or use `load_bundle` otherwise.

    Args:
      path: a folder, a packaged name, or a gs:// address, which is copied to a temporary folder first.
      placement: (flat name, shape) -> sharding; the default device where it is None or gives None.
      placing: the same for whatever architecture is found: model -> placement.
      allow_drivers: tensorstore drivers ("gcs", "s3", "http", "file") with which a native T5X checkpoint may place
        arrays outside its folder. Name one only where you trust the checkpoint: its index says what is read.
      kind: a key of `kinds.KINDS`, to choose where a folder can be read in several ways.

    Raises:
      UserError: see `identify` and the readers; messages name the file or tensor.
    """
    with remote.local_copy(path) as local:
        opened = open_model(local, allow_drivers=allow_drivers, kind=kind)
        return opened.load(placement if placing is None else placing(opened.model))
