"""What a pair for `restore_de` is worth: likelihood, calibration, agreement of the two models, quality on novel text.

    SPECCASCADE_L10N_DIR=corpus python benchmarks/pair.py [--pair restore_de_pair] [--against OTHER] [--output FILE]

Two parts, printed as Markdown:

1. Teacher-forced on the validation split: NLL and accuracy per byte, expected calibration error of the most likely
   byte (15 bins), and how the two models agree: E[sum min(p, q)], which is the acceptance rate of lossless
   speculation at temperature 1, and the share of bytes at which both rank the same byte first.
2. Greedy outputs on the test split: whole strings right, by the similarity of the nearest training item
   (`test_nearest.tsv.gz` of the corpus), for both models and for the input given back as it is.

--against, with a second pair of the same vocabulary (another seed of the recipe, say), prints both and what the first
is above the second, with paired 95 % intervals over texts.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np

from speccascade_t5x.deferral import calibration
from speccascade_t5x.evaluation import statistics
from speccascade_t5x.inference import generate
from speccascade_t5x.interfaces import Array, Bound
from speccascade_t5x.tasks import l10n
from speccascade_t5x.tasks.folding import fold
from speccascade_t5x.text.vocabulary import Vocabulary

BINS = ((0.0, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.01))
Rows = Sequence[tuple[str, float]]  # German text, similarity of the nearest training item
Measured = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # of every validation byte; of every test string


def rows(split: str, longest: int, limit: int | None) -> Rows:
    """The German texts of the task, with their similarity to training data where the corpus tells (else NaN)."""
    folder = l10n.corpus_dir()
    lines = l10n.read_rows(folder / f"{split}.tsv.gz")
    near = [float("nan")] * len(lines)
    beside = folder / f"{split}_nearest.tsv.gz"
    if beside.is_file():
        with gzip.open(beside, "rt", encoding="utf-8") as file:
            near = [float(line.split("\t")[0]) for line in file]
    found = [(row.de, s) for row, s in zip(lines, near, strict=True) if len(row.de.encode()) < longest]
    return found[:limit]


def padded(texts: Sequence[str], vocabulary: Vocabulary, length: int, end: bool) -> np.ndarray:
    """Ids [N, length], cut to fit, with EOS where it fits."""
    out = np.zeros((len(texts), length), np.int32)
    for i, text in enumerate(texts):
        ids = [*vocabulary.encode(text), *([vocabulary.eos_id] if end else [])][:length]
        out[i, : len(ids)] = ids
    return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(drafter: Any, verifier: Any, params: Any, encoder: Array, targets: Array) -> dict[str, Array]:
    """Figures of each target byte, [B, T]: both models' NLL, most likely byte and its probability; sum min(p, q)."""
    shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    found, laws = {}, {}
    for name, model in (("drafter", drafter), ("verifier", verifier)):
        logits = model.module.apply({"params": params[name]}, encoder, shifted, targets)
        laws[name] = jax.nn.softmax(logits)
        found[f"{name}_nll"] = -jnp.log(jnp.take_along_axis(laws[name], targets[..., None], -1)[..., 0])
        found[f"{name}_top"], found[f"{name}_max"] = laws[name].argmax(-1), laws[name].max(-1)
    return found | {"overlap": jnp.minimum(laws["drafter"], laws["verifier"]).sum(-1)}


def teacher_forced(pair: generate.LoadedPair, texts: Sequence[str], batch: int) -> dict[str, np.ndarray]:
    """`score` over texts: every counted byte, in one row; "target" beside it, and "text", its text's number."""
    lengths, pieces = pair.feature_lengths, pair.vocabulary
    encoder = padded([fold(text) for text in texts], pieces, lengths["inputs"], True)
    targets = padded(texts, pieces, lengths["targets"], True)
    models: dict[str, Bound] = {"drafter": pair.drafter, "verifier": pair.verifier}
    params = {name: bound.params for name, bound in models.items()}
    parts = []
    for at in range(0, len(texts), batch):
        rest = slice(at, at + batch)
        fill = ((0, batch - len(encoder[rest])), (0, 0))
        inputs = np.pad(encoder[rest], fill), np.pad(targets[rest], fill)
        parts.append(score(models["drafter"].model, models["verifier"].model, params, *inputs))
    found = {name: np.concatenate([np.asarray(part[name]) for part in parts])[: len(texts)] for name in parts[0]}
    counted = targets > 0
    about = {"target": targets[counted], "text": np.nonzero(counted)[0]}
    return {name: value[counted] for name, value in found.items()} | about


