"""Tables of the results of `precompile`: Markdown, and a few lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from speccascade_t5x.common import text_table
from speccascade_t5x.tpu.hardware import GIB

_HEAD = (
    *("pair", "slice", "mesh", "batch", "program", "fits", "needed", "weights", "caches", "arguments", "temporaries"),
    *("idle", "collectives", "sent", "cycles", "est. time", "compile"),
)
_NOTE = """\
*batch* is that of the whole slice. Sizes are GiB on each chip. *needed* = arguments + outputs - aliased + temporaries +
code + idle; *weights* and *caches* are parts of it; *idle* are parameters that this program does not read and that stay
in memory all the same. *cycles* (millions) and *est. time* come from the compiler's `estimated_cycles`, loops
multiplied out, with the cheapest and with the dearest branch of every conditional; they hold no waiting for other
chips. Figures of `loop` are those of one round, of `refill` those of a round and a pause; collectives and what they
send (MiB, results on one chip) likewise, or of a run of the other programs. *compile* is wall time, in brackets the
seconds of processors it took.
"""


def rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row of texts for each program, in the order of `_HEAD`."""
    return [_row(result["cell"], program) for result in results for program in result["programs"].values()]


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The table, and what its columns mean."""
    lines = text_table.markdown([_HEAD, *rows(results)])
    made = sorted({_made(result) for result in results})
    return "\n".join([*lines, "", _NOTE, "Compiled with " + "; ".join(made) + ".", *_messages(results), ""])


def plain(results: Sequence[Mapping[str, Any]]) -> str:
    """The same for a terminal."""
    table = [_HEAD, *rows(results)]
    return "\n".join([*text_table.plain(table), *_messages(results)])


def gib(nbytes: int | float | None) -> str:
    """Bytes as GiB."""
    return "-" if nbytes is None else f"{nbytes / GIB:.2f}"


def _row(cell: Mapping[str, Any], program: Mapping[str, Any]) -> tuple[str, ...]:
    memory, costs = program.get("memory", {}), program.get("costs", {})
    part = costs.get("round", costs.get("run"))
    batch = cell["options"]["train_batch_size" if program["program"].startswith("train") else "batch_size"]
    return (
        *(cell["pair"], cell["topology"], f"model={cell['options']['model']}", str(batch), program["program"]),
        _fits(program),
        gib(program.get("needed")),
        *(gib(memory.get(name)) for name in ("parameters", "caches", "arguments", "temporaries", "idle")),
        *_costs(part),
        _seconds(program),
    )


def _seconds(program: Mapping[str, Any]) -> str:
    """What compiling took, and on how much of a processor."""
    worked = f" ({program['cpu_s']:.0f})" if "cpu_s" in program else ""
    return f"{program['compile_s']:.0f} s{worked}"


def _costs(part: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    """(collectives, MiB sent, millions of cycles, time)."""
    if part is None:
        return "-", "-", "-", "-"
    count = sum(kind["count"] for kind in part["collectives"].values())
    sent = sum(kind["bytes"] for kind in part["collectives"].values())
    kinds = ", ".join(f"{kind['count']} {name}" for name, kind in part["collectives"].items())
    seconds = part["seconds"] and _span([1e3 * value for value in part["seconds"]], " ms")
    cycles = _span([count / 1e6 for count in part["cycles"]], "")
    return (kinds if count else "0"), f"{sent / 2**20:.2f}", cycles, seconds or "-"


def _span(values: Sequence[float], unit: str) -> str:
    texts = [f"{value:.3g}" for value in values]
    return f"{texts[0]}{unit}" if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}{unit}"


def _fits(program: Mapping[str, Any]) -> str:
    if program["status"] == "fits":
        return f"yes, of {gib(program['capacity'])}"
    if program["status"] == "too large":
        return f"no: {gib(program['over'])} over {gib(program['capacity'])}"
    return program["status"]


def _made(result: Mapping[str, Any]) -> str:
    versions = result.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "nothing yet"


def _messages(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the compiler said where it gave up."""
    return [
        f"- {result['cell']['pair']} for {result['cell']['topology']}, {program['program']}: {program['message']}"
        for result in results
        for program in result["programs"].values()
        if "message" in program
    ]
