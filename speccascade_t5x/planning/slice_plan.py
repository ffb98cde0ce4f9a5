"""The `slice_plan` job: tokens/s of a pair on a slice per batch and draft length, from acceptance measured anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from speccascade_t5x.common import checks, storage, text_table
from speccascade_t5x.core import rules
from speccascade_t5x.distributed.partitioning import STANDARD_RULES, Rules, with_batch_of
from speccascade_t5x.inference import plan_files
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models import T5Config
from speccascade_t5x.planning import roofline
from speccascade_t5x.tpu import hardware, slice_cells

FILE, TABLE = "slice_plan.json", "slice_plan.md"


@dataclasses.dataclass(frozen=True)
class SlicePlan:
    """The result of the job.

    Attributes:
      name: names of the pair and of the slice.
      model: number of chips that share the weights.
      predicted: every batch with every draft length, and with none (0).
      stops_at: the smallest batch from which on speculation gains nothing; None where it gains to the last that fits.
      path: path of the table; None without an output folder.
    """

    name: str
    model: int
    predicted: tuple[roofline.Predicted, ...]
    stops_at: int | None
    path: Path | None

    def best(self, batch: int) -> roofline.Predicted:
        """The fastest choice of a batch that fits, "no speculation" among them; the fastest of all where none does."""
        choices = (each for each in self.predicted if each.batch == batch)
        return max(choices, key=lambda each: (each.fits, each.tokens_per_s))


@checks.arguments(acceptance=(0.0, 1.0), draft_lens=(1,), batch_sizes=(1,), input_len=(1,), max_len=(1,), model=(1,))
def slice_plan(
    architectures: tuple[T5Config, T5Config],
    pair: str,
    topology: str,
    acceptance: Sequence[float] | None = None,
    plan: str | None = None,
    draft_lens: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10),
    batch_sizes: Sequence[int] = (1, 4, 16, 64, 256, 1024),
    input_len: int = 512,
    max_len: int = 128,
    rule: str = "lossless",
    alpha: float | None = None,
    model: int | None = None,
    axis_rules: Rules = STANDARD_RULES,
    drafter_rules: Rules | None = None,
    output_dir: str | Path | None = None,
) -> SlicePlan:
    """Predicts tokens/s for every batch size and draft length.

    Args:
      architectures: (drafter, verifier).
      pair: its name.
      topology: a slice, by any of its names.
      acceptance: at each draft position given that all before it stand; the last holds for all later ones.
      plan: plan.json of `speccascade plan` instead, made with this pair on any machine; its rule and its tokens per
        round hold, for the draft lengths it ranks.
      draft_lens: of interest.
      batch_sizes: rows decoded at a time by the whole slice.
      input_len: encoder positions.
      max_len: output tokens.
      rule: of the decode; what matters is whether it reads the drafter's distribution.
      alpha: its trade-off.
      model: chips that share the weights; None takes the fewest on which the pair's weights leave room.
      axis_rules: logical axis rules.
      drafter_rules: those of drafters; None takes `axis_rules`.
      output_dir: where tables go; None writes none.

    Raises:
      UserError: figures out of range, an unknown slice, or one that `model` does not divide.
    """
    drafter, verifier = architectures
    on = hardware.named(topology)
    chip = hardware.chip(on)
    if model is None:
        model = slice_cells.fewest_sharing(on.chips, chip.hbm_bytes, [drafter, verifier])
    own_rules = axis_rules if drafter_rules is None else with_batch_of(drafter_rules, axis_rules)
    place = roofline.Place(chip, hardware.groups(on, model), model, axis_rules, own_rules)
    if (acceptance is None) == (plan is None):
        raise UserError("name either the acceptance (--acceptance=0.8, or one per position) or a plan (--plan=FILE)")
    if plan is not None:
        tokens, rule, alpha = _from_plan(plan, draft_lens)
    elif acceptance is not None:
        tokens = roofline.expected_tokens(acceptance, draft_lens)
    reads = rules.by_name(rule, alpha).reads_drafter
    decode = roofline.Decode(drafter, verifier, input_len, max_len, reads)
    predicted = tuple(roofline.predict(decode, place, tokens, batch_sizes))
    found = SlicePlan(f"{pair} on {on.name}", model, predicted, roofline.stops_paying(predicted), None)
    if output_dir is None:
        return found
    folder = Path(output_dir)
    content = {"pair": pair, "topology": on.name, "model": model, "stops_at": found.stops_at}
    content |= {"predicted": [dataclasses.asdict(each) for each in predicted]}
    storage.write_json(folder / FILE, content)
    return dataclasses.replace(found, path=storage.write_text(folder / TABLE, markdown(found)))


def _from_plan(path: str, draft_lens: Sequence[int]) -> tuple[dict[int, float], str, float | None]:
    """(draft length -> tokens of a round, rule, alpha) of a plan.

    Raises:
      UserError: it is not a plan, or ranks no single drafter at these lengths.
    """
    content = plan_files.read(path)
    plain = [each for each in content["candidates"] if each["drafter"] == "model"]
    ranked = {each["draft_len"]: each["tokens_per_round"] for each in plain}
    tokens = {length: ranked[length] for length in draft_lens if length in ranked}
    if not tokens:
        known = ", ".join(str(length) for length in sorted(ranked) if length) or "none"
        raise UserError(f"the plan {path} ranks a drafter of draft lengths {known}: give some of these as draft_lens")
    return tokens, content["conditions"]["rule"], content["conditions"]["alpha"]


_HEAD = ("batch", "draft_len", "tokens/round", "round ms", "tokens/s", "gain", "pays above", "GiB/chip", "bound")


def rows(found: SlicePlan) -> list[tuple[str, ...]]:
    """A row of texts for each choice."""
    return [
        (
            *(str(each.batch), str(each.draft_len or "none"), f"{each.tokens_per_round:.2f}"),
            *(f"{1e3 * each.seconds:.3g}", f"{each.tokens_per_s:.0f}", f"{each.gain:.2f}x", _break_even(each)),
            f"{each.memory_bytes / hardware.GIB:.2f}" + ("" if each.fits else " (too large)"),
            each.bound,
        )
        for each in found.predicted
    ]


def _break_even(each: roofline.Predicted) -> str:
    if each.draft_len == 0:
        return "-"
    return "never" if each.break_even is None else f"{each.break_even:.2f}"


def verdict(found: SlicePlan) -> list[str]:
    """Human-readable summary of when speculation pays off."""
    lines = []
    for batch in dict.fromkeys(each.batch for each in found.predicted):
        best = found.best(batch)
        if not best.fits:
            lines.append(f"batch {batch}: does not fit")
        elif best.draft_len:
            lines.append(f"batch {batch}: draft_len {best.draft_len} gains {best.gain:.2f}x")
        else:
            lines.append(f"batch {batch}: do not speculate")
    if found.stops_at is None:
        lines.append("speculation pays at every batch size that was looked at and fits")
    else:
        lines.append(f"speculation stops paying at batch {found.stops_at}")
    return lines


def plain(found: SlicePlan) -> str:
    """For a terminal."""
    table = [_HEAD, *rows(found)]
    return "\n".join([f"{found.name}, model={found.model}", "", *text_table.plain(table), "", *verdict(found)])


def markdown(found: SlicePlan) -> str:
    """The same as Markdown."""
    lines = [f"# {found.name}, model={found.model}", "", *text_table.markdown([_HEAD, *rows(found)])]
    return "\n".join([*lines, "", *(f"- {line}" for line in verdict(found)), ""])
