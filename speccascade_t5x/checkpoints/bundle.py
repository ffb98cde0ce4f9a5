"""Bundles: everything decoding needs, in one folder.

    bundle.json          format, version, architectures, vocabulary, lengths, defaults, checksums
    verifier/ drafter/   one Orbax checkpoint each, readable by plain `orbax.checkpoint`
    vocabulary.model     the SentencePiece model, unless the vocabulary is bytes

A bundle appears under its name only when it is whole. Packing a pair of npz folders:

    from speccascade_t5x import checkpoints
    from speccascade_t5x.runtime.vocabulary import ByteVocabulary

    checkpoints.save_bundle(
        "restore_de_pair",
        drafter=checkpoints.load("pair/drafter"), verifier=checkpoints.load("pair/verifier"),
        vocabulary=ByteVocabulary(), feature_lengths={"inputs": 80, "targets": 96},
        description="What the pair does.",
    )
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from speccascade_t5x.checkpoints import architecture, orbax_tree, tree
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models.t5 import T5, param_shapes
from speccascade_t5x.runtime import vocabulary as vocabularies
from speccascade_t5x.runtime.vocabulary import SentencePieceVocabulary, Vocabulary

FORMAT = "speccascade_t5x.bundle"
VERSION = 1
MANIFEST = "bundle.json"
VOCABULARY_FILE = "vocabulary.model"
MEMBERS = ("verifier", "drafter")
_LENGTHS = ("inputs", "targets")
DEFAULT_DECODE = {"draft_len": 5, "start_id": 0}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
      path: its folder.
      verifier: the verifier, or the only model.
      drafter: the drafter, None in a bundle of one model.
      vocabulary: the vocabulary the members share.
      feature_lengths: {"inputs": S, "targets": T}, the lengths to decode with by default.
      decode: default decode settings: draft_len, eos_id, pad_id, start_id and any others.
      description: what the pair does, for people.
    """

    path: Path
    verifier: Bound
    drafter: Bound | None
    vocabulary: Vocabulary
    feature_lengths: dict[str, int]
    decode: dict[str, Any]
    description: str


def save_bundle(
    path: str | Path,
    *,
    verifier: Bound,
    drafter: Bound | None = None,
    vocabulary: Vocabulary,
    drafter_vocabulary: Vocabulary | None = None,
    feature_lengths: Mapping[str, int],
    decode: Mapping[str, Any] | None = None,
    description: str = "",
    overwrite: bool = False,
) -> Path:
    """Writes a bundle in one step.

    Args:
      path: the folder to make.
      verifier: the verifier, or the only model.
      drafter: the drafter.
      vocabulary: what the ids mean.
      drafter_vocabulary: the drafter's own, if it came with one; must be the same.
      feature_lengths: {"inputs": S, "targets": T}.
      decode: default decode settings; draft_len 5, start_id 0 and the vocabulary's EOS and
        pad if not given.
      description: for people: what the pair does, on what it was trained.
      overwrite: replace a bundle that is already there.

    Returns:
      `path`.

    Raises:
      UserError: the vocabularies or models do not fit together, a tensor is not finite, something
        is in the way, or the place cannot be written. Nothing half-written is left.
    """
    path = Path(path)
    members = {"verifier": verifier} | ({"drafter": drafter} if drafter is not None else {})
    if drafter_vocabulary is not None:
        vocabularies.check_same(drafter_vocabulary, vocabulary)
    _check_members(members, vocabulary)
    if path.exists() and not (overwrite and (path / MANIFEST).is_file()):
        raise UserError(
            f"{path} already exists; choose another name, or allow a bundle to be overwritten."
        )
    defaults = {"eos_id": vocabulary.eos_id, "pad_id": vocabulary.pad_id}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "description": description,
        "members": {name: _describe(member) for name, member in members.items()},
        "vocabulary": vocabulary.spec(),
        "feature_lengths": _checked_lengths(feature_lengths, str(path)),
        "decode": {**DEFAULT_DECODE, **defaults, **(decode or {})},
    }
    _write(path, manifest, members, vocabulary)
    return path


