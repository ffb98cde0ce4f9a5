"""Our vocabularies against the real seqio ones."""

from __future__ import annotations

import random
import shutil

import pytest

from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text import vocabulary as V

TEXTS = [
    "",
    "plain",
    "Grüße, größer – “ok” …",
    "日本語 🎉 ß",
    "tab\tand\nnewline",
    "<extra_id_0> end",
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A SentencePiece model trained here, with T5's special ids and byte fallback."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    words = [
        "der",
        "die",
        "farbe",
        "pfad",
        "bewegung",
        "größe",
        "neue",
        "datei",
        "öffnen",
        "schließen",
    ]
    shuffle = random.Random(0)
    lines = [" ".join(shuffle.choices(words, k=6)) for _ in range(300)]
    (folder / "text.txt").write_text("\n".join(lines), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tiny"),
        vocab_size=340,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tiny.model"


@pytest.fixture(scope="module")
def seqio():
    return pytest.importorskip("seqio")


def random_ids(seed, size, count=40):
    """Rows of ids that cross every boundary: padding, EOS, extra ids, beyond the vocabulary."""
    source = random.Random(seed)
    rows = [[source.randrange(size + 5) for _ in range(12)] for _ in range(count)]
    return rows + [[], [0, 0], [1], [5, 1, 6], [0, 7, 0, 8], [size - 1, size, size + 100]]


@pytest.mark.parametrize("extra_ids", [0, 125])
def test_byte_ids_are_those_of_seqio(seqio, extra_ids):
    ours, theirs = V.ByteVocabulary(extra_ids), seqio.ByteVocabulary(extra_ids)
    assert ours.vocab_size == theirs.vocab_size == 259 + extra_ids
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_id, theirs.pad_id)
    assert V.ByteVocabulary().vocab_size == seqio.ByteVocabulary().vocab_size
    for text in TEXTS:
        assert ours.encode(text) == list(theirs.encode(text))
        assert ours.decode(ours.encode(text)) == text
    for ids in random_ids(1, ours.vocab_size, count=300):
        assert ours.decode(ids) == theirs.decode(ids), ids


def test_byte_decode_drops_broken_utf8_like_seqio(seqio):
    broken = [
        b"\xc3",
        b"a\xc3b",
        b"\xff\xfea",
        b"\xf0\x9f\x8e",
        b"\xe6\x97\xa5\xe6",
        b"\xed\xa0\x80x",
    ]
    for raw in broken:
        ids = [byte + 3 for byte in raw]
        assert V.ByteVocabulary().decode(ids) == seqio.ByteVocabulary().decode(ids), raw


def test_byte_pieces_show_a_character_at_its_last_byte():
    ids = V.ByteVocabulary().encode("aü🎉") + [1, 70, 0]
    assert V.ByteVocabulary().decode_pieces(ids) == ["a", "", "ü", "", "", "", "🎉", "", "", ""]


@pytest.mark.parametrize("extra_ids", [0, 3])
def test_sentencepiece_ids_are_those_of_seqio(seqio, model_file, extra_ids):
    ours = V.SentencePieceVocabulary(model_file, extra_ids)
    theirs = seqio.SentencePieceVocabulary(str(model_file), extra_ids)
    assert ours.vocab_size == theirs.vocab_size
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_id, theirs.pad_id) == (1, 0)
    for text in [*TEXTS, "neue datei öffnen"]:
        assert ours.encode(text) == list(theirs.encode(text))
    for ids in random_ids(2, ours.vocab_size):
        assert ours.decode(ids) == theirs.decode(ids), ids


def test_sentencepiece_pieces_join_to_the_text(model_file):
    vocabulary = V.SentencePieceVocabulary(model_file)
    text = "neue größe 🎉 öffnen"
    ids = vocabulary.encode(text)
    pieces = vocabulary.decode_pieces([*ids, vocabulary.eos_id, ids[0]])
    assert len(pieces) == len(ids) + 2
    assert "".join(pieces).removeprefix(" ") == text
    assert "🎉" in pieces  # four byte tokens, shown once
    assert pieces[-2:] == ["", ""]


def test_spec_round_trip(model_file):
    for vocabulary in (V.ByteVocabulary(7), V.SentencePieceVocabulary(model_file, 2)):
        again = V.from_spec(vocabulary.spec(), model_file)
        assert again.fingerprint() == vocabulary.fingerprint()
        assert again.pieces == vocabulary.pieces


