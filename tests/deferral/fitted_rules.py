"""Learned rules over four tokens with random heads, and their target laws by the oracle."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from oracles import deferral as oracle
from oracles import rules as rule_oracle
from oracles import sampler
from speccascade_t5x.core import rules
from speccascade_t5x.deferral import Calibration, FeatureSpec, Head, HeadConfig, PairCalibration
from speccascade_t5x.deferral.head import fresh

VOCAB, TOP, LAYERS = 4, 3, 2
CLASSES = (0, 1, 1, 0)
SPEC = FeatureSpec(top=TOP, classes=2)
# Name -> alpha that defers on some prefixes and keeps on others.
ALPHAS = {
    "gap": 0.25, "gap_log": 4.8, "token_v1": 0.05, "token_v2": 0.2, "token_v3": 0.5,
    "opt_temperature": 0.1, "opt_vector": 0.3, "opt_isotonic": 0.2,
}  # fmt: skip


@functools.cache
def head(kind: str, loss: str = "zero_one", seed: int | None = None) -> Head:
    """A head with random variables, far from fresh. Seeds are chosen so that rules defer here and keep there."""
    seed = {"prefix": 2, "token": 0}[kind] if seed is None else seed
    config = HeadConfig(kind, SPEC, loss, width=6, layers=LAYERS)
    rng = np.random.default_rng(seed)
    variables = fresh(config, jax.random.key(seed), 8 + 2 if kind == "token" else 0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.35, x.shape).astype(np.float32), variables["params"])
    statistics = jax.tree.map(lambda x: x + rng.uniform(0, 0.7, x.shape).astype(np.float32), variables["statistics"])
    return Head(config, {"params": params, "statistics": statistics}, jnp.asarray(CLASSES, jnp.int32))


@functools.cache
def calibration(kind: str) -> PairCalibration:
    values = {
        "temperature": [{"temperature": jnp.float32(t)} for t in (0.6, 1.7)],
        "vector": [
            {"scale": jnp.array(s, jnp.float32), "bias": jnp.array(b, jnp.float32)}
            for s, b in (([1.5, 0.7, 1.0, 0.4], [0.2, -0.6, 0.0, 0.5]), ([0.5, 1.1, 2.0, 0.9], [0.0, 0.4, -0.3, 0.1]))
        ],
        "isotonic": [{"knots": jnp.array([0.3, 0.5, 0.9]), "levels": jnp.array([0.2, y, 0.8])} for y in (0.3, 0.7)],
    }[kind]
    return PairCalibration(*(Calibration(kind, each) for each in values))


def rule(name: str) -> rules.Rule:
    """The rule of a name of ALPHAS."""
    alpha = ALPHAS[name]
    if name.startswith("gap"):
        return rules.by_name("learned_gap", alpha, head=head("prefix", "log" if name == "gap_log" else "zero_one"))
    if name.startswith("token"):
        return rules.by_name("learned_token", alpha, head=head("token"), test=name.removeprefix("token_"))
    kind = name.removeprefix("opt_")
    loss = "log" if kind == "vector" else "zero_one"
    return rules.by_name("calibrated_opt", alpha, calibration=calibration(kind), loss=loss)


def _numpy(tree):
    return jax.tree.map(np.asarray, tree)


def _confidence(kind: str, values, law) -> float:
    if kind == "isotonic":
        return float(np.interp(max(law), np.asarray(values["knots"], float), np.asarray(values["levels"], float)))
    return max(oracle.tempered_by(law, float(values["temperature"])))


def margin(name: str, q_raw, p_raw, position: int, alpha: float, distance: float) -> float:
    """score - alpha D_TV of a prefix rule: how far its test is from a tie."""
    common = (q_raw, p_raw, position, TOP, CLASSES, 2)
    if name.startswith("gap"):
        found = head("prefix", "log" if name == "gap_log" else "zero_one")
        return oracle.gap(_numpy(found.variables), *common, LAYERS, name == "gap") - alpha * distance
    kind = name.removeprefix("opt_")
    both = calibration(kind)
    if kind == "vector":
        laws = [
            oracle.vector_scaled(law, *(np.asarray(side.values[x], float) for x in ("scale", "bias")))
            for side, law in ((both.q, q_raw), (both.p, p_raw))
        ]
        return rule_oracle.entropy(laws[0]) - rule_oracle.entropy(laws[1]) - alpha * distance
    read = [_confidence(kind, side.values, law) for side, law in ((both.q, q_raw), (both.p, p_raw))]
    return read[1] - read[0] - alpha * distance


def draft_and_target(name: str, drafter, verifier, position: int, temperature: float, truncation: dict, alpha=None):
    """(d, pi) in float64, from logits."""
    alpha = ALPHAS[name] if alpha is None else alpha
    q_raw, p_raw = sampler.tempered(drafter), sampler.tempered(verifier)
    q, p = sampler.tempered(drafter, temperature), sampler.tempered(verifier, temperature)
    if name.startswith("token"):
        common = (q_raw, p_raw, position, TOP, CLASSES, 2)
        law = oracle.fitted_law(_numpy(head("token").variables), *common, LAYERS)
        pi = oracle.keep_or_defer(q, p, oracle.rejected(law, p_raw, alpha, name.removeprefix("token_")))
    else:
        off = margin(name, q_raw, p_raw, position, alpha, rule_oracle.total_variation(p, q))
        pi = np.array(p if off > 0 else q)
    return sampler.truncate(q, **truncation), sampler.truncate(pi, **truncation)
