"""Files beside Hugging Face weights that change what Transformers decodes: start and end ids, added tokens.

`generate` takes start and end ids from generation_config.json before config.json. Tokens that were added to a tokenizer
stand in added_tokens.json, tokenizer_config.json or tokenizer.json, never in the SentencePiece model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speccascade_t5x.common import schema
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import SentencePieceVocabulary, held_sentinels

PIECES_FILE = "spiece.model"
_GENERATION, _ADDED = "generation_config.json", "added_tokens.json"
_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_LARGEST_TOKENIZER = 64 * 2**20
_SENTINEL = re.compile(r"\u2581?<extra_id_\d+>")
_ANY_IDS = (int, list, type(None))
_DEFAULT_SENTINELS = 100  # what Transformers adds to a T5's pieces unless it is told otherwise


@dataclasses.dataclass(frozen=True)
class Ids:
    """Start and end ids of `generate`.

    Attributes:
      start: the token before the output.
      ends: what ends it, possibly several; () where no file says.
      pad: what fills it up, None where no file says.
    """

    start: int
    ends: tuple[int, ...]
    pad: int | None


def ids(folder: Path, fields: Mapping[str, Any], vocab_size: int) -> Ids:
    """Start and end ids, from generation_config.json where it says something, else from config.json.

    Args:
      folder: of the model.
      fields: of its config.json.
      vocab_size: width of the logits.

    Raises:
      UserError: an id that is none.
    """
    found: dict[str, Any] = {}
    names = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    own = schema.read(folder / _GENERATION) if (folder / _GENERATION).is_file() else {}
    for name in names:
        for file, said in (("config.json", fields), (_GENERATION, own)):
            value = said.get(name)
            listed = value if isinstance(value, list) and name == "eos_token_id" else [] if value is None else [value]
            if any(type(i) is not int or not 0 <= i < vocab_size for i in listed):
                raise UserError(
                    f"{folder / file} says {name} = {schema.shown(value)}; it must be an id of the vocabulary"
                )
            found[name] = tuple(listed) or found.get(name, ())
    start, ends, pad = (found[name] for name in names)
    return Ids(start[0] if start else 0, ends, pad[0] if pad else None)


def vocabulary(folder: Path) -> SentencePieceVocabulary | None:
    """The vocabulary beside the weights, with the sentinels Transformers gives it; None without any file of one.

    Raises:
      UserError: tokens were added that a SentencePiece model cannot hold, or only Transformers can read the files.
    """
    pieces = folder / PIECES_FILE
    added = _added_tokens(folder)
    if not pieces.is_file():
        if (folder / _TOKENIZER).is_file():
            raise UserError(
                f"{folder} has its vocabulary in {_TOKENIZER} alone, which is not read: copy the {PIECES_FILE} of the "
                "model it was made from into it, or name a vocabulary"
            )
        return None
    sentinels = sum(1 for text in added.values() if _SENTINEL.fullmatch(text)) if added else _said_sentinels(folder)
    found = SentencePieceVocabulary(pieces, 0 if held_sentinels(pieces) else sentinels)
    strange = [text for i, text in sorted(added.items()) if not _is_piece(found, i, text)]
    if strange:
        raise UserError(
            f"{folder} adds tokens to its vocabulary ({', '.join(map(schema.shown, strange[:3]))}) which {PIECES_FILE} "
            "does not have: name a SentencePiece model that has them as vocabulary"
        )
    return found


def _is_piece(found: SentencePieceVocabulary, i: int, text: str) -> bool:
    return i < found.vocab_size and found.pieces[i].removeprefix("\u2581") == text.removeprefix("\u2581")


def _said_sentinels(folder: Path) -> int:
    path = folder / _TOKENIZER_CONFIG
    said = schema.read(path, largest=_LARGEST_TOKENIZER).get("extra_ids") if path.is_file() else None
    return _DEFAULT_SENTINELS if said is None else schema.whole(0, 100_000)(said, f"{path}: extra_ids")


def _added_tokens(folder: Path) -> dict[int, str]:
    """Id to text of every token that one of the files says was added."""
    number = schema.whole()
    found: dict[int, str] = {}
    if (folder / _ADDED).is_file():
        path = folder / _ADDED
        found |= {i: text for text, i in schema.read(path, schema.map_of(number), largest=_LARGEST_TOKENIZER).items()}
    if (folder / _TOKENIZER_CONFIG).is_file():
        path = folder / _TOKENIZER_CONFIG
        tokens = schema.map_of(schema.record({"content": schema.of(str)}))
        check = schema.record({}, {"added_tokens_decoder": tokens})
        told = schema.read(path, check, largest=_LARGEST_TOKENIZER).get("added_tokens_decoder", {})
        if not all(re.fullmatch(r"\d{1,9}", i) for i in told):
            raise UserError(f"{path}: added_tokens_decoder has a name that is not an id")
        found |= {int(i): token["content"] for i, token in told.items()}
    if (folder / _TOKENIZER).is_file():
        path = folder / _TOKENIZER
        token = schema.record({"id": number, "content": schema.of(str)})
        check = schema.record({}, {"added_tokens": schema.list_of(token)})
        told = schema.read(path, check, largest=_LARGEST_TOKENIZER).get("added_tokens", [])
        found |= {token["id"]: token["content"] for token in told}
    return found
