"""The tasks `l10n_en_de` and `restore_de` over an English-German localisation corpus.

The corpus is a folder with `train.tsv.gz`, `validation.tsv.gz` and `test.tsv.gz`: UTF-8, no header,
no quoting, one pair per line with the tab-separated columns English, German, source package.

  l10n_en_de   English -> German, SentencePiece vocabulary
  restore_de   folded German -> German, bytes (id = byte + 3)

Importing this module registers both. Folder, vocabulary and row filter are looked up when a dataset
is opened, so a gin file may bind them after the import:

    from __gin__ import dynamic_registration
    from speccascade_t5x.tasks import l10n

    l10n.data_dir.path = 'corpora/l10n_en_de'
    l10n.vocabulary_file.path = 'corpora/en_de.model'
    l10n.restore_de_rows.max_target_bytes = 79
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

# TensorFlow and seqio come through data.seqio_tasks, which loads them quietly and off accelerators.
from speccascade_t5x.data.seqio_tasks import seqio, tf
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import in_memory, metrics
from speccascade_t5x.tasks.folding import fold
from speccascade_t5x.tasks.late import configured

DIR_VARIABLE = "SPECCASCADE_L10N_DIR"
SPLITS = ("train", "validation", "test")
# 3 special ids + 256 bytes + 125 extra ids = 384, the width of byte models in the T5 family.
BYTE_EXTRA_IDS = 125


class Row(NamedTuple):
    """One line of the corpus."""

    en: str
    de: str
    source: str


def data_dir(path: str | None = None) -> str | None:
    """Names the corpus folder; None leaves it to the environment variable SPECCASCADE_L10N_DIR."""
    return path


def vocabulary_file(path: str | None = None) -> str | None:
    """Names the SentencePiece model of `l10n_en_de` and of the tasks of `text_de`: pad id 0, eos id 1, unk id 2."""
    return path


def restore_de_rows(max_target_bytes: int | None = None) -> Callable[[Row], bool]:
    """Returns which rows `restore_de` keeps.

    Args:
      max_target_bytes: longest German side in UTF-8 bytes, that length included; None keeps all.
    """
    if max_target_bytes is None:
        return lambda row: True
    return lambda row: len(row.de.encode()) <= max_target_bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """How a corpus folder is named.

    Attributes:
      configured: a function that returns the folder where gin binds it.
      binding: that gin binding, for messages.
      variable: the environment variable that names it otherwise.
      tasks: who reads it, for messages.
    """

    configured: Callable[[], str | None]
    binding: str
    variable: str
    tasks: str

    def folder(self) -> Path:
        """Returns the folder.

        Raises:
          UserError: neither gin nor the environment names one, or it does not exist.
        """
        named = configured(self.configured)() or os.environ.get(self.variable)
        how = (
            f"bind `{self.binding}` in gin or set the environment variable {self.variable} to the "
            f"folder that holds {', '.join(f'{s}.tsv.gz' for s in SPLITS)}"
        )
        if not named:
            raise UserError(f"no corpus folder is set for {self.tasks}: {how}")
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise UserError(f"the corpus folder {folder} does not exist: {how}")
        return folder


L10N = Corpus(data_dir, "l10n.data_dir.path", DIR_VARIABLE, "l10n_en_de and restore_de")


def corpus_dir() -> Path:
    """Returns the configured folder of the localisation corpus; see `Corpus.folder`."""
    return L10N.folder()


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{file} is not a whole gzip file, reading stopped after line {number} ({error}): copy it again"
        ) from error


def read_rows(file: Path, corpus: Corpus = L10N) -> list[Row]:
    """Reads and checks a whole file, so that a bad line stops a run before anything is decoded.

    Raises:
      UserError: the file is missing or not a whole gzip file; or a line is not UTF-8, does not
        have three tab-separated columns, or has an empty one. The message names file and line.
    """
    if not file.is_file():
        raise UserError(
            f"{file} does not exist: `{corpus.binding}` in gin or the environment variable "
            f"{corpus.variable} must name the folder that holds it"
        )
    rows = []
    for number, line in _lines(file):
        try:
            columns = line.decode("utf-8").rstrip("\n").split("\t")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}, line {number} is not UTF-8 ({error.reason})") from error
        if len(columns) != len(Row._fields):
            raise UserError(
                f"{file}, line {number} has {len(columns)} tab-separated columns, expected "
                f"{len(Row._fields)}: English, German, source package"
            )
        for name, value in zip(Row._fields, columns, strict=True):
            if not value.strip():
                raise UserError(f"{file}, line {number} has an empty column '{name}'")
        rows.append(Row(*columns))
    return rows


class TsvSource(in_memory.InMemorySource):
    """Rows of the corpus as {"inputs", "targets"} texts.

    Args:
      name: of the task.
      pair: (number of the row in its file, counted from 0, row) -> (input text, target text).
      keep: a function whose result says which rows to keep; called with its gin bindings each
        time a split is opened.
      corpus: where the rows are; its folder is asked for each time a split is opened.
    """

    def __init__(
        self,
        name: str,
        pair: Callable[[int, Row], tuple[str, str]],
        keep: Callable[[], Callable[[Row], bool]] | None = None,
        corpus: Corpus = L10N,
    ):
        self._pair = pair
        self._keep = keep
        self._corpus = corpus
        super().__init__(name, SPLITS)

    def rows(self, split: str) -> list[dict[str, str]]:
        """See `InMemorySource`.

        Raises:
          UserError: what `Corpus.folder` and `read_rows` raise.
        """
        keep = configured(self._keep)() if self._keep is not None else lambda row: True
        found = enumerate(read_rows(self._corpus.folder() / f"{split}.tsv.gz", self._corpus))
        kept = [self._pair(number, row) for number, row in found if keep(row)]
        return [{"inputs": source, "targets": target} for source, target in kept]


@functools.lru_cache
def _sentencepiece(file: Path) -> seqio.SentencePieceVocabulary:
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    found = (model.pad_id(), model.eos_id(), model.unk_id())
    if found != (0, 1, 2):
        raise UserError(
            f"the SentencePiece vocabulary {file} has pad, eos and unk ids {found}: train it with "
            "pad id 0, eos id 1 and unk id 2"
        )
    return seqio.SentencePieceVocabulary(str(file))


def translation_vocabulary() -> seqio.SentencePieceVocabulary:
    """Returns the configured vocabulary of `l10n_en_de`.

    Raises:
      UserError: none is configured, the file does not exist or is not a SentencePiece model, or its
        special ids are not T5's.
    """
    named = configured(vocabulary_file)()
    how = "bind `l10n.vocabulary_file.path` in gin to a SentencePiece model with pad id 0, eos id 1 and unk id 2"
    if not named:
        raise UserError(f"no vocabulary is set for l10n_en_de: {how}")
    file = Path(named).expanduser()
    if not file.is_file():
        raise UserError(f"the vocabulary {file} of l10n_en_de does not exist: {how}")
    try:
        return _sentencepiece(file)
    except RuntimeError as error:
        raise UserError(f"the vocabulary {file} is not a SentencePiece model: {how}") from error


def _features(vocabulary: seqio.Vocabulary) -> dict[str, seqio.Feature]:
    return {name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}


class _SentencePieceFeatures(Mapping):
    """Both features; a mixture asks for their names at registration, and only who asks for one needs the vocabulary."""

    _NAMES = ("inputs", "targets")

    def __getitem__(self, name: str) -> seqio.Feature:
        if name not in self._NAMES:
            raise KeyError(name)
        return _features(translation_vocabulary())[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._NAMES)

    def __len__(self) -> int:
        return len(self._NAMES)


class SentencePieceTask(seqio.Task):
    """A task whose vocabulary file is looked up at first use instead of at registration."""

    @property
    def output_features(self) -> Mapping[str, seqio.Feature]:
        return _SentencePieceFeatures()

    def get_dataset(self, *args: Any, **kwargs: Any) -> tf.data.Dataset:
        """See `seqio.Task`; what is wrong with the vocabulary is said here and not while TensorFlow traces."""
        translation_vocabulary()
        return super().get_dataset(*args, **kwargs)


# EOS is appended after any cut, as T5 does: a cut text still ends for the model.
PREPROCESSORS = (
    seqio.preprocessors.tokenize,
    seqio.CacheDatasetPlaceholder(),
    seqio.preprocessors.append_eos_after_trim,
)

seqio.TaskRegistry.add(
    "l10n_en_de",
    task_cls=SentencePieceTask,
    source=TsvSource("l10n_en_de", lambda _, row: (row.en, row.de)),
    output_features={},
    preprocessors=list(PREPROCESSORS),
    metric_fns=[metrics.bleu, metrics.chrf, metrics.exact_match],
    shuffle_buffer_size=None,
)

seqio.TaskRegistry.add(
    "restore_de",
    source=TsvSource("restore_de", lambda _, row: (fold(row.de), row.de), keep=restore_de_rows),
    output_features=_features(seqio.ByteVocabulary(extra_ids=BYTE_EXTRA_IDS)),
    preprocessors=list(PREPROCESSORS),
    metric_fns=[metrics.exact_match, metrics.word_accuracy, metrics.character_accuracy],
    shuffle_buffer_size=None,
)
