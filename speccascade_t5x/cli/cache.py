"""`speccascade cache`: writes a seqio task, or a model's outputs, as tokenised shards.

    speccascade cache --task=restore_de --output_dir=cached
    speccascade cache --task=restore_de --records=decoded --splits=train --output_dir=distilled

Short flags are bindings; the config.gin beside the shards holds the resolved configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speccascade_t5x.cli import gin_flags, progress
from speccascade_t5x.common import storage

# Short flag -> (type, help). These are macros of runs/cache.gin.
_MACROS = {
    "task": (str, "a registered seqio task or mixture"),
    "output_dir": (str, "folder to write to: one folder per split, and config.gin"),
    "splits": (str, "splits, separated by commas (default: train,validation)"),
    "inputs_len": (int, "maximum length of inputs in ids, EOS included; longer ones are cut and counted"),
    "targets_len": (int, "maximum length of targets, in the same way"),
    "limit": (int, "write only the first N examples of each split"),
    "records": (str, "the output folder of an `infer` job: its outputs become the targets"),
    "pair": (str, "with --records: the pair that wrote them, for its vocabulary (default: the task's)"),
}

_EPILOG = """\
required:
  --output_dir, and --task or --records

bindings (each flag above sets one of them; any other is set with --gin.NAME=VALUE):
  TASK, OUTPUT_DIR, SPLITS, INPUTS_LEN, TARGETS_LEN, LIMIT, RECORDS, PAIR
  cache.cache.task_lengths         pass the lengths to the task's own preprocessors (span corruption needs them)
  cache.cache.unfinished           with RECORDS: keep outputs that do not end in EOS (default: leave them out)
  cache.cache.seed                 seed of preprocessors that draw random numbers (default: 0)
  cache.cache.examples_per_shard   number of examples in one file (default: 65536)
  l10n.data_dir.path               folder of the corpus of the tasks restore_de and l10n_en_de
  l10n.restore_de_rows.max_target_bytes   maximum length of the German texts of restore_de, in bytes

gin files:
  --task=NAME reads runs/cache_NAME.gin if that file is packaged, else runs/cache.gin.

The config.gin beside the shards repeats the run: speccascade cache --gin_file=FOLDER/config.gin
The same command continues a killed run: it keeps complete splits and writes the rest, with the same files as a result.
"""


def main(argv: list[str]) -> int:
    """Parses flags and runs the job. Returns the exit code."""
    flags, bindings = gin_flags.split(_parser(), argv)
    shorts: dict[str, Any] = {name.upper(): getattr(flags, name) for name in _MACROS}
    if flags.splits is not None:
        shorts["SPLITS"] = tuple(flags.splits.split(","))
    files = flags.gin_file or [gin_flags.default_file("cache", flags.task)]
    config_text = gin_flags.load(files, bindings + gin_flags.literal(shorts), flags.gin_search_paths)

    import gin

    from speccascade_t5x.data import cache

    begin = "begin with a run file, such as --gin_file=runs/cache.gin"
    job = gin_flags.job(cache.cache, {"cache.cache.output_dir": begin, "OUTPUT_DIR/gin.macro.value": begin})
    output_dir = Path(gin.query_parameter("OUTPUT_DIR/gin.macro.value"))
    with _progress_line() as progress:
        found = job(config_text=config_text, progress=progress)
    storage.write_text(output_dir / "config.gin", config_text)
    for cached in found:
        print(_line(cached))
    return 0


def _line(cached: Any) -> str:
    """Describes a corpus in one line."""
    manifest = cached.manifest
    tokens = ", ".join(
        f"{about['tokens']:,} {name} ids (mean {about['mean']:.1f}, longest {about['longest']})"
        for name, about in manifest["features"].items()
    )
    share = f"{100 * manifest['cut_share']:.2f} % cut"
    left_out = manifest["source"].get("unfinished_outputs")
    ended = f", {left_out:,} outputs without EOS" if left_out else ""
    what = "kept" if cached.kept else "wrote"
    return f"{what} {cached.folder}: {manifest['examples']:,} examples, {tokens}, {share}{ended}"


def _parser() -> argparse.ArgumentParser:
    usage = (
        "--task=NAME --output_dir=FOLDER [flags]",
        "--records=FOLDER --splits=train --task=NAME --output_dir=FOLDER [flags]",
    )
    description = "Writes a seqio task or mixture, or a model's outputs, as tokenised shards to train on."
    parser = gin_flags.parser("cache", usage, description, _EPILOG, _MACROS)
    gin_flags.add_flags(parser)
    return parser


@contextlib.contextmanager
def _progress_line() -> Iterator[object]:
    """A live line on stderr with examples and examples/s; nothing is shown if stderr is not a terminal."""
    from rich.progress import SpinnerColumn, TimeElapsedColumn

    texts = ("caching {task.description}", "{task.completed:,.0f} examples", "{task.fields[speed]} examples/s")
    with progress.live(SpinnerColumn(), *texts, TimeElapsedColumn()) as line:
        rows: dict[str, Any] = {}

        def advance(what: str, examples: int) -> None:
            if what not in rows:
                rows[what] = line.add_task(what, total=None, speed="-")
            line.update(rows[what], completed=examples)
            speed = line.tasks[rows[what]].speed
            line.update(rows[what], speed=f"{speed:,.0f}" if speed else "-")

        yield advance


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade cache"))
