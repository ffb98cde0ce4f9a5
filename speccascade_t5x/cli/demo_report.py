"""What `speccascade demo` prints: the table, how far its differences are significant, and the traces."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import jax
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from speccascade_t5x.cli import colour
from speccascade_t5x.cli.demo_result import DemoResult
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import SOURCE_RESIDUAL
from speccascade_t5x.text.vocabulary import Vocabulary

VERIFIER, DRAFTER, LOSSLESS = "verifier alone", "drafter alone", "lossless speculation"
COMPARED = ("token_v3", "min_p")  # read at the same alphas, see `truncation_notes`
_NAMES = {"token_v3": "TokenV3", "min_p": "MinP"}
_CHOSEN = "chosen: "
_VISIBLE = 0.05  # the table shows one decimal


def label(rule: str, alpha: float) -> str:
    """The name of a rule at one alpha in the table."""
    return f"{_NAMES[rule]} alpha {alpha:g}"


def chosen_label(settings: Settings) -> str:
    """The name of the method that the user chose in the table."""
    options = ", ".join(f"{name}={value}" for name, value in settings.rule_options.items())
    parts = (
        (settings.method, settings.method != "speculative"),
        (settings.rule, settings.method in ("speculative", "token_cascade", "oracle")),
        (options, bool(options)),
        (f"alpha {settings.alpha}", settings.alpha is not None),
        ("block verification", settings.verification == "block"),
        (f"drafter {settings.drafter}", settings.drafter != "model"),
        (f"{settings.draft_stop} stop {settings.stop_threshold}", settings.draft_stop is not None),
        (settings.confidence, settings.method == "sequence_cascade"),
    )
    return _CHOSEN + " ".join(text for text, said in parts if said)


def show(result: DemoResult, vocabulary: Vocabulary, console: Console) -> None:
    """Prints everything that depends only on the result."""
    console.print(_head(result, vocabulary))
    console.print()
    console.print(_table(result))
    console.print()
    notes = Table.grid(padding=(0, 1))
    for note in [*chance_notes(result), *truncation_notes(result), *speed_notes(result)]:
        notes.add_row("-", note)
    console.print(notes)
    console.print("\nWho wrote what; a character of several tokens counts as its last one's:")
    for index in _shown_examples(result):
        _show_trace(index, result, vocabulary, console)


def show_end(console: Console) -> None:
    """Prints the machine and what to try next."""
    console.print(f"Machine: {machine()}.")
    console.print(
        'Try next: --text "Schöne Grüße aus Köln" for your own words, --temperature 0 for the greedy '
        "case, --draft_len 3 for shorter drafts; `speccascade infer --help` says how to decode a file."
    )


def machine() -> str:
    """Processor, usable cores, what JAX computes on and its version."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    accelerator = "" if device.platform == "cpu" else f"computing on {device.device_kind}, "
    return f"{_processor()}, {cores} core{'s' * (cores != 1)}, {accelerator}jax {jax.__version__}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # only Linux has the file
    return platform.processor() or platform.machine()


def _head(result: DemoResult, vocabulary: Vocabulary) -> str:
    options, settings, examples = result.options, result.options.settings, result.examples
    judged = sum(example.reference is not None for example in examples)
    unit = "; a token is a byte" if vocabulary.kind == "byte" else ""
    return (
        "restore_de: German text back from its lower-case ASCII-folded form.\n"
        f"{_count(len(examples), 'text')}, {judged} with a reference, one at a time; temperature "
        f"{settings.temperature:g}, draft length {settings.draft_len}{unit}. "
        f"{_count(options.repeats, 'round')}, methods taking turns."
    )


def _table(result: DemoResult) -> Table:
    # Narrow columns: the whole table fits a terminal of 80 columns.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, header_style="bold")
    table.add_column("method", overflow="fold")
    for heading in (
        *("exact\nmatch %", "char.\nacc. %", "tokens\nper s", "speed-up", "spread"),
        *("accept-\nance %", "verifier\ncalls per\ntoken"),
    ):
        table.add_column(heading, justify="right", overflow="fold")
    for row in result.methods.values():
        low, high = row.spread
        drafts = row.settings.method in ("speculative", "bild")
        table.add_row(
            row.label,
            _percent(row.exact_match),
            _percent(row.character_accuracy),
            f"{row.tokens_per_s:.0f}",
            f"{_ratio(row.speedup)}x",
            f"{_ratio(low)}-{_ratio(high)}" if high > low else "",
            _percent(100 * row.rates["acceptance"] if drafts else None),
            f"{row.rates['verifier_calls_per_token']:.2f}",
        )
    return table


