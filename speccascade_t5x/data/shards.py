"""A tokenised corpus on disk: written once on a machine with seqio, read anywhere with numpy alone.

    <folder>/shard-00000-of-0000N.npz   flat ids and offsets of "inputs" and "targets"
    <folder>/vocabulary.model           the SentencePiece model; bytes need none
    <folder>/manifest.json              counts, lengths, vocabulary, checksums; written last

A folder with a manifest is complete. A killed writer leaves no manifest, and the next one starts from the beginning.
The files depend on the examples and the options alone, so every run gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speccascade_t5x.common import checks, schema, storage
from speccascade_t5x.data.examples import check_ids
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text import vocabulary

FEATURES = ("inputs", "targets")
MANIFEST = "manifest.json"
FORMAT = "speccascade_t5x tokenised corpus"
VERSION = 1
_LARGEST_MANIFEST = 64 * 2**20  # an entry of some hundred bytes a shard
_SHARD = schema.record({"file": schema.file_name(), "sha256": schema.of(str), "bytes": schema.whole(most=2**50)})
_CONTENT = schema.record(
    {"vocabulary": schema.of(dict), "examples": schema.whole(most=2**50), "shards": schema.list_of(_SHARD)}
)
_MODEL_FILE = "vocabulary.model"
_UNFINISHED = "unfinished"

# Called after each shard with the number of examples written so far.
Progress = Callable[[int], None]


def cut(ids: np.ndarray, room: int | None, eos_id: int) -> np.ndarray:
    """Returns the first `room` ids; if the sequence ended in EOS, the cut one does too."""
    if room is None or len(ids) <= room:
        return ids
    short = np.array(ids[:room])
    if room and ids[-1] == eos_id:
        short[-1] = eos_id
    return short


def permutation(size: int, *key: int) -> np.ndarray:
    """Returns a permutation of range(size) that depends on the numbers of `key` alone.

    It is made from raw generator output, which stays the same between versions of numpy; numpy's shuffles may change.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(raw, kind="stable")


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised examples in memory, in the integer type they have on disk.

    Attributes:
      ids: feature -> the ids of all examples, one after the other.
      offsets: feature -> [examples + 1] int64; example i has ids[offsets[i]:offsets[i + 1]].
      vocabulary: the vocabulary of the ids.
      fingerprint: sha256; equal if the ids and their order are equal.
      manifest: the manifest of the folder it was read from; empty for a corpus made in memory.
    """

    ids: Mapping[str, np.ndarray]
    offsets: Mapping[str, np.ndarray]
    vocabulary: vocabulary.Vocabulary
    fingerprint: str
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets["inputs"]) - 1

    @property
    def eos_id(self) -> int:
        """The id that ends inputs and targets."""
        return self.vocabulary.eos_id

    @functools.cached_property
    def input_lengths(self) -> np.ndarray:
        """[examples] int64, EOS included."""
        return np.diff(self.offsets["inputs"])

    @functools.cached_property
    def target_lengths(self) -> np.ndarray:
        """[examples] int64, EOS included."""
        return np.diff(self.offsets["targets"])

    def inputs(self, index: int) -> np.ndarray:
        """The input ids of an example; a view."""
        return self._at("inputs", index)

    def targets(self, index: int) -> np.ndarray:
        """The target ids of an example; a view."""
        return self._at("targets", index)

    def _at(self, name: str, index: int) -> np.ndarray:
        start, end = self.offsets[name][index : index + 2]
        return self.ids[name][start:end]

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """All examples in the order of an epoch, permuted by (seed, epoch)."""
        return permutation(len(self), seed, epoch)

    def select(self, which: np.ndarray) -> Corpus:
        """The corpus of some examples: indices in the wanted order, or a mask."""
        chosen = np.arange(len(self))[which].tolist()
        return from_examples(((self.inputs(i), self.targets(i)) for i in chosen), self.vocabulary)


def from_examples(examples: Iterable[tuple[np.ndarray, np.ndarray]], spoken: vocabulary.Vocabulary) -> Corpus:
    """Makes a corpus in memory from (inputs, targets) ids.

    Raises:
      UserError: there is no example, or an id lies outside the vocabulary.
    """
    parts = _Buffer(_id_type(spoken), spoken.vocab_size)
    for inputs, targets in examples:
        example = {"inputs": inputs, "targets": targets}
        parts.check(example)
        parts.add(example)
    if not parts.count:
        raise UserError("there is no example to make a corpus of: check the data and the filters on it")
    arrays = parts.arrays()
    digest = hashlib.sha256(spoken.fingerprint().encode())
    for array in arrays.values():
        digest.update(array.tobytes())
    return _assemble([arrays], spoken, digest.hexdigest(), {})


def write(
    folder: str | Path,
    examples: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    name: str,
    split: str,
    spoken: vocabulary.Vocabulary,
    lengths: Mapping[str, int | None] | None = None,
    source: Mapping[str, Any] | None = None,
    examples_per_shard: int = 65_536,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a corpus, holding one shard in memory at a time. Returns the manifest.

    Args:
      folder: created if missing; what a killed writer left in it is replaced.
      examples: (inputs, targets) ids, read once.
      name: name of the task or mixture.
      split: the split.
      spoken: the vocabulary of the ids.
      lengths: maximum lengths of "inputs" and "targets"; longer ones are cut, with their EOS kept, and counted. None
        cuts nothing.
      source: further facts about the origin of the examples, as JSON types; part of the manifest.
      examples_per_shard: number of examples in one file.
      progress: called after each shard.

    Raises:
      UserError: the folder holds a complete corpus already, there is no example, an id lies outside the vocabulary,
        or the disk is full. Nothing is left that a reader would take for complete.
    """
    folder, rooms = Path(folder), {feature: (lengths or {}).get(feature) for feature in FEATURES}
    checks.whole("examples_per_shard", examples_per_shard, 1)
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} already holds a tokenised corpus: choose another folder, or remove this one")
    _remove_unfinished(folder)
    tally = _Tally(rooms, spoken.eos_id)
    shards: list[dict[str, Any]] = []
    buffer = _Buffer(_id_type(spoken), spoken.vocab_size)
    for inputs, targets in examples:
        buffer.check({"inputs": inputs, "targets": targets})  # before they are cut to int32
        buffer.add(tally.cut(inputs, targets))
        if buffer.count == examples_per_shard:
            shards.append(_write_shard(folder, len(shards), buffer))
            if progress:
                progress(tally.examples)
    if buffer.count:
        shards.append(_write_shard(folder, len(shards), buffer))
    if not shards:
        raise UserError(f"{name!r} has no example in split {split!r}, so there is nothing to write: check its data")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "split": split,
        "source": dict(source or {}),
        **tally.report(buffer.dtype.name),
        "vocabulary": spoken.spec(),
        "eos_id": spoken.eos_id,
        "pad_id": spoken.pad_id,
    }
    _finish(folder, manifest, shards, spoken)
    if progress:
        progress(tally.examples)
    return json.loads((folder / MANIFEST).read_text("utf-8"))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads the manifest of a folder.

    Raises:
      UserError: there is no manifest, it is not one of a tokenised corpus, or it has a newer version.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        inner = sorted(found.parent.name for found in Path(folder).glob(f"*/{MANIFEST}"))
        if inner:
            raise UserError(f"the folder {folder} holds the corpora {', '.join(inner)}: name one of them")
        what = f"holds no complete tokenised corpus (no {MANIFEST})" if Path(folder).is_dir() else "does not exist"
        raise UserError(f"the folder {folder} {what}: write it with `speccascade cache`")
    what = "the manifest of a tokenised corpus"
    return schema.read_versioned(path, VERSION, what, _CONTENT, format=FORMAT, largest=_LARGEST_MANIFEST)


