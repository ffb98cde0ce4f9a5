"""Sources of training examples: one corpus, or several, each seen at its rate."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from speccascade_t5x.common import checks, schema, storage
from speccascade_t5x.data import shards
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import Vocabulary

MIXTURE = "mixture.json"
FORMAT = "speccascade_t5x mixture"
VERSION = 1
_PART = schema.record({"folder": schema.file_name(), "rate": schema.number(0.0)})
_CONTENT = schema.record({"parts": schema.list_of(_PART)})


class Source(Protocol):
    """A source of examples, such as a `shards.Corpus` or a `Mixed`."""

    @property
    def fingerprint(self) -> str:
        """Equal if the examples and their order are."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids mean."""

    def __len__(self) -> int: ...

    @property
    def eos_id(self) -> int:
        """The id that ends inputs and targets."""

    @property
    def input_lengths(self) -> np.ndarray:
        """[examples] ids of each example's inputs."""

    @property
    def target_lengths(self) -> np.ndarray:
        """[examples] ids of each example's targets."""

    def inputs(self, index: int) -> np.ndarray:
        """Ids of one example's inputs."""

    def targets(self, index: int) -> np.ndarray:
        """Ids of one example's targets."""

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of an epoch's examples, in the order they are seen."""


class Mixed:
    """Several corpora, each seen at its rate.

    All examples of a corpus are seen once, in an order of its own, before one of them is seen again.

    Args:
      parts: pairs (corpus, rate); rates are relative to each other.
      examples_per_epoch: number of examples in an epoch; None takes the total of all corpora.

    Raises:
      UserError: there is no corpus, a rate is not above 0, or the vocabularies differ.
    """

    def __init__(self, parts: Sequence[tuple[shards.Corpus, float]], examples_per_epoch: int | None = None):
        if not parts:
            raise UserError("a mixture needs at least one corpus")
        for _, rate in parts:
            checks.real("rate", rate, 0.0)
            if not 0 < rate < float("inf"):
                raise UserError(f"rate={rate!r} is outside its range: the rates of a mixture are above 0")
        self._corpora = [corpus for corpus, _ in parts]
        own = {corpus.vocabulary.fingerprint() for corpus in self._corpora}
        if len(own) > 1:
            shown = " and ".join(sorted(fingerprint[:16] for fingerprint in own))
            raise UserError(f"the corpora of a mixture have different vocabularies (fingerprints {shown})")
        self._starts = np.cumsum([0, *map(len, self._corpora)])
        total = examples_per_epoch or len(self)
        checks.whole("examples_per_epoch", total, 1)
        shares = np.array([rate for _, rate in parts], np.float64)
        # Rounded so that all epochs have the same length and every corpus is in some of them.
        self._ends = np.rint(np.cumsum(shares) / shares.sum() * total).astype(np.int64)
        self._counts = np.diff(self._ends, prepend=0)
        if not self._counts.all():
            raise UserError(f"an epoch of {total} examples has none of the corpus with the least rate: raise its rate")
        self.vocabulary = self._corpora[0].vocabulary
        content = [*(corpus.fingerprint for corpus in self._corpora), *self._counts.tolist()]
        self.fingerprint = hashlib.sha256(repr(content).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def eos_id(self) -> int:
        """The id that ends inputs and targets."""
        return self.vocabulary.eos_id

    @functools.cached_property
    def input_lengths(self) -> np.ndarray:
        """[examples] ids of each example's inputs."""
        return np.concatenate([corpus.input_lengths for corpus in self._corpora])

    @functools.cached_property
    def target_lengths(self) -> np.ndarray:
        """[examples] ids of each example's targets."""
        return np.concatenate([corpus.target_lengths for corpus in self._corpora])

    def inputs(self, index: int) -> np.ndarray:
        """Ids of one example's inputs."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._corpora[part].inputs(index - int(self._starts[part]))

    def targets(self, index: int) -> np.ndarray:
        """Ids of one example's targets."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._corpora[part].targets(index - int(self._starts[part]))

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of an epoch's examples, in the order they are seen."""
        drawn = []
        for part, (corpus, count) in enumerate(zip(self._corpora, self._counts.tolist(), strict=True)):
            first, last = epoch * count, (epoch + 1) * count
            passes = range(first // len(corpus), -(-last // len(corpus)))
            stream = np.concatenate([shards.permutation(len(corpus), seed, part, again) for again in passes])
            start = first - passes[0] * len(corpus)
            drawn.append(stream[start : start + count] + self._starts[part])
        together = np.concatenate(drawn)
        return together[shards.permutation(len(together), seed, len(self._corpora), epoch)]


def first(source: shards.Corpus | Mixed, limit: int | None = None) -> shards.Corpus:
    """The first examples as one corpus; for a mixture the first of an epoch, so that each part has its share.

    Args:
      source: the source of the examples.
      limit: number of examples; None takes all.
    """
    few = limit is not None and limit < len(source)
    if isinstance(source, shards.Corpus):
        return source.select(np.arange(len(source))[:limit]) if few else source
    chosen = source.epoch(0, 0)[:limit] if few else range(len(source))
    return shards.from_examples(((source.inputs(i), source.targets(i)) for i in chosen), source.vocabulary)


def write(folder: str | Path, rates: Mapping[str, float]) -> Path:
    """Writes the file of a mixture of the corpora in the folders below `folder`, with their rates. Returns its path."""
    content = {"format": FORMAT, "version": VERSION, "parts": [{"folder": k, "rate": v} for k, v in rates.items()]}
    return storage.write_json(Path(folder) / MIXTURE, content)


def read(folder: str | Path, spoken: Vocabulary | None = None) -> shards.Corpus | Mixed:
    """Reads what `speccascade cache` wrote: a corpus, or a mixture of several.

    Args:
      folder: folder of a corpus (`manifest.json`) or of a mixture (`mixture.json`).
      spoken: the vocabulary of the model; None takes the corpus's.

    Raises:
      UserError: the errors of `shards.read`, or a mixture file is damaged.
    """
    path = Path(folder) / MIXTURE
    if not path.is_file():
        return shards.read(folder, spoken)
    content = schema.read_versioned(path, VERSION, "a mixture of `speccascade cache`", _CONTENT, format=FORMAT)
    return Mixed([(shards.read(Path(folder) / part["folder"], spoken), part["rate"]) for part in content["parts"]])
