"""`speccascade inspect PATH`: describes what a checkpoint holds, without reading its tensors.

speccascade inspect t5_1_1_small/checkpoint_1000000
speccascade inspect flan-t5-base --json
"""

from __future__ import annotations

import argparse
import sys

from speccascade_t5x.cli import gin_flags, terminal
from speccascade_t5x.common import storage


def main(argv: list[str]) -> int:
    """Prints the description. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="speccascade inspect",
        description="Prints kind, step, architecture, parameters, dtype and vocabulary of a checkpoint: a bundle or a "
        "member of it, T5X (native or Orbax, scanned or not), plain Orbax, npz, or Hugging Face.",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="folder of the checkpoint, a packaged name, or a gs:// address")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--verify", action="store_true", help="compare every file with its checksum, if the checkpoint has any"
    )
    parser.add_argument("--allow_drivers", type=gin_flags.names, default=(), help=gin_flags.ALLOW_DRIVERS)
    parser.add_argument("--kind", help=gin_flags.KIND)
    flags, _ = gin_flags.split(parser, argv)

    from speccascade_t5x.checkpoints import describe

    found = describe.describe(flags.path, verify=flags.verify, allow_drivers=flags.allow_drivers, kind=flags.kind)
    print(storage.to_json(found, indent=1) if flags.json else describe.in_words(terminal.lines(found)))
    return 0


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade inspect"))