def read(folder: str | Path, spoken: vocabulary.Vocabulary | None = None) -> Corpus:
    """Reads a whole corpus into memory (two bytes per token for vocabularies up to 65,536 ids) and checks it.

    Args:
      folder: the folder given to `write`.
      spoken: the vocabulary of the model; None takes the corpus's.

    Raises:
      UserError: no manifest, a newer format, a shard that is missing or damaged, no example, or ids of another
        vocabulary (the message holds both fingerprints).
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not manifest.get("examples") or not manifest.get("shards"):
        raise UserError(f"the tokenised corpus {folder} is empty: write it again with `speccascade cache`")
    own = _own_vocabulary(folder, manifest)
    if spoken is not None:
        _check_vocabulary(folder, own, spoken)
    digest = hashlib.sha256(own.fingerprint().encode())
    parts = []
    for shard in manifest["shards"]:
        parts.append(_read_shard(folder / shard["file"], shard))
        digest.update(shard["sha256"].encode())
    return _assemble(parts, own, digest.hexdigest(), manifest)


class _Tally:
    """Cuts examples to their lengths and counts for the manifest."""

    def __init__(self, rooms: Mapping[str, int | None], eos_id: int):
        self._rooms, self._eos_id = rooms, eos_id
        self.examples = self._cut_examples = 0
        self._features = {feature: {"tokens": 0, "longest": 0, "cut": 0} for feature in FEATURES}

    def cut(self, inputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        whole = {"inputs": inputs, "targets": targets}
        kept = {feature: cut(ids, self._rooms[feature], self._eos_id) for feature, ids in whole.items()}
        for feature, ids in kept.items():
            counts = self._features[feature]
            counts["tokens"] += len(ids)
            counts["longest"] = max(counts["longest"], len(ids))
            counts["cut"] += len(ids) < len(whole[feature])
        self.examples += 1
        self._cut_examples += any(len(kept[feature]) < len(whole[feature]) for feature in FEATURES)
        return kept

    def report(self, dtype: str) -> dict[str, Any]:
        features = {}
        for feature, counts in self._features.items():
            mean = round(counts["tokens"] / self.examples, 3)
            features[feature] = {"dtype": dtype, "room": self._rooms[feature], "mean": mean, **counts}
        share = round(self._cut_examples / self.examples, 6)
        about = {"examples": self.examples, "cut_examples": self._cut_examples, "cut_share": share}
        return {**about, "features": features}


class _Buffer:
    """Ids of the examples of one shard."""

    def __init__(self, dtype: np.dtype, vocab_size: int):
        self.dtype, self._vocab_size = dtype, vocab_size
        self.clear()

    def clear(self) -> None:
        self.count = 0
        self._ids: dict[str, list[np.ndarray]] = {feature: [] for feature in FEATURES}

    def check(self, example: Mapping[str, np.ndarray]) -> None:
        for feature, ids in example.items():
            check_ids(ids, self._vocab_size, "an example", feature)

    def add(self, example: Mapping[str, np.ndarray]) -> None:
        for feature, ids in example.items():
            self._ids[feature].append(np.asarray(ids).astype(self.dtype))
        self.count += 1

    def arrays(self) -> dict[str, np.ndarray]:
        found = {}
        for feature, parts in self._ids.items():
            found[feature] = np.concatenate(parts)
            found[f"{feature}_offsets"] = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return found


def _id_type(spoken: vocabulary.Vocabulary) -> np.dtype:
    return np.min_scalar_type(spoken.vocab_size - 1)


def _write_shard(folder: Path, number: int, buffer: _Buffer) -> dict[str, Any]:
    """Writes and empties the buffer. Returns the shard's entry of the manifest, without the file name."""
    data = storage.npz(buffer.arrays())
    storage.write_bytes(folder / _UNFINISHED / f"{number:05d}.npz", [data])
    entry = {"file": "", "examples": buffer.count, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    buffer.clear()
    return entry


def _finish(folder: Path, manifest: dict[str, Any], shards: Sequence[dict[str, Any]], spoken: Any) -> None:
    """Gives the shards their names, now that their number is known, and writes the manifest."""
    for number in range(len(shards)):
        file = f"shard-{number:05d}-of-{len(shards):05d}.npz"
        (folder / _UNFINISHED / f"{number:05d}.npz").replace(folder / file)
        shards[number]["file"] = file
    shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)
    if spoken.kind == vocabulary.SentencePieceVocabulary.kind:
        storage.write_bytes(folder / _MODEL_FILE, [Path(spoken.path).read_bytes()])
    storage.write_json(folder / MANIFEST, manifest | {"shards": list(shards)})


