"""`speccascade plan`: predicts which draft length, drafter and K matrix pay off, and whether speculation does at all.

    speccascade plan --input=lines.txt --batch_size=1 --output_dir=plan --measure=3
    speccascade infer --input=more.txt --batch_size=1 --draft_len=auto --plan=plan/plan.json
    speccascade plan --acceptance="0.8,0.5;0.6" --costs=0.2

Short flags are bindings: see runs/plan.gin.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from speccascade_t5x.cli import gin_flags, settings_flags
from speccascade_t5x.cli.flag_types import numbers, rows
from speccascade_t5x.common import storage, text_table

# Short flag -> (type, help). These are macros of runs/plan.gin.
_MACROS = {
    "task": (str, "a registered seqio task to measure on"),
    "input": (str, 'a text file, a .jsonl file with "inputs", or "-", instead of a task'),
    "output_dir": (str, "folder for plan.json and config.gin"),
    "split": (str, "split of the task (default: validation)"),
    "limit": (int, "measure on the first N examples (default: 16)"),
    "measure": (int, "decode with the N best, and show their gain on examples that did not choose them"),
    "pair": (str, "a bundle's folder, or the name of a packaged one (default: restore_de_pair)"),
    "acceptance": (rows, 'acceptance to use instead of measuring: "0.8,0.5;0.6", one row per reviewer, Max-Gram last'),
    "costs": (numbers, "with --acceptance: cost of a step of each drafter model, in steps of the verifier"),
}
_LEFT_OUT = (
    *("method", "draft_len", "plan", "draft_stop", "stop_threshold", "drafter", "k_matrix"),
    *("max_ngram", "min_ngram", "ngram_fill", "confidence", "quantile"),
)
_SHOWN = 12

_EPILOG = """\
required:
  --input or --task; or --acceptance and --costs, with which nothing is measured

bindings (each flag above sets one of them; any other is set with --gin.NAME=VALUE):
  TASK, INPUT, OUTPUT_DIR, SPLIT, LIMIT, MEASURE, PAIR, ACCEPTANCE, COSTS
  generate.Settings.rule, alpha, temperature, top_k, top_p, min_p, verification, batch_size, ...: give the values of the
    run that will follow the plan; infer --draft_len=auto rejects a plan made with other values

gin files:
  --task=NAME reads runs/plan_NAME.gin if that file is packaged, else runs/plan.gin.

The predicted gain is tokens per second relative to the verifier alone, in the decoding loop: (tokens per round x the
verifier's step) / (drafting + the verifier's block + the rest of a round). Above 1, speculation pays off.
"""


def main(argv: list[str]) -> int:
    """Parses flags and runs the job. Returns the exit code."""
    settings_flags.refuse_unsupported(argv)
    flags, bindings = gin_flags.split(_parser(), argv)
    shorts: dict[str, Any] = {name.upper(): getattr(flags, name) for name in _MACROS}
    shorts |= {name: value for name, value in settings_flags.bindings(flags).items() if value is not None}
    if flags.acceptance is not None:  # nothing is decoded, so no pair is loaded
        bindings = ["plan.plan.pair = None", *bindings]
    files = flags.gin_file or [gin_flags.default_file("plan", flags.task)]
    config_text = gin_flags.load(files, bindings + gin_flags.literal(shorts), flags.gin_search_paths)

    from speccascade_t5x.planning import plan

    begin = "begin with a run file, such as --gin_file=runs/plan.gin"
    job = gin_flags.job(plan.plan, {"plan.plan.settings": begin})
    found = job(progress=lambda what: print(f"{what} ...", file=sys.stderr, flush=True))
    if found.path is not None:
        storage.write_text(found.path.parent / "config.gin", config_text)
    print("\n".join(lines(found)))
    return 0


def lines(found: Any) -> list[str]:
    """The lines to print for a plan."""
    measured = any(candidate.measured is not None for candidate in found.candidates)
    rows = [("rank", "how", "predicted gain", *(["measured"] if measured else []), "tokens/round", "calls/token")]
    for i, candidate in enumerate(found.candidates):
        if i >= _SHOWN and candidate.draft_len:
            continue
        gain = [f"{candidate.gain:.2f}x"]
        if measured:
            gain.append("-" if candidate.measured is None else f"{candidate.measured:.2f}x")
        calls = " ".join(f"{count:.2f}" for count in candidate.calls_per_token)
        rows.append((str(i + 1), candidate.label, *gain, f"{candidate.tokens_per_round:.2f}", calls))
    text = text_table.plain(rows)
    left = len(found.candidates) - len(rows) + 1
    best = found.candidates[0]
    text += [f"and {left} more"] if left else []
    text.append("")
    if not found.speculate:
        text.append("do not speculate: nothing is expected to be faster than the verifier alone")
    else:
        text.append(f"use {best.label}")
    if found.path is not None:
        text.append(f"wrote {found.path}; follow it with --draft_len=auto --plan={found.path}")
    return text


def _parser() -> argparse.ArgumentParser:
    usage = (
        "--input=FILE [--output_dir=FOLDER] [flags]",
        "--task=NAME [--output_dir=FOLDER] [flags]",
        "--acceptance=ROWS --costs=NUMBERS",
    )
    description = "Predicts which draft length, drafter and K matrix pay off, and whether speculation does at all."
    parser = gin_flags.parser("plan", usage, description, _EPILOG, _MACROS)
    settings_flags.add_flags(parser, leave_out=_LEFT_OUT)
    gin_flags.add_flags(parser)
    return parser


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade plan"))
