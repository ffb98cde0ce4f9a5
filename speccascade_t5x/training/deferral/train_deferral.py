"""The `train_deferral` job: collects, fits, calibrates, collects the test split, and writes a bundle with the result.

<output_dir>/config.gin                     the resolved configuration
<output_dir>/columns/{fit,held_out,test}    features and labels, see `training.deferral.collection`
<output_dir>/<kind>-<objective>/seed-<n>    Orbax checkpoints of each fit
<output_dir>/calibration.npz                temperature, vector scaling, isotonic regression
<output_dir>/deferral-metrics.jsonl         every evaluation on the left-out folds
<output_dir>/deferral-summary.json          the results
<output_dir>/bundle                         the pair with head and calibrations, to decode with

The same command continues a killed run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from speccascade_t5x.checkpoints import bundle as bundles
from speccascade_t5x.checkpoints import deferral_files, loading
from speccascade_t5x.common import checks, storage
from speccascade_t5x.data import mixing, shards
from speccascade_t5x.deferral import calibration, fitting, labels
from speccascade_t5x.deferral import columns as columns_lib
from speccascade_t5x.deferral.calibration import Calibration, PairCalibration
from speccascade_t5x.deferral.fitted import Fitted
from speccascade_t5x.deferral.fitting import FitConfig
from speccascade_t5x.deferral.head import Head, HeadConfig, remark
from speccascade_t5x.distributed.partitioning import data_mesh
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text import vocabulary
from speccascade_t5x.training.deferral import collection, fit_store, pair_scores
from speccascade_t5x.training.deferral.pair_scores import Scored

METRICS_FILE, SUMMARY_FILE, CALIBRATION_FILE = "deferral-metrics.jsonl", "deferral-summary.json", "calibration.npz"
CALIBRATIONS = ("temperature", "vector", "isotonic")


@dataclasses.dataclass(frozen=True)
class Data:
    """The data to collect on.

    Attributes:
      cached: folder of tokenised shards (`speccascade cache`), of one split.
      task: a registered seqio task, instead.
      split: split of the task. The pair must not be trained on it, or the head learns from models that know the
        answers.
      limit: number of examples to collect, from the first; None for all.
      inputs_len, targets_len: maximum lengths of inputs and targets; longer ones are cut, with their EOS kept.
      batch_size: number of rows scored together.
      batches_per_part: number of batches of a file, which a kill can lose.
      shares: relative shares of the examples: "fit" to fit on, "test" to evaluate on, and "held_out" to fix the alphas
        and thresholds of the report. These are not part of a head, so heads are fitted on "held_out" as well.
      seed: seed of the assignment of examples to splits.
    """

    cached: str | None = None
    task: str | None = None
    split: str = "validation"
    limit: int | None = 4000
    inputs_len: int = 512
    targets_len: int = 128
    batch_size: int = 32
    batches_per_part: int = 8
    shares: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"fit": 0.7, "held_out": 0.1, "test": 0.2})
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("inputs_len", "targets_len", "batch_size", "batches_per_part", "limit")
        checks.fields(self, shares=(0.0, 1.0), seed=checks.SEED, **dict.fromkeys(sizes, (1,)))
        if (self.cached is None) == (self.task is None):
            raise UserError("name either tokenised shards or a task to collect on (CACHED or TASK), and not both")
        if set(self.shares) != {"fit", "held_out", "test"}:
            raise UserError("shares must name fit, held_out and test")

    def source(self) -> tuple[str, str]:
        """(task, split) of the examples."""
        if self.cached is None:
            return str(self.task), self.split
        manifest = shards.read_manifest(self.cached)
        return str(manifest.get("name")), str(manifest.get("split"))

    def corpus(self, spoken: vocabulary.Vocabulary) -> shards.Corpus:
        """The examples.

        Raises:
          UserError: another vocabulary than `spoken`; see also `mixing.read` and `seqio_tasks.examples`.
        """
        if self.cached is not None:
            found = mixing.read(self.cached)
            vocabulary.check_same(found.vocabulary, spoken, ("labels", "pair"))
            return mixing.first(found, self.limit)
        from speccascade_t5x.data import seqio_tasks

        task = str(self.task)
        seqio_tasks.check_vocabulary(task, spoken)
        return seqio_tasks.corpus(task, self.split, spoken, self.limit)


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """The head to fit.

    Attributes:
      kind: "prefix" or "token".
      loss: of a prefix head, whose gap it estimates: "zero_one" or "log".
      hidden: whether it reads both models' last hidden states.
      top: how many of the largest probabilities of each distribution it reads.
      width, layers: of the network.
    """

    kind: str = "prefix"
    loss: str = "zero_one"
    hidden: bool = False
    top: int = 4
    width: int = 64
    layers: int = 2

    def __post_init__(self) -> None:
        checks.fields(self, top=(1,), width=(1,), layers=(0,))


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of a job.

    Attributes:
      bundle: folder of the pair with head and calibrations.
      fitted: head and calibrations in memory.
      fits: the fit of each seed, the best first.
      test: columns of the test split, with "score_*" of each calibration.
      held_out: columns of the held-out split.
      classes: [V] class of each token.
      summary: the content of deferral-summary.json.
    """

    bundle: Path
    fitted: Fitted
    fits: list[fitting.Fit]
    test: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]
    classes: np.ndarray
    summary: dict[str, Any]

    @property
    def head(self) -> Head:
        """The head that was fitted."""
        return self.fits[0].head


