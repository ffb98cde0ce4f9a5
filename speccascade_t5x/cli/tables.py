"""`speccascade tables`: counts a task or tokenised shards into an n-gram table and stores it in a bundle.

    speccascade tables --task=restore_de --output_dir=pair_with_table
    speccascade infer --pair=pair_with_table --drafter=max_gram --input=lines.txt

Short flags are bindings: see runs/tables.gin.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from speccascade_t5x.cli import gin_flags

# Short flag -> (type, help). These are macros of runs/tables.gin.
_MACROS = {
    "task": (str, "a registered seqio task"),
    "cached": (str, "a folder of `speccascade cache`, instead of a task"),
    "output_dir": (str, "the bundle to create; the pair's own folder adds the table to that bundle"),
    "pair": (str, "a bundle's folder, or the name of a packaged one (default: restore_de_pair)"),
    "split": (str, "split of the task (default: train)"),
    "order": (int, "2 for bigrams, 3 for trigrams on top of them (default: 3)"),
    "limit": (int, "count only the first N examples"),
}

_EPILOG = """\
required:
  --output_dir, and --task or --cached

bindings (each flag above sets one of them; any other is set with --gin.NAME=VALUE):
  TASK, CACHED, OUTPUT_DIR, PAIR, SPLIT, ORDER, LIMIT
  tables.tables.successors   maximum number of successors kept per context (default: 16)
  tables.tables.discount     count that is moved from each successor to the shorter context (default: 0.5)
  l10n.data_dir.path         folder of the corpus of the tasks restore_de and l10n_en_de

gin files:
  --task=NAME reads runs/tables_NAME.gin if that file is packaged, else runs/tables.gin.

To count the verifier's own outputs, decode with `speccascade infer`, cache the records, and give the shards here.
"""


def main(argv: list[str]) -> int:
    """Parses flags and runs the job. Returns the exit code."""
    flags, bindings = gin_flags.split(_parser(), argv)
    shorts: dict[str, Any] = {name.upper(): getattr(flags, name) for name in _MACROS}
    files = flags.gin_file or [gin_flags.default_file("tables", flags.task)]
    gin_flags.load(files, bindings + gin_flags.literal(shorts), flags.gin_search_paths)

    from speccascade_t5x.training import tables

    begin = "begin with a run file, such as --gin_file=runs/tables.gin"
    built = gin_flags.job(tables.tables, {"tables.tables.output_dir": begin})()
    about = built.about
    kind = {2: "bigram", 3: "trigram"}[about["order"]]
    print(
        f"wrote {built.bundle}: a {kind} table of {about['sequences']:,} sequences, {about['tokens']:,} tokens "
        f"({about['source']}), {built.stored_bytes / 1e6:.2f} MB"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    usage = (
        "--task=NAME --output_dir=FOLDER [flags]",
        "--cached=FOLDER --output_dir=FOLDER [flags]",
    )
    description = "Counts a task or tokenised shards into an n-gram table and stores it in a bundle, for drafters."
    parser = gin_flags.parser("tables", usage, description, _EPILOG, _MACROS)
    gin_flags.add_flags(parser)
    return parser


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade tables"))
