"""Learned deferral under known distortions: the realised objective of every rule, on one machine, by one command.

    python benchmarks/deferral.py --output=results/deferral --examples=600

A (the ceiling is known): tokens are sampled from P, the verifier as trained at temperature 1; then drafter and verifier
are distorted. The exact Bayes rule is computed from P. B (real references): the labels are the task's targets; nobody
knows P, and the label oracle, which knows the token to come, is shown and unreachable.

Every distortion here changes the models themselves, and so the laws that are sampled, except "verifier read at ...",
which changes only what a rule reads. Two settings of B take a member that was trained further on purpose
(`further_trained.py`); the members are kept in a folder and not trained again. The ten alphas of each setting are
fixed on the held-out examples, at the 5 % to 95 % deferral quantiles of plug-in OPT.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import further_trained
import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.common import storage
from speccascade_t5x.core import noise, probs
from speccascade_t5x.core.rules import Pair
from speccascade_t5x.data import shards
from speccascade_t5x.deferral import FeatureSpec, Head, HeadConfig, PairCalibration, calibration, columns, fitting
from speccascade_t5x.deferral.head import fresh, network
from speccascade_t5x.evaluation import deferral_report
from speccascade_t5x.inference import generate
from speccascade_t5x.interfaces import Array, Bound
from speccascade_t5x.tasks import folding
from speccascade_t5x.training.deferral import pair_scores, train_deferral
from speccascade_t5x.training.deferral.pair_scores import CLASSES, Scored

# Temperatures by class of the likeliest token: sure of letters without reason, too modest about the rest.
_BY_CLASS = (1.0, 0.5, 2.5, 0.6, 0.5, 2.5, 1.5)
_SHARES = {"fit": 0.7, "held_out": 0.1, "test": 0.2}
_LEVELS = ("temperature", "vector", "isotonic")


@dataclasses.dataclass(frozen=True)
class Distortion:
    """A function of logits.

    Attributes:
      kind: "temperature": logits / values[0]. "by_class": positions whose most likely token is of class c are divided
        by values[c]. "slice": logits do not change in rows whose input holds a token of `members`; elsewhere each
        token gets a fixed bias, drawn once with deviation values[1], and the sum is divided by values[0].
      values: temperatures; of a slice, temperature and deviation.
      classes: class of each token, for "by_class".
      members: token ids, for "slice".
    """

    kind: str
    values: tuple[float, ...]
    classes: tuple[int, ...] = ()
    members: tuple[int, ...] = ()

    def apply(self, logits: Array, inside: Array) -> Array:
        """[B, T, V] -> [B, T, V]; `inside` [B] bool, for "slice": rows that do not change."""
        logits = logits.astype(jnp.float32)
        if self.kind == "temperature":
            return logits / self.values[0]
        if self.kind == "slice":
            bias = self.values[1] * jax.random.normal(noise.from_seed(0), logits.shape[-1:])
            return jnp.where(inside[:, None, None], logits, (logits + bias) / self.values[0])
        kind = jnp.take(jnp.asarray(self.classes), jnp.argmax(logits, axis=-1))
        return logits / jnp.take(jnp.asarray(self.values, jnp.float32), kind)[..., None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One distortion.

    Attributes:
      name: for people.
      drafter, verifier: what is done to their logits, before anything reads or samples them.
      verifier_read: temperature at which a rule reads the verifier, which is sampled as it is; None for the same.
      trained: (role, how): a member that is trained further, see `further_trained`; None for the pair as it is.
    """

    name: str
    drafter: Distortion | None = None
    verifier: Distortion | None = None
    verifier_read: float | None = None
    trained: tuple[str, Callable[..., Bound]] | None = None

    @property
    def changes(self) -> str:
        """What the distortion changes."""
        if self.verifier_read is not None:
            return "only what the rule reads"
        changed = self.drafter or self.verifier or self.trained
        return "the sampled laws" if changed else "nothing"


