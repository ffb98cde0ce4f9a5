"""The course of a launch: a slice, the job on it, a new slice after each preemption, and nothing left behind."""

from __future__ import annotations

import argparse
import sys
import time

from . import flags as flags_lib
from . import slices
from .gcloud import Gcloud
from .job import Job
from .outcomes import PREEMPTED, Interrupted, LaunchError, SliceLost


def main(arguments: list[str] | None = None) -> int:
    """Parses, launches and cleans up; the exit code (see --help)."""
    flags = flags_lib.parse(sys.argv[1:] if arguments is None else arguments)
    cloud = Gcloud(flags.dry_run)
    target = slices.Slice(
        cloud, flags.name, flags_lib.place(flags), [] if flags.clean_up else flags_lib.request(flags),
        60 * flags.wait_minutes, flags.poll_seconds,
    )  # fmt: skip
    code = 0
    try:
        cloud.signals.install()
        if flags.clean_up:
            target.ours = True
        else:
            code = _launch(flags, cloud, target)
        cloud.signals.close()
    except LaunchError as error:
        cloud.signals.close()
        cloud.say(str(error))
        code = error.code
    except Interrupted as stop:
        cloud.say(f"Told to stop (signal {stop.signum}).")
        code = 128 + stop.signum
    finally:
        # Errors nobody thought of pass through here too, and the slice is deleted all the same.
        cloud.signals.close()
        code = _clean_up(flags, cloud, target, code)
    return code


def _launch(flags: argparse.Namespace, cloud: Gcloud, target: slices.Slice) -> int:
    """Runs the command to its end, on as many slices as that takes; its exit code."""
    logs = flags.log_dir / flags.name / ("TIME" if flags.dry_run else time.strftime("%Y%m%d-%H%M%S", time.gmtime()))
    job = Job(
        cloud, target, hosts=slices.accelerator(flags.accelerator_type).hosts, command=flags_lib.words(flags),
        include=flags.include, setup_commands=flags.setup_command, ssh_flags=flags.ssh_flag, log_dir=logs,
        show_all=flags.show_all, poll_seconds=flags.poll_seconds, grace_seconds=flags.grace_seconds,
    )  # fmt: skip
    number = 0
    reason = ""
    for restarts in range(flags.max_restarts + 1):
        running = False
        if restarts:
            cloud.say(f"{flags.name} was preempted ({reason}); restart {restarts} on a new slice.")
            # A host that was told to stop is going away, whatever its state says for a few seconds more.
            target.delete()
        try:
            if not restarts and flags.reuse and target.adopt(flags.accelerator_type):
                number, running = job.newest()
            else:
                cloud.say("Asking for the slice.")
                target.obtain(patient=restarts > 0)
            if not running:
                number += 1
                job.prepare()
                job.start(number)
            code = job.follow(number)
            if code != PREEMPTED:
                return code
            reason = "the job was told to stop"
        except SliceLost as lost:
            target.active = False
            reason = str(lost)
    cloud.say(f"{flags.name} was preempted ({reason}) once more than --max_restarts={flags.max_restarts} allows.")
    return PREEMPTED


def _clean_up(flags: argparse.Namespace, cloud: Gcloud, target: slices.Slice, code: int) -> int:
    """Deletes the slice unless it is to be kept or not ours; the exit code of it all."""
    if not target.ours:
        return code
    # A slice that never came, or is gone, does no work but counts against the quota: --keep does not mean it.
    if flags.keep and target.active:
        cloud.say(f"{flags.name} was kept AND STAYS BILLED. Continue on it with --reuse, delete it with --clean_up.")
        return code
    cloud.say(f"Deleting {flags.name}.")
    try:
        target.delete()
    except LaunchError as error:
        cloud.say(str(error))
        return code or error.code
    return code
