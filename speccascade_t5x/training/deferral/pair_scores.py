"""A pair under teacher forcing: batches of examples, the rules' Pair at every position, and columns made from it."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.common import checks, fingerprints
from speccascade_t5x.core import divergences, probs
from speccascade_t5x.core.rules import Pair
from speccascade_t5x.data import shards
from speccascade_t5x.deferral import features, labels
from speccascade_t5x.deferral.features import FeatureSpec
from speccascade_t5x.interfaces import Array, Bound, UserError
from speccascade_t5x.text import vocabulary

CLASSES = ("special", "lower case", "upper case", "digit", "space", "punctuation", "other")
_HALF = ("hidden_q", "hidden_p", "candidate_features")  # kept in half precision
_ROUND_TO = 16  # lengths of batches are multiples of it, so that few shapes are compiled

# Per-position figures to collect as well: name -> function of the Pair.
Scores = Mapping[str, Callable[[Pair], Array]]


@dataclasses.dataclass(frozen=True)
class Scored:
    """A pair and how to score it.

    Attributes:
      drafter, verifier: bound LanguageModels.
      vocabulary: of both.
      temperature: at which tokens will be sampled: D_TV(p, q) is measured there, everything else at 1.
    """

    drafter: Bound
    verifier: Bound
    vocabulary: vocabulary.Vocabulary
    temperature: float = 1.0

    @property
    def width(self) -> int:
        """The vocabulary size V that both models share."""
        return min(self.drafter.model.vocab_size, self.verifier.model.vocab_size)


def token_classes(spoken: vocabulary.Vocabulary, width: int) -> np.ndarray:
    """[width] int32 class of each id, an index of CLASSES; ids beyond the vocabulary are special.

    A piece has the class of its first character. A single byte of a longer character is "other".
    """
    found = np.zeros(width, np.int32)
    for i, piece in enumerate(spoken.pieces[:width]):
        text = spoken.decode_pieces([i])[0]
        byte = re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
        if byte or text:
            bare = text if not text.strip() else text.strip()
            fits = (
                ("space", bool(text) and not text.strip()),
                ("digit", bare[:1].isdigit()),
                ("upper case", bare[:1].isupper()),
                ("lower case", bare[:1].islower()),
                ("punctuation", bare[:1].isprintable() and bool(bare) and not bare[:1].isalnum()),
            )
            found[i] = CLASSES.index(next((name for name, is_it in fits if is_it), "other"))
    return found


def spec_of(pair: Scored, hidden: bool, top: int = 4) -> FeatureSpec:
    """The features of a pair; hidden states on request."""
    widths = [bound.model.config.emb_dim if hidden else 0 for bound in (pair.drafter, pair.verifier)]
    return FeatureSpec(top=top, classes=len(CLASSES), hidden_q=widths[0], hidden_p=widths[1])


def fingerprint(bound: Bound) -> str:
    """A short text that differs if a model or its parameters differ."""
    text = repr((bound.model, fingerprints.of_tree(bound.params)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some examples, padded.

    Attributes:
      inputs: [B, S] int32.
      targets: [B, T] int32.
      lengths: [B] target ids of each row; 0 in filler rows.
      ids: [B] example ids.
    """

    inputs: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray


