"""What an export is made of: the models of a pair, and the vocabulary that comes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

from speccascade_t5x.checkpoints import bundle, huggingface_sidecars, loading, t5x_pair
from speccascade_t5x.checkpoints.bundle import Bundle
from speccascade_t5x.checkpoints.kinds import KINDS, Found
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary, held_sentinels

_T5_EXTRA_IDS = 100
_BYTE_EXTRA_IDS = 125


def members_of(
    found: Found, drafter: str | Path | None = None, allow_drivers: Collection[str] = ()
) -> dict[str, Bound]:
    """The models of a bundle, of a T5X checkpoint of a pair, or of two checkpoints, by role.

    Args:
      found: a bundle of two models, a pair, or the verifier's checkpoint of any kind.
      drafter: the drafter's checkpoint, where `found` is the verifier's.
      allow_drivers: see `checkpoints.load`.

    Raises:
      UserError: there is only one model, or more than two; or a checkpoint cannot be read.
    """
    source = found.folder
    if found.kind in ("bundle", "t5x_pair") and drafter is not None:
        raise UserError(f"{source} is a {KINDS[found.kind]} and has its own members; leave the drafter out")
    if found.kind == "t5x_pair":
        return t5x_pair.load(source)
    if found.kind == "bundle":
        pair = bundle.load_bundle(source)
        if pair.drafter is None:
            raise UserError(f"{source} holds a verifier alone; name its folder as source and a drafter")
        return {"drafter": pair.drafter, "verifier": pair.verifier}
    if drafter is None:
        raise UserError(f"{source} is one model: name the drafter's checkpoint too, or a bundle of two models")
    verifier = loading.open_found(found, allow_drivers=allow_drivers).load()
    return {"drafter": loading.load(drafter, allow_drivers=allow_drivers), "verifier": verifier}


def bundle_of(
    found: Found,
    drafter: str | Path | None,
    vocabulary: str | Path | None,
    extra_ids: int | None,
    lengths: Mapping[str, int],
    description: str,
    allow_drivers: Collection[str],
) -> Bundle:
    """A bundle as it is, or one made of checkpoints."""
    if found.kind == "bundle":
        if drafter is not None or vocabulary is not None:
            raise UserError(
                f"{found.folder} is a bundle and has its own members and vocabulary; name one of its members"
            )
        made = bundle.load_bundle(found.folder)
        return dataclasses.replace(made, description=description or made.description)
    if found.kind == "t5x_pair":
        opened = t5x_pair.open_members(found.folder)["verifier"]
    else:
        opened = loading.open_found(found, allow_drivers=allow_drivers)
    pieces = _vocabulary(opened, vocabulary, extra_ids)
    if len(opened.ends) > 1:
        raise UserError(
            f"{opened.path} ends an output at any of the ids {', '.join(map(str, opened.ends))}; a bundle has one: "
            "leave one eos_token_id in its generation_config.json, and give the others as stop sequences"
        )
    if found.kind == "t5x_pair":
        members: dict[str, Bound | None] = {**members_of(found, drafter)}
    else:
        small = None if drafter is None else loading.load(drafter, allow_drivers=allow_drivers)
        members = {"drafter": small}
    decode = {"start_id": opened.model.start_id}
    decode |= {"eos_id": opened.ends[0]} if opened.ends else {}
    decode |= {"pad_id": opened.pad_id} if opened.pad_id is not None else {}
    verifier = members.get("verifier") or opened.load()
    return Bundle(found.folder, verifier, members["drafter"], pieces, dict(lengths), decode, description)


def _vocabulary(opened: Opened, named: str | Path | None, extra_ids: int | None) -> Vocabulary:
    if named == "bytes":
        return ByteVocabulary(_BYTE_EXTRA_IDS if extra_ids is None else extra_ids)
    if named is None and opened.kind == "member":
        return bundle.load_vocabulary(opened.path.parent)
    if named is None and opened.kind == "huggingface":
        found = huggingface_sidecars.vocabulary(opened.path)
        if found is not None:
            return found if extra_ids is None else SentencePieceVocabulary(found.path, extra_ids)
    path = opened.vocabulary_file if named is None else named
    if path is None:
        raise UserError(f"{opened.path} comes without a vocabulary: name 'bytes' or a SentencePiece model")
    if extra_ids is None:
        extra_ids = 0 if held_sentinels(path) else _T5_EXTRA_IDS
    return SentencePieceVocabulary(path, extra_ids)
