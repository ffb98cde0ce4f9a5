"""What a sweep measures: arms (rule x drafter x execution), their alphas, and the conditions they run under.

An arm is one method at every alpha; a point is an arm at one alpha under one condition (draft length, temperature,
top-p); a cell is a point with one seed: what is decoded, and stored, at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from speccascade_t5x.common import checks
from speccascade_t5x.core import rules
from speccascade_t5x.inference import drafters, methods
from speccascade_t5x.inference.settings import Settings, make_settings
from speccascade_t5x.interfaces import UserError

# Always measured in the same run: without them no figure of a rule means anything.
BASELINES = (
    *("verifier", "drafter", "lossless", "lossy_sd", "lossy_sd_optimal", "bild_fixed", "bild"),
    *("token_cascade:chow", "sequence_cascade"),
)
# The fair baseline of the first at every alpha: the same kept tokens, without the drafter's distribution.
TRUNCATED, TRUNCATION = "token_v3", "min_p"
# Where a rule's range is open, or its distribution stops changing before its end: the span its alphas are taken from.
_SPANS = {
    "chow_log": (0.0, 2.0),  # nats; beyond, hardly any position is left to defer
    "diff_log": (-1.5, 1.5),
    "opt": (-1.0, 1.0),  # |max p - max q| <= D_TV(p, q), so at temperature 1 nothing changes beyond
    "opt_log": (-3.0, 3.0),
    "bild_fixed": (0.0, 6.0),
    "bild": (0.0, 6.0),
    "token_v3": (0.0, 1.0),
    "learned_gap": (-1.0, 2.0),
    "learned_token": (0.0, 1.0),
    "calibrated_opt": (-1.0, 1.0),
}
# Fields of Settings an arm may set, and those that a sweep sets by itself.
_ARM = (
    *("method", "rule", "rule_options", "draft_len", "verification", "draft_stop", "stop_threshold", "drafter"),
    *("k_matrix", "lenience", "edge_rules", "max_ngram", "min_ngram", "ngram_fill", "confidence", "quantile"),
)
_OWN = ("alpha", "plan", "num_samples", "trace", "temperature", "top_p", "seed")
_FILE_NAME = re.compile(r"[\w+=@:(-][\w .,+=@:()-]*")  # of cells; the first character hides no file


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method at every alpha.

    Attributes:
      name: what tables and files call it.
      options: fields of `inference.settings.Settings` that make the method; not alpha, nor sampling options.
      alphas: to measure at; None takes `default_alphas`.
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alphas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        checks.fields(self)
        if not _FILE_NAME.fullmatch(self.name):
            raise UserError(
                f"the method name {self.name!r} names files as well: use letters, digits, blanks and -+=@:.,() only"
            )
        wrong = sorted(set(self.options) - set(_ARM))
        if wrong:
            raise UserError(f"the method {self.name!r} sets {wrong[0]}, which no method of a sweep may: leave it out")
        make_settings(**self.options)
        if self.alphas is not None:
            object.__setattr__(self, "alphas", tuple(map(float, self.alphas)))
            for alpha in self.alphas:
                check_alpha(self, alpha)

    @property
    def method(self) -> str:
        """Its execution."""
        return self.options.get("method", "speculative")

    @property
    def rule(self) -> str | None:
        """Registry name of its rule; None where the execution has none."""
        if self.method == "bild":
            return "bild"
        return self.options.get("rule", "lossless") if "rule" in methods.METHODS[self.method].reads else None

    @property
    def range(self) -> tuple[float, float] | Any:
        """Lowest and highest valid alpha; None where it takes no alpha."""
        if self.method == "sequence_cascade":
            return -math.inf, math.inf
        return None if self.rule is None else rules.get(self.rule).alpha_range

    @property
    def reads_draft_len(self) -> bool:
        """Whether it drafts what a condition says: BiLD ends its drafts itself, and some have a length of their own."""
        own = self.options.get("drafter") == "cascade" or self.options.get("draft_len") is not None
        return self.method in ("speculative", "token_cascade") and not own


def arm(text: str | Arm) -> Arm:
    """An arm from its short form `[execution:]rule[+block][@drafter]`, or the name of an execution.

    "token_v3", "opt+block", "lossless@max_gram", "token_cascade:chow", "oracle:diff", "bild", "lossy_sd_optimal".

    Raises:
      UserError: no such method; the message names the nearest.
    """
    if isinstance(text, Arm):
        return text
    checks.text("method", text)
    rest, _, drafter = text.partition("@")
    rest, _, verification = rest.partition("+")
    execution, _, rule = rest.rpartition(":")
    chosen: dict[str, Any] = {}
    if not execution and rule in methods.METHODS and rule != "speculative":
        if rule in ("token_cascade", "oracle"):
            raise UserError(f"the method {rule!r} needs a rule: write {rule}:chow")
        chosen["method"] = rule
    else:
        if execution:
            chosen["method"] = checks.one_of("execution", execution, methods.METHODS)
        if rule == "lossy_sd_optimal":
            chosen |= {"rule": "lossy_sd", "rule_options": {"residual": "optimal"}}
        else:
            names = [*rules.names(), "lossy_sd_optimal", *(m for m in methods.METHODS if m != "speculative")]
            chosen["rule"] = checks.one_of("method", rule, names)
    if verification:
        chosen["verification"] = checks.one_of("verification", verification, ("token", "block"))
    if drafter:
        chosen["drafter"] = checks.one_of("drafter", drafter, drafters.DRAFTERS)
    return Arm(text, chosen)


def check_alpha(chosen: Arm, alpha: float) -> None:
    """Refuses an alpha outside the arm's range.

    Raises:
      UserError: the message names the range.
    """
    if chosen.range is None:
        raise UserError(f"the method {chosen.name!r} takes no alpha, but alpha={alpha:g} was given: leave it out")
    if not math.isfinite(alpha):
        raise UserError(f"alpha={alpha} of the method {chosen.name!r} is not finite")
    low, high = chosen.range
    if chosen.rule is not None and not low <= alpha <= high:
        cls = rules.get(chosen.rule)
        span = f"{rules.describe_range(cls)} ({cls.ends})"
        raise UserError(f"alpha={alpha:g} is outside the range of the method {chosen.name!r}: {span}")


def default_alphas(chosen: Arm, count: int) -> tuple[float, ...]:
    """Evenly spaced alphas within the arm's range.

    Its ends are left out: there the distribution is the verifier's, or the drafter's. Where the range is open, or most
    of it changes nothing, a part of it is used instead (`_SPANS`). The alphas of a sequence cascade depend on the
    drafter's outputs, see `sequence_alphas`.
    """
    if chosen.range is None:
        return ()
    low, high = _SPANS.get(chosen.rule or "", chosen.range)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"the method {chosen.name!r} has an open range of alphas: give it alphas")
    inset = (high - low) / (2 * count)
    return tuple(_short(x) for x in np.linspace(low + inset, high - inset, count))


def ends(chosen: Arm) -> tuple[float, ...]:
    """The ends of the span default alphas are taken from; none where it is open."""
    span = _SPANS.get(chosen.rule or "", chosen.range or ())
    return tuple(alpha for alpha in span if math.isfinite(alpha))


def sequence_alphas(confidences: Sequence[float], count: int) -> tuple[float, ...]:
    """Thresholds of a sequence cascade that rewrite evenly spaced shares of the drafter's outputs."""
    shares = (np.arange(count) + 0.5) / count
    return tuple(sorted({_short(x) for x in np.quantile(np.asarray(confidences), shares)}))


