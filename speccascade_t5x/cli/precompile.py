"""`speccascade precompile`: compiles a pair's programs for TPU slices on a machine without a TPU, from shapes alone.

    speccascade precompile --pairs=t5_1_1_small_xl --topologies=v4:2x2x1
    speccascade precompile --pairs=all --topologies=all --output_dir=precompiled
    speccascade precompile --pairs=t5_1_1_base_xxl --topologies=v4:2x2x1,v5p:2x2x1 --model=4 --programs=encoder,loop

Short flags are bindings: see runs/precompile.gin. The compiler runs in child processes: see docs/precompile.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin

from speccascade_t5x.cli import gin_flags
from speccascade_t5x.common import checks, paths, storage
from speccascade_t5x.interfaces import UserError

_ALL = "all"
# Short flag -> (type, help). These are macros of runs/precompile.gin.
_MACROS = {
    "pairs": (gin_flags.names, "pairs, separated by commas: of pairs/, FAMILY_SIZE_SIZE or DRAFTER:VERIFIER; or all"),
    "topologies": (gin_flags.names, "slices, separated by commas, such as v4-8 or v4:2x2x1; or all"),
    "output_dir": (str, "folder for tables and results; a run found there is continued"),
    "batch_size": (int, "inputs that the slice decodes at a time (default: 16, or one per group of chips)"),
    "input_len": (int, "number of encoder positions (default: 512)"),
    "max_len": (int, "number of output tokens (default: 128)"),
    "draft_len": (int, "number of tokens drafted per round (default: 5)"),
    "model": (int, "number of chips that share the weights (default: the fewest that hold the pair)"),
    "programs": (gin_flags.names, "of encoder, loop, refill, train_drafter, train_verifier (default: all but refill)"),
    "timeout_s": (float, "time limit of the process of a cell, in seconds (default: 3600)"),
}
_EPILOG = """\
required: nothing

bindings (each flag above sets one of them; any other is set with --gin.NAME=VALUE):
  PAIRS, TOPOLOGIES, OUTPUT_DIR, BATCH_SIZE, INPUT_LEN, MAX_LEN, DRAFT_LEN, MODEL, PROGRAMS, TIMEOUT_S
  slice_cells.Options.rule, alpha, num_samples, train_batch_size, targets_len, microbatches, drafter_rules

Every cell of the table is compiled in a process of its own. A cell that crashes or takes too long does not affect the
others, and the same command with the same --output_dir compiles what is missing.
"""


def main(argv: list[str]) -> int:
    """Parses flags and runs the job. Returns the exit code."""
    flags, bindings = gin_flags.split(_parser(), argv)
    shorts: dict[str, Any] = {name.upper(): getattr(flags, name) for name in _MACROS}
    shorts["PAIRS"] = all_pairs() if shorts["PAIRS"] == (_ALL,) else shorts["PAIRS"]
    if shorts["TOPOLOGIES"] == (_ALL,):
        from speccascade_t5x.tpu import hardware

        shorts["TOPOLOGIES"] = hardware.SLICES
    files = flags.gin_file or ["runs/precompile.gin"]
    bindings = bindings + gin_flags.literal(shorts)
    gin_flags.load(files, bindings, flags.gin_search_paths)
    needed = {"precompile.precompile.options": "begin with a run file, such as --gin_file=runs/precompile.gin"}
    from speccascade_t5x.tpu import precompile, programs_table  # JAX loads after the flags are known to be good

    gin_flags.job(precompile.precompile, needed)
    made = architectures(gin_flags.configured("precompile.precompile.pairs"), flags.gin_search_paths)
    config_text = gin_flags.load(files, bindings, flags.gin_search_paths)
    job = gin_flags.job(precompile.precompile, needed)
    say = lambda what: print(f"{what} ...", file=sys.stderr, flush=True)  # noqa: E731
    found = job(architectures=made, environment=environment(), before=check_compiler, progress=say)
    print(programs_table.plain(found.results))
    if found.path is not None:
        storage.write_text(found.path.parent / "config.gin", config_text)
        print(f"wrote {found.path}")
    return 0


def model_files() -> list[str]:
    """Names of the packaged architectures."""
    return sorted(path.stem for path in (paths.gin_configs_dir() / "models").glob("*.gin"))


def all_pairs() -> tuple[str, ...]:
    """The packaged pairs whose name contains their architectures."""
    known = set(model_files())
    stems = sorted(path.stem for path in (paths.gin_configs_dir() / "pairs").glob("*.gin"))
    return tuple(stem for stem in stems if set(parts(stem)) <= known)


def parts(pair: str) -> tuple[str, str]:
    """(drafter, verifier) of a pair's name: "a:b", or "family_size_size" as the files of pairs/ are called."""
    if ":" in pair:
        drafter, verifier = pair.split(":", 1)
        return drafter, verifier
    drafter, _, size = pair.rpartition("_")
    return drafter, f"{drafter.rpartition('_')[0]}_{size}"


def architectures(pairs: tuple[str, ...], search_paths: str = "") -> dict[str, tuple[Any, Any]]:
    """Pair -> (drafter, verifier), as the files of models/ configure them. Replaces the configuration of gin.

    Raises:
      UserError: a model has no file.
    """
    from speccascade_t5x.models import t5

    pairs = checks.as_type("pairs", pairs, Sequence[str])
    known, found = model_files(), {}
    for name in dict.fromkeys(name for pair in pairs for name in parts(pair)):
        if name not in known:
            pair = next(pair for pair in pairs if name in parts(pair))
            hint = checks.suggestion(name, known)
            raise UserError(f"the pair {pair!r} needs models/{name}.gin, which there is not: {hint}")
        gin_flags.load([f"models/{name}.gin"], [], search_paths)
        found[name] = gin.get_configurable(t5.T5Config)()
    return {pair: tuple(found[name] for name in parts(pair)) for pair in pairs}


def check_compiler() -> None:
    """Checks that libtpu is installed.

    Raises:
      UserError: it is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"libtpu, which holds the TPU compiler, is not installed: pip install '{_libtpu()}' (some 700 MB), or this "
            "package with its extra, speccascade_t5x[tpu]"
        )


def _libtpu() -> str:
    """The version of libtpu that the installed jax requires."""
    for requirement in importlib.metadata.requires("jax") or ():
        found = re.match(r"libtpu\s*([^;]*)", requirement)
        if found:
            return f"libtpu{found[1].strip()}"
    return "libtpu"


def environment() -> dict[str, str]:
    """The environment of a compiling process: no accelerator, no request to a cloud's metadata server, this package."""
    package = str(Path(__file__).resolve().parents[2])
    known = [package, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
    own = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(known)}


def _parser() -> argparse.ArgumentParser:
    usage = ("--pairs=NAMES --topologies=NAMES [--output_dir=FOLDER] [flags]",)
    description = "Compiles a pair's programs for TPU slices on a machine without a TPU, from shapes alone."
    parser = gin_flags.parser("precompile", usage, description, _EPILOG, _MACROS)
    gin_flags.add_flags(parser)
    return parser


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade precompile"))