def chance_notes(result: DemoResult) -> list[str]:
    """How far two methods with the SAME distribution differ here: the yardstick for every other difference."""
    apart = _gains(result, LOSSLESS)
    if not apart:
        return ["Quality is not judged, for no text has a reference: give plain German, not folded."]
    if result.options.settings.temperature == 0:
        return ["At temperature 0 lossless speculation writes what the verifier alone writes."]
    sample = f"{_count(len(result.examples), 'text')}, {_count(result.options.repeats, 'seed')}"
    visible = {metric: abs(gain) for metric, gain in apart.items() if abs(gain) >= _VISIBLE}
    if not visible:
        return [f"Quality is that of one sample ({sample}): small differences show nothing."]
    return [
        f"Lossless speculation follows the verifier's own distribution: the {_points(visible)} between the two are "
        f"chance ({sample}), and other differences of this size show nothing either."
    ]


def truncation_notes(result: DemoResult) -> list[str]:
    """How much of TokenV3's gain MinP has too: it keeps the same tokens, with no drafter in its distribution."""
    chance = _gains(result, LOSSLESS)
    notes = []
    for alpha in result.options.alphas:
        gains, truncated = (_gains(result, label(rule, alpha)) for rule in COMPARED)
        gains = {metric: gain for metric, gain in gains.items() if gain >= _VISIBLE}
        if not gains:
            continue
        within = ", within chance" if all(gain <= abs(chance[metric]) for metric, gain in gains.items()) else ""
        shown = " and ".join(f"{truncated[metric]:+.1f}" for metric in gains)
        if all(truncated[metric] >= gain - _VISIBLE for metric, gain in gains.items()):
            verdict = "all of that can come from leaving out unlikely tokens (truncation), not from the drafter"
        elif all(truncated[metric] < _VISIBLE for metric in gains):
            verdict = "leaving out unlikely tokens (truncation) does not explain it"
        else:
            verdict = "that part can come from leaving out unlikely tokens (truncation), not from the drafter"
        notes.append(
            f"{label('token_v3', alpha)} gains {_points(gains)} over the verifier alone{within}. MinP at the same "
            f"alpha, with the same kept tokens and no drafter in its distribution, gains {shown}: {verdict}."
        )
    return notes


def speed_notes(result: DemoResult) -> list[str]:
    """Caveats about the speed-ups."""
    speculative = [row for row in result.methods.values() if row.settings.method == "speculative"]
    notes = []
    if max(row.speedup for row in speculative) < 1:
        notes.append(
            "No speculative method was faster than the verifier alone: on this machine, and with "
            "models this small, scoring a block costs too much more than one step."
        )
    if any(row.spread[1] > 1.5 * row.spread[0] for row in speculative):
        notes.append(
            "Some speed-ups differ widely between rounds, as on a busy machine: a larger --repeats "
            "steadies the medians."
        )
    return notes


def _gains(result: DemoResult, name: str) -> dict[str, float]:
    """Points gained over the verifier alone, by metric; empty if no text has a reference."""
    row, base = result.methods[name], result.methods[VERIFIER]
    judged = {
        "exact match": (row.exact_match, base.exact_match),
        "character accuracy": (row.character_accuracy, base.character_accuracy),
    }
    return {name: ours - alone for name, (ours, alone) in judged.items() if ours is not None and alone is not None}


def _points(gains: Mapping[str, float]) -> str:
    """'1.0 points of exact match and 2.0 of character accuracy'."""
    return " and ".join(
        f"{gain:.1f} {'points ' if i == 0 else ''}of {metric}" for i, (metric, gain) in enumerate(gains.items())
    )


def _shown_examples(result: DemoResult) -> list[int]:
    """Every given text, or else the sentence in which lossless speculation rejected most drafts."""
    if result.options.texts:
        return list(range(len(result.options.texts)))
    records = result.methods[LOSSLESS].first.records
    return [max(range(len(records)), key=lambda i: records[i]["source"].count(SOURCE_RESIDUAL))]


def _show_trace(index: int, result: DemoResult, vocabulary: Vocabulary, console: Console) -> None:
    """Prints one text under lossless speculation, under TokenV3 and under a method of the user's choice."""
    example, coloured = result.examples[index], colour.has_colour(console)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    grid.add_row("input", Text(example.inputs))
    if example.reference is not None:
        grid.add_row("reference", Text(example.reference))
    seen: set[int] = set()
    v3 = (label("token_v3", alpha) for alpha in result.options.alphas)
    for name in (LOSSLESS, *v3, *(name for name in result.methods if name.startswith(_CHOSEN))):
        record = result.methods[name].first.records[index]
        pieces = vocabulary.decode_pieces(record["tokens"])
        grid.add_row(name, colour.trace(pieces, record["source"], colour=coloured))
        seen.update(record["source"])
    console.print(grid)
    console.print(colour.legend(seen, colour=coloured))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