def likelihood(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means over the bytes."""
    about: dict[str, Any] = {"bytes": len(found["target"]), "overlap": float(found["overlap"].mean())}
    about["same_first"] = float((found["drafter_top"] == found["verifier_top"]).mean())
    hits = {name: found[f"{name}_top"] == found["target"] for name in ("drafter", "verifier")}
    about["drafter_alone_right"] = float((hits["drafter"] & ~hits["verifier"]).mean())
    about["verifier_alone_right"] = float((hits["verifier"] & ~hits["drafter"]).mean())
    for name, right in hits.items():
        about[name] = {
            "nll": float(found[f"{name}_nll"].mean()),
            "accuracy": float(right.mean()),
            "ece": calibration.expected_error(found[f"{name}_max"], right),
        }
    return about


def restored(pair: generate.LoadedPair, texts: Rows, batch: int) -> dict[str, np.ndarray]:
    """Which whole strings are right, [texts] bool: of each model's greedy output, and of the inputs as they are."""
    inputs = [fold(text) for text, _ in texts]
    outputs = {"input as it is": inputs}
    for method in ("drafter", "verifier"):
        records = pair.generate(inputs, method=method, temperature=0.0, batch_size=batch, truncate=True)
        outputs[method] = [record["prediction"] for record in records]
    return {name: np.asarray([a == b for a, (b, _) in zip(o, texts, strict=True)]) for name, o in outputs.items()}


def by_similarity(right: dict[str, np.ndarray], texts: Rows) -> dict[str, Any]:
    """Shares of `restored` by similarity bin, and of all."""
    near = np.asarray([similarity for _, similarity in texts])
    parts = {f"{low:g} to {min(high, 1):g}": (near >= low) & (near < high) for low, high in BINS}
    parts = {name: inside for name, inside in parts.items() if inside.any()} | {"all": np.ones(len(texts), bool)}
    return {
        name: {"items": int(inside.sum()), **{who: float(r[inside].mean()) for who, r in right.items()}}
        for name, inside in parts.items()
    }


def differences(ours: Measured, theirs: Measured) -> dict[str, statistics.Estimate]:
    """Our figures minus theirs, each with its paired interval over texts."""
    (found, right), (others, other_right) = ours, theirs
    if not np.array_equal(found["text"], others["text"]) or len(right["verifier"]) != len(other_right["verifier"]):
        raise SystemExit("the two pairs do not read the same texts: their vocabularies or longest inputs differ")
    texts, counts = np.unique(found["text"], return_counts=True)
    made = {}
    for label, column in (
        ("verifier: NLL per byte", "verifier_nll"),
        ("drafter: NLL per byte", "drafter_nll"),
        ("E[sum min(p, q)]", "overlap"),
    ):
        gained = np.bincount(found["text"], found[column] - others[column])
        made[label] = statistics.Bootstrap(len(texts)).ratio(gained, counts)
    for name in ("verifier", "drafter"):
        made[f"{name}: whole test strings right"] = statistics.paired_difference(right[name], other_right[name])
    return made


def measured(name: str, limit: int | None, batch: int) -> tuple[Measured, dict[str, Any]]:
    """Measures one pair and prints it. Returns what was found of every byte and text, and the figures."""
    pair = generate.load(name)
    longest = pair.feature_lengths["inputs"]
    validation, tests = (rows(split, longest, limit) for split in ("validation", "test"))
    found = teacher_forced(pair, [text for text, _ in validation], batch)
    about = likelihood(found)
    print(f"Validation, {len(validation):,} texts, {about['bytes']:,} bytes:\n")
    print("| | NLL per byte (nats) | accuracy per byte | calibration error |\n|---|---|---|---|")
    for who in ("verifier", "drafter"):
        figures = about[who]
        print(f"| {who} | {figures['nll']:.4f} | {figures['accuracy']:.2%} | {figures['ece']:.4f} |")
    print(f"\nE[sum min(p, q)] {about['overlap']:.4f}; both put the same byte first {about['same_first']:.2%}")
    alone = [f"{who} {about[f'{who}_alone_right']:.2%}" for who in ("drafter", "verifier")]
    print(f"right where the other is wrong: {', '.join(alone)}\n")
    right = restored(pair, tests, batch)
    table = by_similarity(right, tests)
    print("Test, whole strings right, by similarity of the nearest training item:\n")
    print(f"| similarity | texts | {' | '.join(right)} |\n|{'---|' * (len(right) + 2)}")
    for part, cells in table.items():
        print(f"| {part} | {cells['items']} | {' | '.join(f'{cells[who]:.1%}' for who in right)} |")
    return (found, right), {"likelihood": about, "restored": table}


def main() -> None:
    """Measures, prints, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="restore_de_pair", help="a bundle's folder, or the name of a packaged one")
    parser.add_argument("--against", help="a second pair, to compare with")
    parser.add_argument("--limit", type=int, help="only the first so many texts of each split")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    print(f"{machine.name()}\n")
    found, figures = measured(options.pair, options.limit, options.batch)
    figures = {"machine": machine.name(), **figures}
    if options.against:
        print(f"\n{options.against}\n")
        others, figures["against"] = measured(options.against, options.limit, options.batch)
        print(f"\n| {options.pair} minus {options.against} | difference | 95 % interval |\n|---|---|---|")
        for name, each in differences(found, others).items():
            print(f"| {name} | {each.value:+.4f} | {each.low:+.4f} to {each.high:+.4f} |")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
