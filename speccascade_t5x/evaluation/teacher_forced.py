"""What a method's law says of given texts: NLL of references, and of each output token's q, p and pi.

Both models score a whole text in one block; the rule then builds its target law at every position exactly as the
decoding loop does (`decoding.laws.rule_laws`), temperature and truncation included, so this is the law that is
emitted. No token is drawn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x import decoding
from speccascade_t5x.core import probs
from speccascade_t5x.core.rules import Lossless, Pair
from speccascade_t5x.data import batching
from speccascade_t5x.decoding.laws import rule_laws
from speccascade_t5x.inference.generate import LoadedPair, Runner
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import Array, Bound, UserError

# A law may give a reference token no chance at all (temperature 0, truncation): it is then charged this much.
FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token ids to score, beside their inputs.

    Attributes:
      batches: of the inputs.
      ids: of each example, EOS included, by example index.
    """

    batches: tuple[batching.Batch, ...]
    ids: Mapping[int, Sequence[int]]


def references(pair: LoadedPair, batches: Sequence[batching.Batch], targets: Sequence[str], max_len: int) -> Texts:
    """Reference texts, tokenised as outputs are: with EOS, cut to max_len."""
    vocabulary = pair.vocabulary
    ids = {i: [*vocabulary.encode(text)[: max_len - 1], vocabulary.eos_id] for i, text in enumerate(targets)}
    return Texts(tuple(batches), ids)


def why_not(pair: LoadedPair, settings: Settings) -> str | None:
    """Why a method's law cannot be told from its models' laws at a prefix; None where it can."""
    if settings.method == "sequence_cascade":
        return "a sequence cascade decides once per output, so it has no law of the next token"
    head = getattr(Runner(pair, settings).program.rule, "head", None)
    if head is not None and head.config.features.hidden:
        return "the rule's head reads hidden states, which are not captured here"
    if settings.method == "speculative" and settings.drafter != "model" and settings.rule not in ("lossless", "min_p"):
        return f"the law q of drafter={settings.drafter!r} is known on its own drafts only"
    return None


class TeacherForced:
    """Scores texts under methods of one pair; programs are compiled once per rule and shape.

    Args:
      pair: both models.
      max_len: texts are padded to it.
    """

    def __init__(self, pair: LoadedPair, max_len: int):
        self.pair, self.max_len = pair, max_len
        self._score = jax.jit(_score, static_argnums=(0, 4))
        self._judge: dict[Any, Any] = {}

    def score(self, texts: Texts, settings: Sequence[Settings]) -> list[dict[str, np.ndarray]]:
        """Figures of each method on each text, [N, max_len] float32 each, NaN after a text's end.

        Returns:
          Per settings, row i being example i: "prob" (of the token under the emitted law), "q" and "p" (at
          temperature 1), "drafted" (under d, the law of a model's drafts), "deferral", "overlap" (sum_v min(pi, d): the
          chance that a drafted token stands), and "max_q", "max_p", "right_q", "right_p" (whether the argmax is the
          token).

        Raises:
          UserError: settings that make no program; a model's law of a token is NaN.
        """
        programs = [Runner(self.pair, one).program for one in settings]
        total = max(texts.ids) + 1
        found: list[dict[str, np.ndarray]] = [{} for _ in settings]
        for batch in texts.batches:
            tokens = np.zeros((len(batch.valid), self.max_len), np.int32)
            lengths = np.zeros(len(batch.valid), np.int32)
            for row, index in enumerate(batch.example_ids):
                ids = texts.ids[int(index)][: self.max_len]
                tokens[row, : len(ids)], lengths[row] = ids, len(ids)
            logits_p, logits_q = self._logits(batch, tokens)
            inside = np.arange(self.max_len) < lengths[:, None]
            for i, (one, program) in enumerate(zip(settings, programs, strict=True)):
                figures = jax.device_get(self._figures(one, program, logits_p, logits_q, jnp.asarray(tokens)))
                _check_finite(batch, figures["prob"], inside)
                for name, values in figures.items():
                    into = found[i].setdefault(name, np.full((total, self.max_len), np.nan, np.float32))
                    for row in np.flatnonzero(batch.valid).tolist():
                        into[batch.example_ids[row]] = np.where(inside[row], values[row], np.nan)
        return found

    def _logits(self, batch: batching.Batch, tokens: np.ndarray) -> tuple[Array, Array | None]:
        def of(bound: Bound) -> Array:
            inputs = bound.model.inputs(jnp.asarray(batch.encoder_input_tokens))
            return self._score(bound.model, bound.params, inputs, jnp.asarray(tokens), self.max_len)

        return of(self.pair.verifier), None if self.pair.drafter is None else of(self.pair.drafter)

    def _figures(
        self, settings: Settings, program: decoding.Program, logits_p: Array, logits_q: Array | None, tokens: Array
    ) -> dict[str, Array]:
        """Figures of one batch. A program per rule class: JAX takes equal-looking rules for each other."""
        alone = settings.method in ("verifier", "drafter")
        rule = Lossless() if alone else program.rule
        leaves, structure = jax.tree.flatten((rule, program.sampling))
        key = (type(rule), structure, settings.method == "drafter", program.width, program.config.vocab_size)
        if key not in self._judge:
            shape = _Shape(settings.method == "drafter", program.width, program.config)

            def judge(leaves: Any, *arrays: Array) -> dict[str, Array]:
                return _figures(shape, *jax.tree.unflatten(structure, leaves), *arrays)

            self._judge[key] = jax.jit(judge)
        return self._judge[key](leaves, logits_p, logits_q, tokens)


