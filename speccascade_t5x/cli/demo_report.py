"""What `speccascade demo` prints: the table, what it does and does not show, and the traces."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from speccascade_t5x.cli import colour
from speccascade_t5x.interfaces import SOURCE_RESIDUAL
from speccascade_t5x.runtime.vocabulary import Vocabulary

if TYPE_CHECKING:
    from speccascade_t5x.cli.demo import DemoResult, MethodResult

VERIFIER, DRAFTER, LOSSLESS = "verifier alone", "drafter alone", "lossless speculation"
COMPARED = ("token_v3", "min_p")  # read at the same alphas, see `truncation_notes`
_NAMES = {"token_v3": "TokenV3", "min_p": "MinP"}
_VISIBLE = 0.05  # the table shows one decimal


def label(rule: str, alpha: float) -> str:
    """How a rule at one alpha is called in the table."""
    return f"{_NAMES[rule]} alpha {alpha:g}"


def show(result: DemoResult, vocabulary: Vocabulary, console: Console) -> None:
    """Prints everything that depends on the result alone."""
    console.print(_head(result))
    console.print(_table(result))
    for note in [*chance_notes(result), *truncation_notes(result), *speed_notes(result)]:
        console.print(f"- {note}")
    for index in _shown_examples(result):
        _show_trace(index, result, vocabulary, console)


def show_end(console: Console) -> None:
    """Prints the machine and what to try next."""
    console.print(f"Machine: {machine()}.")
    console.print(
        'Try next: --text "Schöne Grüße aus Köln" for your own words, --temperature 0 for the greedy case, '
        "--draft_len 3; `speccascade infer --help` decodes a file or a task, `speccascade methods` lists the rules."
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


def _head(result: DemoResult) -> str:
    options, examples = result.options, result.examples
    judged = sum(example.reference is not None for example in examples)
    return (
        "restore_de: German text back from its lower-case ASCII-folded form.\n"
        f"{_count(len(examples), 'text')}, {judged} with a reference, one at a time; temperature "
        f"{options.temperature:g}, draft length {options.draft_len}; a token is a byte. "
        f"{_count(options.repeats, 'round')}, methods taking turns."
    )


def _table(result: DemoResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("method", overflow="fold")
    for heading in (
        *("exact\nmatch %", "character\naccuracy %", "tokens\nper s"),
        *("speed-up\n(spread)", "accept-\nance %", "verifier\ncalls per\ntoken"),
    ):
        table.add_column(heading, justify="right", overflow="fold")
    for row in result.methods.values():
        low, high = row.spread
        drafts = row.settings.method == "speculative"
        table.add_row(
            row.label,
            _percent(row.exact_match),
            _percent(row.character_accuracy),
            f"{row.tokens_per_s:.0f}",
            f"{row.speedup:.2f}x" + (f" ({low:.2f}-{high:.2f})" if high > low else ""),
            _percent(100 * row.rates["acceptance"] if drafts else None),
            f"{row.rates['verifier_calls_per_token']:.2f}",
        )
    return table


def chance_notes(result: DemoResult) -> list[str]:
    """How far two methods of the SAME law lie apart here: the yardstick for every other difference."""
    apart = _gap(result, LOSSLESS)
    if apart is None:
        return ["No text has a reference, so quality is not judged: give plain German, not its folded form."]
    if result.options.temperature == 0:
        return ["At temperature 0 lossless speculation writes what the verifier alone writes."]
    return [
        f"Lossless speculation follows the verifier's own law: the {abs(apart):.1f} points of character accuracy "
        f"between the two are chance, {_count(len(result.examples), 'text')} and "
        f"{_count(result.options.repeats, 'seed')} being few. Read no smaller difference as one."
    ]


def truncation_notes(result: DemoResult) -> list[str]:
    """Says how much of TokenV3's gain MinP has as well, which keeps the same tokens and reads no drafter."""
    notes = []
    for alpha in result.options.alphas:
        gain, without_drafter = (_gap(result, label(rule, alpha)) for rule in COMPARED)
        if gain is None or gain < _VISIBLE:
            continue
        text = (
            f"{label('token_v3', alpha)} gains {gain:.1f} points of character accuracy over the verifier alone. MinP "
            "at the same alpha, with the same kept tokens and no drafter in its law, "
        )
        if without_drafter < _VISIBLE:
            notes.append(text + "gains nothing: leaving out unlikely tokens does not explain it.")
            continue
        share = "all of that" if without_drafter >= gain - _VISIBLE else f"{without_drafter:.1f} points of that"
        notes.append(
            text + f"gains {without_drafter:.1f}: {share} can come from leaving out unlikely tokens (truncation), "
            "not from the drafter."
        )
    return notes


def speed_notes(result: DemoResult) -> list[str]:
    """What a reader should know before believing the speed-ups."""
    speculative = [row for row in result.methods.values() if row.settings.method == "speculative"]
    notes = []
    if max(row.speedup for row in speculative) < 1:
        notes.append(
            "No speculative method was faster than the verifier alone on this machine: scoring a block costs much "
            "more than one step here. Try a shorter --draft_len."
        )
    if any(row.spread[1] > 1.5 * row.spread[0] for row in speculative):
        notes.append("Speed-ups differ widely between rounds, as on a busy machine; a larger --repeats steadies them.")
    return notes


def _gap(result: DemoResult, name: str) -> float | None:
    """Points of character accuracy over the verifier alone; None where nothing was judged."""
    reached, base = (result.methods[n].character_accuracy for n in (name, VERIFIER))
    return None if reached is None else reached - base


def _shown_examples(result: DemoResult) -> list[int]:
    """Every given text, or else the sentence in which lossless speculation rejected most drafts."""
    if result.options.texts:
        return list(range(len(result.options.texts)))
    records = result.methods[LOSSLESS].first.records
    return [max(range(len(records)), key=lambda i: records[i]["source"].count(SOURCE_RESIDUAL))]


def _show_trace(index: int, result: DemoResult, vocabulary: Vocabulary, console: Console) -> None:
    """Prints one text under lossless speculation and under TokenV3."""
    example, coloured = result.examples[index], colour.has_colour(console)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    grid.add_row("input", example.inputs)
    if example.reference is not None:
        grid.add_row("reference", example.reference)
    seen: set[int] = set()
    for name in (LOSSLESS, *(label("token_v3", alpha) for alpha in result.options.alphas)):
        record = result.methods[name].first.records[index]
        pieces = vocabulary.decode_pieces(record["tokens"])
        grid.add_row(name, colour.trace(pieces, record["source"], colour=coloured))
        seen.update(record["source"])
    console.print("\nWho wrote what:" if index == 0 or not result.options.texts else "")
    console.print(grid)
    console.print(colour.legend(seen, colour=coloured))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
