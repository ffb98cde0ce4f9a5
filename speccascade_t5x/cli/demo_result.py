"""The options of `speccascade demo` and the result of its measurement."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

from speccascade_t5x.inference.generate import Generation
from speccascade_t5x.inference.settings import Settings


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """The options of `run_demo`.

    Attributes:
      bundle: folder of the pair.
      texts: the user's texts, plain German or folded.
      sentences: how many of the packaged sentences to use; None uses all.
      alphas: the alphas of TokenV3 and MinP.
      repeats: number of measured rounds.
      settings: draft length, sampling options and seed hold for every row of the table; a method that the
        table does not have anyway makes a row of its own.
    """

    bundle: Path
    texts: tuple[str, ...] = ()
    sentences: int | None = None
    alphas: tuple[float, float] = (0.3, 0.9)
    repeats: int = 3
    settings: Settings = dataclasses.field(default_factory=lambda: Settings(draft_len=5))


@dataclasses.dataclass(frozen=True)
class Example:
    """A text to restore. `reference` is None where the user gave folded text."""

    inputs: str
    reference: str | None


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """One method over all rounds.

    Attributes:
      label: human-readable name.
      settings: of the first round; later rounds differ in the seed.
      exact_match: percentage over all rounds; None where no text has a reference.
      character_accuracy: the same, of characters.
      tokens_per_s: median over rounds.
      speedups: tokens/s over the verifier alone's in the same round, one per round.
      rates: see `accounting.rates`, over all rounds.
      first: the outputs of the first round.
    """

    label: str
    settings: Settings
    exact_match: float | None
    character_accuracy: float | None
    tokens_per_s: float
    speedups: tuple[float, ...]
    rates: dict[str, float]
    first: Generation

    @property
    def speedup(self) -> float:
        """Median over rounds."""
        return statistics.median(self.speedups)

    @property
    def spread(self) -> tuple[float, float]:
        """Lowest and highest speed-up."""
        return min(self.speedups), max(self.speedups)


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """The measurements, by label and in the order of the table."""

    options: DemoOptions
    examples: tuple[Example, ...]
    methods: dict[str, MethodResult]
    compile_s: float
    decode_s: float
