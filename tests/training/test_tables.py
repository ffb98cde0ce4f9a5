"""n-gram tables: counted from shards or a task, kept in a bundle, read as a language model."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from inference import small_pair
from speccascade_t5x.checkpoints import bundle
from speccascade_t5x.data import shards
from speccascade_t5x.drafting import build_table
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models import ngram_model
from speccascade_t5x.text.vocabulary import ByteVocabulary
from speccascade_t5x.training import tables

TARGETS = [[*ByteVocabulary().encode(text), 1] for text in small_pair.TEXTS]


@pytest.fixture
def plain(tmp_path):
    """A bundle without a table, as bundles were before there were tables."""
    folder = small_pair.write(tmp_path / "plain", table=False)
    assert "ngrams" not in bundle.read_manifest(folder)
    return folder


@pytest.fixture
def cached(tmp_path):
    """The texts as shards."""
    examples = ((np.array([5, 1]), np.array(ids)) for ids in TARGETS)
    shards.write(tmp_path / "cached", examples, name="letters", split="train", spoken=ByteVocabulary())
    return tmp_path / "cached"


def assert_same_table(found, wanted):
    for field in dataclasses.fields(wanted):
        ours, theirs = getattr(found, field.name), getattr(wanted, field.name)
        assert (ours is None) == (theirs is None), field.name
        if theirs is not None:
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)


@pytest.mark.parametrize("order", [2, 3])
def test_from_shards_into_a_bundle_of_its_own(plain, cached, tmp_path, order):
    built = tables.tables(plain, tmp_path / "with", cached=cached, order=order)
    assert (built.about["order"], built.about["sequences"], built.about["tokens"]) == (order, 3, sum(map(len, TARGETS)))
    assert built.stored_bytes > 0
    assert bundle.load_bundle(plain).table is None
    loaded = bundle.load_bundle(built.bundle)
    assert_same_table(loaded.table, build_table(TARGETS, 384, order=order))
    assert bundle.read_manifest(built.bundle)["ngrams"]["source"] == "shards cached"


def test_a_task_counts_its_targets(plain, corpus, tmp_path):
    from corpora import ROWS
    from speccascade_t5x.tasks import l10n  # noqa: F401

    built = tables.tables(plain, tmp_path / "with", task="restore_de", split="train", order=2, limit=2)
    german = [[*ByteVocabulary().encode(text), 1] for _, text, _ in ROWS[:2]]
    assert_same_table(bundle.load_bundle(built.bundle).table, build_table(german, 384, order=2))


def test_the_pairs_own_folder_takes_a_new_table(plain, cached):
    tables.tables(plain, plain, cached=cached, order=2)
    again = tables.tables(plain, plain, cached=cached, order=3, limit=1)
    assert_same_table(bundle.load_bundle(plain).table, build_table(TARGETS[:1], 384, order=3))
    assert again.about["sequences"] == 1
    assert not list(plain.parent.glob(".plain*"))


def test_what_is_refused_leaves_nothing(plain, cached, tmp_path):
    (tmp_path / "taken").mkdir()
    for options, message in [
        ({"output_dir": tmp_path / "taken", "cached": cached}, "already exists"),
        ({"output_dir": tmp_path / "new"}, "name either a task or a folder of tokenised shards"),
        ({"output_dir": tmp_path / "new", "cached": cached, "order": 4}, "order=4 is outside"),
        ({"output_dir": tmp_path / "new", "cached": cached, "limit": 0}, "limit=0 is outside its range"),
        ({"output_dir": tmp_path / "new", "cached": plain}, "manifest.json"),
    ]:
        with pytest.raises(UserError, match=message):
            tables.tables(plain, **options)
    with pytest.raises(UserError, match="restore_d_pair does not exist; did you mean 'restore_de_pair'"):
        tables.tables("restore_d_pair", tmp_path / "new", cached=cached)
    assert not (tmp_path / "new").exists() and not list((tmp_path / "taken").iterdir())


@pytest.mark.parametrize("damage", ["vocabulary", "file", "truncated"])
def test_a_table_that_does_not_belong_is_refused(plain, cached, tmp_path, damage):
    folder = tables.tables(plain, tmp_path / "with", cached=cached).bundle
    manifest = json.loads((folder / bundle.MANIFEST).read_text("utf-8"))
    if damage == "vocabulary":
        manifest["ngrams"]["vocabulary"] = "0" * 64
    elif damage == "file":
        (folder / bundle.TABLE_FILE).write_bytes(b"nonsense")
    else:
        shutil.copyfile(folder / bundle.TABLE_FILE, tmp_path / "copy")
        (folder / bundle.TABLE_FILE).write_bytes((tmp_path / "copy").read_bytes()[:-40])
    (folder / bundle.MANIFEST).write_text(json.dumps(manifest), "utf-8")
    message = {"vocabulary": "was counted with another vocabulary"}.get(damage, "ngrams.npz")
    with pytest.raises(UserError, match=message):
        bundle.load_bundle(folder)
    with pytest.raises(UserError, match=message if damage == "vocabulary" else "is damaged"):
        bundle.load_bundle(folder, verify=False)


def test_as_a_language_model_it_scores_a_block_as_it_scores_steps():
    table = build_table(TARGETS, 384, order=3)
    bound = ngram_model(table)
    inputs = {"encoder_input_tokens": jnp.zeros((2, 4), jnp.int32)}
    text = np.array([[0, *TARGETS[0][:5]], [0, *TARGETS[1][:5]]])
    tokens, positions = bound.model.first(inputs)
    assert tokens.tolist() == positions.tolist() == [0, 0]
    cache = bound.model.start(bound.params, inputs, 2, 8)
    block, _ = bound.model.extend(bound.params, cache, jnp.asarray(text), positions)
    steps = []
    for i in range(text.shape[1]):
        logits, cache = bound.model.extend(bound.params, cache, jnp.asarray(text[:, i : i + 1]), positions + i)
        steps.append(logits)
    np.testing.assert_allclose(block, jnp.concatenate(steps, axis=1), rtol=1e-6)
    for row in range(2):
        for i in range(text.shape[1]):
            before = text[row, i - 1] if i else -1
            law = bound.params["table"].law(jnp.array([before]), jnp.array([text[row, i]]))[0]
            np.testing.assert_allclose(np.exp(block[row, i]), law, rtol=1e-5, atol=1e-8)
