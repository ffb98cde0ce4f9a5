"""From labels to a bundle that decodes, on a tiny pair: collection, splits, resume, and whose head it is."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from inference import small_pair
from speccascade_t5x.checkpoints import bundle as bundles
from speccascade_t5x.common import paths
from speccascade_t5x.core.rules import Pair
from speccascade_t5x.data import shards
from speccascade_t5x.deferral.fitting import FitConfig
from speccascade_t5x.inference import generate
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary
from speccascade_t5x.training.deferral import collection, pair_scores, train_deferral
from speccascade_t5x.training.deferral.pair_scores import CLASSES, Scored

TEXTS = [f"{'abc' * (i % 3 + 1)} {i}{'Ü,' * (i % 2)}" for i in range(12)]
FIT = FitConfig(steps=4, batch_size=16, eval_every=2, patience=9)
KINDS = ("temperature",)  # random models are wrong at every label, which gives isotonic regression nothing to fit
HEAD = train_deferral.HeadOptions(loss="log", hidden=True, width=4, layers=1)


def corpus() -> shards.Corpus:
    ids = [np.array([*ByteVocabulary().encode(text), 1], np.int32) for text in TEXTS]
    return shards.from_examples(zip(ids, ids[::-1], strict=True), ByteVocabulary())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deferral")
    small_pair.write(folder / "pair", table=True)
    found = corpus()
    examples = [(found.inputs(i), found.targets(i)) for i in range(len(found))]
    shards.write(folder / "cached", examples, name="toy", split="train", spoken=ByteVocabulary())
    return folder


@pytest.fixture(scope="module")
def data(place):
    return train_deferral.Data(
        cached=str(place / "cached"), inputs_len=32, targets_len=16, batch_size=4, batches_per_part=1,
        shares={"fit": 0.5, "held_out": 0.25, "test": 0.25},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(place, data):
    return train_deferral.train_deferral(place / "pair", data, place / "out", HEAD, FIT, KINDS)


@pytest.mark.parametrize(
    ("noted", "source", "said"),
    [
        ({}, ("toy", "validation"), ""),
        ({}, ("toy", "train"), "the split of 'toy' is called 'train'; if the pair was trained on it, there its models"),
        (
            {"trained_on": [{"task": "a", "split": "b"}]},
            ("a", "b"),
            "the pair was trained on the split 'b' of 'a'; there",
        ),
        ({"trained_on": [{"task": "a", "split": "b"}]}, ("other", "train"), ""),  # of another task
    ],
)
def test_a_split_the_pair_was_trained_on_is_named(noted, source, said):
    found = train_deferral.trained_on(noted, *source)
    assert found.startswith(said) and bool(found) == bool(said)


def test_training_data_are_warned_of(place, data, trained):
    told = []

    class Told(train_deferral.Observer):
        def warned(self, text):
            told.append(text)

    assert data.source() == ("toy", "train") and train_deferral.Data(task="t").source() == ("t", "validation")
    train_deferral.train_deferral(place / "pair", data, place / "out", HEAD, FIT, KINDS, observer=Told())
    assert len(told) == 1 and "is called 'train'" in told[0]
    packaged = bundles.read_manifest(paths.pretrained_dir() / "restore_de_pair")
    assert train_deferral.trained_on(packaged, "restore_de", "train")


def test_splits_are_by_example(trained, place):
    columns = place / "out" / "columns"
    seen = [set(collection.read(columns / name)["example"]) for name in ("fit", "held_out", "test")]
    assert [len(each) for each in seen] == [6, 3, 3]
    assert set.union(*seen) == set(range(12))  # so no two share one


def test_columns_are_the_models_own(place, trained):
    """Rows in any order and padding: each position is what the pair says of its prefix alone."""
    found, columns = corpus(), collection.read(place / "out" / "columns" / "fit")
    pair = generate.load(place / "pair")
    example = int(columns["example"][0])
    mine = columns["example"] == example
    np.testing.assert_array_equal(columns["tokens"][mine], found.targets(example)[:16])
    np.testing.assert_array_equal(columns["position"][mine], np.arange(mine.sum()))
    for side, bound in (("q", pair.drafter), ("p", pair.verifier)):
        ids = found.targets(example)[None, :16]
        logits = np.asarray(pair_scores.scored_logits(bound, found.inputs(example)[None], ids)[0], np.float64)[0]
        logits[:, 259:] = -1e10  # ids beyond the vocabulary
        logs = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        wanted = logs[np.arange(mine.sum()), ids[0]]
        np.testing.assert_allclose(columns[f"log_{side}"][mine], np.maximum(wanted, -20), atol=2e-3)
        np.testing.assert_array_equal(columns[f"hit_{side}"][mine], logs.argmax(-1) == ids[0])
        assert columns[f"hidden_{side}"].shape[-1] == 8


def test_token_classes():
    classes = pair_scores.token_classes(ByteVocabulary(), 384)
    name = lambda text: CLASSES[classes[ByteVocabulary().encode(text)[-1]]]  # noqa: E731
    assert [name(text) for text in "aZ7 ,ü"] == [
        "lower case", "upper case", "digit", "space", "punctuation", "other",
    ]  # fmt: skip
    assert {CLASSES[c] for c in (*classes[:3], *classes[259:])} == {"special"}


def test_the_bundle_decodes_with_what_was_fitted(trained):
    pair = generate.load(trained.bundle)
    assert pair.table is not None  # what was there before is there still
    alone = pair.generate(TEXTS[:2], method="verifier", temperature=0.0)
    lossless = pair.generate(TEXTS[:2], rule="learned_gap", alpha=-1e9, temperature=0.0)
    assert [r["tokens"] for r in lossless] == [r["tokens"] for r in alone]
    drafted = pair.generate(TEXTS[:2], rule="learned_gap", alpha=1e9, temperature=0.0)
    assert [r["tokens"] for r in drafted] == [
        r["tokens"] for r in pair.generate(TEXTS[:2], method="drafter", temperature=0.0)
    ]
    pair.generate(TEXTS[:1], rule="calibrated_opt", alpha=0.1)
    with pytest.raises(UserError, match="holds no fitted isotonic calibration"):
        pair.generate(TEXTS[:1], rule="calibrated_opt", alpha=0.1, rule_options={"kind": "isotonic"})
    with pytest.raises(UserError, match="holds no fitted token head"):
        pair.generate(TEXTS[:1], rule="learned_token", alpha=0.1)


def test_the_same_command_again_does_nothing_anew(trained, place, data):
    parts = sorted((place / "out" / "columns").rglob("part-*.npz"))
    before = [part.stat().st_mtime_ns for part in parts]
    lost = parts.pop()
    before.pop()
    lost_bytes = lost.read_bytes()
    (lost.parent / "manifest.json").unlink()  # as if killed before the last part
    lost.unlink()
    again = train_deferral.train_deferral(place / "pair", data, place / "out", HEAD, FIT, KINDS)
    assert [part.stat().st_mtime_ns for part in parts] == before
    assert lost.read_bytes() == lost_bytes
    np.testing.assert_array_equal(*(found.head.gap(_some_pair()) for found in (trained, again)))


def _some_pair() -> Pair:
    """Any pair the head can read."""
    rng = np.random.default_rng(0)
    q, p = rng.dirichlet(np.ones(384), (2, 3)).astype(np.float32)
    hidden = rng.normal(size=(3, 8)).astype(np.float32)
    return Pair(q, p, q, p, position=np.arange(3), hidden_q=hidden, hidden_p=hidden)


def test_a_head_of_another_pair_is_refused(trained, place):
    other = shutil.copytree(trained.bundle, place / "other")
    manifest = json.loads((other / "bundle.json").read_text())
    for part in ("drafter", "vocabulary"):
        changed = json.loads(json.dumps(manifest))
        changed["deferral"][part] = "0" * 64
        (other / "bundle.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"was fitted with another {part} .* fit one for this pair"):
            bundles.load_bundle(other)
    with pytest.raises(UserError, match="was fitted with another drafter"):
        swapped = dataclasses.replace(trained.fitted, drafter="1" * 64)
        bundles.store_deferral(trained.bundle, place / "new", swapped)
    assert not (place / "new").exists()
    (other / "bundle.json").write_text(json.dumps(manifest))
    with np.load(other / "deferral.npz") as file:
        arrays = {name: file[name] for name in file.files}
    kernel = "head/prefix/params/trunk/read/kernel"
    np.savez(other / "deferral.npz", **{**arrays, kernel: arrays[kernel][:-1]})
    with pytest.raises(UserError, match="damaged .*arrays do not fit"):
        bundles.load_bundle(other, verify=False)


def test_what_cannot_be_collected_is_said(place, data, tmp_path):
    pair = generate.load(place / "pair")
    scored = Scored(pair.drafter, pair.verifier, pair.vocabulary)
    spec = pair_scores.spec_of(scored, False)
    with pytest.raises(UserError, match="holds no example"):
        collection.collect(scored, corpus(), [], tmp_path / "a", spec)
    short = shards.from_examples([(np.array([5, 1]), np.array([6, 1]))], ByteVocabulary(3))
    strange = dataclasses.replace(short, vocabulary=_Strange())
    with pytest.raises(UserError, match="labels"):
        collection.collect(scored, strange, [0], tmp_path / "a", spec)
    with pytest.raises(UserError, match="of another .*chosen"):
        collection.collect(scored, corpus(), [0], place / "out" / "columns" / "fit", spec)
    with pytest.raises(UserError, match="the test split of 2 examples is empty"):
        collection.split(2, {"fit": 0.5, "held_out": 0.4, "test": 0.1}, 0)
    with pytest.raises(UserError, match="holds a verifier alone"):
        small_pair.write(tmp_path / "one", table=False, drafter=False)
        train_deferral.train_deferral(tmp_path / "one", data, tmp_path / "out")
    with pytest.raises(UserError, match="no fitted head or calibration|needs a fitted head"):
        pair.generate(TEXTS[:1], rule="learned_gap", alpha=0.1)


class _Strange(ByteVocabulary):
    """Other pieces under the same numbers."""

    @property
    def pieces(self):
        return (*super().pieces[:100], "<other>", *super().pieces[101:])
