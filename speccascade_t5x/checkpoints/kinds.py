"""What a folder or a name is: the one answer that loading, inspecting, exporting and decoding share.

Only names of files and small metadata are looked at. What a folder is follows from what it holds, never from what it is
called, but for the numbers of steps; where it could be read in two ways, the user chooses.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from speccascade_t5x.checkpoints import huggingface, npz, orbax_tree, remote, safetensors_files, t5x_native, t5x_pair
from speccascade_t5x.checkpoints.bundle import MANIFEST
from speccascade_t5x.common import checks, packaged, paths
from speccascade_t5x.interfaces import UserError

# Kind -> what it is called in messages and descriptions.
KINDS = {
    "bundle": "bundle",
    "member": "member of a bundle",
    "npz": "npz folder",
    "t5x_native": "native T5X checkpoint",
    "t5x_pair": "native T5X checkpoint of a pair",
    "t5x_orbax": "T5X checkpoint written by Orbax",
    "orbax": "Orbax checkpoint",
    "huggingface": "Hugging Face folder",
}
_LOOKED_FOR = (
    f"a bundle ({MANIFEST}), an npz folder ({npz.PARAMS_FILE} and {npz.CONFIG_FILE}), a native T5X checkpoint (a file "
    f"{t5x_native.INDEX_FILE!r}), an Orbax checkpoint ({orbax_tree.METADATA_FILE}, in it or one folder below), a "
    f"folder of steps, or a Hugging Face folder ({huggingface.CONFIG_FILE} and *.safetensors)"
)
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "flax_model*.msgpack")
_STEP = re.compile(r"((?:.*_)?)(\d{1,18})")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a path is.

    Attributes:
      kind: a key of KINDS.
      folder: the checkpoint: the newest one where a folder of steps was named.
      mark: the file or folder in it that tells its kind.
      item: the folder with the arrays of an Orbax checkpoint, `folder` itself or one below; None for other kinds.
      of_steps: whether a folder of steps was named.
    """

    kind: str
    folder: Path
    mark: str
    item: Path | None = None
    of_steps: bool = False


def identify(path: str | Path, kind: str | None = None) -> Found:
    """Says what a checkpoint is, without opening it.

    Args:
      path: a local folder, or the name of a packaged bundle or of a member of it ("restore_de_pair/verifier").
      kind: a key of KINDS, to choose where a folder can be read in several ways.

    Raises:
      UserError: nothing is there, or nothing known, or something that can be read in several ways.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"there is no kind of checkpoint {kind!r}: use one of {', '.join(KINDS)}")
    if remote.is_remote(path):
        raise UserError(f"{path} is a remote address; copy the checkpoint to a local folder first")
    try:
        folder = _place(path)
        if folder.is_file():
            raise UserError(f"{folder} is a file; name the folder it lies in")
        ways = list(_ways(folder, kind))
        if len(ways) > 1:
            seen = " or ".join(f"as a {KINDS[way.kind]} ({way.mark})" for way in ways)
            raise UserError(
                f"{folder} can be read in several ways, {seen}: name the kind that is meant (--kind), or move the "
                "others away"
            )
        if not ways:
            _nothing(folder, kind)
        return ways[0]
    except OSError as error:
        raise UserError(f"cannot look into {path}: {error.strerror or error}") from error


def _place(path: str | Path) -> Path:
    """The folder of a path or of a packaged name."""
    path = Path(path)
    if path.exists():
        return path
    names = packaged.names()
    if path.parts and path.parts[0] in names and (paths.pretrained_dir() / path).is_dir():
        return paths.pretrained_dir() / path
    hint = checks.suggestion(str(path), names)
    if not hint.startswith("did you mean"):
        hint = f"a checkpoint is {_LOOKED_FOR}, or has a packaged name: {', '.join(names)}"
    raise UserError(f"{path} does not exist; {hint}")


def _ways(folder: Path, kind: str | None) -> Iterator[Found]:
    """Every way to read a folder. Steps in it count only if it is not a checkpoint itself: its own name was given."""
    own = [way for way in _own_ways(folder) if kind in (None, way.kind)]
    yield from own or (way for way in _steps(folder) if kind in (None, way.kind))


def _own_ways(folder: Path) -> Iterator[Found]:
    if (folder / MANIFEST).is_file():
        yield Found("bundle", folder, MANIFEST)
    if (folder / npz.PARAMS_FILE).is_file():
        yield Found("npz", folder, npz.PARAMS_FILE)
    if (folder / t5x_native.INDEX_FILE).is_file():
        yield Found("t5x_pair" if t5x_pair.is_pair(folder) else "t5x_native", folder, t5x_native.INDEX_FILE)
    if (folder.resolve().parent / MANIFEST).is_file():
        yield Found("member", folder.resolve(), f"../{MANIFEST}")
    elif not (folder / MANIFEST).is_file():  # the members of a bundle are Orbax checkpoints
        yield from _orbax(folder)
    for pattern in (f"*{safetensors_files.INDEX_SUFFIX}", f"*{safetensors_files.SUFFIX}"):
        if names := sorted(file.name for file in folder.glob(pattern)):
            yield Found("huggingface", folder, names[0])
            break


def _orbax(folder: Path) -> Iterator[Found]:
    """A folder that is one Orbax checkpoint, or holds one as its only item."""
    if (folder / orbax_tree.METADATA_FILE).is_file():
        items = [folder]
    else:
        items = sorted(mark.parent for mark in folder.glob(f"*/{orbax_tree.METADATA_FILE}"))
        items = [item for item in items if not _STEP.fullmatch(item.name)]
    if len(items) > 1:
        named = " or ".join(str(item) for item in items)
        raise UserError(f"{folder} holds several Orbax checkpoints; name one: {named}")
    for item in items:
        kind = "t5x_orbax" if orbax_tree.is_train_state(item) else "orbax"
        yield Found(kind, folder, str((item / orbax_tree.METADATA_FILE).relative_to(folder)), item)


def _steps(folder: Path) -> Iterator[Found]:
    """The newest finished checkpoint of each series of steps; unfinished ones have other names."""
    series: dict[str, int] = {}
    newest: dict[str, Path] = {}
    for child in folder.iterdir():
        match = _STEP.fullmatch(child.name)
        if not match or not child.is_dir() or not (match[1] == "checkpoint_" or _is_orbax(child)):
            continue
        if int(match[2]) >= series.get(match[1], 0):
            series[match[1]], newest[match[1]] = int(match[2]), child
    for child in newest.values():
        found = identify(child)
        if found.item is None and found.kind not in ("t5x_native", "t5x_pair"):
            raise UserError(f"{child} is not a checkpoint of a training run but a {KINDS[found.kind]}; name it itself")
        yield dataclasses.replace(found, mark=child.name, of_steps=True)


def _is_orbax(folder: Path) -> bool:
    marks = (orbax_tree.METADATA_FILE, "_CHECKPOINT_METADATA")
    return any((folder / mark).is_file() for mark in marks) or any(folder.glob(f"*/{marks[0]}"))


def _nothing(folder: Path, kind: str | None) -> None:
    if kind is not None and (others := list(_ways(folder, None))):
        raise UserError(f"{folder} is not a {KINDS[kind]} but a {KINDS[others[0].kind]} ({others[0].mark})")
    pickles = [file.name for pattern in _PICKLES for file in folder.glob(pattern)]
    if pickles:
        raise UserError(
            f"{folder} holds {pickles[0]}, which may run code when opened and is never read; save the model as "
            "safetensors"
        )
    raise UserError(f"{folder} holds no checkpoint; looked for {_LOOKED_FOR}")
