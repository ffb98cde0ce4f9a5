"""Converts text to ids and back, with the ids of seqio but without TensorFlow.

A machine that only decodes needs neither seqio nor TensorFlow. Both classes give the same ids as
their seqio namesakes (tests compare them): pad 0, EOS 1 and UNK 2 in the T5 vocabularies.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from speccascade_t5x.interfaces import UserError

PAD_ID = 0
_SPACE = "\u2581"  # SentencePiece writes a space as this character
_EXTRA_ID_PREFIXES = ("<extra_id_", f"{_SPACE}<extra_id_")


class Vocabulary(Protocol):
    """The interface of a vocabulary for decoding, records and bundles."""

    kind: str
    extra_ids: int

    @property
    def vocab_size(self) -> int:
        """Number of ids with a meaning, extra ids included. Models may have more."""

    @property
    def eos_id(self) -> int:
        """The id that ends a text."""

    @property
    def pad_id(self) -> int:
        """The id of padding: 0, as in seqio and T5X."""

    @property
    def unk_id(self) -> int:
        """The id of text without an id of its own."""

    @property
    def pieces(self) -> tuple[str, ...]:
        """The name of every id, in order."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first EOS; padding and ids beyond the vocabulary are left out."""

    def decode_pieces(self, ids: Iterable[int]) -> list[str]:
        """One display text per id; see `ByteVocabulary.decode_pieces`."""

    def fingerprint(self) -> str:
        """sha256 over kind, size and pieces: equal if ids have the same meaning."""
        content = [self.kind, self.vocab_size, list(self.pieces)]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()

    def spec(self) -> dict[str, Any]:
        """The argument of `from_spec`, as JSON types."""
        size, fingerprint = self.vocab_size, self.fingerprint()
        return {"kind": self.kind, "extra_ids": self.extra_ids, "size": size, "fingerprint": fingerprint}


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes: id = byte + 3. The vocabulary of ByT5.

    Args:
      extra_ids: ids reserved after the 259 ordinary ones. 0 as in seqio; 125 fills up to the 384
        rows ByT5 checkpoints have. Extra ids decode to nothing.

    >>> ByteVocabulary().encode("Tür")
    [87, 198, 191, 117]
    >>> ByteVocabulary().decode([87, 198, 191, 117, 1, 99])
    'Tür'
    """

    kind = "byte"
    _SPECIAL = ("<pad>", "</s>", "<unk>")

    def __init__(self, extra_ids: int = 0):
        if extra_ids < 0:
            raise UserError(f"a vocabulary cannot have {extra_ids} extra ids: give 0 or more")
        self.extra_ids = extra_ids

    @property
    def vocab_size(self) -> int:
        return len(self._SPECIAL) + 256 + self.extra_ids

    @property
    def eos_id(self) -> int:
        return 1

    @property
    def pad_id(self) -> int:
        return PAD_ID

    @property
    def unk_id(self) -> int:
        return 2

    @property
    def pieces(self) -> tuple[str, ...]:
        extra = tuple(f"<extra_id_{i}>" for i in reversed(range(self.extra_ids)))
        return self._SPECIAL + tuple(f"<0x{byte:02X}>" for byte in range(256)) + extra

    def encode(self, text: str) -> list[int]:
        return [byte + len(self._SPECIAL) for byte in text.encode("utf-8")]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first EOS. Bytes that are not UTF-8 are dropped, as seqio does."""
        return "".join(self.decode_pieces(ids))

    def decode_pieces(self, ids: Iterable[int]) -> list[str]:
        """One text per id; joined, they are `decode(ids)`.

        A character of several bytes is shown whole at its last byte, and its other bytes give ''. So do
        padding, EOS, everything after it, and bytes that are not UTF-8.
        """
        reader = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        texts = []
        ended = False
        for i in map(int, ids):
            ended = ended or i == self.eos_id
            byte = i - len(self._SPECIAL)
            texts.append(reader.decode(bytes([byte])) if 0 <= byte < 256 and not ended else "")
        return texts


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model file, with `extra_ids` sentinels added after its pieces as seqio does.

    Args:
      path: the model file.
      extra_ids: how many of `<extra_id_0>`, ... to add; the last id is `<extra_id_0>`. Nothing is added to a file that
        holds that many of its own, as mT5's does.

    Raises:
      UserError: the file is missing or is not a SentencePiece model, the model has no EOS, or it holds another number
        of sentinels.
    """

    kind = "sentencepiece"

    def __init__(self, path: str | Path, extra_ids: int = 0):
        if extra_ids < 0:
            raise UserError(f"a vocabulary cannot have {extra_ids} extra ids: give 0 or more")
        self.path = Path(path)
        self.extra_ids = extra_ids
        self._processor = _load_sentencepiece(self.path, extra_ids)
        if self._processor.eos_id() < 0:
            raise UserError(f"the SentencePiece model {self.path} has no EOS piece, which decoding needs")

    @property
    def vocab_size(self) -> int:
        return self._processor.GetPieceSize()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def pad_id(self) -> int:
        return PAD_ID  # whatever the model says: seqio and T5X pad with 0

    @property
    def unk_id(self) -> int:
        return self._processor.unk_id()

    @functools.cached_property
    def pieces(self) -> tuple[str, ...]:
        """The name of every id, in order."""
        return tuple(self._processor.IdToPiece(i) for i in range(self.vocab_size))

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def unknown(self, text: str) -> str:
        """The characters of `text`, as the model normalises it, that have no piece, in order."""
        processor = self._processor
        if processor.unk_id() not in processor.EncodeAsIds(text):
            return ""
        return "".join(x for x in processor.EncodeAsPieces(text) if processor.PieceToId(x) == processor.unk_id())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first EOS; ids beyond the vocabulary show as UNK, as in seqio."""
        kept = []
        for i in map(int, ids):
            kept.append(i if i < self.vocab_size else self._processor.unk_id())
            if i == self.eos_id:
                break
        return self._processor.DecodeIds(kept)

    def decode_pieces(self, ids: Iterable[int]) -> list[str]:
        """One display text per id; '' for control pieces, EOS and after.

        Byte pieces of one character are shown together at its last byte. Joined, the texts are
        `decode(ids)` but for the space before the first word and for what the model's own
        denormaliser rewrites.
        """
        processor = self._processor
        reader = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        texts = []
        ended = False
        for i in map(int, ids):
            ended = ended or i == self.eos_id
            if ended or (i < self.vocab_size and processor.IsControl(i)):
                texts.append("")
            elif i >= self.vocab_size or processor.IsUnknown(i):
                texts.append("\u2047")
            elif processor.IsByte(i):
                texts.append(reader.decode(bytes([int(self.pieces[i][3:5], 16)])))
            else:
                texts.append(self.pieces[i].replace(_SPACE, " "))
        return texts