def settings(experiment: str, classes: np.ndarray, members: tuple[int, ...]) -> list[Setting]:
    """The settings of an experiment."""
    at = lambda value: Distortion("temperature", (value,))  # noqa: E731
    by_class = Distortion("by_class", _BY_CLASS, classes=tuple(classes.tolist()))
    good_on_a_slice = Distortion("slice", (0.6, 1.5), members=members)
    if experiment == "A":
        return [
            Setting("as trained"),
            Setting("both sharpened (0.5)", at(0.5), at(0.5)),
            Setting("verifier flattened (2)", None, at(2.0)),
            Setting("temperature by token class, both", by_class, by_class),
            Setting("drafter good on one slice", good_on_a_slice, None),
        ]
    return [
        Setting("as trained"),
        Setting("verifier at 0.5", None, at(0.5)),
        Setting("verifier at 2", None, at(2.0)),
        Setting("verifier read at 2", verifier_read=2.0),
        Setting("drafter sharpened (0.5)", at(0.5), None),
        Setting("drafter fine-tuned on games", trained=("drafter", further_trained.slice_drafter)),
        Setting("verifier trained with label noise", trained=("verifier", further_trained.noisy_verifier)),
    ]


@dataclasses.dataclass(frozen=True)
class Logits:
    """Both models' logits over batches of one shape, computed once for all settings.

    Attributes:
      batches: inputs and labels.
      q, p: logits of drafter and verifier.
      inside: rows a "slice" leaves alone.
      calibrated: calibrations of undistorted logits, by what was fitted on, so that settings share them.
    """

    batches: list[pair_scores.Batch]
    q: list[np.ndarray]
    p: list[np.ndarray]
    inside: list[np.ndarray]
    calibrated: dict[tuple[int, float], dict[str, Any]] = dataclasses.field(default_factory=dict)


def score(scored: Scored, corpus: shards.Corpus, members: tuple[int, ...], batch_size: int) -> Logits:
    """Runs both models over a corpus, teacher-forced, all batches padded to one shape."""
    lengths = (int(corpus.input_lengths.max()), int(corpus.target_lengths.max()))
    made = pair_scores.batches(corpus, range(len(corpus)), batch_size, lengths)
    widths = [max(getattr(batch, side).shape[1] for batch in made) for side in ("inputs", "targets")]
    grown = lambda ids, width: np.pad(ids, ((0, 0), (0, width - ids.shape[1])))  # noqa: E731
    made = [
        dataclasses.replace(batch, inputs=grown(batch.inputs, widths[0]), targets=grown(batch.targets, widths[1]))
        for batch in made
    ]
    q, p = (logits_of(bound, made, scored) for bound in (scored.drafter, scored.verifier))
    inside = [np.isin(batch.inputs, members).any(axis=1) for batch in made]
    return Logits(made, q, p, inside)


def logits_of(bound: Bound, batches: list[pair_scores.Batch], scored: Scored) -> list[np.ndarray]:
    """One model's logits of each batch."""
    size = scored.vocabulary.vocab_size
    run = jax.jit(
        lambda bound, inputs, targets: probs.mask_vocabulary(pair_scores.scored_logits(bound, inputs, targets)[0], size)
    )
    return [np.asarray(run(bound, batch.inputs, batch.targets)) for batch in batches]


def only(logits: Logits, q: list, p: list, chosen: np.ndarray) -> tuple[Logits, list, list]:
    """The rows of some examples, in batches of the same shape, and their distorted logits q and p."""
    size = len(logits.batches[0].ids)
    ids = np.concatenate([batch.ids for batch in logits.batches])
    at = np.flatnonzero(np.isin(ids, chosen))
    fillers = -len(at) % size
    at = np.pad(at, (0, fillers))

    def cut(parts: list) -> list[np.ndarray]:
        rows = np.concatenate(parts)[at]
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    names = ("inputs", "targets", "lengths", "ids")
    parts = [cut([getattr(batch, name) for batch in logits.batches]) for name in names]
    made = [pair_scores.Batch(*each) for each in zip(*parts, strict=True)]
    made[-1].ids[size - fillers :] = -1
    few = Logits(made, cut(logits.q), cut(logits.p), cut(logits.inside))
    return few, cut(q), cut(p)


