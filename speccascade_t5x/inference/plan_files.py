"""The file that `speccascade plan` writes, and how draft_len="auto" follows it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speccascade_t5x.common import schema, storage
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import UserError

FORMAT = "speccascade_t5x.plan"
VERSION = 1
_CONTENT = schema.record({"candidates": schema.list_of(schema.of(dict)), "conditions": schema.of(dict)})
FILE = "plan.json"
# Fields of Settings on which acceptance or cost depends: a plan made with other values does not apply to a run.
CONDITIONS = (
    *("rule", "alpha", "rule_options", "temperature", "top_k", "top_p", "min_p", "verification"),
    *("batch_size", "num_samples"),
)
# Fields of Settings a plan chooses.
CHOICE = ("drafter", "draft_len", "k_matrix", "lenience")


def conditions(settings: Settings) -> dict[str, Any]:
    """The settings for which a plan was made, as JSON types."""
    return json.loads(storage.to_json({name: getattr(settings, name) for name in CONDITIONS}))


def identity(pair: Any) -> str:
    """A short text that differs if models, vocabulary or n-gram table of a `generate.LoadedPair` differ in shape."""
    models = [bound and bound.model for bound in (pair.verifier, pair.drafter, *pair.smaller)]
    table = pair.table and {f.name: getattr(pair.table, f.name) is not None for f in dataclasses.fields(pair.table)}
    text = repr((pair.vocabulary.fingerprint(), models, table))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(path: Path, plan: Mapping[str, Any]) -> Path:
    """Writes a plan atomically."""
    return storage.write_json(path, {"format": FORMAT, "version": VERSION, **plan})


def read(path: str | Path) -> dict[str, Any]:
    """Reads a plan; for a folder, the plan.json in it.

    Raises:
      UserError: it is missing, damaged, or of a newer format.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise UserError(f"there is no plan {path}: make one with `speccascade plan --output_dir=FOLDER`")
    plan = schema.read_versioned(path, VERSION, "a plan of `speccascade plan`", _CONTENT, format=FORMAT)
    if not plan["candidates"]:
        raise UserError(f"{path} holds no candidates: make a plan with `speccascade plan`")
    return plan


def follow(settings: Settings, pair_identity: str) -> Settings:
    """The settings with draft_len="auto" replaced by the recommendation of the plan.

    With drafter="model" that is the plan's best candidate of any drafter, else its best with that drafter; with a
    lenience, its best cascade of that lenience. "Do not speculate" becomes draft_len=0, with the same distribution.

    Raises:
      UserError: no plan is named; or it is damaged, of another pair, or made under other conditions.
    """
    if settings.plan is None:
        raise UserError(
            "draft_len='auto' follows a plan, but none is named: run `speccascade plan --output_dir=FOLDER` and give "
            "--plan=FOLDER/plan.json"
        )
    plan = read(settings.plan)
    if plan.get("pair") != pair_identity:
        raise UserError(
            f"the plan {settings.plan} was made for another pair, or from given figures: run `speccascade plan` with "
            "this pair"
        )
    ours = conditions(settings)
    for name, value in plan["conditions"].items():
        if ours.get(name) != value:
            raise UserError(
                f"the plan {settings.plan} was made for {name}={value!r}, but this run has {ours.get(name)!r}: run "
                "`speccascade plan` with this run's options"
            )
    for candidate in plan["candidates"]:
        choice = {name: candidate.get(name) for name in CHOICE}
        lenient = settings.lenience in (None, choice["lenience"])
        if settings.drafter in ("model", choice["drafter"]) and lenient:
            return dataclasses.replace(settings, **choice)
    asked = f"drafter={settings.drafter!r}" + ("" if settings.lenience is None else f", lenience={settings.lenience}")
    raise UserError(f"the plan {settings.plan} ranks nothing with {asked}: leave that to the plan")
