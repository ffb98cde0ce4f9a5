"""The data for fitting heads: teacher-forced features and labels of a pair, streamed to disk part by part.

    <folder>/part-00000-of-0000N.npz   columns of the positions of some batches
    <folder>/identity.json             what the columns were made of; written first
    <folder>/manifest.json             counts and checksums; written last

A folder with a manifest is complete. A killed collection continues at its first missing part, if pair, data and
features are the same. No logits are kept: a position takes a few hundred bytes for any vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from speccascade_t5x.common import checks, schema, storage
from speccascade_t5x.data import shards
from speccascade_t5x.deferral.features import FeatureSpec
from speccascade_t5x.distributed.partitioning import data_mesh
from speccascade_t5x.interfaces import Array, Bound, UserError
from speccascade_t5x.text import vocabulary
from speccascade_t5x.training.deferral.pair_scores import (
    Scored,
    Scores,
    batches,
    columns_of,
    fingerprint,
    flat,
    pair_of,
    token_classes,
)

MANIFEST, IDENTITY = "manifest.json", "identity.json"
FORMAT = "speccascade_t5x deferral columns"
VERSION = 1
_CONTENT = schema.record({"files": schema.map_of(schema.of(str))})

# Called after each batch with (examples done, examples in all).
Progress = Callable[[int, int], None]


def collect(
    scored: Scored,
    corpus: shards.Corpus,
    chosen: Sequence[int],
    folder: str | Path,
    spec: FeatureSpec,
    *,
    candidates: bool = False,
    scores: Scores | None = None,
    identity: Mapping[str, Any] | None = None,
    lengths: tuple[int, int] = (512, 128),
    batch_size: int = 32,
    batches_per_part: int = 16,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Path:
    """Scores examples with both models and writes columns. After a kill, the same call continues.

    Args:
      scored: the pair.
      corpus: inputs and targets; its vocabulary must be the pair's.
      chosen: numbers of the examples; they are the sequence ids of the columns.
      folder: created if missing; a complete collection of the same identity there is left as it is.
      spec: the features.
      candidates: also keep the columns that a token head reads.
      scores: further figures to keep, as "score_NAME".
      identity: further inputs of the columns, such as those of `scores`; JSON types.
      lengths: maximum lengths of inputs and targets.
      batch_size: number of rows of a batch, a multiple of the devices of `mesh`.
      batches_per_part: number of batches that a kill can lose.
      mesh: devices that share each batch; one if None.
      progress: called after each batch.

    Raises:
      UserError: another vocabulary, no example, a folder with columns of something else, NaN logits, or a full disk.
    """
    folder, mesh = Path(folder), mesh or data_mesh(1)
    vocabulary.check_same(corpus.vocabulary, scored.vocabulary, ("labels", "pair"))
    if not len(chosen):
        raise UserError(f"the split for {folder.name!r} holds no example: collect more, or give it a larger share")
    if batch_size % mesh.size:
        raise UserError(f"batch_size={batch_size} cannot be shared by {mesh.size} devices: make it a multiple of that")
    whole = {
        "drafter": fingerprint(scored.drafter),
        "verifier": fingerprint(scored.verifier),
        "temperature": scored.temperature,
        "vocabulary": scored.vocabulary.fingerprint(),
        "data": corpus.fingerprint,
        "chosen": hashlib.sha256(np.asarray(chosen, np.int64).tobytes()).hexdigest()[:16],
        "features": dataclasses.asdict(spec),
        "batching": [batch_size, batches_per_part, *lengths],
        "candidates": candidates,
        "scores": sorted(scores or {}),
        "more": dict(identity or {}),
    }
    _claim(folder, whole)
    if (folder / MANIFEST).is_file():
        return folder
    made = batches(corpus, list(chosen), batch_size, lengths)
    parts = [made[i : i + batches_per_part] for i in range(0, len(made), batches_per_part)]
    classes = jnp.asarray(token_classes(scored.vocabulary, scored.width))
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    models = {
        name: Bound(bound.model, jax.device_put(bound.params, everywhere))
        for name, bound in (("drafter", scored.drafter), ("verifier", scored.verifier))
    }

    @jax.jit
    def run(models: dict[str, Any], inputs: Array, targets: Array) -> dict[str, Array]:
        pair = pair_of(dataclasses.replace(scored, **models), spec, inputs, targets)
        return columns_of(pair, spec, classes, targets, candidates, scores)

    done = 0
    for number, part in enumerate(parts):
        path = folder / f"part-{number:05d}-of-{len(parts):05d}.npz"
        if not path.is_file():
            kept = []
            for batch in part:
                found = jax.device_get(run(models, *jax.device_put((batch.inputs, batch.targets), split)))
                kept.append(flat(found, batch))
                done += int((batch.ids >= 0).sum())
                if progress:
                    progress(done, len(chosen))
            columns = {name: np.concatenate([each[name] for each in kept]) for name in kept[0]}
            storage.write_bytes(path, [storage.npz(columns, compress=False)])
        else:
            done += sum(int((batch.ids >= 0).sum()) for batch in part)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("part-*.npz"))}
    positions = int(sum(int(batch.lengths.sum()) for batch in made))
    manifest = {"format": FORMAT, "version": VERSION, "examples": len(chosen), "positions": positions, "files": files}
    storage.write_json(folder / MANIFEST, {**manifest, "identity": whole})
    return folder


def read(folder: str | Path) -> dict[str, np.ndarray]:
    """All columns of a complete collection, [N, ...] each, "example" among them.

    Raises:
      UserError: it is not complete, or a part is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} holds no complete collection of deferral columns: collect it again")
    manifest = schema.read_versioned(
        folder / MANIFEST, VERSION, "a manifest of deferral columns", _CONTENT, format=FORMAT
    )
    parts = []
    for name, digest in manifest["files"].items():
        try:
            raw = (folder / name).read_bytes()
            if hashlib.sha256(raw).hexdigest() != digest:
                raise ValueError("its checksum differs")
            with np.load(io.BytesIO(raw), allow_pickle=False) as file:
                parts.append({column: file[column] for column in file.files})
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{folder / name} is damaged ({error}): remove {folder} and collect again") from error
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split(examples: int, shares: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Divides the examples (never their tokens) into splits: name -> ascending example numbers.

    Raises:
      UserError: a share that is not above 0, or a split that gets no example.
    """
    for name, share in shares.items():
        checks.real(f"the share of split {name!r}", share, 0.0, 1.0)
    order = shards.permutation(examples, seed, 17)
    ends = np.round(np.cumsum(list(shares.values())) / sum(shares.values()) * examples).astype(int)
    found = {
        name: np.sort(order[begin:end])
        for name, begin, end in zip(shares, [0, *ends[:-1].tolist()], ends.tolist(), strict=True)
    }
    for name, chosen in found.items():
        if not len(chosen):
            raise UserError(f"the {name} split of {examples} examples is empty: give more examples, or a larger share")
    return found


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Binds a folder to the inputs of its columns, or rejects a folder bound to others."""
    path, wanted = folder / IDENTITY, json.loads(storage.to_json(identity))
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} holds other files: choose another folder for the deferral columns")
        storage.write_json(path, wanted)
        return
    found = schema.read(path)
    differ = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if differ:
        raise UserError(
            f"{folder} holds deferral columns of another {', '.join(differ)}: choose another folder, or remove this one"
        )
