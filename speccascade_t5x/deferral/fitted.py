"""The result of a fit as a bundle stores it: heads, calibrations, and the pair and vocabulary they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.core import rules
from speccascade_t5x.deferral import head as heads
from speccascade_t5x.deferral.calibration import Calibration, PairCalibration
from speccascade_t5x.deferral.features import FeatureSpec
from speccascade_t5x.deferral.head import Head, HeadConfig
from speccascade_t5x.interfaces import UserError

_SEPARATOR = "/"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Heads and calibrations of one pair.

    Attributes:
      heads: "prefix" and "token", each where it was fitted.
      calibrations: "temperature", "vector", "isotonic", each where it was fitted.
      drafter, verifier, vocabulary: fingerprints of what they were fitted on.
      about: what a manifest notes of the fit, as JSON types.
    """

    heads: dict[str, Head]
    calibrations: dict[str, PairCalibration]
    drafter: str
    verifier: str
    vocabulary: str
    about: dict[str, Any]

    def rule(self, name: str, alpha: Any, **options: Any) -> rules.Rule:
        """A rule of `deferral.RULES` with its head or calibration in place.

        Args:
          name: "learned_gap", "learned_token" (option `test`) or "calibrated_opt" (options `kind` and `loss`).
          alpha: the trade-off.
          **options: of the rule.

        Raises:
          UserError: what the rule needs was not fitted for this pair.
        """
        if name == "calibrated_opt":
            kind = options.pop("kind", "temperature")
            return rules.by_name(name, alpha, calibration=_part(self.calibrations, kind, "calibration"), **options)
        kind = "prefix" if name == "learned_gap" else "token"
        return rules.by_name(name, alpha, head=_part(self.heads, kind, "head"), **options)

    def check(self, drafter: str, verifier: str, vocabulary: str, where: str) -> None:
        """Rejects a pair this was not fitted on.

        Raises:
          UserError: naming what differs.
        """
        found = {"drafter": drafter, "verifier": verifier, "vocabulary": vocabulary}
        for name, theirs in found.items():
            if theirs != getattr(self, name):
                raise UserError(
                    f"the deferral head of {where} was fitted with another {name} (fingerprint "
                    f"{getattr(self, name)[:16]}, this one's is {theirs[:16]}): fit one for this pair with "
                    "`speccascade train_deferral`"
                )

    def merged(self, older: Fitted | None) -> Fitted:
        """This, with what only `older` holds, where both are of one pair."""
        if older is None or (older.drafter, older.verifier) != (self.drafter, self.verifier):
            return self
        return dataclasses.replace(
            self,
            heads={**older.heads, **self.heads},
            calibrations={**older.calibrations, **self.calibrations},
            about={**older.about, **self.about},
        )


def _part(parts: Mapping[str, Any], kind: str, what: str) -> Any:
    if kind not in parts:
        has = ", ".join(sorted(parts)) or "none"
        raise UserError(
            f"this bundle holds no fitted {kind} {what} (it has {has}): fit one with `speccascade train_deferral`"
        )
    return parts[kind]


def to_files(fitted: Fitted) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(named arrays, JSON description) of everything, for a bundle."""
    arrays: dict[str, np.ndarray] = {}
    for kind, head in fitted.heads.items():
        _flatten(heads.as_tree(head), f"head{_SEPARATOR}{kind}", arrays)
    for kind, both in fitted.calibrations.items():
        for side in "qp":
            calibration = getattr(both, side)
            _flatten(calibration.values, _SEPARATOR.join(("calibration", kind, side)), arrays)
    described = {
        "heads": {kind: dataclasses.asdict(head.config) for kind, head in fitted.heads.items()},
        "calibrations": {kind: [both.q.kind, both.p.kind] for kind, both in fitted.calibrations.items()},
        "drafter": fitted.drafter,
        "verifier": fitted.verifier,
        "vocabulary": fitted.vocabulary,
        "about": fitted.about,
    }
    return arrays, described


def from_files(arrays: Mapping[str, np.ndarray], described: Mapping[str, Any]) -> Fitted:
    """What `to_files` gave.

    Raises:
      UserError: arrays of another shape than the description says, or that are not finite.
      KeyError, TypeError: something is missing.
    """
    found_heads = {}
    for kind, fields in described["heads"].items():
        config = HeadConfig(**{**fields, "features": FeatureSpec(**fields["features"])})
        tree = _nested(arrays, f"head{_SEPARATOR}{kind}{_SEPARATOR}")
        found = heads.from_tree(config, tree)
        few = found.variables["statistics"]["normalise_candidate"]["mean"].shape[0] if kind == "token" else 0
        wanted = jax.eval_shape(lambda config=config, few=few: heads.fresh(config, jax.random.key(0), few))
        shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)  # noqa: E731
        if shapes(found.variables) != shapes(wanted):
            raise UserError(
                f"the {kind} head's arrays do not fit its description: fit it again with `speccascade train_deferral`"
            )
        found_heads[kind] = found
    calibrations = {}
    for kind, names in described["calibrations"].items():
        parts = {
            side: Calibration(name, _nested(arrays, _SEPARATOR.join(("calibration", kind, side, ""))))
            for side, name in zip("qp", names, strict=True)
        }
        calibrations[kind] = PairCalibration(**parts)
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"{name} of the deferral head holds NaN or infinities: fit it again with `speccascade train_deferral`"
            )
    plain = {name: described[name] for name in ("drafter", "verifier", "vocabulary", "about")}
    return Fitted(found_heads, calibrations, **plain)


def _flatten(tree: Mapping[str, Any], prefix: str, into: dict[str, np.ndarray]) -> None:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            _flatten(value, f"{prefix}{_SEPARATOR}{name}", into)
        else:
            into[f"{prefix}{_SEPARATOR}{name}"] = np.asarray(value)


def _nested(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        if name.startswith(prefix):
            *path, last = name.removeprefix(prefix).split(_SEPARATOR)
            place = tree
            for part in path:
                place = place.setdefault(part, {})
            place[last] = jnp.asarray(value)
    return tree
