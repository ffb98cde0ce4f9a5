"""Pruning the vocabulary of a tiny T5 over a SentencePiece model trained here."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from corpora import ROWS
from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import flat_params, huggingface, pruning
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import SentencePieceVocabulary

from .tiny import TINY, make_model

EXTRA_IDS = 4
TEXTS = [text for row in ROWS for text in row[:2]]
OTHERS = ["Die Fenster sind geschlossen", "Open all windows", "Ja, die Datei", "Feld", "of all", ""]


def train_model(folder, model_type="unigram", vocab_size=80):
    prefix = folder / model_type
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5),
        model_prefix=str(prefix),
        model_type=model_type,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Hugging Face folder whose model has three rows more than pieces and sentinels, as T5's have."""
    folder = tmp_path_factory.mktemp("source")
    file = train_model(folder)
    bound = make_model(dataclasses.replace(TINY, vocab_size=SentencePieceVocabulary(file, EXTRA_IDS).vocab_size + 3))
    flat = flat_params.flatten(bound.params)
    huggingface.write(folder, bound.model, lambda name: np.asarray(flat[name]), vocabulary_file=file)
    return folder


@pytest.fixture(scope="module")
def old(source):
    return SentencePieceVocabulary(source / "spiece.model")


def fewest(old):
    """Rows that leave no choice, and rows that leave some."""
    single = sum(len(piece) == 1 for piece in old.pieces)
    return 3 + single + EXTRA_IDS + 2


def prune(source, target, old, more=6, texts=TEXTS, **options):
    return pruning.prune(source, target, texts, fewest(old) + more, extra_ids=EXTRA_IDS, **options)


def test_rows_follow_their_pieces_and_order_stays(source, old, tmp_path):
    report = prune(source, tmp_path / "new", old)
    before, after = checkpoints.load(source), checkpoints.load(tmp_path / "new")
    new = SentencePieceVocabulary(tmp_path / "new" / "spiece.model")
    assert after.model.vocab_size == report.rows == new.vocab_size + EXTRA_IDS
    ids = [old.pieces.index(piece) for piece in new.pieces]
    assert ids == sorted(ids) and len(ids) == report.kept < old.vocab_size
    ids += range(old.vocab_size, old.vocab_size + EXTRA_IDS)  # sentinels, but not what fills the table up
    ours, theirs = flat_params.flatten(after.params), flat_params.flatten(before.params)
    for name, values in ours.items():
        wanted = np.asarray(theirs[name])
        if name == "token_embedder/embedding":
            wanted = wanted[ids]
        elif name == "decoder/logits_dense/kernel":
            wanted = wanted[:, ids]
        np.testing.assert_array_equal(values, wanted, err_msg=name)
    assert report.parameters == sum(value.size for value in ours.values())


def test_special_pieces_and_characters_stay_and_the_rest_goes_by_count(source, old, tmp_path):
    texts = ["Datei Datei Datei Datei"] * 9 + TEXTS
    prune(source, tmp_path / "new", old, more=6, texts=texts)
    new = SentencePieceVocabulary(tmp_path / "new" / "spiece.model")
    assert new.pieces[:3] == old.pieces[:3]
    assert {piece for piece in old.pieces if len(piece) == 1} <= set(new.pieces)
    used = [old.pieces[i] for text in texts for i in old.encode(text)]
    count = {piece: used.count(piece) for piece in old.pieces if len(piece) > 1}
    kept, gone = (
        [count[piece] for piece in count if (piece in new.pieces) is there and not piece.startswith("<")]
        for there in (True, False)
    )
    # Two pieces may stay for their scores whatever their count.
    assert sorted(kept)[2:] and min(sorted(kept)[2:]) >= max(gone)


def test_a_text_without_dropped_pieces_keeps_its_pieces_and_another_is_cut_finer(source, old, tmp_path):
    report = prune(source, tmp_path / "new", old)
    new = SentencePieceVocabulary(tmp_path / "new" / "spiece.model")
    same = finer = 0
    for text in TEXTS + OTHERS:
        before, after = ([spoken.pieces[i] for i in spoken.encode(text)] for spoken in (old, new))
        assert new.decode(new.encode(text)) == old.decode(old.encode(text))
        if set(before) <= set(new.pieces):
            assert after == before
            same += 1
        else:
            assert len(after) > len(before) and "".join(after) == "".join(before)
            finer += 1
    assert same and finer
    assert report.unknown == report.unknown_before == 0 and report.kept_share < 1