def _check_finite(batch: batching.Batch, prob: np.ndarray, inside: np.ndarray) -> None:
    """NaN marks what lies after a text's end: within it, it would make the text shorter and its NLL smaller."""
    broken = batch.valid & np.any(np.isnan(prob) & inside, axis=1)
    if broken.any():
        index = int(batch.example_ids[np.argmax(broken)])
        raise UserError(f"a model produced NaN on the text of example {index}: check its checkpoint, or use float32")


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a compiled judgement depends on beside its arrays."""

    drafter_alone: bool
    width: int
    config: decoding.DecodeConfig


def _score(model: Any, params: Any, inputs: Any, tokens: Array, room: int) -> Array:
    """Logits [B, T, V] of `tokens`, each from those before it."""
    rows = tokens.shape[0]
    cache = model.start(params, inputs, rows, room)
    first, positions = model.first(inputs)
    block = jnp.concatenate([first[:, None], tokens[:, :-1]], axis=1)
    return model.extend(params, cache, block, positions)[0]


def _figures(
    shape: _Shape, rule: Any, sampling: Any, logits_p: Array, logits_q: Array | None, tokens: Array
) -> dict[str, Array]:
    vocab_size = shape.config.vocab_size
    logits_p = logits_p[..., : shape.width]
    logits_q = logits_p if logits_q is None else logits_q[..., : shape.width]
    p_raw, q_raw = probs.raw(logits_p, vocab_size), probs.raw(logits_q, vocab_size)
    q = probs.tempered(logits_q, sampling.temperature, vocab_size, q_raw)
    pair = Pair(q=q_raw, p=p_raw, q_raw=q_raw, p_raw=p_raw, position=jnp.arange(tokens.shape[1])[None])
    unread: Any = None  # by rule_laws
    program = decoding.Program(unread, rule, sampling, unread, unread, shape.config, shape.width)
    laws = rule_laws(program, pair, logits_p, q, plain=False)
    drafted = probs.truncate(q, sampling)
    target = drafted if shape.drafter_alone else laws.target
    deferral = jnp.zeros_like(laws.deferral) if shape.drafter_alone else laws.deferral
    peak = functools.partial(jnp.max, axis=-1)
    return {
        "prob": jnp.where(laws.broken, jnp.nan, probs.gather(target, tokens)),
        "q": probs.gather(q_raw, tokens),
        "p": probs.gather(p_raw, tokens),
        "drafted": probs.gather(drafted, tokens),
        "deferral": deferral,
        "overlap": jnp.sum(jnp.minimum(target, drafted), axis=-1),
        "max_q": peak(q_raw),
        "max_p": peak(p_raw),
        "right_q": (probs.argmax(q_raw) == tokens).astype(jnp.float32),
        "right_p": (probs.argmax(p_raw) == tokens).astype(jnp.float32),
    }


def per_example(figures: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Sums over each text: what a cell keeps of its references.

    Returns:
      "nll" in nats with probabilities floored at FLOOR, "unreachable" tokens (below the floor), "tokens", "deferral"
      and "overlap", each [N].
    """
    prob = figures["prob"]
    sums = {
        "nll": np.nansum(-np.log(np.maximum(prob, FLOOR)), axis=1),
        "unreachable": np.sum(prob < FLOOR, axis=1),
        "tokens": np.sum(~np.isnan(prob), axis=1),
        "deferral": np.nansum(figures["deferral"], axis=1),
        "overlap": np.nansum(figures["overlap"], axis=1),
    }
    return {name: [round(float(x), 5) for x in values] for name, values in sums.items()}


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Whether confidences keep what they promise: bins of equal width, and the expected calibration error.

    Args:
      confidence: any shape, NaN where nothing was scored.
      right: likewise, 0 or 1.

    Returns:
      "bins": [{"confidence", "accuracy", "tokens"}], empty ones left out; "ece": the mean gap, weighted by tokens.
    """
    known = ~np.isnan(confidence)
    confidence, right = confidence[known].astype(np.float64), right[known].astype(np.float64)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    found = []
    for i in range(bins):
        inside = place == i
        if inside.any():
            entry = {"confidence": confidence[inside].mean(), "accuracy": right[inside].mean(), "tokens": inside.sum()}
            found.append({name: float(value) for name, value in entry.items()})
    gaps = [entry["tokens"] * abs(entry["confidence"] - entry["accuracy"]) for entry in found]
    return {"bins": found, "ece": float(sum(gaps) / max(len(confidence), 1))}