def refined(alphas: Sequence[float], costs: Sequence[float], qualities: Sequence[float]) -> float | None:
    """The alpha to measure next: in the middle of the interval next to which the curve bends most.

    A bend is the area of the triangle of three neighbours in the plane of cost and quality, each scaled to its range.

    Args:
      alphas: measured so far, in any order.
      costs: of each, such as verifier calls per token.
      qualities: of each.

    Returns:
      None where fewer than three points, or no bend, or no room between neighbours is left.
    """
    order = np.argsort(alphas)
    places = np.asarray(alphas, np.float64)[order]
    points = np.stack([np.asarray(costs, np.float64)[order], np.asarray(qualities, np.float64)[order]], axis=1)
    if len(places) < 3:
        return None
    spread = np.ptp(points, axis=0)
    points = points / np.where(spread > 0, spread, 1.0)
    bends = np.zeros(len(places))
    one, two = points[1:-1] - points[:-2], points[2:] - points[1:-1]
    bends[1:-1] = np.abs(one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0])
    score = (bends[:-1] + bends[1:]) * np.linalg.norm(np.diff(points, axis=0), axis=1)
    for i in np.argsort(-score, kind="stable"):
        middle = _short((places[i] + places[i + 1]) / 2)
        if score[i] > 1e-9 and places[i] < middle < places[i + 1]:
            return middle
    return None


