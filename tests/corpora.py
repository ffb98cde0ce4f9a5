"""Small corpora and vocabularies that tests write for themselves."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

# English, German, source package. The quotes and the ellipsis are there for readers that interpret
# quoting and for folding that changes the length.
ROWS = [
    ("Open the file", "Öffnen Sie die Datei", "gedit"),
    ("Size of the button …", "Größe der Fläche …", "glade"),
    ('Close "all" windows', 'Schließen Sie "alle" Fenster', "kate"),
    ("Yes", "Ja", "git"),
]


def write_split(folder: Path, split: str, rows: Sequence[Sequence[str]]) -> Path:
    """Writes `split`.tsv.gz and returns its path."""
    file = folder / f"{split}.tsv.gz"
    file.write_bytes(gzip.compress("".join("\t".join(row) + "\n" for row in rows).encode()))
    return file


def train_sentencepiece(folder: Path, pad_id: int = 0, eos_id: int = 1) -> Path:
    """Trains a tiny SentencePiece model on ROWS, with T5's special ids unless told otherwise."""
    import sentencepiece

    prefix = folder / f"tiny_{pad_id}_{eos_id}"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for row in ROWS for text in row[:2]]),
        model_prefix=str(prefix),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=pad_id,
        eos_id=eos_id,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")
