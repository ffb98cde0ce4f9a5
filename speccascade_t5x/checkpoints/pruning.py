"""A T5 with fewer rows: only the pieces that texts of a task need, and characters they need and it lacks.

A SentencePiece unigram model takes the best way to cut a text into pieces. Without some pieces, what was the best way
still is one wherever it uses none of them, so such a text keeps its pieces; any other is cut into pieces that are left,
and as every single character stays, there are some.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import speccascade_t5x.checkpoints as checkpoints
from speccascade_t5x.checkpoints import flat_params, folders, huggingface
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.common import checks
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models.t5 import T5, T5Config
from speccascade_t5x.text.vocabulary import SentencePieceVocabulary

_EMBEDDING, _LOGITS = "token_embedder/embedding", "decoder/logits_dense/kernel"
_MODEL_FILE = "spiece.model"
_SPACE = "\u2581"
_EXTRA_ID = "<extra_id_"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a pruning has left behind.

    Attributes:
      target: the folder.
      rows: of the embedding, sentinels included.
      kept: how many pieces of the source's vocabulary are among them.
      added: characters that have a row now and had none.
      parameters: of the model.
      texts: how many were read.
      kept_share: share of the texts' pieces, as the source cuts them, that are kept.
      unknown_before: how many texts meet the unknown piece in the source's vocabulary.
      unknown: how many still do.
      characters: what they meet it for: (character, texts with it), the commonest first.
    """

    target: str
    rows: int
    kept: int
    added: tuple[str, ...]
    parameters: int
    texts: int
    kept_share: float
    unknown_before: int
    unknown: int
    characters: tuple[tuple[str, int], ...]


def prune(
    source: str | Path,
    target: str | Path,
    texts: Iterable[str],
    rows: int,
    *,
    vocabulary: str | Path | None = None,
    extra_ids: int = 100,
    add_from: int | None = None,
    overwrite: bool = False,
) -> Report:
    """Writes a T5 of `rows` rows as a Hugging Face folder, its SentencePiece model beside it.

    Kept are special pieces, single characters, sentinels, and of all other pieces those the texts use most; their order
    stays. Added characters come between pieces and sentinels; their rows begin as those of the small letter, where
    there is one, and else of the unknown piece.

    Args:
      source: a checkpoint of a T5, of any kind but a bundle of two.
      target: the folder to make.
      texts: by which pieces are counted.
      rows: of the embedding and columns of the logits.
      vocabulary: the source's SentencePiece model; None takes the one beside the checkpoint.
      extra_ids: sentinels that follow the pieces.
      add_from: a character the source's vocabulary lacks gets a row where at least so many texts have it; None adds
        none.
      overwrite: replace a checkpoint that is already there.

    Raises:
      UserError: a model or vocabulary that cannot be pruned, too few or too many rows, no texts, a target in the way,
        or texts that would meet the unknown piece only now.
    """
    checks.whole("rows", rows, 1)
    checks.whole("extra_ids", extra_ids, 0)
    if add_from is not None:
        checks.whole("add_from", add_from, 1)
    if Path(target).exists() and not overwrite:
        raise UserError(f"{target} already exists: choose another folder, or allow it to be overwritten (--overwrite)")
    opened, old = _open(source, vocabulary, extra_ids)
    read = [*texts]
    if not read:
        raise UserError("there are no texts to count pieces by: name a task with examples")
    used = collections.Counter(i for text in read for i in old.encode(text))
    counts = np.array([used[i] for i in range(old.vocab_size)])
    lacking = [old.unknown(text) for text in read]
    added = [char for char, number in _texts_with(lacking) if add_from is not None and number >= add_from]
    proto = _proto(old.path)
    kept = _choose(proto, counts, rows - extra_ids - len(added))
    unknown_id = next(i for i, piece in enumerate(proto.pieces) if piece.type == proto.SentencePiece.UNKNOWN)
    ids = {piece: i for i, piece in enumerate(old.pieces)}
    begins = [ids.get(char.lower(), unknown_id) for char in added]
    sentinels = range(old.vocab_size, old.vocab_size + extra_ids)
    with folders.published(Path(target), "pruned model") as partial:
        (partial / _MODEL_FILE).write_bytes(_pruned(proto, kept, added).SerializeToString())
        new = SentencePieceVocabulary(partial / _MODEL_FILE)
        left = [new.unknown(text) for text in read]
        _require_known(read, lacking, left)
        parameters = _write_model(partial, opened, [*kept, *begins, *sentinels])
        folders.write_checksums(partial)
    return Report(
        target=str(target),
        rows=rows,
        kept=len(kept),
        added=tuple(added),
        parameters=parameters,
        texts=len(read),
        kept_share=float(counts[kept].sum() / max(counts.sum(), 1)),
        unknown_before=sum(map(bool, lacking)),
        unknown=sum(map(bool, left)),
        characters=tuple(_texts_with(left)),
    )


