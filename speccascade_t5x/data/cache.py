"""The `cache` job: a seqio task or mixture, or a model's own outputs, as tokenised shards."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speccascade_t5x.checkpoints import bundle as bundles
from speccascade_t5x.checkpoints import loading
from speccascade_t5x.common import checks, storage
from speccascade_t5x.data import mixing, shards
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text import vocabulary

# Called from time to time with (name of what is read, examples so far).
Progress = Callable[[str, int], None]
_EVERY = 500


@dataclasses.dataclass(frozen=True)
class Cached:
    """One corpus written or kept by a `cache` job.

    Attributes:
      folder: its folder; for a mixture that of the mixture.
      manifest: the content of its manifest.
      kept: whether it was complete already, from an earlier run with the same options.
    """

    folder: Path
    manifest: Mapping[str, Any]
    kept: bool


@checks.arguments(inputs_len=(1,), targets_len=(1,), limit=(1,), seed=checks.SEED, examples_per_shard=(1,))
def cache(
    output_dir: str | Path,
    task: str | None = None,
    splits: str | Sequence[str] = ("train", "validation"),
    inputs_len: int | None = None,
    targets_len: int | None = None,
    task_lengths: bool = False,
    records_dir: str | Path | None = None,
    spoken: vocabulary.Vocabulary | None = None,
    unfinished: bool = False,
    limit: int | None = None,
    seed: int = 0,
    examples_per_shard: int = 65_536,
    config_text: str = "",
    progress: Progress | None = None,
) -> list[Cached]:
    """Writes one folder of shards per split. After a kill, it keeps complete splits and writes the others again.

    A task is written to `output_dir/<split>`, the tasks of a mixture to `output_dir/<split>/<task>`, beside a file of
    their rates. Records of an `infer` job become (its inputs, the model's own outputs), for distillation. A complete
    folder is recognised by the options and settings it was made with; changes of its data since are not detected.

    Args:
      output_dir: folder that holds the folders of the splits.
      task: a registered seqio task or mixture. With records_dir: the task of the records, needed if the folder holds
        several.
      splits: one or several splits of the task. With records_dir: the split of the records.
      inputs_len: maximum length of inputs, EOS included; longer ones are cut, with their EOS kept, and counted. None
        cuts nothing.
      targets_len: maximum length of targets, in the same way.
      task_lengths: give both lengths to the task's own preprocessors, as span corruption needs it; what these cut
        is not counted.
      records_dir: the output folder of an `infer` job, read instead of the task's data.
      spoken: the vocabulary of the records; None takes the task's.
      unfinished: keep outputs that do not end in EOS, which are otherwise left out and counted.
      limit: number of examples of each split to write, from the first; None writes all.
      seed: seed of preprocessors that draw random numbers.
      examples_per_shard: number of examples in one file.
      config_text: the resolved configuration; kept in the manifests, without the folder and the splits.
      progress: called from time to time.

    Raises:
      UserError: bad options, an unknown task or split, records that are damaged or of another split, features with
        different vocabularies, a folder that holds a corpus made with other options, or a full disk.
    """
    names = (splits,) if isinstance(splits, str) else splits
    if not names or len(set(names)) < len(names):
        raise UserError(f"splits={splits!r} must name one split or several different ones")
    lengths = {"inputs": inputs_len, "targets": targets_len}
    if task_lengths and None in lengths.values():
        raise UserError("task_lengths=True needs both feature lengths: set inputs_len and targets_len")
    job = _Job(Path(output_dir), lengths, limit, examples_per_shard, _settings(config_text), progress)
    if records_dir is not None:
        return [_from_records(job, Path(records_dir), task, names, spoken, unfinished)]
    if task is None:
        raise UserError("name a task or a mixture to cache (TASK), or a folder of records (RECORDS)")
    return [cached for split in names for cached in _from_task(job, task, split, task_lengths, seed)]


def pair_vocabulary(path: str | Path | None = None) -> vocabulary.Vocabulary | None:
    """The vocabulary of a pair, for `cache`; None for no pair.

    Args:
      path: a bundle's folder, or the name of a packaged one.

    Raises:
      UserError: no bundle is there, or it is damaged.
    """
    return None if path is None else bundles.load_vocabulary(loading.bundle_folder(path))


@dataclasses.dataclass(frozen=True)
class _Job:
    """The options that all corpora of a job share."""

    output_dir: Path
    lengths: Mapping[str, int | None]
    limit: int | None
    examples_per_shard: int
    settings: list[str]
    progress: Progress | None

    def write(
        self,
        folder: Path,
        examples: Iterator[tuple[np.ndarray, np.ndarray]],
        name: str,
        split: str,
        spoken: vocabulary.Vocabulary,
        source: Mapping[str, Any],
    ) -> Cached:
        """Writes a corpus, or keeps an existing one that was made with the same options."""
        source = dict(source) | ({"limit": self.limit} if self.limit else {}) | {"settings": self.settings}
        with storage.one_writer(self.output_dir, f"the corpus {folder.relative_to(self.output_dir)}"):
            if (folder / shards.MANIFEST).exists():
                manifest = shards.read_manifest(folder)
                wanted = {"task": name, "split": split, "vocabulary": spoken.fingerprint(), **source}
                wanted |= {f"{feature}_len": room for feature, room in self.lengths.items()}
                _check_kept(folder, manifest, wanted)
                return Cached(folder, manifest, kept=True)
            manifest = shards.write(
                folder,
                self._counted(examples, f"{name} {split}"),
                name=name,
                split=split,
                spoken=spoken,
                lengths=self.lengths,
                source=source,
                examples_per_shard=self.examples_per_shard,
            )
            return Cached(folder, manifest, kept=False)

    def _counted(self, examples: Iterator, what: str) -> Iterator:
        count = 0
        for example in examples:
            yield example
            count += 1
            if self.progress and count % _EVERY == 0:
                self.progress(what, count)
        if self.progress:
            self.progress(what, count)


def _settings(config_text: str) -> list[str]:
    """The lines of a configuration that shape a corpus."""
    lines = [line for line in config_text.splitlines() if line.strip() and not line.startswith("#")]
    return [line for line in lines if not line.startswith(("OUTPUT_DIR = ", "SPLITS = "))]


def _check_kept(folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    found = {
        "task": manifest.get("name"),
        "split": manifest.get("split"),
        "vocabulary": manifest.get("vocabulary", {}).get("fingerprint"),
        **manifest.get("source", {}),
        **{f"{name}_len": about.get("room") for name, about in manifest.get("features", {}).items()},
    }
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            then, now = (values.get(name) for values in (found, wanted))
            if name == "settings":
                before, after = then or [], now or []
                then = " ".join(line for line in before if line not in after)
                now = " ".join(line for line in after if line not in before)
            then, now = (str(value)[:200] or "nothing of it" for value in (then, now))
            raise UserError(
                f"{folder} holds a corpus made with {name} {then}, not {now}: choose another output folder, or remove "
                "this one"
            )


def _from_task(job: _Job, name: str, split: str, task_lengths: bool, seed: int) -> Iterator[Cached]:
    """Writes a split of a task, or of every task of a mixture."""
    from speccascade_t5x.data import seqio_tasks

    parts = seqio_tasks.parts(name)
    lengths = {feature: room for feature, room in job.lengths.items() if room} if task_lengths else None
    source: dict[str, Any] = {"kind": "task", "seed": seed} | ({"task_lengths": True} if task_lengths else {})
    spoken = [_task_vocabulary(part) for part, _ in parts]
    streams = [seqio_tasks.stream(part, split, job.limit, lengths, seed) for part, _ in parts]
    mixture = parts[0][0] != name or len(parts) > 1
    for i in range(1, len(parts)):
        vocabulary.check_same(spoken[0], spoken[i], (f"task {parts[0][0]!r}", f"task {parts[i][0]!r}"))
    for (part, _), own, examples in zip(parts, spoken, streams, strict=True):
        folder = job.output_dir / split
        with contextlib.closing(examples):
            place = folder / storage.file_stem(part) if mixture else folder
            made = job.write(place, examples, part, split, own, source)
        yield made
    if mixture:
        mixing.write(job.output_dir / split, {storage.file_stem(part): rate for part, rate in parts})


def _task_vocabulary(task: str) -> vocabulary.Vocabulary:
    """The one vocabulary of a task's features."""
    from speccascade_t5x.data import seqio_tasks

    found = seqio_tasks.task_vocabularies(task)
    spoken = {name: seqio_tasks.as_vocabulary(found[name]) for name in shards.FEATURES if name in found}
    if len(spoken) == len(shards.FEATURES):
        names = (f"feature 'inputs' of task {task!r}", f"feature 'targets' of task {task!r}")
        vocabulary.check_same(spoken["inputs"], spoken["targets"], names)
    if not spoken:
        raise UserError(
            f"task {task!r} has no feature 'inputs' or 'targets', so there is nothing to train on: name another task"
        )
    return next(iter(spoken.values()))


def _from_records(
    job: _Job,
    folder: Path,
    task: str | None,
    splits: Sequence[str],
    spoken: vocabulary.Vocabulary | None,
    unfinished: bool,
) -> Cached:
    """Writes the outputs an `infer` job has recorded."""
    stem, files = _record_files(folder, task)
    split = _split_of(folder, stem, splits)
    if spoken is None:
        if task is None:
            raise UserError("records need a vocabulary: name their task (TASK) or the pair that wrote them (PAIR)")
        spoken = _task_vocabulary(task)
    # A first pass over all records meets every bad line before anything is written.
    left_out = sum(not _ends(output, spoken.eos_id) for _, output in _outputs(files))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    source = {
        "kind": "records", "sha256": digest.hexdigest(), "unfinished_outputs": left_out, "unfinished_kept": unfinished
    }  # fmt: skip

    def examples() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number, (text, output) in enumerate(_outputs(files)):
            if job.limit is not None and number >= job.limit:
                return
            if unfinished or _ends(output, spoken.eos_id):
                # Ids of any size, until they are checked.
                yield np.array([*spoken.encode(text), spoken.eos_id]), np.array(output, object)

    return job.write(job.output_dir / split, examples(), task or stem, split, spoken, source)


def _record_files(folder: Path, task: str | None) -> tuple[str, list[Path]]:
    """The stem of the records in a folder, and their files, all of them, in order."""
    pattern = re.compile(r"(.+)-predict\.jsonl-(\d{5})-of-(\d{5})")
    found: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := pattern.fullmatch(path.name):
            found.setdefault(match[1], {})[int(match[2])] = path
            counts[match[1]] = int(match[3])
    wanted = storage.file_stem(task) if task is not None else next(iter(found), None)
    if wanted not in found:
        held = f"it holds those of {', '.join(found)}" if found else "an `infer` job writes them there"
        raise UserError(f"{folder} holds no finished records{f' of {task!r}' if task else ''}: {held}")
    if task is None and len(found) > 1:
        raise UserError(f"{folder} holds the records of {', '.join(found)}: name one of them (TASK)")
    missing = [i for i in range(counts[wanted]) if i not in found[wanted]]
    if missing:
        raise UserError(
            f"part {missing[0]} of {counts[wanted]} of the records of {wanted!r} is missing in {folder}: let the "
            "`infer` job finish first"
        )
    return wanted, [found[wanted][i] for i in range(counts[wanted])]


def _split_of(folder: Path, stem: str, splits: Sequence[str]) -> str:
    """The split of the records: the given one, which must not contradict what the `infer` job recorded."""
    if len(splits) != 1:
        raise UserError(f"records are of one split, but splits={splits!r} names {len(splits)}: name theirs (SPLITS)")
    noted = None
    path = folder / f"{stem}-predict.config.txt"
    if path.is_file():
        config = path.read_text("utf-8")
        match = re.search(r"^SPLIT = '([^']*)'", config, re.MULTILINE)
        of_a_task = re.search(r"^TASK = '", config, re.MULTILINE)  # an input file has no split, whatever SPLIT says
        noted = match[1] if match and of_a_task else None
    if noted is not None and noted != splits[0]:
        raise UserError(f"the records in {folder} are of split {noted!r}, not {splits[0]!r}: name theirs (SPLITS)")
    return splits[0]


def _outputs(files: Sequence[Path]) -> Iterator[tuple[str, list[int]]]:
    """(input text, output ids) of all records; several samples of one input follow each other."""
    for path in files:
        for number, record in enumerate(storage.read_records(path), start=1):
            text, tokens = record.get("inputs"), record.get("tokens")
            if not isinstance(text, str) or not isinstance(tokens, list):
                raise UserError(f'{path}, line {number} has no text under "inputs" or no ids under "tokens"')
            samples = tokens if tokens and isinstance(tokens[0], list) else [tokens]
            for output in samples:
                if not all(isinstance(i, int) for i in output):
                    raise UserError(f'{path}, line {number} has a value under "tokens" that is not ids')
                yield text, output


def _ends(output: Sequence[int], eos_id: int) -> bool:
    return bool(output) and output[-1] == eos_id