class Observer(fitting.Observer):
    """Receives the events of a run; each method may be overridden."""

    def collecting(self, split: str, done: int, examples: int) -> None:
        """A number of examples of a split have been scored."""

    def calibrating(self, kind: str) -> None:
        """A calibration begins."""

    def warned(self, text: str) -> None:
        """A note that a reader of the results should know."""


@checks.arguments(temperature=(0.0, 2.0), devices=(1,))
def train_deferral(
    pair: str | Path,
    data: Data,
    output_dir: str | Path,
    head: HeadOptions | None = None,
    fit: FitConfig | None = None,
    calibrations: Sequence[str] = CALIBRATIONS,
    temperature: float = 1.0,
    devices: int | None = None,
    config_text: str = "",
    observer: Observer | None = None,
) -> Trained:
    """Fits a head and calibrations for a pair. After a kill, the same call continues.

    Args:
      pair: a bundle's folder, or the name of a packaged one; it must have a drafter.
      data: the data to collect on.
      output_dir: folder of all files.
      head: the head to fit.
      fit: how to fit it.
      calibrations: the calibrations to fit as well, as baselines.
      temperature: the temperature of sampling, at which D_TV(p, q) is measured.
      devices: number of devices that share each batch of the collection; None takes all.
      config_text: the resolved configuration, kept beside the checkpoints.
      observer: receives the events of the run.

    Raises:
      UserError: no drafter, labels of another vocabulary, an empty split, labels that are all the same, a loss that
        became NaN, or files of another run in `output_dir`.
    """
    head, fit, observer = head or HeadOptions(), fit or FitConfig(), observer or Observer()
    output_dir = Path(output_dir)
    unknown = sorted(set(calibrations) - set(CALIBRATIONS))
    if unknown:
        raise UserError(f"the calibration {unknown[0]!r} is unknown: use {', '.join(CALIBRATIONS)}")
    source = loading.bundle_folder(pair)
    loaded = bundles.load_bundle(source)
    if loaded.drafter is None:
        raise UserError(f"the bundle {pair} holds a verifier alone: deferral needs a drafter to defer from")
    if known := trained_on(bundles.read_manifest(source), *data.source()):
        observer.warned(known)
    scored = Scored(loaded.drafter, loaded.verifier, loaded.vocabulary, temperature)
    spec = pair_scores.spec_of(scored, head.hidden, head.top)
    config = HeadConfig(head.kind, spec, head.loss, fit.objective, head.width, head.layers)
    with storage.one_writer(output_dir, "train_deferral"):
        job = _Job(scored, data, config, fit, output_dir, data_mesh(devices), observer)
        columns = {name: job.collect(name) for name in ("fit", "held_out")}
        both = columns_lib.joined(columns["fit"], columns["held_out"])
        fits = job.fit(both)
        fitted_calibrations = job.calibrate(calibrations, both)
        test = job.collect("test", fitted_calibrations)
        manifest = bundles.read_manifest(source)
        about = {
            config.kind: {
                "fit": dataclasses.asdict(fit), "loss": config.loss, "left_out": fits[0].left_out, "seed": fits[0].seed,
                "examples": {name: len(chosen) for name, chosen in job.splits.items()},
            }
        }  # fmt: skip
        drafter, verifier = (deferral_files.member_fingerprint(manifest, name) for name in ("drafter", "verifier"))
        fitted = Fitted(
            {config.kind: fits[0].head},
            fitted_calibrations,
            drafter,
            verifier,
            loaded.vocabulary.fingerprint(),
            json.loads(storage.to_json(about)),
        )
        bundle = _store(source, output_dir / "bundle", fitted)
        summary = _summary(job, fits, fitted_calibrations, columns)
        storage.write_json(output_dir / SUMMARY_FILE, summary)
        if config_text:
            storage.write_text(output_dir / "config.gin", config_text)
        return Trained(bundle, fitted, fits, test, columns["held_out"], job.classes, summary)


