"""Builds programs from rule, drafter and execution, and rejects combinations that cannot work."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.core import rules
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.decoding.config import DecodeConfig
from speccascade_t5x.decoding.rounds import Speculative
from speccascade_t5x.decoding.sequential import SequenceCascade, TokenCascade
from speccascade_t5x.decoding.state import Program
from speccascade_t5x.drafting import Deferral, DraftStop, ModelDrafter
from speccascade_t5x.interfaces import Array, Bound, Drafter, LanguageModel, UserError


def autoregressive_program(
    model: Bound, config: DecodeConfig, sampling: Sampling | None = None, role: str = "verifier"
) -> Program:
    """One model alone; `role` ("verifier" or "drafter") says whose calls and tokens are counted."""
    if role not in ("verifier", "drafter"):
        raise UserError(f"role={role!r} is unknown: use 'verifier' or 'drafter'")
    config = dataclasses.replace(config, draft_len=0)
    width = model.model.vocab_size
    _check(config, sampling, width, model)
    return Program(model, rules.Lossless(), sampling or Sampling(), None, Speculative(role), config, width)


def speculative_program(
    drafter: Bound,
    verifier: Bound,
    rule: rules.Rule,
    config: DecodeConfig,
    sampling: Sampling | None = None,
    draft_stop: DraftStop | None = None,
    solo: str = "verifier",
) -> Program:
    """Speculative execution of a rule; nothing is drafted where config.draft_len is 0."""
    sampling = sampling or Sampling()
    width = _common_width(drafter, verifier, config)
    _check(config, sampling, width, drafter, verifier)
    reads = rule.reads_drafter or config.trace
    if config.draft_len == 0 and not reads:
        bound = None
    elif isinstance(drafter.model, Drafter):
        if draft_stop is not None:
            raise UserError("draft_stop needs a language model as drafter: this drafter decides its lengths itself")
        if drafter.model.draft_len != config.draft_len:
            raise UserError(
                f"the drafter drafts {drafter.model.draft_len} tokens, but draft_len={config.draft_len}: "
                "make them equal"
            )
        _check_drafter(drafter.model, rule, config, sampling, width)
        if rule.reads_hidden:
            raise UserError(
                f"the head of {type(rule).__name__} reads hidden states, which {type(drafter.model).__name__} does not "
                "report: use drafter='model', or fit a head without hidden states"
            )
        bound = drafter
    else:
        wrapped = ModelDrafter(
            sampling,
            drafter.model,
            config.draft_len,
            width,
            config.vocab_size,
            reads,
            draft_stop,
            report_hidden=rule.reads_hidden,
        )
        bound = Bound(wrapped, drafter.params)
    return Program(verifier, rule, sampling, bound, Speculative(solo), config, width)


def token_cascade_program(
    drafter: Bound,
    verifier: Bound,
    rule: rules.Rule,
    config: DecodeConfig,
    sampling: Sampling | None = None,
    oracle: bool = False,
) -> Program:
    """TokenCascade, or the oracle that is charged for deferred tokens only."""
    if not isinstance(rule, rules.PrefixRule):
        raise UserError(
            f"a token cascade needs a rule that defers whole positions, which {type(rule).__name__} does not: "
            "use chow or chow_log, or run this rule by speculation"
        )
    if oracle:
        alone = dataclasses.replace(config, draft_len=0)
        return speculative_program(drafter, verifier, rule, alone, sampling, solo="oracle")
    if not rule.tests_drafter_alone:
        raise UserError(
            f"the test of {type(rule).__name__} reads the verifier, so a token cascade would have to run it at every "
            "token: use chow or chow_log, the oracle, or run this rule by speculation"
        )
    config = dataclasses.replace(config, draft_len=max(config.draft_len, 1))
    # q is wanted at every position, whether or not it is drafted: the test and the log-probabilities read it.
    program = speculative_program(drafter, verifier, rule, config, sampling, Deferral(rule))
    return dataclasses.replace(program, execution=TokenCascade())


def sequence_cascade_program(
    drafter: Bound,
    verifier: Bound,
    config: DecodeConfig,
    sampling: Sampling | None = None,
    threshold: Array | float = 0.0,
    confidence: str = "mean",
    quantile: Array | float = 0.0,
) -> Program:
    """The program of `decoding.sequence_cascade`."""
    if confidence not in ("sum", "mean", "quantile"):
        raise UserError(f"confidence={confidence!r} is unknown: use 'sum', 'mean' or 'quantile'")
    config = dataclasses.replace(config, draft_len=0)
    width = _common_width(drafter, verifier, config)
    _check(config, sampling, width, drafter, verifier)
    execution = SequenceCascade(jnp.float32(threshold), jnp.float32(quantile), confidence)
    return Program(verifier, rules.Lossless(), sampling or Sampling(), drafter, execution, config, width)


def _common_width(drafter: Bound, verifier: Bound, config: DecodeConfig) -> int:
    """The logits' width both models share; a padded tail may differ where config.vocab_size masks it."""
    drafted = drafter.model.width if isinstance(drafter.model, Drafter) else drafter.model.vocab_size
    sizes = [drafted, verifier.model.vocab_size]
    if sizes[0] != sizes[1] and (config.vocab_size is None or config.vocab_size > min(sizes)):
        raise UserError(
            f"the drafter has {sizes[0]} logits and the verifier {sizes[1]}: they must share a vocabulary; "
            f"if only their padding differs, set vocab_size (at most {min(sizes)})"
        )
    return min(sizes)


