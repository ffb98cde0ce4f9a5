"""Heads: small networks that estimate from features what the models' confidences miss.

A prefix head gives g_hat(x_<t), the expected loss gap. A token head gives P_hat(v | x_<t) of a few candidate tokens.
The normalisation of the features is part of the head: means and scales travel in its variables.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x import trees
from speccascade_t5x.core.rules import Pair
from speccascade_t5x.deferral import features as features_lib
from speccascade_t5x.deferral.features import Candidates, FeatureSpec
from speccascade_t5x.interfaces import NEG_INF, Array, PyTree, UserError

KINDS = ("prefix", "token")
LOSSES = ("zero_one", "log")
_LEAST_SCALE = 1e-3  # a feature that hardly varies is not magnified


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The architecture of a head; static.

    Attributes:
      kind: "prefix" (g_hat) or "token" (P_hat of the candidates).
      features: what it reads.
      loss: whose gap a prefix head estimates: "zero_one" or "log".
      objective: what it was fitted with, see `fitting.OBJECTIVES`. Under "co_llm" the output is the log-odds of
        deferring, not a gap.
      width: of the hidden layers.
      layers: hidden layers.
    """

    kind: str = "prefix"
    features: FeatureSpec = dataclasses.field(default_factory=FeatureSpec)
    loss: str = "zero_one"
    objective: str = "squared"
    width: int = 64
    layers: int = 2

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r} of a head is unknown: use {' or '.join(known)}")
        if self.width < 1 or self.layers < 1:
            raise UserError("a head needs a width and a number of layers of 1 or more")

    @property
    def gated(self) -> bool:
        """Whether g_hat is 0 where both argmaxes agree: the 0-1 gap is exactly 0 there."""
        return self.kind == "prefix" and self.loss == "zero_one" and self.objective != "co_llm"


