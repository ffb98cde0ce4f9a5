"""`speccascade prune`: cuts the vocabulary of a T5 down to the pieces that a task's texts use most.

    speccascade prune --task=text_de --vocabulary=flan-t5-small/spiece.model --source=flan-t5-small \\
        --target=flan-t5-small-de --rows=12288

Short flags are bindings: see runs/prune.gin.
"""

from __future__ import annotations

import sys

from speccascade_t5x.cli import gin_flags

# Short flag -> (type, help). These are macros of runs/prune.gin.
_MACROS = {
    "source": (str, "checkpoint of a T5; `speccascade inspect` describes it"),
    "target": (str, "the Hugging Face folder to create"),
    "task": (str, "a registered seqio task or mixture, whose texts are counted"),
    "vocabulary": (str, "the source's SentencePiece model, which also reads the task"),
    "rows": (int, "number of rows of the embedding, sentinels included"),
    "split": (str, "split of the task (default: train)"),
    "limit": (int, "count only the first N examples of each task"),
}
# Short flags that are arguments of checkpoints.pruning.prune.
_ARGUMENTS = {
    "extra_ids": (int, "number of sentinels after the ordinary pieces (default: 100)"),
    "add_from": (int, "give a row to each character without a piece that occurs in at least N texts (default: none)"),
}
_SHOWN = 12  # characters in a message

_EPILOG = """\
required:
  --source, --target, --task, --vocabulary and --rows

bindings (each flag above sets one of them; any other is set with --gin.NAME=VALUE):
  SOURCE, TARGET, TASK, VOCABULARY, ROWS, SPLIT, LIMIT
  pruning.prune.extra_ids, add_from, overwrite

gin files:
  --task=NAME reads runs/prune_NAME.gin if that file is packaged, else runs/prune.gin.
"""


def main(argv: list[str]) -> int:
    """Parses flags, prunes, prints what was kept. Returns the exit code."""
    usage = ["--task=NAME --source=PATH --vocabulary=FILE --target=FOLDER --rows=N [flags]"]
    description = "Cuts the vocabulary of a T5 down to the pieces that a task's texts use most."
    parser = gin_flags.parser("prune", usage, description, _EPILOG, _MACROS | _ARGUMENTS)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    gin_flags.add_flags(parser)
    flags, bindings = gin_flags.split(parser, argv)
    shorts = {name.upper(): getattr(flags, name) for name in _MACROS}
    shorts |= {f"pruning.prune.{name}": getattr(flags, name) for name in _ARGUMENTS}
    shorts["pruning.prune.overwrite"] = flags.overwrite or None
    files = flags.gin_file or [gin_flags.default_file("prune", flags.task)]
    gin_flags.load(files, bindings + gin_flags.literal(shorts), flags.gin_search_paths)

    from speccascade_t5x.checkpoints import pruning  # JAX loads after the flags are known to be good

    begin = "begin with a run file, such as --gin_file=runs/prune.gin"
    report = gin_flags.job(pruning.prune, {"pruning.prune.texts": begin})()
    kept = f"{report.kept:,} pieces, {report.kept_share:.2%} of the texts' pieces"
    added = f", and {len(report.added)} added characters ({_shown(report.added)})" if report.added else ""
    print(f"{'rows':<12}{report.rows:,}: {kept}{added}")
    print(f"{'parameters':<12}{report.parameters:,}")
    print(
        f"{'unknown':<12}{report.unknown:,} of {report.texts:,} texts meet the unknown piece, "
        f"{report.unknown_before:,} did before"
    )
    if report.characters:
        print(f"{'':<12}for {len(report.characters)} characters: {_shown([char for char, _ in report.characters])}")
    print(f"wrote {report.target}")
    return 0


def _shown(characters: tuple[str, ...] | list[str]) -> str:
    return " ".join(characters[:_SHOWN]) + (" ..." if len(characters) > _SHOWN else "")


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb

    sys.exit(run_verb(main, sys.argv[1:], "speccascade prune"))
