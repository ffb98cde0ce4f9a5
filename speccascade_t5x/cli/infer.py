"""`speccascade infer`: decodes a seqio task, or lines of text, with a pair.

    speccascade infer --task=restore_de --output_dir=out --rule=token_v3 --alpha=0.3
    speccascade infer --gin_file=runs/infer_restore_de.gin --gin.OUTPUT_DIR="'out'"
    echo "grusse aus munchen" | speccascade infer --input=- --temperature=0
    speccascade infer --task=restore_de --output_dir=out --operating_point=sweep/operating_points.json

Short flags are bindings; the config.gin beside the output holds the resolved configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping

from speccascade_t5x.cli import (
    gin_flags,
    host_processes,
    operating_point,
    preemption,
    progress,
    settings_flags,
    streams,
    terminal,
    topology,
)
from speccascade_t5x.common import storage
from speccascade_t5x.inference import records

# Short flag -> (type, help). These are macros of runs/infer.gin.
_MACROS = {
    "task": (str, "a registered seqio task"),
    "input": (str, 'a text file, a .jsonl file with "inputs" (and "targets"), or "-", instead of a task'),
    "output_dir": (str, "folder for records, metrics and config.gin; without it, predictions go to stdout"),
    "split": (str, "split of the task (default: test)"),
    "limit": (int, "decode only the first N examples"),
    "pair": (str, "a bundle's folder, or the name of a packaged one (default: restore_de_pair)"),
}
_EPILOG = """\
required:
  --task and --output_dir, or --input

bindings (each flag above sets one of them; any other is set with --gin.NAME=VALUE):
  TASK, INPUT, OUTPUT_DIR, SPLIT, LIMIT, PAIR; ALLOW_CODE_EXECUTION and RUN_PROGRAMS_UNPROTECTED of the tasks that
    score programs
  generate.Settings.method, rule, alpha, draft_len, plan, verification, draft_stop, stop_threshold, drafter,
    k_matrix, lenience, max_ngram, min_ngram, ngram_fill, confidence, quantile, temperature, top_k, top_p, min_p,
    max_input_len, max_len, truncate, trace, num_samples, batch_size, seed; without a flag: rule_options,
    edge_rules, stop_sequences, buckets
  infer.infer.batches_per_chunk      number of batches a killed run can lose (default: 8)
  infer.infer.refill                 the binding of --refill
  infer.infer.host_patience_s        seconds that hosts wait for each other (default: 21600)
  partitioning.Topology.devices, data, model, submesh, rules, drafter_rules, strict    the mesh of --topology
  l10n.data_dir.path                 folder of the corpus of the tasks restore_de and l10n_en_de

gin files:
  --task=NAME reads runs/infer_NAME.gin if that file is packaged, runs/infer_text_task.gin for a published text task,
  such as wmt14_en_de, else runs/infer.gin. If you give further files, name the run file first:
    --gin_file=runs/infer_restore_de.gin --gin_file=rules/token_v3.gin

