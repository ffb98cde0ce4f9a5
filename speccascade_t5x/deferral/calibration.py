"""Calibration of what a plug-in rule READS; the distributions that are sampled do not change.

Temperature scaling and vector scaling (Guo et al. 2017) give a calibrated distribution; isotonic regression gives a
calibrated confidence, the probability that the argmax is right. All three are fitted on teacher-forced targets of the
fitting split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from speccascade_t5x import trees
from speccascade_t5x.core import divergences
from speccascade_t5x.core.rules import Pair
from speccascade_t5x.interfaces import Array, UserError

KINDS = ("identity", "temperature", "vector", "isotonic")
BINS = 15
# Reciprocal temperatures of a first pass; a second pass refines between two of them.
_GRID = np.geomspace(1 / 16, 16.0, 33)
_BISECTIONS = 17
_VECTOR_STEPS, _VECTOR_RATE, _VECTOR_DECAY = 200, 0.03, 1e-4
_MOST_KNOTS = 200
_REMEMBERED = 2**29

# Yields (logits [N, V] float32, tokens [N]; -1 where a position does not count) and may be called again.
Batches = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """One model's calibration, a pytree.

    Attributes:
      kind: static. "identity"; "temperature": softmax(log law / T); "vector": softmax(scale * log law + bias);
        "isotonic": of the largest probability alone.
      values: {"temperature": []}, {"scale": [V], "bias": [V]} or {"knots": [K], "levels": [K]}; empty for identity.
    """

    kind: str
    values: dict[str, Array]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"the calibration {self.kind!r} is unknown: use one of {', '.join(KINDS)}")

    def law(self, raw: Array) -> Array:
        """The calibrated distribution, [..., V]. A token of probability 0 keeps it.

        Raises:
          UserError: isotonic regression gives no distribution.
        """
        if self.kind == "identity":
            return raw
        if self.kind == "isotonic":
            raise UserError("isotonic calibration gives no distribution: use temperature or vector scaling")
        logits = jnp.log(jnp.maximum(raw, 1e-30))
        if self.kind == "temperature":
            logits = logits / self.values["temperature"]
        else:
            # A padded tail has neither parameters nor probability.
            short = raw.shape[-1] - self.values["scale"].shape[-1]
            scale = jnp.pad(self.values["scale"][: raw.shape[-1]], (0, max(short, 0)), constant_values=1.0)
            bias = jnp.pad(self.values["bias"][: raw.shape[-1]], (0, max(short, 0)))
            logits = scale * logits + bias
        return jax.nn.softmax(jnp.where(raw > 0, logits, -jnp.inf), axis=-1)

    def confidence(self, raw: Array) -> Array:
        """The calibrated probability that the most likely token is right, [...]."""
        if self.kind != "isotonic":
            return jnp.max(self.law(raw), axis=-1)
        return jnp.interp(jnp.max(raw, axis=-1), self.values["knots"], self.values["levels"])


@dataclasses.dataclass(frozen=True)
class PairCalibration:
    """Calibrations of drafter and verifier.

    Attributes:
      q: the drafter's.
      p: the verifier's.
    """

    q: Calibration
    p: Calibration

    per_input: ClassVar[bool] = False  # one for all rows of a decode

    def gap(self, pair: Pair, loss: str) -> Array:
        """The plug-in loss gap of calibrated inputs, [...]: max p - max q ("zero_one") or H(q) - H(p) ("log")."""
        if loss == "zero_one":
            return self.p.confidence(pair.p_raw) - self.q.confidence(pair.q_raw)
        return divergences.entropy(self.q.law(pair.q_raw)) - divergences.entropy(self.p.law(pair.p_raw))


trees.register(Calibration, static=["kind"])
trees.register(PairCalibration)


def identity() -> Calibration:
    """A calibration that changes nothing."""
    return Calibration("identity", {})


def remembered(batches: Batches, most_bytes: int = _REMEMBERED) -> Batches:
    """The same batches, kept in memory after the first pass if they total at most `most_bytes`.

    Vector scaling passes over them dozens of times; batches beyond the limit are computed anew in each pass.
    """
    held: list[tuple[np.ndarray, np.ndarray]] = []
    whole = [False]

    def again() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        if whole[0]:
            yield from held
            return
        held.clear()
        total = 0
        for batch in batches():
            total += sum(array.nbytes for array in batch)
            if total <= most_bytes:
                held.append(batch)
            yield batch
        whole[0] = total <= most_bytes

    return again


@jax.jit
def _slopes(logits: Array, tokens: Array, betas: Array) -> Array:
    """d/d beta of sum -log softmax(beta logits)[token], for each beta."""
    label = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]

    def slope(beta: Array) -> Array:
        expected = jnp.sum(jax.nn.softmax(beta * logits, axis=-1) * logits, axis=-1)
        return jnp.sum(jnp.where(tokens >= 0, expected - label, 0.0))

    return jax.lax.map(slope, betas)


def fit_temperature(batches: Batches) -> Calibration:
    """The temperature of least negative log-likelihood: the loss is convex in 1/T, so its slope has one root.

    Raises:
      UserError: there is no position, or logits that are not finite.
    """

    def slopes(betas: np.ndarray) -> np.ndarray:
        total, some = np.zeros(len(betas)), False
        for logits, tokens in batches():
            total += np.asarray(_slopes(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(betas, jnp.float32)))
            some |= bool((tokens >= 0).any())
        if not some:
            raise UserError("there is no position to calibrate on: the fitting split is empty")
        if not np.isfinite(total).all():
            raise UserError("a model's logits are not finite, so it cannot be calibrated: check its checkpoint")
        return total

    betas = _GRID
    for _ in range(2):
        rising = slopes(betas)
        above = int(np.searchsorted(rising > 0, True))
        if above in (0, len(betas)):  # the root lies beyond the grid: its end is the answer
            betas = np.array([betas[min(above, len(betas) - 1)]])
            break
        found = np.interp(0.0, rising[above - 1 : above + 1], betas[above - 1 : above + 1])
        betas = np.geomspace(betas[above - 1], betas[above], _BISECTIONS)
    else:
        betas = np.array([found])
    return Calibration("temperature", {"temperature": jnp.float32(1.0 / betas[0])})


def fit_vector(batches: Batches, temperature: Calibration, steps: int = _VECTOR_STEPS) -> Calibration:
    """A scale and a bias per token, by Adam from the fitted temperature, with a pull towards it.

    A token that is never seen keeps the temperature's scale and no bias.
    """
    start = 1.0 / temperature.values["temperature"]
    params: dict[str, Array] = {}
    optimizer = optax.adam(optax.cosine_decay_schedule(_VECTOR_RATE, steps))

    @jax.jit
    def step(params, state, logits, tokens):
        def loss(params):
            scaled = params["scale"] * logits + params["bias"]
            counts = (tokens >= 0).astype(jnp.float32)
            each = optax.softmax_cross_entropy_with_integer_labels(scaled, jnp.maximum(tokens, 0))
            nll = jnp.sum(each * counts) / jnp.maximum(jnp.sum(counts), 1.0)
            pull = jnp.sum(jnp.square(params["scale"] - start)) + jnp.sum(jnp.square(params["bias"]))
            return nll + _VECTOR_DECAY * pull

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    done = 0
    while done < steps:
        before = done
        for logits, tokens in batches():
            if not params:
                width = logits.shape[-1]
                params = {"scale": jnp.full(width, start, jnp.float32), "bias": jnp.zeros(width)}
                state = optimizer.init(params)
            if (tokens >= 0).any() and done < steps:
                log_law = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
                params, state = step(params, state, jnp.maximum(log_law, -70.0), jnp.asarray(tokens))
                done += 1
        if done == before:
            raise UserError("there is no position to calibrate on: the fitting split is empty")
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params)):
        raise UserError("vector scaling became NaN or infinite: check the models' logits")
    return Calibration("vector", params)


def fit_isotonic(confidence: np.ndarray, hits: np.ndarray) -> Calibration:
    """The non-decreasing map from max-probability to hit rate of least squared error.

    Args:
      confidence: [N] largest probabilities.
      hits: [N] 1 where the most likely token was the label.

    Raises:
      UserError: there is no position, or every label is a hit, or none is.
    """
    from scipy import optimize  # takes a while to load, and only fitting needs it

    confidence, hits = np.asarray(confidence, np.float64), np.asarray(hits, np.float64)
    if not len(hits):
        raise UserError("there is no position to calibrate on: the fitting split is empty")
    if hits.min() == hits.max():
        what = "right" if hits.min() else "wrong"
        raise UserError(f"a model's most likely token is {what} at every label, so there is nothing to calibrate by")
    values, inverse = np.unique(confidence, return_inverse=True)
    weights = np.bincount(inverse).astype(np.float64)
    means = np.bincount(inverse, weights=hits) / weights
    fitted = optimize.isotonic_regression(means, weights=weights)
    # The fitted steps as a piecewise linear map through the first and last value of each block.
    first, last = fitted.blocks[:-1], fitted.blocks[1:] - 1
    knots = np.stack([values[first], values[last]], axis=1).ravel()
    heights = np.repeat(fitted.x[first], 2)
    # Always as many knots, so that no fit compiles a program of its own; a last one that is repeated changes nothing.
    places = np.minimum(np.arange(_MOST_KNOTS), len(knots) - 1)
    if len(knots) > _MOST_KNOTS:
        places = np.linspace(0, len(knots) - 1, _MOST_KNOTS).round().astype(int)
    shape = {"knots": jnp.asarray(knots[places], jnp.float32), "levels": jnp.asarray(heights[places], jnp.float32)}
    return Calibration("isotonic", shape)


def reliability(confidence: np.ndarray, hits: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """Rows of a reliability diagram: {"confidence", "accuracy", "count"} of each bin of equal width that holds any."""
    which = np.clip((np.asarray(confidence) * bins).astype(int), 0, bins - 1)
    rows = []
    for index in range(bins):
        inside = which == index
        if inside.any():
            means = float(np.mean(confidence[inside])), float(np.mean(hits[inside]))
            rows.append({"confidence": means[0], "accuracy": means[1], "count": int(inside.sum())})
    return rows


def expected_error(confidence: np.ndarray, hits: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean over positions of |confidence - accuracy| of the bin; 0 where there is none."""
    rows = reliability(confidence, hits, bins)
    total = sum(row["count"] for row in rows)
    return sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / max(total, 1)
