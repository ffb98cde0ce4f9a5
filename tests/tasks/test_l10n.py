from __future__ import annotations

import gzip
import textwrap

import gin
import numpy as np
import pytest

from corpora import ROWS, train_sentencepiece, write_split
from speccascade_t5x.data import seqio_tasks
from speccascade_t5x.data.seqio_tasks import seqio
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import l10n
from speccascade_t5x.tasks.folding import fold

LENGTHS = {"inputs": 64, "targets": 64}
HEADER = """
    from __gin__ import dynamic_registration
    from speccascade_t5x.tasks import l10n
"""


def configure(text: str) -> None:
    gin.parse_config(textwrap.dedent(HEADER) + text)


@pytest.fixture(autouse=True)
def no_bindings():
    yield
    gin.clear_config()


def byte_ids(text: str) -> list[int]:
    return [b + 3 for b in text.encode()] + [1]


def test_restore_de_folds_the_input_and_keeps_the_order(corpus):
    found = seqio_tasks.examples("restore_de", "validation", LENGTHS)
    assert [e.targets_text for e in found] == [de for _, de, _ in ROWS]
    assert [e.inputs_text for e in found] == [fold(de) for _, de, _ in ROWS]
    assert [e.index for e in found] == [0, 1, 2, 3]
    for example in found:
        assert example.inputs.tolist() == byte_ids(example.inputs_text)
        assert example.targets.tolist() == byte_ids(example.targets_text)
        assert example.inputs.dtype == np.int32


def test_an_error_under_a_gin_binding_stays_one_sentence(tmp_path):
    configure(f"l10n.data_dir.path = {str(tmp_path / 'none')!r}")
    with pytest.raises(UserError) as caught:
        seqio_tasks.examples("restore_de", "test", LENGTHS)
    assert "\n" not in str(caught.value)


def test_rows_are_filtered_by_the_bytes_of_the_german_side(corpus):
    lengths = [len(de.encode()) for _, de, _ in ROWS]
    limit = lengths[1]  # a row of exactly this many bytes stays
    assert limit > len(ROWS[1][1])
    configure(f"l10n.restore_de_rows.max_target_bytes = {limit}")
    found = seqio_tasks.examples("restore_de", "test", LENGTHS)
    assert [e.targets_text for e in found] == [de for (_, de, _), n in zip(ROWS, lengths, strict=True) if n <= limit]
    assert 1 < len(found) < len(ROWS)


def test_a_filter_that_leaves_nothing_is_said(corpus):
    configure("l10n.restore_de_rows.max_target_bytes = 1")
    with pytest.raises(UserError, match="no example in split 'test'.*row filters"):
        seqio_tasks.examples("restore_de", "test", LENGTHS)