def distorted(logits: Logits, setting: Setting) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Both models' logits under a setting."""

    def change(which: list[np.ndarray], distortion: Distortion | None) -> list[np.ndarray]:
        if distortion is None:
            return which
        run = jax.jit(distortion.apply)
        return [np.asarray(run(each, inside)) for each, inside in zip(which, logits.inside, strict=True)]

    return change(logits.q, setting.drafter), change(logits.p, setting.verifier)


class Columns:
    """Columns of any setting from one compiled program."""

    def __init__(self, scored: Scored, spec: FeatureSpec, classes: np.ndarray, known: bool):
        self._run = jax.jit(self._of, static_argnames=())
        self._scored, self._spec, self._classes, self._known = scored, spec, jnp.asarray(classes), known

    def _of(self, q, p, read_q, read_p, truth, targets, calibrations):
        pair = pair_scores.pair_from_logits(q, p, self._scored)
        size = self._scored.vocabulary.vocab_size
        read = dataclasses.replace(pair, q_raw=probs.raw(read_q, size), p_raw=probs.raw(read_p, size))
        known = probs.raw(truth, size) if self._known else None
        found = pair_scores.columns_of(
            read, self._spec, self._classes, targets, False, train_deferral.calibrated_scores(calibrations), known
        )
        # Losses and distance are those of the laws that are sampled; argmaxes are the same in both.
        own = pair_scores.columns_of(pair, self._spec, self._classes, targets)
        return found | {name: own[name] for name in ("log_q", "log_p", "hit_q", "hit_p", "distance")}

    def __call__(self, logits: Logits, q, p, setting: Setting, calibrations: dict[str, PairCalibration]) -> dict:
        """Flat columns of all batches."""
        parts = []
        for i, batch in enumerate(logits.batches):
            read_p = p[i] if setting.verifier_read is None else p[i] / setting.verifier_read
            found = self._run(q[i], p[i], q[i], read_p, logits.p[i], batch.targets, calibrations)
            parts.append(pair_scores.flat(jax.device_get(found), batch))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def calibrate(
    logits: Logits, q: list, p: list, fit: dict, chosen: np.ndarray, spec: FeatureSpec, setting: Setting
) -> dict[str, PairCalibration]:
    """Temperature, vector scaling and isotonic regression of both models, on the examples the head is fitted on."""
    sides: dict[str, dict[str, Any]] = {}
    for side, values in (("q", q), ("p", p)):
        read = 1.0 if side == "q" or setting.verifier_read is None else setting.verifier_read
        untouched = values is getattr(logits, side)
        if untouched and (id(values), read) in logits.calibrated:
            sides[side] = logits.calibrated[id(values), read]
            continue

        def again(values: list = values, read: float = read) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch, each in zip(logits.batches, values, strict=True):
                real = np.arange(batch.targets.shape[1]) < batch.lengths[:, None]
                real &= np.isin(batch.ids, chosen)[:, None]
                yield each.reshape(-1, each.shape[-1]) / read, np.where(real, batch.targets, -1).ravel()

        found = {"temperature": calibration.fit_temperature(again)}
        found["vector"] = calibration.fit_vector(again, found["temperature"])
        confidence = fit["features"][:, spec.names.index(f"max_{side}")]
        found["isotonic"] = calibration.fit_isotonic(confidence, fit[f"hit_{side}"])
        sides[side] = found
        if untouched:
            logits.calibrated[id(values), read] = found
    return {kind: PairCalibration(sides["q"][kind], sides["p"][kind]) for kind in _LEVELS}


def corpus_of(pair: generate.LoadedPair, flags: argparse.Namespace, sampled: bool) -> shards.Corpus:
    """Examples of restore_de: the targets, or tokens the verifier samples at temperature 1."""

    texts = further_trained.german(flags.split)[: flags.examples]
    if not sampled:
        return further_trained.corpus(pair.vocabulary, texts)
    how = generate.make_settings(method="verifier", batch_size=flags.batch)
    folded = [folding.fold(text) for text in texts]
    written = pair.run(folded, how)
    return shards.from_examples(
        (
            (np.array(further_trained.ids(pair.vocabulary, text), np.int32), np.array(record["tokens"], np.int32))
            for text, record in zip(folded, written.records, strict=True)
        ),
        pair.vocabulary,
    )


