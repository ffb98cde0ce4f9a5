"""The n-gram table of a bundle on disk: its arrays in one npz, described in bundle.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speccascade_t5x.checkpoints import npz, tensors
from speccascade_t5x.checkpoints.tensors import Tensor
from speccascade_t5x.drafting import NGramTable
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import Vocabulary

FILE, SECTION = "ngrams.npz", "ngrams"
_BIGRAM = ("unigram", "successors", "shares")
_TRIGRAM = (*_BIGRAM, "starts", "seconds", "pair_successors", "pair_shares")
_ADVICE = "build it again with `speccascade tables`"
_ROUNDING = 1e-3  # of sums of float32 shares


def write(
    folder: Path, manifest: dict[str, Any], table: NGramTable, about: Mapping[str, Any], vocabulary: Vocabulary
) -> None:
    """Writes the file into a bundle's folder and notes it in the manifest."""
    arrays = {f.name: getattr(table, f.name) for f in dataclasses.fields(table)}
    with open(folder / FILE, "wb") as file:
        np.savez_compressed(file, **{name: array for name, array in arrays.items() if array is not None})
    manifest[SECTION] = {**about, "vocabulary": vocabulary.fingerprint()}


def read(folder: Path, manifest: Mapping[str, Any], vocabulary: Vocabulary) -> NGramTable | None:
    """The n-gram table of a bundle; None where it has none.

    Args:
      folder: of the bundle.
      manifest: its bundle.json.
      vocabulary: of the bundle.

    Raises:
      UserError: it was counted with another vocabulary, or is damaged: no array is read before all shapes fit, and no
        table with an invalid distribution is returned.
    """
    if SECTION not in manifest:
        return None
    known = manifest[SECTION]["vocabulary"]
    if known != vocabulary.fingerprint():
        raise UserError(
            f"the n-gram table of the bundle {folder} was counted with another vocabulary (fingerprint {known[:16]}, "
            f"the bundle's is {vocabulary.fingerprint()[:16]}); {_ADVICE}"
        )
    path = folder / FILE
    try:
        found = npz.open_arrays(path)
        _check_shapes(found)
        arrays: dict[str, Any] = {name: tensors.to_host(name, t, str(path), t.dtype) for name, t in found.items()}
        _check_values(arrays)
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); {_ADVICE}") from error
    if len(arrays["unigram"]) < vocabulary.vocab_size:
        raise UserError(
            f"{path} has {len(arrays['unigram'])} ids but the vocabulary {vocabulary.vocab_size} pieces; {_ADVICE}"
        )
    return NGramTable(**arrays)


def _check_shapes(found: Mapping[str, Tensor]) -> None:
    """Names, ranks, sizes and dtypes, from the headers alone."""
    if set(found) not in (set(_BIGRAM), set(_TRIGRAM)):
        raise UserError(f"its arrays are {', '.join(sorted(found)) or 'none'}")
    size = found["unigram"].shape[0] if found["unigram"].shape else 0
    most, pair_most = (
        found[name].shape[1] if name in found and len(found[name].shape) == 2 else 0
        for name in ("successors", "pair_successors")
    )
    pairs = found["seconds"].shape[0] if "seconds" in found and found["seconds"].shape else 0
    wanted = {
        "unigram": (size,), "successors": (size, most), "shares": (size, most), "starts": (size + 1,),
        "seconds": (pairs,), "pair_successors": (pairs, pair_most), "pair_shares": (pairs, pair_most),
    }  # fmt: skip
    for name, tensor in found.items():
        kind = "f" if name == "unigram" or name.endswith("shares") else "i"
        if tensor.shape != wanted[name] or tensor.dtype.kind != kind or tensor.dtype.itemsize > 8 or size * most == 0:
            raise UserError(f"{name} has shape {tensor.shape} of {tensor.dtype.name}")


def _check_values(arrays: Mapping[str, np.ndarray]) -> None:
    """Ids within the vocabulary, shares that leave something over, pairs in order."""
    size = len(arrays["unigram"])
    if arrays["unigram"].min() < 0 or abs(float(arrays["unigram"].sum(dtype=np.float64)) - 1) > _ROUNDING:
        raise UserError("unigram is not a distribution")
    for ids, shares in (("successors", "shares"), ("pair_successors", "pair_shares")):
        if ids in arrays and arrays[ids].size:
            if arrays[ids].min() < -1 or arrays[ids].max() >= size:
                raise UserError(f"{ids} holds ids outside its {size}")
            if arrays[shares].min() < 0 or arrays[shares].sum(axis=-1, dtype=np.float64).max() > 1 + _ROUNDING:
                raise UserError(f"{shares} is not part of a distribution")
    if "starts" in arrays:
        starts, seconds = arrays["starts"], arrays["seconds"]
        in_order = starts[0] == 0 and starts[-1] == len(seconds) and (np.diff(starts) >= 0).all()
        if not in_order or (seconds.size and not 0 <= seconds.min() <= seconds.max() < size):
            raise UserError("starts and seconds do not fit together")