def batches(corpus: shards.Corpus, chosen: Sequence[int], batch_size: int, lengths: tuple[int, int]) -> list[Batch]:
    """Batches of similar lengths over the chosen examples, a pure function of its arguments."""
    for name, value in (("batch_size", batch_size), ("inputs_len", lengths[0]), ("targets_len", lengths[1])):
        checks.whole(name, value, 1)
    cut = lambda ids, side: shards.cut(ids, lengths[side], corpus.eos_id)  # noqa: E731
    taken = [(cut(corpus.inputs(i), 0), cut(corpus.targets(i), 1)) for i in chosen]
    order = sorted(range(len(chosen)), key=lambda i: (len(taken[i][1]), len(taken[i][0]), chosen[i]))
    made = []
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        widths = [max(max(len(taken[i][side]) for i in rows), 1) for side in (0, 1)]
        widths = [-(-width // _ROUND_TO) * _ROUND_TO for width in widths]
        padded = [np.zeros((batch_size, width), np.int32) for width in widths]
        counts, ids = np.zeros(batch_size, np.int32), np.full(batch_size, -1, np.int32)
        for row, i in enumerate(rows):
            for side in (0, 1):
                padded[side][row, : len(taken[i][side])] = taken[i][side]
            counts[row], ids[row] = len(taken[i][1]), chosen[i]
        padded[0][len(rows) :, 0] = corpus.eos_id  # a filler row is an empty text
        made.append(Batch(padded[0], padded[1], counts, ids))
    return made


def scored_logits(
    bound: Bound, inputs: Array, targets: Array, capture: tuple[str, ...] = ()
) -> tuple[Array, dict[str, Array]]:
    """Teacher-forced logits [B, T, V] of any LanguageModel, as one block, and the captured hidden states."""
    model = bound.model
    given = model.inputs(inputs) if hasattr(model, "inputs") else {"encoder_input_tokens": inputs}
    rows, length = targets.shape
    tokens, positions = model.first(given)
    cache = model.start(bound.params, given, rows, length)
    block = jnp.concatenate([tokens[:, None], targets[:, :-1]], axis=1)
    found, _ = model.extend(bound.params, cache, block, positions, capture)
    return found if capture else (found, {})


def pair_of(scored: Scored, spec: FeatureSpec, inputs: Array, targets: Array) -> Pair:
    """The rules' Pair at every position of a teacher-forced batch, [B, T, ...]."""
    found: dict[str, Array] = {}
    hidden: dict[str, Any] = {}
    for name, bound, width in (("q", scored.drafter, spec.hidden_q), ("p", scored.verifier, spec.hidden_p)):
        found[name], captured = scored_logits(bound, inputs, targets, ("hidden",) if width else ())
        hidden[f"hidden_{name}"] = captured.get("hidden")
    pair = pair_from_logits(found["q"][..., : scored.width], found["p"][..., : scored.width], scored)
    return dataclasses.replace(pair, **hidden)


def pair_from_logits(q: Array, p: Array, scored: Scored) -> Pair:
    """The Pair of logits [B, T, V] at output positions 0 to T - 1."""
    size = scored.vocabulary.vocab_size
    raw_q, raw_p = (probs.raw(logits, size) for logits in (q, p))
    position = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    at = scored.temperature
    tempered_q, tempered_p = probs.tempered(q, at, size, raw_q), probs.tempered(p, at, size, raw_p)
    return Pair(tempered_q, tempered_p, raw_q, raw_p, position=position)


def columns_of(
    pair: Pair,
    spec: FeatureSpec,
    classes: Array,
    targets: Array,
    candidates: bool = False,
    scores: Scores | None = None,
    truth: Array | None = None,
) -> dict[str, Array]:
    """The columns of a batch, [B, T, ...] each. Jittable.

    Args:
      pair: the Pair at every position.
      spec: the features.
      classes: [V] class of each token.
      targets: [B, T] labels.
      candidates: also keep the columns that a token head reads.
      scores: further figures.
      truth: [B, T, V] the distribution from which the labels were drawn, if it is known.
    """
    found = labels.realised(pair.q_raw, pair.p_raw, targets)
    columns = {
        "features": features.prefix_features(pair, spec, classes),
        "tokens": targets,
        "class": jnp.take(classes, targets),
        "distance": divergences.total_variation(pair.p, pair.q),
        "position": pair.position,
        **{field.name: getattr(found, field.name) for field in dataclasses.fields(found)},
    }
    read = [name for name in ("hidden_q", "hidden_p") if getattr(spec, name)]
    columns |= {name: getattr(pair, name).astype(jnp.float16) for name in read}
    if candidates:
        few = features.candidates(pair, spec, classes)
        columns |= {f"candidate_{field.name}": getattr(few, field.name) for field in dataclasses.fields(few)}
    if truth is not None:
        for loss in ("zero_one", "log"):
            columns[f"exact_{loss}"] = labels.expected_gap(truth, pair.q_raw, pair.p_raw, loss)
    return columns | {f"score_{name}": score(pair) for name, score in (scores or {}).items()}


def flat(found: Mapping[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
    """Real positions of a batch's columns, [n, ...] each, with the number of their example.

    Raises:
      UserError: a column is not finite.
    """
    real = (np.arange(batch.targets.shape[1]) < batch.lengths[:, None]) & (batch.ids >= 0)[:, None]
    columns = {name: np.asarray(values)[real] for name, values in found.items()}
    columns["example"] = np.broadcast_to(batch.ids[:, None], real.shape)[real]
    for name in ("features", "log_q", "log_p", "distance"):
        wrong = ~np.isfinite(columns[name]).reshape(len(columns[name]), -1).all(axis=1)
        if wrong.any():
            row = int(columns["example"][wrong][0])
            raise UserError(f"a model produced NaN logits at example {row}: check its checkpoint")
    return {name: values.astype(np.float16) if name in _HALF else values for name, values in columns.items()}


def logits_batches(
    scored: Scored, which: str, corpus: shards.Corpus, chosen: Sequence[int], lengths: tuple[int, int], batch_size: int
) -> Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]:
    """(logits [N, V], tokens [N]) of one model for calibration, computed anew on each call.

    Unused positions have the token -1, so that there are few shapes.
    """
    bound: Bound = getattr(scored, which)
    made = batches(corpus, list(chosen), batch_size, lengths)
    run = jax.jit(
        lambda bound, inputs, targets: probs.mask_vocabulary(
            scored_logits(bound, inputs, targets)[0][..., : scored.width], scored.vocabulary.vocab_size
        )
    )

    def again() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in made:
            found = np.asarray(run(bound, batch.inputs, batch.targets))
            real = np.arange(batch.targets.shape[1]) < batch.lengths[:, None]
            yield found.reshape(-1, found.shape[-1]), np.where(real, batch.targets, -1).ravel()

    return again