def run_setting(
    experiment: str, setting: Setting, logits: Logits, collect: Columns, spec: FeatureSpec, flags: argparse.Namespace,
    classes: np.ndarray, examples: int,
) -> dict[str, Any]:  # fmt: skip
    """Fits, calibrates and evaluates under one distortion."""
    q, p = distorted(logits, setting)
    splits = collect.split(examples, _SHARES, 0)
    plain = collect(logits, q, p, setting, {})
    at = lambda found, name: {k: v[np.isin(found["example"], splits[name])] for k, v in found.items()}  # noqa: E731
    held_out = at(plain, "held_out")
    fit, chosen = columns.joined(at(plain, "fit"), held_out), np.union1d(splits["fit"], splits["held_out"])
    config = HeadConfig("prefix", spec, flags.loss)
    how = fitting.FitConfig(
        objective=flags.objective, steps=flags.steps, batch_size=flags.minibatch, seeds=tuple(range(flags.seeds))
    )
    best = fitting.fit_head(config, how, fit, classes)[0]
    fitted = calibrate(logits, q, p, fit, chosen, spec, setting)
    test = at(collect(*only(logits, q, p, splits["test"]), setting, fitted), "test")
    return deferral_report.evaluate(test, held_out, spec.names, flags.loss, best.head)


