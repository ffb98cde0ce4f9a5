"""`--operating_point=FILE`: the method and alpha a sweep has found, in place of `--rule` and `--alpha`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from speccascade_t5x.cli import gin_flags
from speccascade_t5x.interfaces import UserError

_PREFIX = "generate.Settings."


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the three flags."""
    group = parser.add_argument_group("operating point")
    group.add_argument(
        "--operating_point",
        metavar="FILE",
        help="operating_points.json of `speccascade sweep`; without a limit, the fastest at the verifier's quality",
    )
    group.add_argument("--latency_budget", type=float, help="best quality within this share of the verifier's time")
    group.add_argument("--quality_floor", type=float, help="fastest at this quality or better, in the sweep's metric")


def bindings(flags: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """gin bindings of the point that is chosen; none where no file is named.

    Args:
      flags: parsed; its temperature, top_p and draft_len choose among conditions of the sweep.
      given: bindings of the command line, "NAME = VALUE".

    Raises:
      UserError: no point fits, or a flag chooses what the point chooses.
    """
    if flags.operating_point is None:
        for name in ("latency_budget", "quality_floor"):
            if getattr(flags, name) is not None:
                raise UserError(f"--{name} chooses among operating points: give --operating_point=FILE as well")
        return {}
    from speccascade_t5x.evaluation import operating_points

    wanted = {name: getattr(flags, name) for name in operating_points.CONDITIONS}
    point = operating_points.choose(flags.operating_point, flags.latency_budget, flags.quality_floor, wanted)
    bound = {binding.partition(" = ")[0].removeprefix(_PREFIX) for binding in given}
    for name in operating_points.FIELDS:
        free = name in operating_points.CONDITIONS and name not in bound
        if not free and (name in bound or getattr(flags, name, None) is not None):
            raise UserError(
                f"the operating point {point['name']} chooses {name} itself: leave --{name} out, or the operating point"
            )
    return {f"{_PREFIX}{name}": value for name, value in point["settings"].items()}


def checked(job: Callable[..., Any], binding: str, file: str | Path | None) -> Callable[..., Any]:
    """The job, with its pair loaded and known to be the one of the operating points.

    Args:
      job: configured.
      binding: of its pair.
      file: named by --operating_point, or None: then the job as it is.

    Raises:
      UserError: the points were measured with another pair.
    """
    if file is None:
        return job
    from speccascade_t5x.evaluation import operating_points
    from speccascade_t5x.runtime import plans

    pair = gin_flags.configured(binding)
    if operating_points.read(file)["pair"] != plans.identity(pair):
        raise UserError(f"the operating points {file} are of another pair: run `speccascade sweep` with this one")
    return lambda **arguments: job(pair=pair, **arguments)
