"""Target laws of every rule in float64, straight from the table of rules.

`target` takes laws; `draft_and_target` takes logits and applies the truncation convention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from . import sampler

Law = Sequence[float]


def entropy(law: Law) -> float:
    """Entropy in nats."""
    return -math.fsum(x * math.log(x) for x in law if x > 0)


def total_variation(p: Law, q: Law) -> float:
    """Sum of the positive parts of p - q."""
    return math.fsum(max(0.0, a - b) for a, b in zip(p, q, strict=True))


def negative_log(x: float) -> float:
    """-log x, infinite at 0."""
    return -math.log(x) if x > 0 else math.inf


# Rules that decide once per prefix: name -> does the rule defer?
PREFIX_TESTS: dict[str, Callable[[Law, Law, Law, Law, float], bool]] = {
    "chow": lambda q, p, qr, pr, a: max(qr) < 1 - a,
    "chow_log": lambda q, p, qr, pr, a: entropy(qr) > a,
    "diff": lambda q, p, qr, pr, a: max(qr) < max(pr) - a,
    "diff_log": lambda q, p, qr, pr, a: entropy(qr) > entropy(pr) + a,
    "opt": lambda q, p, qr, pr, a: max(qr) < max(pr) - a * total_variation(p, q),
    "opt_log": lambda q, p, qr, pr, a: entropy(qr) > entropy(pr) + a * total_variation(p, q),
    "bild_fixed": lambda q, p, qr, pr, a: negative_log(pr[sampler.argmax(qr)]) > a,
}

# Rules that decide per token: name -> is token v deferred?
TOKEN_TESTS: dict[str, Callable[[Law, Law, int, float], bool]] = {
    "token_v1": lambda qr, pr, v, a: qr[v] < max(pr) - a,
    "token_v2": lambda qr, pr, v, a: pr[v] < max(pr) - a,
    "token_v3": lambda qr, pr, v, a: pr[v] < (1 - a) * max(pr),
    "typical": lambda qr, pr, v, a: pr[v] < min(a, math.sqrt(a) * math.exp(-entropy(pr))),
}

NAMES = (
    "lossless",
    *PREFIX_TESTS,
    "bild",
    *TOKEN_TESTS,
    "lossy_sd",
    "cos",
    "min_p",
)

# The only rule that truncates p and q before the rule instead of pi after it.
TRUNCATES_INPUTS = ("lossy_sd",)
# Rules whose target law does not depend on the drafter.
IGNORES_DRAFTER = ("lossless", "min_p")


def one_hot(index: int, size: int) -> np.ndarray:
    law = np.zeros(size)
    law[index] = 1.0
    return law


def _keep_or_defer(q: Law, p: Law, deferred: Sequence[bool]) -> np.ndarray:
    """pi(v) = q(v) (1 - r(v)) + p(v) sum of q over the deferred tokens."""
    handed_over = math.fsum(q[v] for v in range(len(q)) if deferred[v])
    return np.array([(0.0 if deferred[v] else q[v]) + handed_over * p[v] for v in range(len(q))])


def _lossy_shifted(q: Law, p: Law, keep: float) -> np.ndarray:
    accepted = [min(q[v], p[v] / keep) for v in range(len(q))]
    missing = 1.0 - math.fsum(accepted)
    gain = [max(0.0, p[v] - q[v]) for v in range(len(q))]
    if not sum(gain) > 0:
        return np.array(accepted)
    return np.array(accepted) + missing * sampler.normalise(gain)


def _lossy_optimal(q: Law, p: Law, keep: float) -> np.ndarray:
    """Finds b by bisection on s = 1/b in [0, 1]: sum of max(0, s p - q) grows with s."""
    accepted = [min(q[v], p[v] / keep) for v in range(len(q))]
    missing = 1.0 - math.fsum(accepted)
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if math.fsum(max(0.0, middle * p[v] - q[v]) for v in range(len(q))) < missing:
            low = middle
        else:
            high = middle
    return np.array([max(accepted[v], high * p[v]) for v in range(len(q))])


def _lossy(q: Law, p: Law, pr: Law, alpha: float, greedy: bool, residual: str) -> np.ndarray:
    keep = 1.0 - alpha
    if greedy:
        x, y = sampler.argmax(q), sampler.argmax(p)
        return one_hot(x if pr[x] >= keep * max(pr) else y, len(q))
    return {"shifted": _lossy_shifted, "optimal": _lossy_optimal}[residual](q, p, keep)


def lossy_deferral(q: Law, p: Law, p_raw: Law, alpha: float, greedy: bool = False) -> float:
    """How much of LossySD's law is not the drafter's: at temperature 0 all or nothing, as its token falls or stands."""
    if greedy:
        return float(p_raw[sampler.argmax(q)] < (1.0 - alpha) * max(p_raw))
    return 1.0 - math.fsum(min(q[v], p[v] / (1.0 - alpha)) for v in range(len(q)))


def target(
    name: str,
    q: Law,
    p: Law,
    q_raw: Law,
    p_raw: Law,
    alpha: float,
    *,
    greedy: bool = False,
    residual: str = "shifted",
    fallback: float = 0.6,
) -> np.ndarray:
    """The target law pi of one prefix. `greedy` says that q and p are one-hot (temperature 0).

    For `bild`, alpha is the rollback threshold and `fallback` the drafter's own.
    """
    size = len(q)
    if name == "lossless":
        return np.array(p, dtype=np.float64)
    if name == "cos":
        return np.array([(1 - alpha) * p[v] + alpha * q[v] for v in range(size)])
    if name == "min_p":
        return sampler.normalise([p[v] if p_raw[v] >= (1 - alpha) * max(p_raw) else 0.0 for v in range(size)])
    if name == "lossy_sd":
        return _lossy(q, p, p_raw, alpha, greedy, residual)
    if name in PREFIX_TESTS:
        deferred = PREFIX_TESTS[name](q, p, q_raw, p_raw, alpha)
        return np.array(p if deferred else q, dtype=np.float64)
    if name == "bild":
        if max(q_raw) < fallback:
            return np.array(p, dtype=np.float64)
        return _keep_or_defer(q, p, [negative_log(p_raw[v]) > alpha for v in range(size)])
    test = TOKEN_TESTS[name]
    if greedy:
        x, y = sampler.argmax(q), sampler.argmax(p)
        return one_hot(y if test(q_raw, p_raw, x, alpha) else x, size)
    return _keep_or_defer(q, p, [test(q_raw, p_raw, v, alpha) for v in range(size)])


def acceptance(pi: Law, d: Law) -> np.ndarray:
    """min(1, pi / d) per token; 0 where d is 0, for such a token is never drafted."""
    return np.array([min(1.0, b / a) if a > 0 else 0.0 for a, b in zip(d, pi, strict=True)])


def residual(pi: Law, d: Law) -> np.ndarray:
    """norm(max(0, pi - d)); all zero where nothing is left to draw."""
    gain = [max(0.0, b - a) for a, b in zip(d, pi, strict=True)]
    return sampler.normalise(gain) if math.fsum(gain) > 1e-14 else np.zeros(len(gain))


def draft_and_target(
    name: str,
    drafter_logits: Law,
    verifier_logits: Law,
    alpha: float,
    temperature: float,
    truncation: dict | None = None,
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """(d, pi) of a single-model drafter from the two models' logits.

    Target rules see the untruncated pair and pi is truncated; LossySD sees the truncated pair.
    """
    settings = truncation or {}
    q_raw, p_raw = sampler.tempered(drafter_logits), sampler.tempered(verifier_logits)
    q = sampler.tempered(drafter_logits, temperature)
    p = sampler.tempered(verifier_logits, temperature)
    d = sampler.truncate(q, **settings)
    greedy = temperature == 0
    if name in TRUNCATES_INPUTS:
        p = sampler.truncate(p, **settings)
        return d, target(name, d, p, q_raw, p_raw, alpha, greedy=greedy, **options)
    pi = target(name, q, p, q_raw, p_raw, alpha, greedy=greedy, **options)
    return d, sampler.truncate(pi, **settings)
