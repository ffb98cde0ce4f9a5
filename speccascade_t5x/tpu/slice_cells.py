"""Cells of the table: one pair on one slice, as plain values that are sent to a child process as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from speccascade_t5x.common import checks
from speccascade_t5x.core import rules
from speccascade_t5x.distributed.partitioning import STANDARD_RULES, Rules, Topology
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models import T5Config
from speccascade_t5x.tpu import hardware, shapes

_BATCH_SIZE = 16  # where none is named and no more is needed
# What can be compiled for a cell, and what is unless programs are named, in this order.
PROGRAMS = ("encoder", "loop", "refill", "train_drafter", "train_verifier")
_USUAL = tuple(name for name in PROGRAMS if name != "refill")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile: sizes, which are those of the whole slice, and how they are divided.

    Attributes:
      batch_size: inputs decoded at a time; None takes 16, or as many more as give every group of chips the same.
      input_len: encoder positions.
      max_len: output tokens.
      draft_len: tokens drafted per round.
      rule: of the decode.
      alpha: its trade-off.
      num_samples: outputs per input.
      model: chips that share the weights; None takes the fewest on which the pair's weights leave room.
      train_batch_size: rows of a training batch.
      targets_len: decoder positions of a training row.
      microbatches: pieces a training batch is cut into.
      programs: names of PROGRAMS.
      rules: logical axis rules, see `distributed.partitioning`.
      drafter_rules: those of drafters; None takes `rules`.
    """

    batch_size: int | None = None
    input_len: int = 512
    max_len: int = 128
    draft_len: int = 5
    rule: str = "lossless"
    alpha: float | None = None
    num_samples: int = 1
    model: int | None = None
    train_batch_size: int = 64
    targets_len: int = 128
    microbatches: int = 1
    programs: tuple[str, ...] = _USUAL
    rules: Rules = STANDARD_RULES
    drafter_rules: Rules | None = None

    def __post_init__(self) -> None:
        sizes = ("batch_size", "input_len", "max_len", "num_samples", "train_batch_size", "targets_len", "microbatches")
        checks.fields(self, draft_len=(0,), model=(1,), **dict.fromkeys(sizes, (1,)))
        for name in self.programs:
            if name not in PROGRAMS:
                raise UserError(f"there is no program {name!r} to compile: known are {', '.join(PROGRAMS)}")
        checked = Topology(rules=self.rules, drafter_rules=self.drafter_rules)
        object.__setattr__(self, "rules", checked.rules)
        object.__setattr__(self, "drafter_rules", checked.drafter_rules)
        rules.by_name(self.rule, self.alpha)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One pair on one slice.

    Attributes:
      pair: its name.
      drafter: architecture.
      verifier: architecture.
      topology: name of the slice, as libtpu calls it.
      options: what is compiled; `batch_size` and `model` are settled.
    """

    pair: str
    drafter: T5Config
    verifier: T5Config
    topology: str
    options: Options

    @property
    def key(self) -> str:
        """A name for files that differs wherever something of the cell does; programs apart."""
        content = self.to_json()
        del content["options"]["programs"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        plain = f"{self.pair}-{self.topology}".replace(":", "-").replace("/", "-")
        return f"{plain}-{digest}"

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Cell:
        """The inverse of `to_json`."""
        models = {name: T5Config(**content[name]) for name in ("drafter", "verifier")}
        own: dict[str, Any] = {}
        for name, value in content["options"].items():
            own[name] = tuple(value) if isinstance(value, list) else value
        return cls(content["pair"], topology=content["topology"], options=Options(**own), **models)


def make(pair: str, drafter: T5Config, verifier: T5Config, topology: str, wanted: Options) -> Cell:
    """A cell, checked as far as possible without the compiler.

    Raises:
      UserError: an unknown slice, sizes that cannot be shared out, vocabularies that do not fit each other.
    """
    on = hardware.named(topology)
    model = wanted.model
    if model is None:
        model = fewest_sharing(on.chips, hardware.chip(on).hbm_bytes, [drafter, verifier])
    groups = hardware.groups(on, model)
    batch_size = wanted.batch_size or groups * math.ceil(_BATCH_SIZE / groups)
    wanted = dataclasses.replace(wanted, model=model, batch_size=batch_size)
    if drafter.vocab_size != verifier.vocab_size:
        raise UserError(
            f"the drafter of {pair} has {drafter.vocab_size} logits and the verifier {verifier.vocab_size}: "
            "they must share a vocabulary"
        )
    trains = any(name.startswith("train") for name in wanted.programs)
    pieces = {"batch_size": groups, "train_batch_size": groups * wanted.microbatches if trains else 1}
    for name, share in pieces.items():
        rows = getattr(wanted, name) * (wanted.num_samples if name == "batch_size" else 1)
        if rows % share:
            raise UserError(
                f"{name}={getattr(wanted, name)} cannot be shared by the {share} parts that {on.name} with "
                f"model={model} needs: choose one that {share} divides, or another model"
            )
    return Cell(pair, drafter, verifier, on.name, wanted)


def fewest_sharing(chips: int, hbm_bytes: int, models: list[T5Config]) -> int:
    """The fewest of some chips, of so many bytes each, whose shares of the weights leave room.

    The weights and a copy of them in half the width take 0.8 of the memory at most.

    A copy, because the loop converts float32 weights to the activations' bfloat16 once, before it begins.
    """
    nbytes = 1.5 * sum(shapes.parameter_bytes(config) for config in models)
    for model in (size for size in range(1, chips + 1) if chips % size == 0):
        if nbytes / model <= 0.8 * hbm_bytes:
            return model
    return chips