def line(experiment: str, setting: Setting, report: dict[str, Any]) -> str:
    """A row of the summary table."""
    curves, count = report["curves"], len(report["alphas"])
    mean = lambda estimates: sum(estimates[1:], estimates[0]) / count  # noqa: E731

    def shown(estimate: Any) -> str:
        return f"{1e3 * estimate.value:+.2f} [{1e3 * estimate.low:+.2f}, {1e3 * estimate.high:+.2f}]"

    against = {name: mean(curve.against) for name, curve in curves.items()}
    calibrated = {name: against[name] for name in against if name.endswith(" OPT") and name != deferral_report.PLUG_IN}
    best = min(calibrated, key=lambda name: calibrated[name].value)
    learned = against[deferral_report.LEARNED]
    part = report["recovered"].get(deferral_report.LEARNED, [None])[-1]
    cells = [
        experiment, setting.name, setting.changes, shown(learned),
        *(shown(calibrated[f"{kind} OPT"]) for kind in _LEVELS), f"{shown(learned - calibrated[best])} ({best})",
        shown(against[deferral_report.EXACT]) if deferral_report.EXACT in against else "unknown",
        "-" if part is None else f"{100 * part:.0f} %", shown(against[deferral_report.ORACLE]),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def cost_share(pair: generate.LoadedPair, spec: FeatureSpec, drafts: int = 5) -> tuple[float, float]:
    """Floating-point operations of (network, network and features) over those of a verifier block, one row."""
    config = HeadConfig("prefix", spec)
    head = Head(config, fresh(config, jax.random.key(0)), jnp.zeros(pair.verifier.model.vocab_size, jnp.int32))
    width, size = pair.verifier.model.vocab_size, drafts + 1
    law = jnp.ones((1, size, width)) / width
    hidden = {name: jnp.zeros((1, size, getattr(spec, name))) for name in ("hidden_q", "hidden_p")}
    both = Pair(law, law, law, law, position=jnp.zeros((1, size)), **hidden)
    inputs = pair.verifier.model.inputs(jnp.ones((1, pair.feature_lengths["inputs"]), jnp.int32))
    room = pair.feature_lengths["targets"] + size
    start = lambda bound: bound.model.start(bound.params, inputs, 1, room)  # noqa: E731
    cache = jax.eval_shape(start, pair.verifier)
    block = lambda bound, cache, ids, at: bound.model.extend(bound.params, cache, ids, at)[0]  # noqa: E731
    read = jnp.zeros((1, size, len(spec.names)))
    states = jnp.zeros((1, size, spec.hidden)) if spec.hidden else None
    flops = lambda fn, *given: jax.jit(fn).lower(*given).cost_analysis()["flops"]  # noqa: E731
    whole = flops(block, pair.verifier, cache, jnp.zeros((1, size), jnp.int32), jnp.zeros(1, jnp.int32))
    alone = lambda head, read, states: network(config).apply(head.variables, read, states)  # noqa: E731
    return flops(alone, head, read, states) / whole, flops(lambda head, pair: head.gap(pair), head, both) / whole


HEADER = [
    "Objective minus plug-in OPT's, mean over ten alphas, in thousandths per token, with 95 % intervals over examples;",
    "lower is better. The label oracle knows the token to come: no rule can reach it.",
    "",
    "| | setting | the distortion changes | learned gap | temperature | vector | isotonic |"
    " learned minus best calibrated | exact Bayes | recovered | label oracle |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
]


def main(argv: list[str]) -> None:
    """Runs both experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="restore_de_pair")
    parser.add_argument("--split", default="validation", help="texts the pair was not trained on")
    parser.add_argument("--output", default="results/deferral", help="folder of the table, and of plots per setting")
    parser.add_argument("--experiments", default="AB")
    parser.add_argument("--only", default="", help="only settings whose name holds this")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--loss", default="zero_one")
    parser.add_argument("--objective", default="squared")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minibatch", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--models", default="deferral-models", help="folder of the members that are trained further")
    parser.add_argument("--train_steps", type=int, default=300, help="updates of such a member")
    flags = parser.parse_args(argv)
    pair, rows, begin = generate.load(flags.pair), list(HEADER), time.perf_counter()
    scored = Scored(pair.drafter, pair.verifier, pair.vocabulary)
    classes = pair_scores.token_classes(pair.vocabulary, scored.width)
    marks = tuple(np.flatnonzero(classes == CLASSES.index("punctuation")).tolist())
    spec = FeatureSpec(classes=len(CLASSES))
    tell: Callable[[str], None] = lambda text: print(f"{time.perf_counter() - begin:6.0f} s  {text}", flush=True)  # noqa: E731
    for hidden in (False, True):
        shares = cost_share(pair, pair_scores.spec_of(scored, hidden))
        what = "with hidden states" if hidden else "without hidden states"
        tell(f"operations of a head {what}, of a verifier block of 6: network {100 * shares[0]:.2f} %, "
             f"features and network {100 * shares[1]:.2f} %")  # fmt: skip
    for experiment in flags.experiments:
        corpus = corpus_of(pair, flags, sampled=experiment == "A")
        tell(f"{experiment}: {len(corpus)} examples, {int(corpus.target_lengths.sum())} tokens")
        logits, kept = score(scored, corpus, marks, flags.batch), []
        tell(f"{experiment}: both models scored them")
        collect = Columns(scored, spec, classes, known=experiment == "A")
        for setting in settings(experiment, classes, marks):
            if flags.only not in setting.name:
                continue
            words = setting.name.replace("(", " ").replace(")", " ").replace(",", " ").split()
            folder = Path(flags.output) / "-".join([experiment, *words])
            own = logits
            if setting.trained is not None:
                role, train = setting.trained
                member = train(pair, Path(flags.models) / "-".join(words), flags.train_steps)
                side = {"drafter": "q", "verifier": "p"}[role]
                own = dataclasses.replace(logits, **{side: logits_of(member, logits.batches, scored)})
                kept.append(own)  # so that no later list gets the id its calibrations are known by
            report = run_setting(experiment, setting, own, collect, spec, flags, classes, len(corpus))
            deferral_report.write(folder, report, f"{experiment}: {setting.name}")
            rows.append(line(experiment, setting, report))
            tell(rows[-1])
            about = f"{len(corpus)} examples, {flags.steps} steps, loss {flags.loss}, objective {flags.objective}."
            storage.write_text(Path(flags.output) / "table.md", "\n".join([*rows, "", about]) + "\n")
    print("\n".join(rows))
    print(json.dumps(vars(flags)))


if __name__ == "__main__":
    main(sys.argv[1:])
