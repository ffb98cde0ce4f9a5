"""Drafters by name, built from a user's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from speccascade_t5x import decoding, drafting
from speccascade_t5x.core import rules
from speccascade_t5x.drafting import NGramTable
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models import ngram_model

_COPIES = ("ngram_fill", "max_ngram", "min_ngram")
# A token that is copied, or looked up at no cost, needs no drafter model and has no model's distribution q.
MODEL_FREE = ("max_gram", "prompt_lookup", "ngram")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A drafter, or an execution, that a user can name.

    Attributes:
      what: one human-readable line.
      reads: the fields of Settings that have a meaning for it, beyond those all of its kind read.
      source: where it comes from.
    """

    what: str
    reads: tuple[str, ...]
    source: str


DRAFTERS = {
    "model": Kind(
        "the pair's drafter, draft_len tokens per round; draft_stop=confidence ends a draft before a token where "
        "max q < stop_threshold, draft_stop=entropy where H(q) > stop_threshold, in nats",
        ("draft_stop", "stop_threshold"),
        "Leviathan et al. 2023; stop tests: BiLD, Kim et al. 2023, and here",
    ),
    "max_gram": Kind(
        "copies what followed the longest earlier match in prompt and output, the rest from the bundle's n-gram table "
        "if it has one; no model; rules that read no drafter (lossless, min_p)",
        _COPIES,
        "Cascade Speculative Drafting, Chen et al. 2024",
    ),
    "prompt_lookup": Kind(
        "Max-Gram with matches of min_ngram to max_ngram tokens and no table; rules that read no drafter",
        ("max_ngram", "min_ngram"),
        "Saxena 2023, as a setting of Max-Gram",
    ),
    "ngram": Kind(
        "samples from the bundle's bigram or trigram table (`speccascade tables` builds it); any rule, with the "
        "table's distribution as q",
        ("draft_stop", "stop_threshold"),
        "Leviathan et al. 2023, bigram approximation models",
    ),
    "cascade": Kind(
        "a draft made by speculative decoding from smaller drafters, down to Max-Gram, as k_matrix says; any rule, "
        "with q the distribution of the pair's drafter",
        ("k_matrix", "lenience", "edge_rules", *_COPIES),
        "Cascade Speculative Drafting, Chen et al. 2024; under rules: here",
    ),
}


def default_k_matrix(draft_len: int, models: int) -> tuple[tuple[int, ...], ...]:
    """The default K matrix of a cascade: purely vertical, over Max-Gram.

    Each model but the smallest drafts draft_len tokens for the model above and reviews the drafts of the next smaller
    one; the smallest reviews 3 copied tokens at a time.
    """
    rows = [[0] * (models + 1) for _ in range(models + 1)]
    for level in range(models):
        rows[level][level] = max(draft_len - level, 1)
    rows[models][models] = 3
    return tuple(map(tuple, rows))


def build(
    settings: Settings,
    verifier: Bound,
    models: Sequence[Bound],
    table: NGramTable | None,
    rule: rules.Rule,
    config: decoding.DecodeConfig,
) -> tuple[Bound, decoding.DecodeConfig]:
    """The drafter these settings name, and the options with its draft length.

    Args:
      settings: the user's settings; their draft_len is a number or None, and that of config takes precedence.
      verifier: bound model.
      models: bound drafter models, from the largest; may be empty if none is needed.
      table: the bundle's n-gram table, or None.
      rule: the rule, which defines the target distribution.
      config: options, draft length included.

    Raises:
      UserError: the options do not go together; the message says which do.
    """
    kind, sampling = settings.drafter, settings.sampling()
    if kind not in MODEL_FREE and not models:
        able = ", ".join(MODEL_FREE)
        what = "method='speculative' needs a drafter" if kind == "model" else f"drafter={kind!r} needs a drafter model"
        raise UserError(f"{what}, but this bundle holds a verifier alone: use drafter={able}")
    if kind == "ngram":
        if table is None:
            raise UserError(
                "drafter='ngram' needs an n-gram table, which this bundle does not hold: build one with "
                "`speccascade tables`, or use max_gram or prompt_lookup"
            )
        return ngram_model(table, config.start_id), config
    if rule.reads_drafter and kind in MODEL_FREE:
        raise UserError(
            f"the rule {settings.rule!r} reads the distribution q of a drafter model, but drafter={kind!r} copies "
            "tokens, which have none: use lossless or min_p, or drafter='cascade', 'ngram' or 'model'"
        )
    if kind == "model" or config.draft_len == 0:
        return models[0] if models else verifier, config
    width = min(bound.model.vocab_size for bound in (verifier, *(models if kind == "cascade" else ())))
    prompt = getattr(verifier.model, "input_name", None)
    common: dict[str, Any] = {"vocab_size": config.vocab_size, "prompt": prompt, "min_ngram": settings.min_ngram}
    if kind == "prompt_lookup":
        longest = 3 if settings.max_ngram is None else settings.max_ngram
        bound = drafting.prompt_lookup(config.draft_len, width, longest, sampling=sampling, **common)
        return bound, config
    common |= {"max_ngram": settings.max_ngram, "fill": settings.ngram_fill}
    if settings.ngram_fill == "sample" and table is None:
        raise UserError("ngram_fill='sample' needs an n-gram table, which this bundle does not hold: leave it out")
    copier = drafting.max_gram(config.draft_len, width, table, sampling, **common)
    if kind == "max_gram":
        return copier, config
    k = settings.k_matrix or default_k_matrix(config.draft_len, len(models))
    if len(k) not in (len(models), len(models) + 1):
        raise UserError(
            f"k_matrix has {len(k)} rows, but this pair has {len(models)} drafter model(s): give it {len(models)}, or "
            f"{len(models) + 1} with Max-Gram last"
        )
    bound = drafting.cascade(
        models,
        k,
        copier=copier if len(k) > len(models) else None,
        lenience=None if settings.lenience is None else jnp.float32(settings.lenience),
        rules=_edge_rules(settings.edge_rules),
        sampling=sampling,
        width=width,
        vocab_size=config.vocab_size,
        reads=0 if rule.reads_drafter or config.trace else None,
    )
    return bound, dataclasses.replace(config, draft_len=bound.model.draft_len)


def _edge_rules(edges: Sequence[Sequence | None] | None) -> list[rules.Rule | None] | None:
    """The rules between drafters."""
    if edges is None:
        return None
    made = [edge and rules.by_name(*edge) for edge in edges]
    return [jax.tree.map(jnp.float32, rule) for rule in made]


def check_options(settings: Settings) -> None:
    """Rejects an unknown drafter, and a changed option that this drafter does not read."""
    if settings.drafter not in DRAFTERS:
        raise UserError(f"drafter={settings.drafter!r} is unknown: use one of {', '.join(DRAFTERS)}")
    for field in dataclasses.fields(settings):
        able = [name for name, kind in DRAFTERS.items() if field.name in kind.reads]
        if able and settings.drafter not in able and getattr(settings, field.name) != field.default:
            raise UserError(
                f"drafter={settings.drafter!r} does not read {field.name}: leave it out, or use {' or '.join(able)}"
            )