def test_spec_of_another_vocabulary_is_refused(model_file):
    spec = V.SentencePieceVocabulary(model_file, 2).spec()
    with pytest.raises(UserError, match="fingerprints differ"):
        V.from_spec({**spec, "extra_ids": 3}, model_file)
    with pytest.raises(UserError, match="kind 'wordpiece'"):
        V.from_spec({**spec, "kind": "wordpiece"}, model_file)
    with pytest.raises(UserError, match="extra_ids"):
        V.from_spec({"kind": "byte"})


def test_missing_and_broken_model_files(tmp_path):
    with pytest.raises(UserError, match="none.model: No such file"):
        V.SentencePieceVocabulary(tmp_path / "none.model")
    (tmp_path / "broken.model").write_bytes(b"\xff\xff\xffnot a model")
    with pytest.raises(UserError, match="broken.model is not a"):
        V.SentencePieceVocabulary(tmp_path / "broken.model")


def test_same_vocabularies_may_differ_in_extra_ids(model_file, tmp_path):
    copy = shutil.copy(model_file, tmp_path / "copy.model")
    V.check_same(V.ByteVocabulary(), V.ByteVocabulary(125))
    V.check_same(V.SentencePieceVocabulary(copy, 4), V.SentencePieceVocabulary(model_file))


def test_different_vocabularies_name_sizes_and_piece(model_file):
    sentencepiece = V.SentencePieceVocabulary(model_file)
    with pytest.raises(
        UserError,
        match=rf"259 pieces.*{sentencepiece.vocab_size} \(sentencepiece\).*id 259 is nothing",
    ):
        V.check_same(V.ByteVocabulary(), sentencepiece)


def test_same_size_but_other_pieces(seqio, tmp_path):
    """Two models of one size: only the pieces tell them apart."""
    from sentencepiece import sentencepiece_model_pb2

    models = []
    for word in ("alpha", "beta"):
        model = sentencepiece_model_pb2.ModelProto()
        for piece, kind in (("<pad>", 3), ("</s>", 3), ("<unk>", 2), (word, 1)):
            model.pieces.add(piece=piece, score=0.0, type=kind)
        model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = 0, 1, 2
        (tmp_path / word).write_bytes(model.SerializeToString())
        models.append(V.SentencePieceVocabulary(tmp_path / word))
    with pytest.raises(
        UserError,
        match="big has a vocabulary of 4 .*small one of 4 .*id 3 is 'alpha' in one and 'beta'",
    ):
        V.check_same(*models, names=("big", "small"))
    assert models[0].fingerprint() != models[1].fingerprint()


def test_stop_sequences_have_ids_that_stand_for_them_alone(model_file):
    sentencepiece = V.SentencePieceVocabulary(model_file)
    assert V.stop_ids(V.ByteVocabulary(), ("\n", "ab")) == ((13,), (100, 101))
    assert V.stop_ids(sentencepiece, ("a",)) == (tuple(sentencepiece.encode("a")),)
    for text, message in (
        ("\n", r"the stop sequence '\\n' has no ids in this vocabulary"),
        ("", "the stop sequence '' has no ids"),
        ("\ud800", r"the stop sequence '\\ud800' is not Unicode"),
        (3, "the stop sequence 3 is not a text but int"),
    ):
        with pytest.raises(UserError, match=message):
            V.stop_ids(sentencepiece, (text,))


def test_a_stop_sequence_of_unknown_characters_is_refused(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for piece, kind in (("<pad>", 3), ("</s>", 3), ("<unk>", 2), ("▁a", 1)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = 0, 1, 2
    (tmp_path / "model").write_bytes(model.SerializeToString())
    small = V.SentencePieceVocabulary(tmp_path / "model")
    assert V.stop_ids(small, ("a",)) == ((3,),)
    with pytest.raises(UserError, match="the stop sequence '{' holds a character that this vocabulary does not have"):
        V.stop_ids(small, ("{",))


def test_a_text_that_no_vocabulary_can_encode():
    with pytest.raises(UserError, match="text 0 is not Unicode .*half a character"):
        V.ids_of(V.ByteVocabulary(), "\udcfc", "text 0")
