"""`speccascade prune` as a user meets it, with the packaged recipe over two corpora."""

from __future__ import annotations

import dataclasses

import gin
import numpy as np
import pytest

from checkpoints.tiny import TINY, make_model
from corpora import train_sentencepiece, write_split
from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import flat_params, huggingface
from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.text.vocabulary import SentencePieceVocabulary


@pytest.fixture
def flags(corpus, tmp_path, monkeypatch):
    """The flags of a pruning by three rows."""
    (tmp_path / "help").mkdir()
    write_split(tmp_path / "help", "train", [("Yes yes", "Ja € ja", "p:shared")])
    monkeypatch.setenv("SPECCASCADE_LOHELP_DIR", str(tmp_path / "help"))
    file = train_sentencepiece(tmp_path)
    rows = SentencePieceVocabulary(file, 2).vocab_size
    bound = make_model(dataclasses.replace(TINY, vocab_size=rows))
    flat = flat_params.flatten(bound.params)
    (tmp_path / "model").mkdir()
    huggingface.write(tmp_path / "model", bound.model, lambda name: np.asarray(flat[name]), vocabulary_file=file)
    yield [
        *("prune", "--task=text_de", f"--source={tmp_path / 'model'}", f"--vocabulary={file}", "--extra_ids=2"),
        *(f"--target={tmp_path / 'new'}", f"--rows={rows - 3}", "--add_from=100"),
    ]
    gin.clear_config()


def test_the_packaged_recipe(flags, tmp_path, capsys):
    assert cli.main(flags) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    rows = checkpoints.load(tmp_path / "new").model.vocab_size
    assert f"rows        {rows}: {rows - 2} pieces, " in out and f"wrote {tmp_path / 'new'}" in out
    # Four labels and one help text, each translated and corrected, of one input and one target.
    unknown = int(out.partition("unknown     ")[2].split()[0])
    assert f"{unknown} of 20 texts meet the unknown piece, {unknown} did before" in out
    assert unknown >= 3 and "€" in out  # in the German of the translation, and on both sides of the correction
    assert cli.main(flags) == 2
    assert "already exists" in capsys.readouterr().err
    assert cli.main([*flags, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--rows=3", "special pieces and single characters alone"),
        ("--source=nowhere", "nowhere does not exist"),
        ("--row=3", "did you mean '--rows'?"),
        ("--task=nothing", "there is no task"),
    ],
)
def test_mistakes_are_one_line(flags, change, message, capsys):
    assert cli.main([*flags, change]) == 2
    err = capsys.readouterr().err
    assert message.lower() in err.lower() and len(err.strip().splitlines()) == 1
