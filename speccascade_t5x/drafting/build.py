"""Builds cascades from bound models and rejects combinations that have no target distribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.core.rules import Rule
from speccascade_t5x.drafting.cascade import CascadeDrafter
from speccascade_t5x.drafting.k_matrix import KMatrix, k_matrix
from speccascade_t5x.drafting.max_gram import MaxGram
from speccascade_t5x.interfaces import Array, Bound, UserError


def cascade(
    models: Sequence[Bound],
    k: Sequence[Sequence[int]],
    *,
    copier: Bound | None = None,
    lenience: Array | float | Sequence[Array | float | None] | None = None,
    rules: Sequence[Rule | None] | None = None,
    sampling: Sampling | None = None,
    width: int | None = None,
    vocab_size: int | None = None,
    reads: int | None = None,
) -> Bound:
    """A bound cascade of drafters.

    Args:
      models: bound LanguageModels, the largest first; one at least.
      k: the K matrix, one row and column per drafter, the copier's last (see `drafting.k_matrix`).
      copier: a bound MaxGram as the smallest drafter; its own draft_len is not used.
      lenience: L >= 1 of "Cascade Speculative Drafting" between drafters: one number for every edge without a
        rule, or one per model (None is exact). It never reaches the verifier's review. None: exact everywhere.
      rules: per model, the rule between it and the drafter below, or None: q' = rule(q1, q2).
      sampling: the one the decode is given.
      width: V of the verifier's logits; by default the smallest of the models'.
      vocab_size: ids at or above it are never drafted.
      reads: index of the model whose distribution the verifier's rule reads; None where it reads none.

    Raises:
      UserError: the combination cannot be run; the message says why and what to use instead.
    """
    if not models:
        raise UserError("a cascade needs a language model: use drafting.max_gram alone, or add a model")
    count, sampling = len(models), sampling or Sampling()
    plan = k_matrix(k, count, copier is not None)
    rules = _checked_rules(rules, plan)
    per_model = _lenience(lenience, rules, [plan.length(i + 1) > 0 for i in range(count)])
    _check_reads(reads, count)
    width = width or min(bound.model.vocab_size for bound in models)
    drafter = CascadeDrafter(
        sampling=sampling,
        lenience=tuple(per_model),
        rules=tuple(rules),
        copier=None if copier is None else _fitted(copier, sampling, width, vocab_size),
        models=tuple(bound.model for bound in models),
        plan=plan,
        width=width,
        vocab_size=vocab_size,
        reads=reads,
    )
    params = {"models": [bound.params for bound in models], "copier": copier and copier.params}
    return Bound(drafter, params)


def _per_model(values: Sequence | None, count: int, name: str) -> list:
    """`values` as a list with one entry per model."""
    values = [None] * count if values is None else list(values)
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} entries for {count} models: give one per model, None for none")
    return values


def _lenience(
    given: Array | float | Sequence[Array | float | None] | None, rules: list[Rule | None], drafts: list[bool]
) -> list[Array | float | None]:
    """One checked entry per model; a single number applies to every edge and conflicts with a rule on any of them."""
    if given is None or isinstance(given, Sequence):
        lenience = _per_model(given, len(rules), "lenience")
    else:
        lenience = [given if below else None for below in drafts]
    for i, value in enumerate(lenience):
        if value is None:
            continue
        if rules[i] is not None:
            raise UserError(
                f"lenience and a rule are both given for the same edge, below model {i}, and each alone determines its "
                "target distribution: give lenience per model with None there, or drop the rule"
            )
        if not isinstance(value, jax.core.Tracer) and not (np.asarray(value) >= 1.0).all():
            raise UserError(f"lenience={value} must be 1 or more: it is L = 1/l, and 1 is exact")
    return lenience


def _check_reads(reads: int | None, count: int) -> None:
    """Rejects an index that names no model."""
    if reads is not None and not 0 <= reads < count:
        raise UserError(
            f"reads={reads} names no model of this cascade: give the index of one, from 0 to {count - 1} (a rule reads "
            "the distribution of a model, never that of copied tokens)"
        )


def _checked_rules(rules: Sequence[Rule | None] | None, plan: KMatrix) -> list[Rule | None]:
    """One entry per model, each with a draft below it to be a rule for."""
    rules = _per_model(rules, plan.models, "rules")
    for i, rule in enumerate(rules):
        _check_rule(i, rule, plan.models, plan.length(i + 1), plan.rows[i + 1] if i + 1 < len(plan.rows) else ())
    return rules


def _check_rule(model: int, rule: Rule | None, models: int, length: int, row: Sequence[int]) -> None:
    """Rejects a rule with no draft below it, or with a draft that has no model's distribution."""
    if rule is None:
        return
    name = type(rule).__name__
    if not length:
        raise UserError(
            f"model {model} reviews no draft, so {name} has no pair there: give row {model + 1} of the K matrix an "
            "entry, or leave the rule out"
        )
    if rule.reads_drafter and (model + 1 >= models or not row[model + 1]):
        raise UserError(
            f"{name} reads the distribution of the model below model {model}, but that draft is written by copying or "
            "by a smaller model alone: use lenience there, or a rule that reads no drafter, or let a model write it"
        )


def _fitted(copier: Bound, sampling: Sampling, width: int, vocab_size: int | None) -> MaxGram:
    """The copying drafter with the cascade's vocabulary and sampling."""
    if not isinstance(copier.model, MaxGram):
        raise UserError(
            f"copier is a {type(copier.model).__name__}, but only a MaxGram copies: list models in `models`"
        )
    return dataclasses.replace(copier.model, sampling=sampling, width=width, vocab_size=vocab_size)
