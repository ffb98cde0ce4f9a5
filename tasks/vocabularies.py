"""The vocabulary of the text tasks: T5's, mT5's or ByT5's by name, or any SentencePiece model by path.

    from speccascade_t5x.tasks import vocabularies

    vocabularies.choice.model = 'mt5'

Nothing is read before a task is used. A named SentencePiece model is then fetched once and kept in a folder of this
user; `vocabularies.store.folder` names another one, and a copy from elsewhere serves as well: give its path.
"""

from __future__ import annotations

import functools
import http.client
import os
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from speccascade_t5x.data.seqio_tasks import seqio
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks.late import configured

FOLDER_VARIABLE = "SPECCASCADE_VOCABULARY_DIR"
# 3 special ids + 256 bytes + 125 sentinels = 384, the rows of ByT5's embedding.
BYTE_SENTINELS = 125
BYTES = ("byt5", "bytes")
_SECONDS = 60
_LARGEST = 64 * 2**20


class Published(NamedTuple):
    """A published SentencePiece model.

    Attributes:
      address: where it is fetched from.
      pieces: its ids, sentinels included.
      sentinels: how many of them are <extra_id_...>; they are added if the file does not have them.
    """

    address: str
    pieces: int
    sentinels: int


_VOCABS = "https://storage.googleapis.com/t5-data/vocabs"
# Sizes: Raffel et al. 2020 (T5) and Xue et al. 2021 (mT5); addresses: T5X's own configurations.
PUBLISHED = {
    "t5": Published(f"{_VOCABS}/cc_all.32000.100extra/sentencepiece.model", 32_100, 100),
    "mt5": Published(f"{_VOCABS}/mc4.250000.100extra/sentencepiece.model", 250_100, 100),
}


def choice(model: str = "t5", sentinels: int | None = None) -> tuple[str, int | None]:
    """Chooses the vocabulary of all text tasks.

    Args:
      model: 't5', 'mt5', 'byt5' (or 'bytes'), or the path of a SentencePiece model.
      sentinels: how many <extra_id_...> to add after the model's own pieces; None adds those that are missing.
    """
    return model, sentinels


def store(folder: str | None = None) -> str | None:
    """Names the folder of fetched models; None leaves it to SPECCASCADE_VOCABULARY_DIR, then the user's cache."""
    return folder


def vocabulary() -> seqio.Vocabulary:
    """Returns the chosen vocabulary.

    Raises:
      UserError: what `model_file` raises, or special ids that are not T5's.
    """
    model, sentinels = configured(choice)()
    if model in BYTES:
        return seqio.ByteVocabulary(BYTE_SENTINELS if sentinels is None else sentinels)
    return _sentencepiece(model_file(model), extra_ids(model) if sentinels is None else sentinels)


def model_file(model: str = "t5") -> str:
    """Returns the path of a SentencePiece model, or 'bytes': what a pair is loaded with. Fetches a named one.

    Raises:
      UserError: it does not exist, cannot be fetched, or is not what its name says.
    """
    if model in BYTES:
        return "bytes"
    if model not in PUBLISHED:
        file = Path(model).expanduser()
        if not file.is_file():
            raise UserError(
                f"there is no vocabulary {model!r}: name one of {', '.join([*PUBLISHED, BYTES[0]])}, or the path of a "
                "SentencePiece model"
            )
        _pieces(str(file))
        return str(file)
    file = _folder() / f"{model}.model"
    if not file.is_file():
        _fetch(model, file)
    _check_size(model, file)
    return str(file)


def extra_ids(model: str = "t5") -> int:
    """Returns how many sentinels are missing from a model's own pieces; 0 for a path to an unpublished model.

    Raises:
      UserError: what `model_file` raises.
    """
    if model in BYTES:
        return BYTE_SENTINELS
    found = _pieces(model_file(model))
    return next((p.sentinels for p in PUBLISHED.values() if found == p.pieces - p.sentinels), 0)


def _check_size(model: str, file: Path) -> None:
    published, found = PUBLISHED[model], _pieces(str(file))
    if found not in (published.pieces, published.pieces - published.sentinels):
        raise UserError(
            f"{file} has {found} pieces, but the vocabulary {model!r} has {published.pieces}: delete it, and it is "
            "fetched again"
        )


def _folder() -> Path:
    named = configured(store)() or os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else Path("~/.cache/speccascade_t5x/vocabularies").expanduser()


def _fetch(model: str, file: Path) -> None:
    """Downloads a published model atomically."""
    address = PUBLISHED[model].address
    how = f"put the model at {file}, or name the path of a copy with `vocabularies.choice.model`"
    part = None
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            content = answer.read(_LARGEST + 1)
        if not content or len(content) > _LARGEST:
            raise OSError(f"{len(content)} bytes")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{model}-", delete=False) as out:
            part = Path(out.name)
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        _check_size(model, part)  # an answer that was cut short is not a model
        part.replace(file)
    except (OSError, http.client.HTTPException, UserError) as error:  # urllib's own errors are among the first
        if part is not None:
            part.unlink(missing_ok=True)
        raise UserError(f"the vocabulary {model!r} could not be fetched from {address} ({error}): {how}") from error


@functools.lru_cache
def _pieces(file: str) -> int:
    """How many ids a model file has."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=file).GetPieceSize()
    except (RuntimeError, OSError) as error:
        raise UserError(f"the vocabulary {file} is not a SentencePiece model: give another path") from error


@functools.lru_cache
def _sentencepiece(file: str, sentinels: int) -> seqio.SentencePieceVocabulary:
    model = sentencepiece.SentencePieceProcessor(model_file=file)
    found = (model.eos_id(), model.unk_id())
    if found != (1, 2) or model.pad_id() not in (0, -1):
        raise UserError(
            f"the SentencePiece vocabulary {file} has pad, eos and unk ids {(model.pad_id(), *found)}: T5's are 0, 1 "
            "and 2, so train it with these"
        )
    return seqio.SentencePieceVocabulary(file, sentinels)
