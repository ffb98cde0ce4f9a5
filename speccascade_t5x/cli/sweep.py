"""`speccascade sweep`: measures methods at several alphas on a task and compares their quality, speed and calls.

    speccascade sweep --task=restore_de --output_dir=sweep --methods=token_v3,opt,lossy_sd
    speccascade sweep --task=restore_de --output_dir=found --methods=token_v3,chow --calibrate=deferral_rate=0.3
    speccascade infer --task=restore_de --output_dir=out --operating_point=sweep/operating_points.json

Short flags are bindings: see runs/sweep.gin.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from speccascade_t5x.cli import gin_flags, host_processes, settings_flags, terminal
from speccascade_t5x.cli.flag_types import alphas, numbers, rate, wholes, words
from speccascade_t5x.common import storage, text_table

# Short flag -> (type, help). These are macros of runs/sweep.gin.
_MACROS = {
    "task": (str, "a registered seqio task with targets"),
    "input": (str, 'a .jsonl file with "inputs" and "targets" instead of a task; quality is then the NLL'),
    "output_dir": (str, "folder for cells, report, plots and operating points"),
    "split": (str, "split of the task (default: validation)"),
    "limit": (int, "use only the first N examples (default: 200)"),
    "pair": (str, "a bundle's folder, or the name of a packaged one (default: restore_de_pair)"),
    "metric": (str, 'measure of quality: a metric of the task (default: its first), or "nll"'),
    "methods": (words, "methods, such as token_v3,opt+block,lossless@max_gram: [execution:]rule[+block][@drafter]"),
    "alphas": (alphas, 'alphas to use instead of the grid: "token_v3=0.1,0.3;opt=0"'),
    "alpha_points": (int, "number of alphas per rule, spread over its range (default: 6)"),
    "refine": (int, "number of further alphas per rule, where its curve bends (default: 2)"),
    "draft_lens": (
        wholes,
        "draft lengths; the first is the main condition's, the others vary one at a time (default: 5)",
    ),
    "temperatures": (numbers, "temperatures, in the same way (default: 1)"),
    "top_ps": (numbers, "values of top-p, in the same way (default: 1)"),
    "seeds": (wholes, "seeds of the random keys; only the first is used at temperature 0 (default: 0,1,2)"),
    "calibrate": (rate, "find the alphas that reach a rate instead of sweeping, such as deferral_rate=0.3"),
}
_SHARED = ("top_k", "min_p", "max_input_len", "max_len", "batch_size")
_EPILOG = """\
required:
  --output_dir, and --task or --input

bindings (each flag above sets one of them; any other is set with --gin.NAME=VALUE):
  TASK, INPUT, OUTPUT_DIR, SPLIT, LIMIT, PAIR, METRIC, METHODS, ALPHAS, ALPHA_POINTS, REFINE, DRAFT_LENS, TEMPERATURES,
    TOP_PS, SEEDS, CALIBRATE
  sweep.sweep.timing_items, timing_repeats, timed_points, traces, quality_tolerance, varied
  generate.Settings.batch_size, max_input_len, max_len, top_k, min_p, buckets, truncate: shared by all methods

gin files:
  --task=NAME reads runs/sweep_NAME.gin if that file is packaged, else runs/sweep.gin.

