"""Bundles: everything decoding needs, in one folder.

    bundle.json          format, version, architectures, vocabulary, lengths, defaults, checksums
    verifier/ drafter/   one Orbax checkpoint each, readable by plain `orbax.checkpoint`
    vocabulary.model     the SentencePiece model, unless the vocabulary is bytes
    ngrams.npz           a bigram or trigram table to draft with, where one was built (`speccascade tables`)
    deferral.npz         heads and calibrations of learned deferral, where fitted (`speccascade train_deferral`)

A bundle appears under its name only when it is whole. Packing a pair of npz folders:

    from speccascade_t5x import checkpoints
    from speccascade_t5x.text.vocabulary import ByteVocabulary

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
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speccascade_t5x.checkpoints import architecture, deferral_files, flat_params, folders, ngram_files, orbax_tree
from speccascade_t5x.checkpoints.opened import Opened, Placing
from speccascade_t5x.checkpoints.tensors import Placement
from speccascade_t5x.common import schema
from speccascade_t5x.deferral.fitted import Fitted
from speccascade_t5x.drafting import NGramTable
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.text import vocabulary as vocabularies
from speccascade_t5x.text.vocabulary import SentencePieceVocabulary, Vocabulary

FORMAT = "speccascade_t5x.bundle"
VERSION = 1
MANIFEST = "bundle.json"
VOCABULARY_FILE = "vocabulary.model"
TABLE_FILE = ngram_files.FILE
MEMBERS = ("verifier", "drafter")
_LENGTHS = ("inputs", "targets")
_LARGEST_MANIFEST = 64 * 2**20
_MOST_EXTRA_IDS = 100_000
_MANIFEST = schema.record(
    {
        "members": schema.map_of(schema.record({}, {"network": schema.of(str), "config": schema.of(dict)})),
        "vocabulary": schema.record(
            {"kind": schema.of(str), "extra_ids": schema.whole(0, _MOST_EXTRA_IDS), "fingerprint": schema.of(str)}
        ),
        "feature_lengths": schema.record({"inputs": schema.whole(1), "targets": schema.whole(1)}),
        "decode": schema.record(
            {},
            {name: schema.whole() for name in ("draft_len", "start_id", "eos_id", "pad_id")}
            | {"prompt_eos": schema.of(bool)},
        ),
        "files": folders.FILES,
    },
    {
        "description": schema.of(str),
        ngram_files.SECTION: schema.record({"vocabulary": schema.of(str)}),
        deferral_files.SECTION: schema.of(dict),
    },
)
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
      decode: default decode settings: draft_len, eos_id, pad_id, start_id and any others. A `prompt_eos` of False
        leaves out the EOS that texts get at their end, for decoder-only models that continue their prompts.
      description: human-readable description of what the pair does.
      table: bigram or trigram table over the same ids, None where the bundle has none.
      deferral: heads and calibrations of this pair, None where none were fitted.
    """

    path: Path
    verifier: Bound
    drafter: Bound | None
    vocabulary: Vocabulary
    feature_lengths: dict[str, int]
    decode: dict[str, Any]
    description: str
    table: NGramTable | None = None
    deferral: Fitted | None = None


