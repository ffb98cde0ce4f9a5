"""`--operating_point=FILE`: takes method and alpha from the results of a sweep, in place of `--rule` and `--alpha`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from speccascade_t5x.cli import gin_flags, host_processes
from speccascade_t5x.interfaces import UserError

_PREFIX = "generate.Settings."


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the three flags."""
    group = parser.add_argument_group("operating point")
    group.add_argument(
        "--operating_point",
        metavar="FILE",
        help="operating_points.json of a sweep; without a limit, its fastest point at the verifier's quality",
    )
    group.add_argument("--latency_budget", type=float, help="best quality within this share of the verifier's time")
    group.add_argument("--quality_floor", type=float, help="fastest at this quality or better, by the sweep's metric")


def chosen(flags: argparse.Namespace) -> Mapping[str, Any] | None:
    """The point the flags ask for, see `operating_points.choose`; None if no file is named.

    Args:
      flags: parsed; its temperature, top_p and draft_len choose among conditions of the sweep.

    Raises:
      UserError: no point fits, or a limit without a file.
    """
    if flags.operating_point is None:
        for name in ("latency_budget", "quality_floor"):
            if getattr(flags, name) is not None:
                raise UserError(f"--{name} chooses among operating points: give --operating_point=FILE as well")
        return None
    from speccascade_t5x.evaluation import operating_points

    wanted = {name: getattr(flags, name) for name in operating_points.CONDITIONS}
    return operating_points.choose(flags.operating_point, flags.latency_budget, flags.quality_floor, wanted)


def bindings(point: Mapping[str, Any] | None, flags: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """gin bindings of the point; empty without a point. None as a value leaves the default.

    Args:
      point: the chosen point.
      flags: parsed.
      given: bindings of the command line, "NAME = VALUE".

    Raises:
      UserError: a flag chooses what the point chooses.
    """
    if point is None:
        return {}
    from speccascade_t5x.evaluation import operating_points

    bound = {binding.partition(" = ")[0].removeprefix(_PREFIX) for binding in given}
    for name in operating_points.FIELDS:
        free = name in operating_points.CONDITIONS and name not in bound
        if not free and (name in bound or getattr(flags, name, None) is not None):
            raise UserError(
                f"the operating point {point['name']} chooses {name} itself: leave --{name} out, or the operating point"
            )
    return {f"{_PREFIX}{name}": point["settings"].get(name) for name in operating_points.FIELDS}


def checked(
    job: Callable[..., Any], binding: str, flags: argparse.Namespace, point: Mapping[str, Any] | None
) -> Callable[..., Any]:
    """The job with its pair loaded and checked to be the one of the operating points; reports the point on stderr.

    Args:
      job: the configured job.
      binding: the binding of its pair.
      flags: parsed.
      point: the chosen point; with None the job is returned as it is.

    Raises:
      UserError: the points were measured with another pair, or a gin file sets what the point leaves as it is.
    """
    if point is None:
        return job
    from speccascade_t5x.evaluation import operating_points
    from speccascade_t5x.inference import infer, plan_files
    from speccascade_t5x.inference.settings import Settings

    for name in operating_points.FIELDS:
        usual = getattr(Settings(), name)
        value = gin_flags.bound(f"{_PREFIX}{name}", usual)
        if name not in point["settings"] and value != usual:
            raise UserError(
                f"the operating point {point['name']} was measured with {name}={usual!r}, but a gin file sets it to "
                f"{value!r}: leave that out, or the operating point"
            )
    pair, offered = gin_flags.configured(binding), operating_points.read(flags.operating_point)
    other = offered["pair"] != plan_files.identity(pair)
    if other or offered.get("weights") not in (None, infer.pair_identity(pair)):
        raise UserError(
            f"the operating points {flags.operating_point} were measured with another pair: run `sweep` with this one"
        )
    if host_processes.first():
        print(f"operating point {operating_points.in_words(point, offered['metric'])}", file=sys.stderr)
    return lambda **arguments: job(pair=pair, **arguments)
