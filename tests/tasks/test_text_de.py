from __future__ import annotations

import gin
import pytest

from corpora import ROWS, train_sentencepiece, write_split
from speccascade_t5x.data import seqio_tasks
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import text_de
from speccascade_t5x.tasks.mistakes import make_mistakes

HELP_ROWS = [
    ("Click the button to close the window.", "Klicken Sie auf die Schaltfläche, um zu schließen.", "p:shared")
]


@pytest.fixture
def corpora(corpus, tmp_path, monkeypatch):
    """Both corpora and a vocabulary."""
    folder = tmp_path / "help"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        write_split(folder, split, HELP_ROWS * 5)
    monkeypatch.setenv(text_de.HELP_VARIABLE, str(folder))
    gin.parse_config(
        "from __gin__ import dynamic_registration\n"
        "from speccascade_t5x.tasks import l10n\n"
        "from speccascade_t5x.tasks import text_de\n"
        f"l10n.vocabulary_file.path = {str(train_sentencepiece(tmp_path))!r}\n"
    )
    yield folder
    gin.clear_config()


def test_translation_has_the_prefix_t5_was_trained_with(corpora):
    found = seqio_tasks.examples("l10n_translate_de", "validation", {})
    assert [(e.inputs_text, e.targets_text) for e in found] == [
        ("translate English to German: " + en, de) for en, de, _ in ROWS
    ]
    assert [e.targets_text for e in seqio_tasks.examples("lohelp_translate_de", "test", {})] == [HELP_ROWS[0][1]] * 5


def test_a_correction_draws_its_mistakes_by_the_number_of_the_row(corpora):
    found = seqio_tasks.examples("lohelp_correct_de", "train", {})
    right = HELP_ROWS[0][1]
    assert [e.inputs_text for e in found] == [text_de.CORRECT + make_mistakes(right, number) for number in range(5)]
    assert [e.targets_text for e in found] == [right] * 5
    assert len({e.inputs_text for e in found}) > 1
    # A shard draws the same for its rows.
    part = seqio_tasks.examples("lohelp_correct_de", "train", {}, shard=(1, 2))
    assert [e.inputs_text for e in part] == [found[1].inputs_text, found[3].inputs_text]


def test_a_row_that_is_left_out_does_not_change_the_mistakes_of_others(corpora):
    everything = seqio_tasks.examples("l10n_correct_de", "train", {})
    longest = max(len(row[1]) for row in ROWS)
    header = "from __gin__ import dynamic_registration\nfrom speccascade_t5x.tasks import text_de\n"
    gin.parse_config(f"{header}text_de.rows.max_chars = {longest - 1}")
    kept = seqio_tasks.examples("l10n_correct_de", "train", {})
    assert 0 < len(kept) < len(everything)
    assert {(e.inputs_text, e.targets_text) for e in kept} < {(e.inputs_text, e.targets_text) for e in everything}


def test_the_mixture_has_all_four_tasks_at_their_rates():
    assert dict(seqio_tasks.parts("text_de")) == text_de.RATES
    assert sum(text_de.RATES.values()) == pytest.approx(1)


def test_the_folder_of_help_texts_is_asked_for_by_its_own_name(corpora, monkeypatch):
    (corpora / "test.tsv.gz").unlink()
    with pytest.raises(UserError, match=r"test\.tsv\.gz does not exist: `text_de\.help_dir\.path` .*LOHELP_DIR"):
        seqio_tasks.examples("lohelp_correct_de", "test", {})
    monkeypatch.delenv(text_de.HELP_VARIABLE)
    with pytest.raises(UserError, match=r"no corpus folder is set .*`text_de\.help_dir\.path`.*LOHELP_DIR"):
        seqio_tasks.examples("lohelp_correct_de", "test", {})