def save_bundle(
    path: str | Path,
    *,
    verifier: Bound,
    drafter: Bound | None = None,
    vocabulary: Vocabulary,
    feature_lengths: Mapping[str, int],
    decode: Mapping[str, Any] | None = None,
    description: str = "",
    overwrite: bool = False,
    dtype: Any = np.float32,
    file_bytes: int = orbax_tree.FILE_BYTES,
    check: Callable[[Path], None] | None = None,
    table: NGramTable | None = None,
    about_table: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a bundle in one step.

    Args:
      path: the folder to make.
      verifier: the verifier, or the only model.
      drafter: the drafter.
      vocabulary: what the ids mean.
      feature_lengths: {"inputs": S, "targets": T}.
      decode: default decode settings; draft_len 5, start_id 0 and the vocabulary's EOS and
        pad if not given.
      description: human-readable: what the pair does, and on what it was trained.
      overwrite: replace a bundle that is already there.
      dtype: what parameters are written as: float32, float16 or bfloat16.
      file_bytes: about the largest data file.
      check: called with the finished folder before it gets its name; what it raises keeps it from that.
      table: n-gram table over the ids of the vocabulary.
      about_table: what bundle.json notes of it.

    Returns:
      `path`.

    Raises:
      UserError: the vocabularies or models do not fit together, a tensor is not finite, something
        is in the way, or the place cannot be written. Nothing half-written is left.
    """
    path = Path(path)
    if path.exists() and not (overwrite and (path / MANIFEST).is_file()):
        raise UserError(f"{path} already exists; choose another name, or allow a bundle to be overwritten")
    members = {"verifier": verifier} | ({"drafter": drafter} if drafter is not None else {})
    _check_members(members, vocabulary)
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
    with folders.published(path, "bundle") as partial:
        for name, member in members.items():
            orbax_tree.save(partial / name, member.params, dtype=dtype, file_bytes=file_bytes)
        if isinstance(vocabulary, SentencePieceVocabulary):
            shutil.copyfile(vocabulary.path, partial / VOCABULARY_FILE)
        if table is not None:
            ngram_files.write(partial, manifest, table, about_table or {}, vocabulary)
        manifest["files"] = folders.checksums(partial)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (partial / MANIFEST).write_text(text, "utf-8")
        if check is not None:
            check(partial)
    return path


def load_bundle(
    path: str | Path,
    *,
    verify: bool = True,
    placement: Placement | None = None,
    placing: Mapping[str, Placing] | None = None,
) -> Bundle:
    """Reads a bundle.

    Args:
      path: its folder.
      verify: compare every file with its checksum first. It reads the files twice.
      placement: where each array shall live; see `checkpoints.load`.
      placing: the same per member and for its architecture.

    Raises:
      UserError: something is missing, truncated, changed, of a newer format, or does not fit.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if verify:
        check_files(path, manifest)
    if "verifier" not in manifest["members"]:
        raise UserError(f"{path / MANIFEST} names no verifier")
    found = {name: open_member(path, name, manifest) for name in manifest["members"]}
    vocabulary = load_vocabulary(path, manifest)
    members = {
        name: member.load(placement if placing is None else placing[name](member.model))
        for name, member in found.items()
    }
    _check_members(members, vocabulary)
    return Bundle(
        path=path,
        verifier=members["verifier"],
        drafter=members.get("drafter"),
        vocabulary=vocabulary,
        feature_lengths=_checked_lengths(manifest["feature_lengths"], str(path / MANIFEST)),
        decode=dict(manifest["decode"]),
        description=str(manifest.get("description", "")),
        table=ngram_files.read(path, manifest, vocabulary),
        deferral=deferral_files.read(path, manifest, vocabulary.fingerprint()),
    )


def store_table(source: Path, target: Path, table: NGramTable, about: Mapping[str, Any]) -> Path:
    """Makes a bundle that holds an n-gram table and is otherwise the one in `source`, in one step.

    Args:
      source: folder of the bundle.
      target: the folder to make; `source` itself is replaced, any other that exists is rejected.
      table: over the ids of the bundle's vocabulary. One that was there is replaced.
      about: what bundle.json notes of it.

    Raises:
      UserError: `target` exists, or the place cannot be written; nothing half-written is left.
    """
    with _copied(source, target) as (partial, manifest):
        ngram_files.write(partial, manifest, table, about, load_vocabulary(source, manifest))
    return target


def store_deferral(source: Path, target: Path, fitted: Fitted) -> Path:
    """Makes a bundle that holds heads and calibrations and is otherwise the one in `source`, in one step.

    Args:
      source: folder of the bundle.
      target: the folder to make; `source` itself is replaced, any other that exists is rejected.
      fitted: for this pair; its fingerprints are checked. Older parts of other kinds are kept.

    Raises:
      UserError: it belongs to another pair, `target` exists, or the place cannot be written.
    """
    with _copied(source, target) as (partial, manifest):
        vocabulary = load_vocabulary(source, manifest).fingerprint()
        older = deferral_files.read(source, manifest, vocabulary)
        drafter, verifier = (deferral_files.member_fingerprint(manifest, name) for name in ("drafter", "verifier"))
        fitted.check(drafter, verifier, vocabulary, "this fit")
        deferral_files.write(partial, manifest, fitted.merged(older))
    return target


@contextlib.contextmanager
def _copied(source: Path, target: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A copy of a bundle to add to, with its manifest; it becomes `target` when the block ends well."""
    manifest = read_manifest(source)
    check_files(source, manifest)
    if target.exists() and target.resolve() != source.resolve():
        raise UserError(f"{target} already exists; choose another name, or give the bundle's own to put it in there")
    with folders.published(target, "bundle") as partial:
        for name in manifest["files"]:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, partial / name)
        yield partial, manifest
        manifest["files"] = folders.checksums(partial)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")


def load_vocabulary(path: Path, manifest: Mapping[str, Any] | None = None) -> Vocabulary:
    """The vocabulary of the bundle in folder `path`."""
    manifest = manifest if manifest is not None else read_manifest(path)
    return vocabularies.from_spec(manifest["vocabulary"], path / VOCABULARY_FILE)


def open_member(path: Path, name: str, manifest: Mapping[str, Any] | None = None) -> Opened:
    """One model of the bundle in folder `path`, not yet read; its files are not compared with their checksums."""
    manifest = manifest if manifest is not None else read_manifest(path)
    members = manifest["members"]
    if name not in MEMBERS or not isinstance(members.get(name), dict):
        raise UserError(f"the bundle {path} has no member {name!r}; it has {', '.join(sorted(members)) or 'none'}")
    where = f"{path / MANIFEST}, member {name!r}"
    config = members[name].get("config")
    if not isinstance(config, dict):
        raise UserError(f"{where}: no 'config' with the architecture")
    network = members[name].get("network")
    fields = architecture.FIELDS.get(network) if isinstance(network, str) else None
    unknown = sorted(set(config) - fields) if fields else [network]
    if unknown:
        raise UserError(f"{where}: {unknown[0]!r} is not known to this release of speccascade_t5x; upgrade it")
    config = architecture.from_fields(config, where, network)
    start_id = manifest["decode"].get("start_id", 0)
    if start_id >= config.vocab_size:
        raise UserError(f"{path / MANIFEST}: decode.start_id = {start_id}, but the {name} has {config.vocab_size} ids")
    leaves = orbax_tree.open_tensors(path / name)
    flat_params.require_match(architecture.shapes(config), leaves, str(path / name))
    pieces = path / VOCABULARY_FILE
    return Opened(
        "member",
        path / name,
        architecture.model(config, start_id),
        leaves,
        vocabulary_file=pieces if pieces.is_file() else None,
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """bundle.json, once it is known to be one this release can read."""
    folders.require_inside(path)
    what = "a bundle"
    return schema.read_versioned(path / MANIFEST, VERSION, what, _MANIFEST, format=FORMAT, largest=_LARGEST_MANIFEST)


def check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compares every file with the size and sha256 bundle.json gives for it.

    Raises:
      UserError: naming the first file that is missing, truncated or changed.
    """
    folders.check_files(path, manifest["files"], f"the bundle {path}", path / MANIFEST)


def _check_members(members: Mapping[str, Bound], vocabulary: Vocabulary) -> None:
    """Every model must be a T5 with a logit for each piece; widths beyond that are padding. All read one input."""
    for name, member in members.items():
        if not isinstance(member.model, architecture.Model):
            raise UserError(f"the {name} is a {type(member.model).__name__}; bundles hold T5 models only")
    if len({member.model.input_name for member in members.values()}) > 1:
        raise UserError(
            "one member of the bundle is an encoder-decoder and the other decoder-only; a pair is of one kind"
        )
    widths = {name: member.model.vocab_size for name, member in members.items()}
    narrow = [name for name, width in widths.items() if width < vocabulary.vocab_size]
    if narrow:
        sizes = " and ".join(f"the {name} {width}" for name, width in widths.items())
        raise UserError(
            f"the vocabulary has {vocabulary.vocab_size} pieces but {sizes} logits, so the "
            f"{narrow[0]} was made for "
            "another vocabulary"
        )
    for name, member in members.items():
        flat_params.require_match(
            architecture.shapes(member.model.config), flat_params.flatten(member.params), f"the {name}"
        )


def _describe(member: Bound) -> dict[str, Any]:
    for name, leaf in flat_params.flatten(member.params).items():
        flat_params.require_finite(name, np.asarray(leaf), "the model to be saved")
    config = dataclasses.asdict(member.model.config)
    return {
        "network": architecture.network(member.model.config),
        "config": config,
        "parameters": flat_params.count(member.params),
    }


def _checked_lengths(lengths: Mapping[str, Any], source: str) -> dict[str, int]:
    for name in _LENGTHS:
        if type(lengths.get(name)) is not int or lengths[name] < 1:
            raise UserError(f"{source}: feature length {name!r} must be a whole number above 0")
    return {name: int(lengths[name]) for name in _LENGTHS}
