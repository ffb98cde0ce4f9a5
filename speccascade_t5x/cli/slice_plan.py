"""`speccascade slice_plan`: predicts tokens/s of a pair on a TPU slice, and when speculation stops paying off there.

    speccascade slice_plan --pair=t5_1_1_base_xxl --topology=v4:2x2x1 --acceptance=0.8
    speccascade slice_plan --pair=t5_1_1_small_xl --topology=v5e:4x4 --plan=plan/plan.json --batch_sizes=1,16,256

Nothing is compiled and no TPU is needed: see docs/slice_plan.md. Short flags are bindings: see runs/slice_plan.gin.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from speccascade_t5x.cli import gin_flags, precompile
from speccascade_t5x.cli.flag_types import numbers, wholes
from speccascade_t5x.common import storage

# Short flag -> (type, help). These are macros of runs/slice_plan.gin.
_MACROS = {
    "pair": (str, "a pair: file of pairs/, FAMILY_SIZE_SIZE or DRAFTER:VERIFIER of models/ (default: t5_1_1_base_xxl)"),
    "topology": (str, "a slice, such as v5e-16 or v5e:4x4 (default: v4:2x2x1)"),
    "acceptance": (
        numbers,
        "acceptance rate of drafted tokens: one figure, or one per draft position: 0.85,0.8,0.75",
    ),
    "plan": (str, "plan.json of `speccascade plan`, made on any machine, instead of --acceptance"),
    "batch_sizes": (wholes, "numbers of rows that the whole slice decodes at a time (default: 1,4,16,64,256,1024)"),
    "draft_lens": (wholes, "numbers of tokens drafted per round (default: 1,2,3,4,5,6,8,10)"),
    "input_len": (int, "number of encoder positions (default: 512)"),
    "max_len": (int, "number of output tokens (default: 128)"),
    "rule": (str, "the rule (default: lossless); one that reads the drafter's distribution costs one more step"),
    "alpha": (float, "the rule's trade-off"),
    "model": (int, "number of chips that share the weights (default: the fewest that hold the pair)"),
    "output_dir": (str, "folder for slice_plan.json, slice_plan.md and config.gin"),
}
_EPILOG = """\
required:
  --acceptance or --plan

bindings (each flag above sets one of them; any other is set with --gin.NAME=VALUE):
  PAIR, TOPOLOGY, ACCEPTANCE, PLAN, BATCH_SIZES, DRAFT_LENS, INPUT_LEN, MAX_LEN, RULE, ALPHA, MODEL, OUTPUT_DIR

"pays above" is the acceptance rate, the same at every draft position, above which that draft length would pay off.
"""


def main(argv: list[str]) -> int:
    """Parses flags and runs the job. Returns the exit code."""
    flags, bindings = gin_flags.split(_parser(), argv)
    shorts: dict[str, Any] = {name.upper(): getattr(flags, name) for name in _MACROS}
    files = flags.gin_file or ["runs/slice_plan.gin"]
    bindings = bindings + gin_flags.literal(shorts)
    gin_flags.load(files, bindings, flags.gin_search_paths)
    from speccascade_t5x.planning import slice_plan

    needed = {"slice_plan.slice_plan.pair": "begin with a run file, such as --gin_file=runs/slice_plan.gin"}
    gin_flags.job(slice_plan.slice_plan, needed)
    pair = gin_flags.configured("slice_plan.slice_plan.pair")
    architectures = precompile.architectures((pair,), flags.gin_search_paths)[pair]
    config_text = gin_flags.load(files, bindings, flags.gin_search_paths)
    found = gin_flags.job(slice_plan.slice_plan, needed)(architectures=architectures)
    print(slice_plan.plain(found))
    if found.path is not None:
        storage.write_text(found.path.parent / "config.gin", config_text)
        print(f"wrote {found.path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    usage = (
        "--pair=NAME --topology=NAME --acceptance=NUMBERS [flags]",
        "--pair=NAME --topology=NAME --plan=FILE [flags]",
    )
    description = "Predicts tokens/s of a pair on a TPU slice, per batch size and draft length."
    parser = gin_flags.parser("slice_plan", usage, description, _EPILOG, _MACROS)
    gin_flags.add_flags(parser)
    return parser


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade slice_plan"))