def from_spec(spec: Mapping[str, Any], model_file: str | Path | None = None) -> Vocabulary:
    """The vocabulary a `spec()` describes.

    Args:
      spec: the result of `spec()`.
      model_file: the current path of the SentencePiece model; not used for bytes.

    Raises:
      UserError: unknown kind, missing field or file, or a vocabulary that is not the one described.
    """
    kind, extra_ids = spec.get("kind"), spec.get("extra_ids")
    if not isinstance(extra_ids, int):
        raise UserError(f"a vocabulary spec needs a whole number 'extra_ids', found {extra_ids!r}")
    if kind == ByteVocabulary.kind:
        vocabulary: Vocabulary = ByteVocabulary(extra_ids)
    elif kind == SentencePieceVocabulary.kind:
        if model_file is None:
            raise UserError("a SentencePiece vocabulary needs its model file, but none was given")
        vocabulary = SentencePieceVocabulary(model_file, extra_ids)
    else:
        raise UserError(f"the vocabulary kind {kind!r} is unknown: known are 'byte' and 'sentencepiece'")
    if spec.get("fingerprint") != vocabulary.fingerprint():
        raise UserError(
            f"the vocabulary of {vocabulary.vocab_size} ids ({model_file or kind}) is not the one described, which "
            f"had {spec.get('size')} ids, as their fingerprints differ: use the vocabulary the model was trained with"
        )
    return vocabulary