def _open(source: str | Path, vocabulary: str | Path | None, extra_ids: int) -> tuple[Opened, SentencePieceVocabulary]:
    """The source's model and its vocabulary without sentinels.

    Raises:
      UserError: it is not a T5, it has no vocabulary, or fewer rows than that has pieces.
    """
    opened = checkpoints.open_model(source)
    if not isinstance(opened.model, T5):
        raise UserError(f"{source} is a decoder-only model, whose vocabulary cannot be pruned here: name a T5")
    file = Path(vocabulary) if vocabulary is not None else opened.vocabulary_file
    if file is None:
        raise UserError(f"{source} has no SentencePiece model beside it: name it (--vocabulary)")
    spoken = SentencePieceVocabulary(file)
    if spoken.vocab_size + extra_ids > opened.model.vocab_size:
        raise UserError(
            f"{source} has {opened.model.vocab_size} rows, fewer than the {spoken.vocab_size} pieces of {file} and "
            f"{extra_ids} sentinels: name the vocabulary it was trained with"
        )
    return opened, spoken


def _texts_with(unknown: Iterable[str]) -> list[tuple[str, int]]:
    """(character, how many of the texts have it), the commonest first."""
    return collections.Counter(char for chars in unknown for char in sorted(set(chars))).most_common()


def _proto(file: Path) -> Any:
    """The model file as a message.

    Raises:
      UserError: it cuts texts by another method than the best sum of scores.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    if proto.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.UNIGRAM:
        raise UserError(
            f"{file} is not a unigram model, so a text without dropped pieces could be cut anew: keep it whole"
        )
    return proto


def _choose(proto: Any, counts: np.ndarray, room: int) -> list[int]:
    """Ids of the pieces that stay, `room` of them, in order."""
    normal = proto.SentencePiece.NORMAL
    scores = {i: piece.score for i, piece in enumerate(proto.pieces) if piece.type == normal}
    # The least score is the base of what an unknown character costs, and the greatest that of user-defined pieces.
    needed = {min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)}
    needed |= {
        i
        for i, piece in enumerate(proto.pieces)
        if piece.type != normal or len(piece.piece) == 1 or piece.piece.lstrip(_SPACE).startswith(_EXTRA_ID)
    }
    if not len(needed) <= room < len(proto.pieces):
        raise UserError(
            f"rows={len(proto.pieces)} pieces cannot become {room}: special pieces and single characters alone are "
            f"{len(needed)}; choose rows from {len(needed)} to {len(proto.pieces) - 1} beside sentinels and added "
            "characters"
        )
    others = [i for i in np.argsort(-counts, kind="stable").tolist() if i not in needed]
    return sorted([*needed, *others[: room - len(needed)]])


def _pruned(proto: Any, kept: Sequence[int], added: Sequence[str]) -> Any:
    """The model with the kept pieces and the added characters, which are as dear as the dearest piece."""
    pieces = [proto.pieces[i] for i in kept]
    least = min(piece.score for piece in pieces if piece.type == proto.SentencePiece.NORMAL)
    new = type(proto)()
    new.CopyFrom(proto)
    del new.pieces[:]
    new.pieces.extend(pieces)
    for char in added:
        new.pieces.add(piece=char, score=least)
    new.trainer_spec.vocab_size = len(new.pieces)
    return new


def _require_known(texts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    """A text the source's vocabulary can write must not meet the unknown piece for the pruning."""
    lost = [(text, new) for text, old, new in zip(texts, before, after, strict=True) if new and not old]
    if lost:
        characters = "".join(char for char, _ in _texts_with(new for _, new in lost)[:20])
        raise UserError(
            f"{len(lost)} of {len(texts)} texts would meet the unknown piece for the pruning, such as "
            f"{lost[0][0][:40]!r} (characters {characters}): raise rows"
        )


def _write_model(partial: Path, opened: Opened, ids: Sequence[int]) -> int:
    """Writes the model with the rows `ids` of the source's. Returns its number of parameters."""
    bound = opened.load()
    flat: Mapping[str, Any] = flat_params.flatten(bound.params)
    cut = {_EMBEDDING: np.asarray(flat[_EMBEDDING])[np.asarray(ids)]}
    if _LOGITS in flat:
        cut[_LOGITS] = np.asarray(flat[_LOGITS])[:, np.asarray(ids)]
    values = {**flat, **cut}
    config = dataclasses.replace(opened.model.config, vocab_size=len(ids))
    assert isinstance(config, T5Config)
    model = T5(config, start_id=ids.index(opened.model.start_id))
    huggingface.write(partial, model, lambda name: np.asarray(values[name]))
    return sum(int(np.prod(value.shape)) for value in values.values())