def _check_drafter(drafter: Drafter, rule: rules.Rule, config: DecodeConfig, sampling: Sampling, width: int) -> None:
    """Rejects a ready-made drafter that does not report what the rule reads, shaped as the decode shapes p."""
    if drafter.width != width:
        raise UserError(
            f"the drafter's distributions are {drafter.width} wide, but the verifier has {width} logits: build "
            f"the drafter with width={width}"
        )
    if not rule.reads_drafter:
        return
    if not drafter.score_bonus:
        raise UserError(
            f"the rule {type(rule).__name__} reads a drafter's distribution q at every drafted and bonus position, "
            f"which {type(drafter).__name__} does not report here (a copied token has none): use lossless or min_p, a "
            "cascade with reads=<the model whose distribution it is to read>, or a ModelDrafter with score_bonus=True"
        )
    if drafter.vocab_size != config.vocab_size:
        raise UserError(
            f"the drafter was built with vocab_size={drafter.vocab_size}, but the decode has {config.vocab_size}: "
            f"{type(rule).__name__} compares both distributions, so build the drafter with the decode's"
        )
    for name in ("temperature", "top_k", "top_p", "min_p"):
        own, wanted = (getattr(options, name) for options in (drafter.sampling, sampling))
        if not _same(own, wanted):
            raise UserError(
                f"the drafter was built with {name}={own}, but the decode has {wanted}: {type(rule).__name__} compares "
                "both distributions, so build the drafter with the decode's sampling"
            )


def _same(one: Array | float, other: Array | float) -> bool:
    """Whether two options are equal. Traced values cannot be inspected and pass."""
    traced = any(isinstance(x, jax.core.Tracer) for x in (one, other))
    return traced or bool(np.array_equal(np.asarray(one), np.asarray(other)))


def _check_beginnings(config: DecodeConfig, *bounds: Bound) -> None:
    """Rejects models that begin with another token, or at different positions: all must read the prompt, or none."""
    models = [model for bound in bounds for model in _language_models(bound.model)]
    for model in models:
        start_id = getattr(model, "start_id", config.start_id)
        if start_id != config.start_id:
            raise UserError(f"a model starts with token {start_id}, but start_id={config.start_id}: make them equal")
    names = {getattr(model, "input_name", None) for model in models} - {None}
    if len(names) > 1:
        raise UserError(
            f"one model reads {' and another '.join(sorted(map(repr, names)))}: encoder-decoders and decoder-only "
            "models cannot be mixed in a pair, as their outputs begin at different positions"
        )


def _language_models(model: LanguageModel | Drafter) -> tuple[LanguageModel, ...]:
    """The language models of a drafter, or the model itself."""
    return model.models if isinstance(model, Drafter) else (model,)


def _check(config: DecodeConfig, sampling: Sampling | None, width: int, *models: Bound) -> None:
    """Rejects options that would decode to nonsense. Traced values cannot be inspected and pass."""
    if config.vocab_size is not None and not 1 <= config.vocab_size <= width:
        raise UserError(f"vocab_size={config.vocab_size} must lie from 1 to the {width} logits of the models")
    if not 0 <= config.eos_id < width:
        raise UserError(f"eos_id={config.eos_id} is outside the vocabulary: give one from 0 to {width - 1}")
    _check_beginnings(config, *models)
    limits = {"temperature": (0.0, np.inf), "top_k": (0, np.inf), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0)}
    for name, (low, high) in limits.items():
        value = getattr(sampling or Sampling(), name)
        if isinstance(value, jax.core.Tracer):
            continue
        inside = (np.asarray(value) >= low) & (np.asarray(value) <= high)
        if not inside.all() or (name == "top_p" and (np.asarray(value) == 0).any()):
            excluded = ", 0 excluded" if name == "top_p" else ""
            raise UserError(f"{name}={value} is outside its range, {low:g} to {high:g}{excluded}")
