"""Methods by name: the execution, rule and drafter that a user's settings select."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from speccascade_t5x import decoding, deferral, drafting
from speccascade_t5x.core import rules
from speccascade_t5x.deferral.fitted import Fitted
from speccascade_t5x.inference import drafters
from speccascade_t5x.inference.drafters import Kind
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import Array, Bound, UserError

# These change how a distribution is sampled, not the distribution: they may stay set while methods are compared.
_HARMLESS = ("draft_len", "plan", "verification")
# BiLD's published settings: at most 10 drafted tokens, fallback 0.6, rollback 5 nats.
_BILD_DRAFT_LEN, _BILD_ROLLBACK = 10, 5.0


METHODS = {
    "speculative": Kind(
        "drafter and verifier by speculative execution of a rule; draft_len=auto does what `speccascade plan` found",
        (
            *("rule", "alpha", "rule_options", "draft_len", "plan", "verification", "draft_stop", "stop_threshold"),
            *("drafter", "k_matrix", "lenience", "edge_rules", "max_ngram", "min_ngram", "ngram_fill"),
        ),
        "Faster Cascades via Speculative Decoding, GenSpecSample; block verification: Sun et al. 2024",
    ),
    "verifier": Kind("the verifier alone, token by token", (), "baseline"),
    "drafter": Kind("the drafter alone, token by token", (), "baseline"),
    "bild": Kind(
        "BiLD as published, with sampling: drafts end at the fallback test; alpha is the rollback threshold in nats, "
        "rule_options={'fallback': ...} the confidence",
        ("alpha", "rule_options", "draft_len", "verification"),
        "Kim et al. 2023",
    ),
    "token_cascade": Kind(
        "the drafter writes a token, or the verifier where the rule defers; rules chow and chow_log",
        ("rule", "alpha", "draft_len"),
        "Faster Cascades via Speculative Decoding, TokenCascade",
    ),
    "oracle": Kind(
        "a token cascade of any prefix rule, charged for the verifier only where it defers",
        ("rule", "alpha"),
        "Faster Cascades via Speculative Decoding, Oracle[Diff]",
    ),
    "sequence_cascade": Kind(
        "the drafter writes the whole output; alpha is the log-probability below which the verifier rewrites it",
        ("alpha", "confidence", "quantile"),
        "Faster Cascades via Speculative Decoding, SeqCascade; confidences: Gupta et al. 2024",
    ),
}


def check(settings: Settings) -> None:
    """Rejects everything that can be found to be wrong without a model, before any weight is read.

    Raises:
      UserError: an unknown method, rule or drafter, an alpha out of range, an option that is not read.
    """
    _check_options(settings)
    if "rule" in METHODS[settings.method].reads and settings.rule not in deferral.RULES:
        rules.by_name(settings.rule, settings.alpha, **settings.rule_options)
    if settings.method == "speculative":
        drafters.check_options(settings)
        _draft_stop(settings)
    if settings.method == "bild" and settings.alpha is not None:
        rules.by_name("bild", settings.alpha, **settings.rule_options)
    if settings.method == "sequence_cascade" and settings.alpha is None:
        raise UserError("method='sequence_cascade' needs an alpha: the log-probability below which to rewrite")


def program(
    settings: Settings,
    verifier: Bound,
    models: Sequence[Bound],
    config: decoding.DecodeConfig,
    default_draft_len: int,
    table: drafting.NGramTable | None = None,
    fitted: Fitted | None = None,
) -> decoding.Program:
    """The Program these settings ask for.

    Args:
      settings: the user's settings.
      verifier: bound model.
      models: bound drafter models, from the largest; only a cascade runs more than the first.
      config: everything but the draft length.
      default_draft_len: used if the settings name none.
      table: the pair's n-gram table, or None.
      fitted: the pair's heads and calibrations, or None.

    Raises:
      UserError: the method does not read an option, two parts do not go together, or the drafter is missing; the
        message says what to use instead.
    """
    method = settings.method
    check(settings)
    drafter = models[0] if models else verifier
    if method not in ("verifier", "speculative") and not models:
        raise UserError(f"method={method!r} needs a drafter, but this bundle holds a verifier alone")
    sampling = settings.sampling()
    if method in ("verifier", "drafter"):
        model = verifier if method == "verifier" else drafter
        return decoding.autoregressive_program(model, config, sampling, role=method)
    draft_len: Any = settings.draft_len
    if draft_len is None:
        draft_len = _BILD_DRAFT_LEN if method == "bild" else default_draft_len
    config = dataclasses.replace(config, draft_len=draft_len)
    if method == "bild":
        alpha = _BILD_ROLLBACK if settings.alpha is None else settings.alpha
        bild: Any = rules.by_name("bild", alpha, **settings.rule_options)
        stop = drafting.Confidence(jnp.float32(bild.fallback))
        return decoding.speculative_program(drafter, verifier, bild, config, sampling, stop)
    if method == "sequence_cascade":
        threshold: Any = settings.alpha
        return decoding.sequence_cascade_program(
            drafter, verifier, config, sampling, threshold, settings.confidence, settings.quantile
        )
    rule = _rule(settings, fitted)
    if method == "speculative":
        chosen, config = drafters.build(settings, verifier, models, table, rule, config)
        return decoding.speculative_program(chosen, verifier, rule, config, sampling, _draft_stop(settings))
    return decoding.token_cascade_program(drafter, verifier, rule, config, sampling, oracle=method == "oracle")


def _rule(settings: Settings, fitted: Fitted | None) -> rules.Rule:
    """The rule these settings name; a learned one with the bundle's head or calibration."""
    if settings.rule not in deferral.RULES:
        return rules.by_name(settings.rule, settings.alpha, **settings.rule_options)
    if fitted is None:
        raise UserError(
            f"the rule {settings.rule!r} needs a fitted head or calibration, which this bundle does not hold: fit one "
            "with `speccascade train_deferral`"
        )
    return fitted.rule(settings.rule, settings.alpha, **settings.rule_options)


def _check_options(settings: Settings) -> None:
    """Rejects a changed option that the method does not read and would silently ignore."""
    if settings.method not in METHODS:
        raise UserError(f"method={settings.method!r} is unknown: use one of {', '.join(METHODS)}")
    reads = METHODS[settings.method].reads
    for field in dataclasses.fields(settings):
        if field.name in _HARMLESS:
            continue
        if not any(field.name in method.reads for method in METHODS.values()) or field.name in reads:
            continue
        if getattr(settings, field.name) != getattr(Settings(), field.name):
            able = ", ".join(name for name, method in METHODS.items() if field.name in method.reads)
            raise UserError(
                f"method={settings.method!r} does not read {field.name}: leave it out, or use one of {able}"
            )


def _draft_stop(settings: Settings) -> drafting.DraftStop | None:
    """The stop test of the drafter."""
    tests: dict[str, Callable[[Array], drafting.DraftStop]] = {
        "confidence": drafting.Confidence,
        "entropy": drafting.Entropy,
    }
    if settings.draft_stop is None:
        if settings.stop_threshold is not None:
            raise UserError("stop_threshold is read by draft_stop only: set draft_stop to 'confidence' or 'entropy'")
        return None
    if settings.draft_stop not in tests:
        raise UserError(f"draft_stop={settings.draft_stop!r} is unknown: use one of {', '.join(tests)}")
    if settings.stop_threshold is None:
        raise UserError(f"draft_stop={settings.draft_stop!r} needs a stop_threshold")
    return tests[settings.draft_stop](jnp.float32(settings.stop_threshold))
