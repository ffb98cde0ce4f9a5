"""The headline experiment in one command, resumable: a sweep over everything, and what it says of the paper's claims.

    python benchmarks/headline/run.py --output_dir=headline [any flag of `speccascade sweep`]

Leaves what a sweep leaves (docs/sweep.md), and claims.md: each claim of "Faster Cascades via Speculative Decoding"
beside what was measured here. With --limit=16 --alpha_points=2 --refine=0 --seeds=0 it is over in minutes, and proves
nothing but that it runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax loads; name another platform to measure it

import claims

from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.cli import host_processes
from speccascade_t5x.cli import sweep as verb
from speccascade_t5x.common import storage

GIN_FILE = Path(__file__).resolve().parent / "headline.gin"


def main(argv: list[str]) -> int:
    """Runs the sweep, then writes claims.md into its folder."""

    def verb_and_claims(flags: list[str]) -> int:
        result = verb.run(flags)
        if not host_processes.first():
            return 0
        said = verb.lines(result)
        if result.groups:  # a calibration has none
            path = storage.write_text(result.folder / "claims.md", claims.markdown(result.groups, result.tolerance))
            said.append(f"wrote {path}")
        print("\n".join(said))
        return 0

    named = any(flag.startswith("--gin_file") for flag in argv)
    files = [] if named else [f"--gin_file={GIN_FILE}"]
    return cli.run_verb(verb_and_claims, [*files, *argv], "headline")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