def test_the_same_model_gives_the_same_logits_of_kept_pieces(source, old, tmp_path):
    prune(source, tmp_path / "new", old)
    new = SentencePieceVocabulary(tmp_path / "new" / "spiece.model")
    text = next(t for t in TEXTS if {old.pieces[i] for i in old.encode(t)} <= set(new.pieces))
    start = np.zeros((1, 1), np.int32)
    logits = []
    for folder, spoken in ((source, old), (tmp_path / "new", new)):
        bound = checkpoints.load(folder)
        ids = np.array([[*spoken.encode(text), 1]])
        logits.append(np.asarray(bound.model.module.apply({"params": bound.params}, ids, start, start + 1))[0, 0])
    kept = [old.pieces.index(piece) for piece in new.pieces]
    np.testing.assert_allclose(logits[1][: len(kept)], logits[0][kept], rtol=1e-5, atol=1e-5)


def test_unknown_characters_are_told_and_get_rows_where_enough_texts_have_them(source, old, tmp_path):
    texts = [*TEXTS, "Ära Ära", "Äste €", "{Ja}"]
    assert old.unknown("Äste €") == "Ä€" and old.unknown("Ja") == ""
    report = prune(source, tmp_path / "told", old, texts=texts)
    assert (report.unknown_before, report.unknown, report.added) == (3, 3, ())
    assert report.characters[0] == ("Ä", 2) and dict(report.characters)["€"] == 1

    report = prune(source, tmp_path / "new", old, texts=texts, add_from=2)
    assert report.added == ("Ä",) and report.unknown == 2 and "Ä" not in dict(report.characters)
    new = SentencePieceVocabulary(tmp_path / "new" / "spiece.model")
    assert new.decode(new.encode("Ära")) == "Ära"
    for text in TEXTS:  # what has none of them is cut as before
        before = [old.pieces[i] for i in old.encode(text)]
        assert not set(before) <= set(new.pieces) or [new.pieces[i] for i in new.encode(text)] == before
    rows = np.asarray(flat_params.flatten(checkpoints.load(tmp_path / "new").params)["token_embedder/embedding"])
    table = np.asarray(flat_params.flatten(checkpoints.load(source).params)["token_embedder/embedding"])
    begins = old.pieces.index("ä") if "ä" in old.pieces else 2
    np.testing.assert_array_equal(rows[new.pieces.index("Ä")], table[begins])


def test_characters_that_are_no_pieces_of_their_own_are_not_lost_in_silence(source, tmp_path):
    """A vocabulary in which a character lives in a longer piece only, which nobody uses often."""
    proto = sentencepiece_model_pb2.ModelProto.FromString((source / "spiece.model").read_bytes())
    proto.pieces[-1].piece = "Ωmega"
    odd = tmp_path / "odd.model"
    odd.write_bytes(proto.SerializeToString())
    old = SentencePieceVocabulary(odd)
    texts = [*TEXTS * 5, "Ωmega"]
    with pytest.raises(UserError, match=r"1 of 41 texts would meet the unknown piece .*'Ωmega' \(characters \w*Ω\w*\)"):
        prune(source, tmp_path / "new", old, texts=texts, vocabulary=odd)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 10}, "special pieces and single characters alone are"),
        ({"rows": 10_000}, "cannot become"),
        ({"rows": 0}, "rows"),
        ({"texts": []}, "no texts to count"),
        ({"extra_ids": 50}, "fewer than the .* pieces"),
    ],
)
def test_what_cannot_be_pruned_is_refused(source, old, tmp_path, change, message):
    given = {"texts": TEXTS, "rows": fewest(old) + 6, "extra_ids": EXTRA_IDS} | change
    with pytest.raises(UserError, match=message):
        pruning.prune(source, tmp_path / "new", given.pop("texts"), given.pop("rows"), **given)
    assert not (tmp_path / "new").exists()


def test_other_kinds_of_vocabularies_and_targets_in_the_way_are_refused(source, old, tmp_path):
    with pytest.raises(UserError, match="not a unigram model"):
        prune(source, tmp_path / "new", old, vocabulary=train_model(tmp_path, "bpe", 50))
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="already exists"):
        prune(source, tmp_path / "new", old)