def _remove_unfinished(folder: Path) -> None:
    shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)
    for pattern in ("shard-*-of-*.npz", _MODEL_FILE, ".*.partial"):
        for leftover in folder.glob(pattern):
            leftover.unlink(missing_ok=True)


def _own_vocabulary(folder: Path, manifest: Mapping[str, Any]) -> vocabulary.Vocabulary:
    spec = manifest.get("vocabulary", {})
    by_file = spec.get("kind") == vocabulary.SentencePieceVocabulary.kind
    try:
        return vocabulary.from_spec(spec, folder / _MODEL_FILE if by_file else None)
    except UserError as error:
        raise UserError(f"the tokenised corpus {folder} has no usable vocabulary: {error}") from error


def _check_vocabulary(folder: Path, own: vocabulary.Vocabulary, spoken: vocabulary.Vocabulary) -> None:
    if own.fingerprint() == spoken.fingerprint():
        return
    try:
        vocabulary.check_same(own, spoken, (f"corpus {folder}", "model"))
    except UserError as error:
        raise UserError(
            f"{str(error).partition(';')[0]} (fingerprints {own.fingerprint()[:16]} and {spoken.fingerprint()[:16]}): "
            "write the corpus with the model's vocabulary"
        ) from error


def _read_shard(path: Path, entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"the shard {path} is missing: copy the corpus again, or write it again") from error
    except OSError as error:
        raise UserError(f"the shard {path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        size = f"{len(data)} bytes instead of {entry['bytes']}" if len(data) != entry["bytes"] else "its bytes changed"
        raise UserError(f"the shard {path} is damaged ({size}): copy the corpus again, or write it again")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"the shard {path} is not an npz file of arrays: write the corpus again") from error


def _assemble(
    parts: Sequence[Mapping[str, np.ndarray]], own: vocabulary.Vocabulary, fingerprint: str, manifest: Mapping[str, Any]
) -> Corpus:
    ids, offsets = {}, {}
    for feature in FEATURES:
        ids[feature] = np.concatenate([part[feature] for part in parts])
        lengths = np.concatenate([np.diff(part[f"{feature}_offsets"]) for part in parts])
        offsets[feature] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(ids, offsets, own, fingerprint, manifest)