class Normalise(nn.Module):
    """(x - mean) / scale, with statistics of the fitting data, which are not trained."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        mean = self.variable("statistics", "mean", jnp.zeros, (width,), jnp.float32)
        scale = self.variable("statistics", "scale", jnp.ones, (width,), jnp.float32)
        return (x.astype(jnp.float32) - mean.value) / scale.value


class Trunk(nn.Module):
    """Normalised features, and hidden states if any, through the hidden layers: [..., F] -> [..., width]."""

    config: HeadConfig

    @nn.compact
    def __call__(self, features: Array, hidden: Array | None) -> Array:
        x = nn.Dense(self.config.width, name="read")(Normalise(name="normalise")(features))
        if hidden is not None:
            x += nn.Dense(self.config.width, use_bias=False, name="read_hidden")(
                Normalise(name="normalise_hidden")(hidden)
            )
        for i in range(self.config.layers - 1):
            x = nn.Dense(self.config.width, name=f"layer_{i}")(nn.gelu(x))
        return nn.gelu(x)


class PrefixNetwork(nn.Module):
    """[..., F] (and [..., D]) -> [...] g_hat. The last layer starts at zero, so a fresh head predicts no gap."""

    config: HeadConfig

    @nn.compact
    def __call__(self, features: Array, hidden: Array | None = None) -> Array:
        x = Trunk(self.config, name="trunk")(features, hidden)
        gap = nn.Dense(1, kernel_init=nn.initializers.zeros, name="gap")(x)[..., 0]
        if self.config.gated:
            gap *= 1.0 - features[..., self.config.features.names.index("agree")]
        return gap


class TokenNetwork(nn.Module):
    """[..., F], candidates -> [..., K + 1] log P_hat of each candidate and, last, of all other tokens together.

    It is a correction to log p that starts at zero, so a fresh head gives the verifier's probabilities.
    """

    config: HeadConfig

    @nn.compact
    def __call__(self, features: Array, found: Candidates, hidden: Array | None = None) -> Array:
        x = Trunk(self.config, name="trunk")(features, hidden)
        own = nn.Dense(self.config.width, name="read_candidate")(Normalise(name="normalise_candidate")(found.features))
        shared = nn.Dense(self.config.width, name="share")(x)[..., None, :]
        scored = nn.Dense(1, kernel_init=nn.initializers.zeros, name="score")(nn.gelu(own + shared))[..., 0]
        rest = nn.Dense(1, kernel_init=nn.initializers.zeros, name="rest")(x)[..., 0]
        logits = jnp.where(found.valid, found.log_p + scored, NEG_INF)
        logits = jnp.concatenate([logits, (found.log_rest + rest)[..., None]], axis=-1)
        return jax.nn.log_softmax(logits, axis=-1)


def network(config: HeadConfig) -> nn.Module:
    """The Flax module of a head."""
    return (PrefixNetwork if config.kind == "prefix" else TokenNetwork)(config)


@dataclasses.dataclass(frozen=True)
class Head:
    """A head with its variables: a pytree, so that it can be a leaf of a rule and swept without recompiling.

    Attributes:
      config: static.
      variables: {"params": ..., "statistics": ...}, float32.
      classes: [V] int32 class of each token; None where the features read none.
    """

    config: HeadConfig
    variables: PyTree
    classes: Array | None = None

    per_input: ClassVar[bool] = False  # one for all rows of a decode, whatever the shapes of its arrays

    @property
    def unfitted(self) -> bool:
        """Whether it still predicts what a fresh head predicts: its last layers are zero."""
        last = [self.variables["params"][name] for name in ("gap", "score", "rest") if name in self.variables["params"]]
        return not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(last))

    def gap(self, pair: Pair) -> Array:
        """g_hat at each position, [...].

        Raises:
          UserError: this is not a prefix head, or the pair lacks what it reads.
        """
        self._require("prefix")
        spec = self.config.features
        read = features_lib.prefix_features(pair, spec, self.classes)
        return network(self.config).apply(self.variables, read, features_lib.hidden_states(pair, spec))

    def law(self, pair: Pair) -> Array:
        """P_hat, [..., V]; the mass that the candidates leave is shared by the other tokens in proportion to p_raw.

        Raises:
          UserError: this is not a token head, or the pair lacks what it reads.
        """
        self._require("token")
        spec = self.config.features
        found = features_lib.candidates(pair, spec, self.classes)
        read = features_lib.prefix_features(pair, spec, self.classes)
        logs = network(self.config).apply(self.variables, read, found, features_lib.hidden_states(pair, spec))
        vocab = pair.p_raw.shape[-1]
        chosen = jax.nn.one_hot(jnp.where(found.valid, found.ids, vocab), vocab, dtype=jnp.float32)
        scored = jnp.einsum("...k,...kv->...v", jnp.where(found.valid, jnp.exp(logs[..., :-1]), 0.0), chosen)
        others = jnp.where(jnp.sum(chosen, axis=-2) > 0, 0.0, pair.p_raw)
        total = jnp.sum(others, axis=-1, keepdims=True)
        return scored + jnp.exp(logs[..., -1:]) * others / jnp.where(total > 0, total, 1.0)

    def _require(self, kind: str) -> None:
        if self.config.kind != kind:
            raise UserError(f"this is a {self.config.kind} head, but the rule needs a {kind} head: fit one")


trees.register(Head, static=["config"])


def remark(head: Head) -> str:
    """A remark for users on a head that learned nothing; empty for any other."""
    if not head.unfitted:
        return ""
    if head.config.kind == "token":
        what = "it says what the verifier says, so learned_token equals the plug-in test of the same name"
    else:
        what = "it sees no gap anywhere, so learned_gap is lossless at alpha < 0 and the drafter alone at alpha >= 0"
    return (
        f"the kept head is the one the fit began with, since no update lowered the left-out loss: {what}; "
        "collect more examples (LIMIT, SPLIT), lower fitting.FitConfig.learning_rate, or try another OBJECTIVE or LOSS"
    )


def fresh(config: HeadConfig, key: Array, candidate_width: int = 0) -> PyTree:
    """Variables of an unfitted head, with statistics that normalise nothing."""
    spec = config.features
    read = jnp.zeros((1, len(spec.names)))
    hidden = jnp.zeros((1, spec.hidden)) if spec.hidden else None
    if config.kind == "prefix":
        return network(config).init(key, read, hidden)
    few = 2 * spec.top
    found = Candidates(
        jnp.zeros((1, few), jnp.int32), jnp.ones((1, few), bool), jnp.zeros((1, few, candidate_width)),
        jnp.zeros((1, few)), jnp.zeros(1),
    )  # fmt: skip
    return network(config).init(key, read, found, hidden)


def with_statistics(variables: PyTree, columns: dict[str, np.ndarray]) -> PyTree:
    """Puts mean and scale of fitting data in place.

    Args:
      variables: of `fresh`.
      columns: name of a Normalise module -> its data [N, width].
    """
    statistics = jax.tree.map(lambda leaf: leaf, variables["statistics"])
    for name, values in columns.items():
        place = statistics["trunk"] if name in statistics["trunk"] else statistics
        values = np.asarray(values, np.float64)
        scale = values.std(axis=0)
        place[name] = {
            "mean": jnp.asarray(values.mean(axis=0), jnp.float32),
            "scale": jnp.asarray(np.where(scale > _LEAST_SCALE, scale, 1.0), jnp.float32),
        }
    return {**variables, "statistics": statistics}


def as_tree(head: Head) -> dict[str, Any]:
    """The arrays of a head as one nested dict, for files."""
    return {**head.variables, **({} if head.classes is None else {"classes": head.classes})}


def from_tree(config: HeadConfig, tree: dict[str, Any]) -> Head:
    """A head from its arrays."""
    arrays = jax.tree.map(jnp.asarray, dict(tree))
    classes = arrays.pop("classes", None)
    return Head(config, arrays, classes)