def test_gin_names_the_folder_and_wins_over_the_environment(corpus, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_split(other, "test", ROWS[:1])
    configure(f"l10n.data_dir.path = {str(other)!r}")
    assert len(seqio_tasks.examples("restore_de", "test", LENGTHS)) == 1
    assert "l10n.data_dir.path" in gin.config_str()


def test_both_ways_to_name_the_folder_are_in_the_message(monkeypatch, tmp_path):
    monkeypatch.delenv("SPECCASCADE_L10N_DIR", raising=False)
    both = r"l10n\.data_dir\.path.*SPECCASCADE_L10N_DIR"
    with pytest.raises(UserError, match=both):
        seqio_tasks.examples("restore_de", "test", LENGTHS)
    monkeypatch.setenv("SPECCASCADE_L10N_DIR", str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"missing does not exist.*" + both):
        seqio_tasks.examples("restore_de", "test", LENGTHS)
    monkeypatch.setenv("SPECCASCADE_L10N_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"test\.tsv\.gz does not exist.*" + both):
        seqio_tasks.examples("restore_de", "test", LENGTHS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"one\ttwo\n", "line 3 has 2 tab-separated columns, expected 3"),
        (b"a\tb\tc\td\n", "line 3 has 4 tab-separated columns"),
        (b"\n", "line 3 has 1 tab-separated columns"),
        (b"a\t  \tc\n", "line 3 has an empty column 'de'"),
        (b"\tb\tc\n", "line 3 has an empty column 'en'"),
        (b"a\tb\t\n", "line 3 has an empty column 'source'"),
        (b"a\t\xff\tc\n", "line 3 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(corpus, line, message):
    good = "".join("\t".join(row) + "\n" for row in ROWS[:2]).encode()
    (corpus / "test.tsv.gz").write_bytes(gzip.compress(good + line + good))
    with pytest.raises(UserError, match=rf"test\.tsv\.gz, {message}"):
        seqio_tasks.examples("restore_de", "test", LENGTHS, limit=1)


@pytest.mark.parametrize("spoil", [lambda b: b[:-10], lambda b: b[:5], lambda b: b"plain text"])
def test_a_broken_gzip_file_is_named(corpus, spoil):
    file = corpus / "test.tsv.gz"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=r"test\.tsv\.gz is not a whole gzip file"):
        seqio_tasks.examples("restore_de", "test", LENGTHS)


def test_l10n_en_de_needs_its_vocabulary(corpus, tmp_path):
    with pytest.raises(UserError, match=r"no vocabulary is set.*vocabulary_file\.path"):
        seqio_tasks.examples("l10n_en_de", "test", LENGTHS)
    configure(f"l10n.vocabulary_file.path = {str(tmp_path / 'none.model')!r}")
    with pytest.raises(UserError, match=r"none\.model of l10n_en_de does not exist"):
        seqio_tasks.task_vocabularies("l10n_en_de")
    text = tmp_path / "text.model"
    text.write_text("not a model")
    configure(f"l10n.vocabulary_file.path = {str(text)!r}")
    with pytest.raises(UserError, match=r"text\.model is not a SentencePiece model"):
        seqio_tasks.task_vocabularies("l10n_en_de")


def test_l10n_en_de_with_a_vocabulary(corpus, tmp_path):
    model = train_sentencepiece(tmp_path)
    configure(f"l10n.vocabulary_file.path = {str(model)!r}")
    found = seqio_tasks.examples("l10n_en_de", "test", LENGTHS)
    assert [(e.inputs_text, e.targets_text) for e in found] == [(en, de) for en, de, _ in ROWS]
    vocabulary = seqio_tasks.task_vocabularies("l10n_en_de")["targets"]
    assert isinstance(vocabulary, seqio.SentencePieceVocabulary)
    for example in found:
        assert example.targets[-1] == 1
        assert example.targets[:-1].tolist() == vocabulary.encode(example.targets_text)


def test_a_vocabulary_with_other_special_ids_is_refused(corpus, tmp_path):
    model = train_sentencepiece(tmp_path, pad_id=1, eos_id=0)
    configure(f"l10n.vocabulary_file.path = {str(model)!r}")
    with pytest.raises(UserError, match=r"pad, eos and unk ids \(1, 0, 2\)"):
        seqio_tasks.examples("l10n_en_de", "test", LENGTHS)


def test_shards_cover_the_split_once(corpus):
    task = seqio.TaskRegistry.get("restore_de")
    seen = []
    for index in range(3):
        shard = task.get_dataset(None, "train", shuffle=False, shard_info=seqio.ShardInfo(index, num_shards=3))
        seen += [ex["targets_pretokenized"].decode() for ex in shard.as_numpy_iterator()]
    assert sorted(seen) == sorted(de for _, de, _ in ROWS)


def test_training_shuffles_anew_each_epoch_and_by_seed(tmp_path, monkeypatch):
    rows = [(f"word {i}", f"Wort {i}", "x") for i in range(50)]
    write_split(tmp_path, "train", rows)
    monkeypatch.setenv("SPECCASCADE_L10N_DIR", str(tmp_path))
    task = seqio.TaskRegistry.get("restore_de")

    def epochs(seed: int) -> list[str]:
        shuffled = task.get_dataset(LENGTHS, "train", seed=seed, num_epochs=2)
        return [ex["targets_pretokenized"].decode() for ex in shuffled.as_numpy_iterator()]

    first = epochs(seed=1)
    assert sorted(first[:50]) == sorted(first[50:]) == sorted(de for _, de, _ in rows)
    assert first[:50] != first[50:]
    assert first == epochs(seed=1)
    assert first != epochs(seed=2)


def test_the_pipeline_gives_what_the_pair_was_trained_on(fixtures, monkeypatch):
    """The first 64 validation rows under 80 bytes, against ids that T5X itself was fed."""
    monkeypatch.setenv("SPECCASCADE_L10N_DIR", str(fixtures / "l10n_en_de"))
    configure("l10n.restore_de_rows.max_target_bytes = 79")
    found = seqio_tasks.examples("restore_de", "validation", {"inputs": 96, "targets": 96}, limit=64)
    with np.load(fixtures / "restore_de_drafter" / "expected.npz") as expected:
        for name, column in (("encoder_input_tokens", "inputs"), ("decoder_target_tokens", "targets")):
            padded = np.zeros_like(expected[name])
            for row, example in enumerate(found):
                ids = getattr(example, column)
                padded[row, : len(ids)] = ids
            np.testing.assert_array_equal(padded, expected[name])


def test_the_module_registers_its_tasks_once():
    assert {"l10n_en_de", "restore_de"} <= set(seqio.TaskRegistry.names())
    with pytest.raises(ValueError, match="duplicate provider"):
        seqio.TaskRegistry.add("restore_de", source=l10n.TsvSource("restore_de", None), output_features={})
