"""n-gram tables of a pair: built from a task or from tokenised shards, and kept in a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from speccascade_t5x.checkpoints import bundle as bundles
from speccascade_t5x.checkpoints import loading
from speccascade_t5x.common import checks
from speccascade_t5x.core.ngram import build_table
from speccascade_t5x.data import mixing
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text import vocabulary


@dataclasses.dataclass(frozen=True)
class Built:
    """The result of a `tables` job.

    Attributes:
      bundle: the bundle that now holds the table.
      about: order, successors, discount, the source, and the number of sequences and tokens counted.
      stored_bytes: size of the table's file.
    """

    bundle: Path
    about: dict[str, Any]
    stored_bytes: int


@checks.arguments(order=(2, 3), successors=(1,), limit=(1,))
def tables(
    pair: str | Path,
    output_dir: str | Path,
    task: str | None = None,
    cached: str | Path | None = None,
    split: str = "train",
    order: int = 3,
    successors: int = 16,
    discount: float = 0.5,
    limit: int | None = None,
) -> Built:
    """Counts the targets of a task, or of tokenised shards, into an n-gram table and stores it in a bundle.

    Args:
      pair: a bundle's folder, or the name of a packaged one.
      output_dir: the bundle to create: a copy of `pair` with the table in it. The pair's own folder is replaced; any
        other existing folder is rejected.
      task: a registered seqio task; its vocabulary must be the pair's.
      cached: a folder of `speccascade cache` instead (of one split). To learn from the verifier's own outputs, cache
        the records of an `infer` job.
      split: split of the task.
      order: 2 for bigrams, 3 for trigrams on top of them.
      successors: maximum number of successors kept per context.
      discount: see `drafting.build_table`.
      limit: number of examples to count, from the first.

    Raises:
      UserError: neither or both of task and cached, no bundle, another vocabulary, no targets, or a full disk.
    """
    if (task is None) == (cached is None):
        raise UserError("name either a task or a folder of tokenised shards to count (TASK or CACHED), and not both")
    source, target = loading.bundle_folder(pair), Path(output_dir)
    manifest = bundles.read_manifest(source)
    spoken = bundles.load_vocabulary(source, manifest)
    width = bundles.open_member(source, "verifier", manifest).model.vocab_size
    if task is not None:
        found, counted = _of_task(task, split, spoken, limit), f"task {task}, {split}"
    elif cached is not None:
        found, counted = _of_shards(cached, spoken, limit), f"shards {Path(cached).name}"
    sequences = [sequence for sequence in found if len(sequence)]
    table = build_table(
        sequences, width, order=order, successors=successors, discount=discount, start_id=manifest["decode"]["start_id"]
    )
    about = {
        "order": order,
        "successors": successors,
        "discount": discount,
        "source": counted,
        "sequences": len(sequences),
        "tokens": int(sum(map(len, sequences))),
    }
    bundles.store_table(source, target, table, about)
    return Built(target, about, (target / bundles.TABLE_FILE).stat().st_size)


def _of_shards(folder: str | Path, spoken: vocabulary.Vocabulary, limit: int | None) -> Iterator[np.ndarray]:
    """Targets of a corpus, or of a mixture of several."""
    corpus = mixing.read(folder, spoken)
    for i in range(len(corpus) if limit is None else min(limit, len(corpus))):
        yield corpus.targets(i)


def _of_task(task: str, split: str, spoken: vocabulary.Vocabulary, limit: int | None) -> Iterator[np.ndarray]:
    """Targets of a seqio task."""
    from speccascade_t5x.data import seqio_tasks

    for feature, named in seqio_tasks.task_vocabularies(task).items():
        if feature == "targets":
            vocabulary.check_same(
                seqio_tasks.as_vocabulary(named), spoken, (f"feature {feature!r} of task {task!r}", "pair")
            )
    for example in seqio_tasks.examples(task, split, {"inputs": 1}, limit=limit, truncate=True):
        if example.targets is None:
            raise UserError(f"task {task!r} has no targets to count: name another task")
        yield example.targets
