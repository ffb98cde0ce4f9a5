"""The settings of a decode, checked when they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from speccascade_t5x import decoding
from speccascade_t5x.common import checks
from speccascade_t5x.interfaces import UserError

_RANGES = {
    **dict.fromkeys(("top_p", "min_p", "quantile"), (0.0, 1.0)),
    **dict.fromkeys(("max_ngram", "min_ngram", "max_input_len", "max_len", "num_samples", "batch_size"), (1,)),
    **dict.fromkeys(("draft_len", "k_matrix", "top_k"), (0,)),
    "temperature": (0.0, 2.0),
    "lenience": (1.0, checks.MOST_REAL),
    "buckets": (1,),
    "seed": checks.SEED,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode. None takes the bundle's value.

    Attributes:
      method: a name of `inference.methods.METHODS`: "speculative", or one model alone ("verifier", "drafter"), or a
        baseline ("bild", "token_cascade", "oracle", "sequence_cascade").
      rule: registered name of the rule.
      alpha: the rule's trade-off, None for rules without one; in a sequence cascade the log-probability below
        which the verifier rewrites.
      rule_options: further fields of the rule, such as {"residual": "optimal"} of lossy_sd.
      draft_len: number of tokens drafted per round; 0 drafts nothing, "auto" takes the recommendation of `plan`.
      plan: the plan.json of `speccascade plan` that draft_len="auto" follows.
      verification: "token" or "block".
      draft_stop: None, or "confidence" or "entropy": ends a draft early, see `drafting.stop`.
      stop_threshold: threshold of draft_stop; a probability, or nats.
      drafter: a name of `inference.drafters.DRAFTERS`: "model", "max_gram", "prompt_lookup", "ngram" or
        "cascade".
      k_matrix: of a cascade, in the convention of `drafting.k_matrix`; takes the place of draft_len. Its last row is
        Max-Gram's where it has one row more than there are models.
      lenience: L >= 1 of "Cascade Speculative Drafting" between drafters of a cascade, never at the verifier.
      edge_rules: of a cascade of several models: per model None, or (rule, alpha) between it and the next smaller.
      max_ngram: longest match that Max-Gram and prompt lookup use; None is unlimited, and 3 for prompt lookup.
      min_ngram: shortest match that they use.
      ngram_fill: how Max-Gram continues from the bundle's n-gram table: "argmax" or "sample".
      confidence: of a sequence cascade: "mean" (log-probability per token), "sum" or "quantile".
      quantile: which quantile of the per-token log-probabilities, 0 to 1.
      temperature: 0 to 2; 0 is greedy.
      top_k: 0 is off.
      top_p: 1 is off.
      min_p: 0 is off.
      max_input_len: maximum length of a prompt in tokens, EOS included.
      max_len: maximum length of an output in tokens, EOS included.
      truncate: cut longer prompts instead of rejecting them.
      stop_sequences: texts that end an output; kept in it. They are matched as the ids the vocabulary gives
        them, so with SentencePiece as whole words.
      num_samples: number of outputs per input.
      batch_size: number of inputs decoded together.
      buckets: prompt lengths to pad to; fewer lengths need fewer compiles.
      trace: keep per-token diagnostics in the records.
      seed: seed of the random key.
    """

    method: str = "speculative"
    rule: str = "lossless"
    alpha: float | None = None
    rule_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    draft_len: int | str | None = None
    plan: str | None = None
    verification: str = "token"
    draft_stop: str | None = None
    stop_threshold: float | None = None
    drafter: str = "model"
    k_matrix: tuple[tuple[int, ...], ...] | None = None
    lenience: float | None = None
    edge_rules: tuple[tuple[str, float | None] | None, ...] | None = None
    max_ngram: int | None = None
    min_ngram: int = 1
    ngram_fill: str = "argmax"
    confidence: str = "mean"
    quantile: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_input_len: int | None = None
    max_len: int | None = None
    truncate: bool = False
    stop_sequences: tuple[str, ...] = ()
    num_samples: int = 1
    batch_size: int = 8
    buckets: tuple[int, ...] | None = None
    trace: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        checks.fields(self, **_RANGES)
        if self.top_p == 0.0:
            raise UserError("top_p=0 would keep no token: use a small positive number, or temperature=0")
        if isinstance(self.draft_len, str) and self.draft_len != "auto":
            raise UserError(f"draft_len={self.draft_len!r} is unknown: use a whole number, or 'auto' with a plan")

    def sampling(self) -> decoding.Sampling:
        """The traced options, strongly typed so that no value compiles a program of its own."""
        return decoding.Sampling(
            jnp.float32(self.temperature), jnp.int32(self.top_k), jnp.float32(self.top_p), jnp.float32(self.min_p)
        )


def make_settings(**choices: Any) -> Settings:
    """Settings from keyword arguments; options that no method here supports are rejected by name.

    Raises:
      UserError: an unsupported or unknown option.
    """
    known = {field.name for field in dataclasses.fields(Settings)}
    for name in choices:
        checks.refuse_unsupported(name)
        checks.one_of("option", name, known)
    return Settings(**choices)