def trained_on(manifest: Mapping[str, Any], task: str, split: str) -> str:
    """A warning if the pair was trained on the split of the examples; empty if nothing indicates that.

    Args:
      manifest: manifest of the bundle; its optional "trained_on" lists {"task", "split"}.
      task: task of the examples.
      split: split of the examples.
    """
    why = "there its models know the answers, so a head learns from cases that do not come back: use a held-out split"
    noted = manifest.get("trained_on")
    if isinstance(noted, list) and {"task": task, "split": split} in noted:
        return f"the pair was trained on the split {split!r} of {task!r}; {why}"
    if not noted and split.startswith("train"):
        return f"the split of {task!r} is called {split!r}; if the pair was trained on it, {why}"
    return ""


class _Job:
    """One call of `train_deferral`."""

    def __init__(
        self,
        scored: Scored,
        data: Data,
        config: HeadConfig,
        fit: FitConfig,
        folder: Path,
        mesh: Mesh,
        observer: Observer,
    ):
        self.scored, self.data, self.config, self.fit_config = scored, data, config, fit
        self.folder, self.mesh, self.observer = folder, mesh, observer
        self.corpus = data.corpus(scored.vocabulary)
        self.splits = collection.split(len(self.corpus), data.shares, data.seed)
        self.classes = pair_scores.token_classes(scored.vocabulary, scored.width)

    def collect(self, name: str, calibrations: Mapping[str, PairCalibration] | None = None) -> dict[str, np.ndarray]:
        """Columns of a split, from disk if they are complete there."""
        folder = collection.collect(
            self.scored,
            self.corpus,
            self.splits[name].tolist(),
            self.folder / "columns" / name,
            self.config.features,
            candidates=self.config.kind == "token",
            scores=calibrated_scores(calibrations or {}),
            identity=fit_store.digest(calibrations or {}),
            lengths=(self.data.inputs_len, self.data.targets_len),
            batch_size=-(-self.data.batch_size // self.mesh.size) * self.mesh.size,
            batches_per_part=self.data.batches_per_part,
            mesh=self.mesh,
            progress=functools.partial(self.observer.collecting, name),
        )
        return collection.read(folder)

    def fit(self, columns: dict[str, np.ndarray]) -> list[fitting.Fit]:
        """Fits every seed, each with checkpoints of its own."""
        name = f"{self.config.kind}-{self.fit_config.objective}"
        plain = dataclasses.asdict(self.fit_config)
        plain = {key: value for key, value in plain.items() if key not in ("seeds", "keep")}
        identity = {
            "head": dataclasses.asdict(self.config),
            "fit": plain,
            "columns": {
                split: json.loads((self.folder / "columns" / split / collection.IDENTITY).read_text("utf-8"))
                for split in ("fit", "held_out")
            },
        }
        place, keep = self.folder / name, self.fit_config.keep

        def stores(seed: int) -> fit_store.OrbaxStore:
            return fit_store.OrbaxStore(place / f"seed-{seed}", identity, keep)

        curves = fit_store.Curves(self.folder / METRICS_FILE, self.observer)
        return fitting.fit_head(self.config, self.fit_config, columns, self.classes, store=stores, observer=curves)

    def calibrate(self, kinds: Sequence[str], columns: dict[str, np.ndarray]) -> dict[str, PairCalibration]:
        """Fits calibrations on the data of the head, or reads those that an earlier part of this run has fitted."""
        place = self.folder / CALIBRATION_FILE
        if place.is_file():
            known = fit_store.read_calibrations(place)
            if set(known) == set(kinds):
                return known
        sides: dict[str, dict[str, Calibration]] = {}
        lengths = (self.data.inputs_len, self.data.targets_len)
        chosen = np.union1d(self.splits["fit"], self.splits["held_out"]).tolist()
        for side, which in (("q", "drafter"), ("p", "verifier")):
            found: dict[str, Calibration] = {}
            batches = calibration.remembered(
                pair_scores.logits_batches(self.scored, which, self.corpus, chosen, lengths, self.data.batch_size)
            )
            if "temperature" in kinds or "vector" in kinds:
                self.observer.calibrating(f"temperature of the {which}")
                found["temperature"] = calibration.fit_temperature(batches)
            if "vector" in kinds:
                self.observer.calibrating(f"vector scaling of the {which}")
                found["vector"] = calibration.fit_vector(batches, found["temperature"])
            if "isotonic" in kinds:
                confidence = columns["features"][:, self.config.features.names.index(f"max_{side}")]
                found["isotonic"] = calibration.fit_isotonic(confidence, columns[f"hit_{side}"])
            sides[side] = found
        fitted = {kind: PairCalibration(sides["q"][kind], sides["p"][kind]) for kind in kinds}
        fit_store.write_calibrations(place, fitted)
        return fitted


def calibrated_scores(calibrations: Mapping[str, PairCalibration]) -> dict[str, Any]:
    """Per-position figures of the test split, which the calibrated plug-in rules and the diagrams read."""
    found: dict[str, Any] = {}
    for kind, both in calibrations.items():
        found[f"{kind}_zero_one"] = lambda pair, both=both: both.gap(pair, "zero_one")
        if kind != "isotonic":
            found[f"{kind}_log"] = lambda pair, both=both: both.gap(pair, "log")
        for side in "qp":
            own = getattr(both, side)
            found[f"{kind}_confidence_{side}"] = lambda pair, own=own, side=side: own.confidence(
                getattr(pair, f"{side}_raw")
            )
    return found


def _store(source: Path, target: Path, fitted: Fitted) -> Path:
    """Writes the bundle with head and calibrations, replacing one that an earlier part of this run has written."""
    if (target / bundles.MANIFEST).is_file():
        return bundles.store_deferral(target, target, fitted)
    return bundles.store_deferral(source, target, fitted)


def _summary(
    job: _Job, fits: list[fitting.Fit], calibrations: Mapping[str, PairCalibration], columns: Mapping[str, Any]
) -> dict[str, Any]:
    temperatures = {}
    if "temperature" in calibrations:
        of_pair = calibrations["temperature"]
        temperatures = {side: float(getattr(of_pair, side).values["temperature"]) for side in "qp"}
    both = columns_lib.joined(columns["fit"], columns["held_out"])
    gap, said = labels.gap(both, job.config.loss), columns_lib.heard(both, job.config)
    shown = ("seed", "left_out", "first", "kept_at", "steps", "stopped_early")
    return {
        "examples": {name: len(chosen) for name, chosen in job.splits.items()},
        "positions": {name: len(found["tokens"]) for name, found in columns.items()},
        "head": dataclasses.asdict(job.config),
        "positions_learnt_from": int(said.sum()),
        "label_mean": float(gap[said].mean()),
        "label_variance": float(gap[said].var()),
        "seeds": [{name: getattr(each, name) for name in shown} for each in fits],
        "remark": remark(fits[0].head),
        "temperatures": temperatures,
    }