def _short(alpha: float) -> float:
    """Four significant digits: tables show alphas, and files are named after them."""
    return float(f"{alpha:.4g}")


@dataclasses.dataclass(frozen=True, order=True)
class Condition:
    """What a point runs under, the method apart."""

    draft_len: int
    temperature: float
    top_p: float

    def __str__(self) -> str:
        return f"draft_len {self.draft_len}, temperature {self.temperature:g}, top-p {self.top_p:g}"


def conditions(
    draft_lens: Sequence[int], temperatures: Sequence[float], top_ps: Sequence[float]
) -> tuple[Condition, ...]:
    """The main condition (the first of each), then one change at a time.

    Raises:
      UserError: an empty list, or a value outside its range.
    """
    for name, values in (("draft_lens", draft_lens), ("temperatures", temperatures), ("top_ps", top_ps)):
        if not values:
            raise UserError(f"{name} is empty: give it at least one value")
    main = Condition(draft_lens[0], float(temperatures[0]), float(top_ps[0]))
    found = [main]
    found += [dataclasses.replace(main, draft_len=length) for length in draft_lens[1:]]
    found += [dataclasses.replace(main, temperature=float(value)) for value in temperatures[1:]]
    found += [dataclasses.replace(main, top_p=float(value)) for value in top_ps[1:]]
    return tuple(dict.fromkeys(found))


def _stem(name: str) -> str:
    """An arm's name inside file names."""
    return name.replace(":", "-").replace("@", "-at-").replace("+", "-")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point with one seed: what is decoded and stored together."""

    arm: Arm
    alpha: float | None
    condition: Condition
    seed: int

    @property
    def point(self) -> str:
        """Its name without the seed; equal for cells of one point. A file name on every system."""
        parts = [_stem(self.arm.name)]
        if self.alpha is not None:
            short = f"{self.alpha:g}"
            parts.append(f"a{short if float(short) == self.alpha else repr(self.alpha)}")
        parts += [f"g{self.condition.draft_len}"] if self.arm.reads_draft_len else []
        return "_".join([*parts, f"t{self.condition.temperature:g}", f"p{self.condition.top_p:g}"])

    @property
    def id(self) -> str:
        """Its name."""
        return f"{self.point}_s{self.seed}"

    def settings(self, base: Settings) -> Settings:
        """The Settings it decodes with.

        Raises:
          UserError: an option outside its range.
        """
        chosen: dict[str, Any] = {
            "temperature": self.condition.temperature,
            "top_p": self.condition.top_p,
            "seed": self.seed,
        }
        chosen |= {"alpha": self.alpha} | dict(self.arm.options)
        if self.arm.reads_draft_len:
            chosen["draft_len"] = self.condition.draft_len
        return dataclasses.replace(base, **chosen)


def check_base(base: Settings) -> None:
    """Refuses base settings that choose what the arms choose.

    Raises:
      UserError: the message names the option and where it belongs.
    """
    for field in dataclasses.fields(Settings):
        if field.name not in (*_ARM, *_OWN):
            continue
        if getattr(base, field.name) != getattr(Settings(), field.name):
            raise UserError(
                f"generate.Settings.{field.name} is chosen by the sweep itself: use its methods, alphas, draft_lens, "
                "temperatures, top_ps and seeds instead"
            )


def arms(
    named: Sequence[str | Arm], alphas: Mapping[str, Sequence[float]], baselines: Sequence[str] = BASELINES
) -> tuple[Arm, ...]:
    """Baselines first, then what was named; MinP joins wherever TokenV3 is measured.

    Args:
      named: short forms, or arms.
      alphas: by arm name; for arms that are measured at alphas of their own.
      baselines: short forms of what is measured in any case.

    Raises:
      UserError: an unknown method, two methods of one name, alphas of a method that is not measured, or an alpha
        outside its range.
    """
    wanted = [arm(text) for text in checks.sequence("methods", named)]
    found: dict[str, Arm] = {}
    for each in [*map(arm, baselines), *wanted]:
        for other in found.values():
            if _stem(other.name) == _stem(each.name) and (other.name, other.options) != (each.name, each.options):
                raise UserError(f"two methods are called {each.name!r}: give one of them another name")
        found[each.name] = each
    if any(each.rule == TRUNCATED for each in wanted):
        found.setdefault(TRUNCATION, arm(TRUNCATION))
    for name, values in alphas.items():
        checks.one_of("method with alphas", name, found)
        found[name] = dataclasses.replace(found[name], alphas=tuple(checks.sequence(f"alphas of {name}", values)))
    return tuple(found.values())