These baselines are always measured in the same run: the verifier and the drafter alone, lossless speculation, lossy
speculative decoding with both residuals, BiLD with fixed windows and as published, a token and a sequence cascade, and
MinP at every alpha of TokenV3. The same command continues a killed sweep at the first missing cell.
"""


def main(argv: list[str]) -> int:
    """Parses flags and runs the job. Returns the exit code."""
    result = run(argv)
    if host_processes.first():
        print("\n".join(lines(result)))
    return 0


def run(argv: list[str]) -> Any:
    """Parses flags and runs the job. Returns its `SweepResult`."""
    settings_flags.refuse_unsupported(argv)
    flags, bindings = gin_flags.split(_parser(), argv)
    host_processes.join(flags, "speccascade sweep")
    shorts: dict[str, Any] = {name.upper(): getattr(flags, name) for name in _MACROS}
    shorts |= {name: value for name, value in settings_flags.bindings(flags).items() if value is not None}
    files = flags.gin_file or [gin_flags.default_file("sweep", flags.task)]
    config_text = gin_flags.load(files, bindings + gin_flags.literal(shorts), flags.gin_search_paths)

    from speccascade_t5x.evaluation import sweep  # JAX loads after the flags are known to be good

    begin = "begin with a run file, such as --gin_file=runs/sweep.gin"
    job = gin_flags.job(sweep.sweep, {"sweep.sweep.pair": begin, "sweep.sweep.settings": begin})
    with _live() as progress:
        result = job(progress=progress, report_only=flags.report_only)
    if host_processes.first():
        storage.write_text(result.folder / "config.gin", config_text)
    return result


def lines(result: Any) -> list[str]:
    """Prints a result."""
    if result.calibrated:
        return [*_calibrated(result.calibrated), f"wrote {result.files['calibration']}"]
    from speccascade_t5x.evaluation import frontier
    from speccascade_t5x.evaluation.notes import advice, interval

    main = result.groups[0]
    rows: list[tuple[str, ...]] = [
        ("method", "alpha", "speed-up at the verifier's quality", "alpha", "best quality within its latency")
    ]
    for answer in frontier.answers(main, result.tolerance):
        row = [answer.arm]
        for choice, figure in ((answer.at_quality, "speed_up"), (answer.at_latency, "quality")):
            alpha = "-" if choice is None or choice.point.alpha is None else f"{choice.point.alpha:g}"
            digits = None if figure == "quality" else 2
            row += [alpha, "none" if choice is None else interval(getattr(choice, figure), digits)]
        rows.append(tuple(row))
    text = [f"{main.condition}:", ""] if len(rows) > 1 else []
    text += text_table.plain(rows) if len(rows) > 1 else []
    text += ["", *advice(main, result.tolerance, "quality")] if len(rows) > 1 else []
    return [*text, "", *(f"wrote {path}" for path in result.files.values())]


def _calibrated(found: list[dict[str, Any]]) -> list[str]:
    text = []
    for entry in found:
        held = entry["held_out"]
        shown = "-" if held["value"] is None else f"{held['value']:.3f} [{held['low']:.3f}, {held['high']:.3f}]"
        text.append(
            f"{entry['arm']}: alpha {entry['alpha']:g} gives {entry['rate']} {shown} on held-out items, "
            f"{entry['wanted']:g} was wanted" + ("" if entry["reached"] else "; no measured alpha reaches it")
        )
    return text


def _parser() -> argparse.ArgumentParser:
    usage = (
        "--task=NAME --output_dir=FOLDER [flags]",
        "--input=FILE.jsonl --output_dir=FOLDER [flags]",
    )
    description = "Measures methods at several alphas on a task and compares their quality, speed and calls."
    parser = gin_flags.parser("sweep", usage, description, _EPILOG, _MACROS)
    parser.add_argument("--report_only", action="store_true", help="measure nothing, report the existing cells")
    settings_flags.add_flags(parser, leave_out=[name for name in settings_flags.SETTINGS if name not in _SHARED])
    host_processes.add_flags(parser)
    gin_flags.add_flags(parser)
    return parser


@contextlib.contextmanager
def _live() -> Iterator[Callable[[Any], None]]:
    """A table of the latest cells with an ETA on stderr; if that is not a terminal, an occasional line instead."""
    from rich.live import Live

    console = terminal.console(stderr=True)
    latest: list[Any] = []
    if not console.is_terminal:
        yield lambda news: _plain(news, console)
        return
    # Seldom refreshed: the table is drawn beside what is being measured.
    with Live(console=console, refresh_per_second=1, transient=True, **terminal.LIVE) as live:

        def advance(news: Any) -> None:
            if news.row is not None:
                latest.append(news.row)
            live.update(_table(latest[-12:], news))

        yield advance


def _plain(news: Any, console: Any) -> None:
    """Prints one line per tenth of the work."""
    step = max(news.total // 10, 1)
    if news.done % step == 0 or news.done == news.total:
        console.print(f"{_head(news)}", soft_wrap=True)


def _head(news: Any) -> str:
    unit = "cells" if news.phase == "quality" else "blocks of wall times"
    eta = "" if news.eta_s is None or news.done == news.total else f", about {_span(news.eta_s)} left"
    return f"{news.done} of {news.total} {unit}{eta}"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _table(rows: list[dict[str, Any]], news: Any) -> Any:
    from rich.table import Table

    table = Table(title=_head(news), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("cell", "metrics", "verifier calls/token", "acceptance", "seconds"):
        table.add_column(name)
    for row in rows:
        if row["status"] == "failed":
            table.add_row(row["cell"], row["error"], "", "", "")
            continue
        metrics = row["metrics"]["all"]
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not name.startswith("reference"))
        rates = row["rates"]["all"]
        calls, acceptance = f"{rates['verifier_calls_per_token']:.3f}", f"{rates['acceptance']:.3f}"
        table.add_row(row["cell"], shown, calls, acceptance, f"{row['decode_s']:.1f}")
    return table


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade sweep"))
