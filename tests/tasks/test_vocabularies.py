from __future__ import annotations

import gin
import pytest

from corpora import train_sentencepiece
from raw_examples import configure
from speccascade_t5x.data import seqio_tasks
from speccascade_t5x.data.seqio_tasks import seqio
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import translation, vocabularies  # noqa: F401
from speccascade_t5x.text.vocabulary import SentencePieceVocabulary


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(vocabularies.FOLDER_VARIABLE, str(tmp_path / "store"))
    yield
    gin.clear_config()


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A tiny model published as 't5', without its two sentinels."""
    model = train_sentencepiece(tmp_path)
    pieces = seqio.SentencePieceVocabulary(str(model)).vocab_size
    entry = vocabularies.Published(model.as_uri(), pieces + 2, 2)
    monkeypatch.setitem(vocabularies.PUBLISHED, "t5", entry)
    return model


def choose(model: str) -> None:
    configure(f"vocabularies.choice.model = {model!r}")


@pytest.mark.parametrize("name", ["byt5", "bytes"])
def test_bytes(name):
    choose(name)
    spoken = seqio_tasks.task_vocabularies("wmt14_en_de")["targets"]
    assert isinstance(spoken, seqio.ByteVocabulary)
    assert spoken.vocab_size == 384
    assert vocabularies.model_file(name) == "bytes"
    assert vocabularies.extra_ids(name) == 125


def test_the_published_sizes():
    sizes = {name: (entry.pieces, entry.sentinels) for name, entry in vocabularies.PUBLISHED.items()}
    assert sizes == {"t5": (32_100, 100), "mt5": (250_100, 100)}


def test_a_name_is_fetched_once_and_gets_the_sentinels_it_lacks(published, tmp_path):
    choose("t5")
    first = seqio_tasks.task_vocabularies("wmt14_en_de")["inputs"]
    kept = tmp_path / "store" / "t5.model"
    assert kept.read_bytes() == published.read_bytes()
    assert [file.name for file in kept.parent.iterdir()] == ["t5.model"]  # no partial file beside it
    published.unlink()
    assert seqio_tasks.task_vocabularies("wmt14_en_fr")["inputs"] == first
    assert first.vocab_size == vocabularies.PUBLISHED["t5"].pieces
    assert (vocabularies.model_file("t5"), vocabularies.extra_ids("t5")) == (str(kept), 2)
    pair = SentencePieceVocabulary(vocabularies.model_file("t5"), vocabularies.extra_ids("t5"))
    assert seqio_tasks.as_vocabulary(first).pieces == pair.pieces
    assert pair.pieces[-1] == "\u2581<extra_id_0>"


def test_a_path_serves_as_well(published):
    choose(str(published))
    spoken = seqio_tasks.task_vocabularies("wmt14_en_de")["inputs"]
    assert spoken.vocab_size == vocabularies.PUBLISHED["t5"].pieces
    configure("vocabularies.choice.sentinels = 0")
    choose(str(published))
    assert seqio_tasks.task_vocabularies("wmt14_en_de")["inputs"].vocab_size == spoken.vocab_size - 2


def test_gin_names_the_folder(published, tmp_path):
    configure(f"vocabularies.store.folder = {str(tmp_path / 'other')!r}")
    assert vocabularies.model_file("t5") == str(tmp_path / "other" / "t5.model")


def test_no_network_is_said_with_two_ways_out(monkeypatch, tmp_path):
    entry = vocabularies.Published("http://127.0.0.1:9/none.model", 10, 0)
    monkeypatch.setitem(vocabularies.PUBLISHED, "t5", entry)
    choose("t5")
    with pytest.raises(UserError, match=r"'t5' could not be fetched.*store/t5\.model.*choice\.model`"):
        seqio_tasks.task_vocabularies("wmt14_en_de")
    assert not (tmp_path / "store" / "t5.model").exists()


def test_an_answer_cut_short_is_not_kept(published, tmp_path):
    published.write_bytes(published.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"'t5' could not be fetched.*store/t5\.model"):
        vocabularies.model_file("t5")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_model_under_the_wrong_name_is_refused(published, tmp_path):
    vocabularies.model_file("t5")
    (tmp_path / "store" / "t5.model").rename(tmp_path / "store" / "mt5.model")
    with pytest.raises(UserError, match=r"mt5\.model has \d+ pieces, but the vocabulary 'mt5' has 250100"):
        vocabularies.model_file("mt5")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no vocabulary 't6': name one of t5, mt5, byt5, or the path"):
        vocabularies.model_file("t6")
    text = tmp_path / "text.model"
    text.write_text("not a model")
    with pytest.raises(UserError, match=r"text\.model is not a SentencePiece model"):
        vocabularies.model_file(str(text))
    choose(str(train_sentencepiece(tmp_path, pad_id=1, eos_id=0)))
    with pytest.raises(UserError, match=r"pad, eos and unk ids \(1, 0, 2\)"):
        seqio_tasks.task_vocabularies("wmt14_en_de")
