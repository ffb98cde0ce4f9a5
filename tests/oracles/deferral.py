"""Learned deferral in plain numpy, straight from its definitions: features, heads, calibrations, target laws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from . import rules, sampler

FLOOR = -20.0


def log(x: float) -> float:
    """Natural logarithm, cut at FLOOR."""
    return max(math.log(x), FLOOR) if x > 0 else FLOOR


def ranked(law: Sequence[float]) -> list[int]:
    """Tokens from the likeliest, ties to the lower id."""
    return sorted(range(len(law)), key=lambda v: (-law[v], v))


def rank(law: Sequence[float], value: float) -> float:
    return math.log(1 + sum(1 for x in law if x > value))


def prefix_features(q, p, position: int, top: int, classes: Sequence[int], class_count: int) -> list[float]:
    found: list[float] = []
    for law in (q, p):
        best = [law[v] for v in ranked(law)[:top]]
        found += [log(x) for x in best]
        found += [best[0], best[0] - best[1], rules.entropy(law)]
    x, y = ranked(q)[0], ranked(p)[0]
    found.append(rules.total_variation(p, q))
    found.append(sum(b * (log(b) - log(a)) for a, b in zip(q, p, strict=True)))
    found.append(sum(a * (log(a) - log(b)) for a, b in zip(q, p, strict=True)))
    found += [log(p[x]), log(q[y]), p[x], q[y], rank(p, p[x]), rank(q, q[y]), float(x == y)]
    found += [math.log(1 + position), position / 100]
    for law in (q, p):
        found += [sum(law[v] for v in range(len(law)) if classes[v] == c) for c in range(class_count)]
    return found


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def dense(x, layer: Mapping) -> np.ndarray:
    made = np.asarray(x, float) @ np.asarray(layer["kernel"], float)
    return made + np.asarray(layer["bias"], float) if "bias" in layer else made


def normalised(x, statistics: Mapping) -> np.ndarray:
    return (np.asarray(x, float) - np.asarray(statistics["mean"], float)) / np.asarray(statistics["scale"], float)


def trunk(variables: Mapping, features, layers: int) -> np.ndarray:
    params = variables["params"]["trunk"]
    x = dense(normalised(features, variables["statistics"]["trunk"]["normalise"]), params["read"])
    for i in range(layers - 1):
        x = dense(gelu(x), params[f"layer_{i}"])
    return gelu(x)


def gap(variables: Mapping, q, p, position: int, top: int, classes, class_count: int, layers: int, gated: bool):
    """g_hat of a prefix head."""
    x, y = ranked(q)[0], ranked(p)[0]
    if gated and x == y:
        return 0.0
    features = prefix_features(q, p, position, top, classes, class_count)
    return float(dense(trunk(variables, features, layers), variables["params"]["gap"])[0])


def fitted_law(variables: Mapping, q, p, position: int, top: int, classes, class_count: int, layers: int) -> np.ndarray:
    """P_hat of a token head."""
    size = len(p)
    x = trunk(variables, prefix_features(q, p, position, top, classes, class_count), layers)
    params = variables["params"]
    shared = dense(x, params["share"])
    tokens = ranked(p)[:top]
    tokens += [v for v in ranked(q)[:top] if v not in tokens]
    weights = {}
    for v in tokens:
        own = [log(q[v]), log(p[v]), q[v], p[v], rank(q, q[v]), rank(p, p[v])]
        own += [float(v == ranked(q)[0]), float(v == ranked(p)[0])]
        own += [float(classes[v] == c) for c in range(class_count)]
        scored = dense(normalised(own, variables["statistics"]["normalise_candidate"]), params["read_candidate"])
        weights[v] = math.exp(log(p[v]) + float(dense(gelu(scored + shared), params["score"])[0]))
    left = 1 - sum(p[v] for v in tokens)
    rest = math.exp(log(left) + float(dense(x, params["rest"])[0]))
    total = sum(weights.values()) + rest
    others = sum(p[v] for v in range(size) if v not in weights) or 1
    return np.array([weights[v] / total if v in weights else rest / total * p[v] / others for v in range(size)])


def rejected(law, p_raw, alpha: float, test: str) -> list[bool]:
    """Which tokens `learned_token` rules out."""
    if test == "v1":
        return [x < law[sampler.argmax(p_raw)] - alpha for x in law]
    return [x < (max(law) - alpha if test == "v2" else (1 - alpha) * max(law)) for x in law]


def keep_or_defer(q, p, deferred: Sequence[bool]) -> np.ndarray:
    handed_over = sum(q[v] for v in range(len(q)) if deferred[v])
    return np.array([(0.0 if deferred[v] else q[v]) + handed_over * p[v] for v in range(len(q))])


def tempered_by(law, temperature: float) -> np.ndarray:
    """Temperature scaling of a law."""
    return sampler.normalise([x ** (1 / temperature) for x in law])


def vector_scaled(law, scale, bias) -> np.ndarray:
    """Vector scaling of a law."""
    return sampler.normalise([x**s * math.exp(b) for x, s, b in zip(law, scale, bias, strict=True)])


def isotonic(values: Sequence[float], hits: Sequence[float]) -> list[float]:
    """The best non-decreasing fit to hits in the order of values, by max-min of means: no two values may be equal."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    y = [hits[i] for i in order]
    fitted = [
        max(min(sum(y[a : b + 1]) / (b + 1 - a) for b in range(i, len(y))) for a in range(i + 1)) for i in range(len(y))
    ]
    found = [0.0] * len(values)
    for place, i in enumerate(order):
        found[i] = fitted[place]
    return found