def ids_of(vocabulary: Vocabulary, text: str, what: str) -> list[int]:
    """Ids of a text from outside, without EOS.

    Args:
      vocabulary: ours, or seqio's.
      text: to encode.
      what: the text in messages.

    Raises:
      UserError: no text, or one with half of a surrogate pair, which no vocabulary can encode.
    """
    if not isinstance(text, str):
        raise UserError(f"{what} is not a text but {type(text).__name__}: give a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not Unicode ({error.reason}): it holds half a character") from error
    return list(vocabulary.encode(text))


def stop_ids(vocabulary: Vocabulary, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Ids of texts that end an output.

    Raises:
      UserError: a text without ids, or one with characters that are unknown to the vocabulary: every other unknown
        character would end an output as well.
    """
    found = []
    for text in texts:
        what = f"the stop sequence {text!r}"
        ids = ids_of(vocabulary, text, what)
        if not ids:
            raise UserError(f"{what} has no ids in this vocabulary, so it can end no output: leave it out")
        if vocabulary.unk_id in ids:
            raise UserError(f"{what} holds a character that this vocabulary does not have: leave it out")
        found.append(tuple(ids))
    return tuple(found)


def check_same(a: Vocabulary, b: Vocabulary, names: tuple[str, str] = ("drafter", "verifier")) -> None:
    """Checks that two vocabularies give every id the same meaning.

    One may have further extra ids at its end, which no text uses.

    Raises:
      UserError: they differ; the message names both sizes and the first piece that differs.
    """
    ours, theirs = a.pieces, b.pieces
    shared = min(len(ours), len(theirs))
    first = next((i for i in range(shared) if ours[i] != theirs[i]), None)
    if first is None:
        longer = ours if len(ours) > shared else theirs
        first = next(
            (i for i in range(shared, len(longer)) if not longer[i].startswith(_EXTRA_ID_PREFIXES)),
            None,
        )
    if first is None and a.eos_id == b.eos_id:
        return
    if first is None:
        detail = f"EOS is {a.eos_id} in one and {b.eos_id} in the other"
    else:
        here, there = (repr(p[first]) if first < len(p) else "nothing" for p in (ours, theirs))
        detail = f"id {first} is {here} in one and {there} in the other"
    raise UserError(
        f"the {names[0]} has a vocabulary of {len(ours)} pieces ({a.kind}) and the {names[1]} one of "
        f"{len(theirs)} ({b.kind}), and {detail}; a pair must share one vocabulary"
    )


def held_sentinels(path: str | Path) -> int:
    """The number of sentinels that a SentencePiece model file itself holds.

    Raises:
      UserError: the file is missing or is not a SentencePiece model.
    """
    return _count_sentinels(_read_sentencepiece(Path(path)))


def _count_sentinels(model: Any) -> int:
    return sum(1 for piece in model.pieces if piece.piece.startswith(_EXTRA_ID_PREFIXES))


def _read_sentencepiece(path: Path) -> Any:
    """The protocol buffer of a model file."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(
            f"reading {path} needs the Python package 'sentencepiece': pip install sentencepiece"
        ) from error
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the SentencePiece model {path}: {error.strerror}") from error
    except Exception as error:  # protobuf's DecodeError has moved between modules
        raise UserError(f"{path} is not a SentencePiece model") from error
    if not all(isinstance(piece.piece, str) for piece in model.pieces):  # protobuf gives bytes if they are not UTF-8
        raise UserError(f"{path} is not a SentencePiece model: a piece of it is not a text")
    return model


def _load_sentencepiece(path: Path, extra_ids: int) -> Any:
    """A SentencePieceProcessor whose last pieces are the extra ids."""
    model = _read_sentencepiece(path)
    held = _count_sentinels(model)
    if extra_ids and held not in (0, extra_ids):
        raise UserError(f"{path} holds {held} sentinels itself, so {extra_ids} cannot be added: give extra_ids=0")
    import sentencepiece

    for i in reversed(range(0 if held else extra_ids)):
        model.pieces.add(piece=f"{_SPACE}<extra_id_{i}>", score=0.0, type=model.SentencePiece.USER_DEFINED)
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a usable SentencePiece model: {error}") from error