The config.gin beside the output repeats the run: speccascade infer --gin_file=FOLDER/config.gin
A run that receives SIGTERM leaves complete files only and exits with code 75; the same command continues it.
Without --output_dir, samples are separated by tabs, and line breaks and tabs inside a prediction are printed as \\n,
\\r and \\t; the files of --output_dir hold them exactly.
"""


def main(argv: list[str]) -> int:
    """Parses flags and runs the job. Returns the exit code."""
    settings_flags.refuse_unsupported(argv)
    flags, bindings = gin_flags.split(_parser(), argv)
    host_processes.join(flags, "speccascade infer")
    mesh_files, mesh_bindings = topology.configured(flags.topology)
    files = (flags.gin_file or [gin_flags.default_file("infer", flags.task)]) + mesh_files
    shorts = {name.upper(): getattr(flags, name) for name in _MACROS}
    shorts |= settings_flags.bindings(flags)
    point = operating_point.chosen(flags)
    shorts |= operating_point.bindings(point, flags, bindings)
    for name in ("truncate", "trace"):
        shorts[f"generate.Settings.{name}"] = getattr(flags, name) or None
    shorts |= mesh_bindings | {"infer.infer.refill": flags.refill or None}
    shorts["ALLOW_CODE_EXECUTION"] = flags.allow_code_execution or None
    shorts["RUN_PROGRAMS_UNPROTECTED"] = flags.run_programs_unprotected or None
    config_text = gin_flags.load(files, bindings + gin_flags.literal(shorts), flags.gin_search_paths)
    config_text = gin_flags.settled("SPLIT", "infer.infer.split", config_text)

    from speccascade_t5x.inference import infer

    begin = "begin with a run file, such as --gin_file=runs/infer.gin"
    job = gin_flags.job(infer.infer, {"infer.infer.pair": begin, "infer.infer.settings": begin})
    job = operating_point.checked(job, "infer.infer.pair", flags, point)
    try:
        with preemption.stop_on_sigterm() as stop, _progress_bar() as progress:
            result = job(config_text=config_text, progress=progress, stop=stop)
    except infer.Preempted as preempted:
        sentence = terminal.line(str(preempted).splitlines()[0])  # gin appends where it came from
        print(f"speccascade infer: {sentence}", file=sys.stderr)
        return preemption.EXIT_CODE
    if not host_processes.first():
        return 0
    if result.predictions is None:
        predictions = (record["prediction"] for record in result.records)
        rows = ([one] if isinstance(one, str) else one for one in predictions)
        streams.show("\t".join(terminal.line(sample) for sample in row) for row in rows)
        return 0
    storage.write_text(result.predictions.parent / "config.gin", config_text)
    for name, value in result.metrics.items():
        print(f"{name:<26} {records.shown(value)}")
    print(f"{'tokens/s':<26} {result.timing['tokens_per_s']:g}  (compile {result.timing['compile_s']:g} s apart)")
    print(f"wrote {result.predictions}")
    return 0


def _parser() -> argparse.ArgumentParser:
    usage = (
        "--task=NAME --output_dir=FOLDER [flags]",
        "--input=FILE [--output_dir=FOLDER] [flags]",
    )
    description = "Decodes a seqio task, or lines of text, with a pair."
    parser = gin_flags.parser("infer", usage, description, _EPILOG, _MACROS)
    settings_flags.add_flags(parser)
    parser.add_argument("--topology", help=topology.HELP)
    parser.add_argument("--refill", action="store_true", help="put new examples in the rows of finished ones")
    operating_point.add_flags(parser)
    parser.add_argument("--truncate", action="store_true", help="cut longer prompts instead of rejecting them")
    parser.add_argument("--trace", action="store_true", help="keep per-token diagnostics in the records")
    parser.add_argument(
        "--allow_code_execution",
        action="store_true",
        help="measure pass@1 by running what the pair wrote inside bubblewrap; a program can still forge its own "
        "verdict (it shares an interpreter with its tests) and use up kernel memory until its time is over: see "
        "docs/security.md",
    )
    parser.add_argument(
        "--run_programs_unprotected",
        action="store_true",
        help="with --allow_code_execution: run them without bubblewrap; they can then do all that you can do",
    )
    host_processes.add_flags(parser)
    gin_flags.add_flags(parser)
    return parser


@contextlib.contextmanager
def _progress_bar() -> Iterator[object]:
    """A bar on stderr with examples/s and acceptance; nothing is shown if stderr is not a terminal."""
    speed = "{task.fields[speed]} examples/s  acceptance {task.fields[acceptance]}"
    with progress.bar("decoding", speed) as bar:
        row = bar.add_task("", total=None, speed="-", acceptance="-")

        def advance(examples: int, total: int, rates: Mapping[str, float]) -> None:
            bar.update(row, total=total, advance=examples)
            speed = bar.tasks[row].speed
            acceptance = f"{rates['acceptance']:.3f}" if rates.get("drafter_calls_per_token") else "-"
            bar.update(row, speed=f"{speed:.1f}" if speed else "-", acceptance=acceptance)

        yield advance


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade infer"))