def load_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """Reads a bundle.

    Args:
      path: its folder.
      verify: compare every file with its checksum first. It reads the files twice.

    Raises:
      UserError: something is missing, truncated, changed, of a newer format, or does not fit.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if verify:
        check_files(path, manifest)
    vocabulary = vocabularies.from_spec(_part(manifest, "vocabulary", path), path / VOCABULARY_FILE)
    members = {name: load_member(path, name, manifest) for name in _part(manifest, "members", path)}
    if "verifier" not in members:
        raise UserError(f"{path / MANIFEST} names no verifier.")
    _check_members(members, vocabulary)
    return Bundle(
        path=path,
        verifier=members["verifier"],
        drafter=members.get("drafter"),
        vocabulary=vocabulary,
        feature_lengths=_checked_lengths(
            _part(manifest, "feature_lengths", path), str(path / MANIFEST)
        ),
        decode=dict(_part(manifest, "decode", path)),
        description=str(manifest.get("description", "")),
    )


def load_member(path: Path, name: str, manifest: Mapping[str, Any] | None = None) -> Bound:
    """One model of the bundle in folder `path`; its files are not compared with their checksums."""
    manifest = manifest if manifest is not None else read_manifest(path)
    members = _part(manifest, "members", path)
    if name not in MEMBERS or not isinstance(members.get(name), dict):
        raise UserError(
            f"The bundle {path} has no member {name!r}; it has "
            f"{', '.join(sorted(members)) or 'none'}."
        )
    where = f"{path / MANIFEST}, member {name!r}"
    config = members[name].get("config")
    if not isinstance(config, dict):
        raise UserError(f"{where}: no 'config' with the architecture.")
    unknown = sorted(set(config) - set(architecture.FIELDS))
    if unknown or members[name].get("network") != "t5":
        what = unknown[0] if unknown else members[name].get("network")
        raise UserError(
            f"{where}: {what!r} is not known to this release of speccascade_t5x; upgrade it."
        )
    config = architecture.from_fields(config, where)
    start_id = _part(manifest, "decode", path).get("start_id", 0)
    return Bound(
        T5(config, start_id=start_id), orbax_tree.restore(path / name, param_shapes(config))
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """bundle.json, once it is known to be one this release can read."""
    manifest = architecture.read_json(path / MANIFEST)
    version = manifest.get("version")
    if manifest.get("format") != FORMAT or not isinstance(version, int):
        raise UserError(
            f"{path / MANIFEST} is not a bundle of speccascade_t5x (format "
            f"{manifest.get('format')!r})."
        )
    if version > VERSION:
        raise UserError(
            f"The bundle {path} has format version {version} but this release of "
            "speccascade_t5x reads up to "
            f"{VERSION}; upgrade the package."
        )
    return manifest


def check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compares every file with the size and sha256 bundle.json gives for it.

    Raises:
      UserError: naming the first file that is missing, truncated or changed.
    """
    for name, facts in _part(manifest, "files", path).items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{path / MANIFEST} lists the unsafe file name {name!r}.")
        size, digest = (
            (facts.get("bytes"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
        )
        file = path / name
        if not file.is_file():
            raise UserError(f"The bundle {path} is incomplete: {name} is missing; copy it again.")
        found = file.stat().st_size
        if found != size:
            raise UserError(
                f"The bundle {path} is damaged: {name} has {found} of {size} bytes; copy it again."
            )
        if _sha256(file) != digest:
            raise UserError(
                f"The bundle {path} is damaged: the content of {name} has changed; copy it again."
            )


def _write(
    path: Path, manifest: dict[str, Any], members: Mapping[str, Bound], vocabulary: Vocabulary
) -> None:
    """Writes everything under a hidden name beside `path`, then publishes it."""
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(
            tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        )
        for name, member in members.items():
            orbax_tree.save(partial / name, member.params)
        if isinstance(vocabulary, SentencePieceVocabulary):
            shutil.copyfile(vocabulary.path, partial / VOCABULARY_FILE)
        manifest["files"] = _checksums(partial)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (partial / MANIFEST).write_text(text, "utf-8")
        _publish(partial, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"Cannot write the bundle {path}: {reason}; nothing was kept.") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _check_members(members: Mapping[str, Bound], vocabulary: Vocabulary) -> None:
    """Every model must be a T5 with a logit for each piece; widths beyond that are padding."""
    for name, member in members.items():
        if not isinstance(member.model, T5):
            raise UserError(
                f"The {name} is a {type(member.model).__name__}; bundles hold T5 models only."
            )
    widths = {name: member.model.vocab_size for name, member in members.items()}
    narrow = [name for name, width in widths.items() if width < vocabulary.vocab_size]
    if narrow:
        sizes = " and ".join(f"the {name} {width}" for name, width in widths.items())
        raise UserError(
            f"The vocabulary has {vocabulary.vocab_size} pieces but {sizes} logits, so the "
            f"{narrow[0]} was made for "
            "another vocabulary."
        )
    for name, member in members.items():
        tree.require_match(
            param_shapes(member.model.config), tree.flatten(member.params), f"The {name}"
        )


def _describe(member: Bound) -> dict[str, Any]:
    for name, leaf in tree.flatten(member.params).items():
        tree.require_finite(name, np.asarray(leaf), "The model to be saved")
    config = dataclasses.asdict(member.model.config)
    return {"network": "t5", "config": config, "parameters": tree.count(member.params)}


def _checked_lengths(lengths: Mapping[str, Any], source: str) -> dict[str, int]:
    for name in _LENGTHS:
        if type(lengths.get(name)) is not int or lengths[name] < 1:
            raise UserError(f"{source}: feature length {name!r} must be a whole number above 0.")
    return {name: int(lengths[name]) for name in _LENGTHS}


def _part(manifest: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    part = manifest.get(key)
    if not isinstance(part, dict):
        raise UserError(f"{path / MANIFEST} has no section {key!r}.")
    return part


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in files
    }


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _publish(partial: Path, path: Path) -> None:
    """Flushes every file, then gives the folder its name; an old bundle goes only after that."""
    for file in partial.rglob("*"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    partial.chmod(0o755)
    old = None
    if path.exists():
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
        os.replace(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        if old is not None:
            with contextlib.suppress(OSError):
                os.replace(old, path)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
