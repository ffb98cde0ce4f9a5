"""The command line of scripts/tpu/launch."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from . import job, slices

_DESCRIPTION = """\
Runs one command on every worker of a Cloud TPU slice that exists only as long as the command does: asks for a queued
resource, copies this checkout, installs scripts/tpu/requirements.lock, starts the command, shows its log, asks for a
new slice and resumes when it is preempted (exit code 75), and deletes the slice however all this ends.

  scripts/tpu/launch my-run --accelerator_type=v4-8 --zone=us-central2-b --spot -- \\
      speccascade infer --task=restore_de --output_dir=/mnt/runs/out --topology=v4_8

docs/launch.md has worked examples. Exit codes: the command's own; 2 a mistake in the flags, 69 no slice was to be had,
70 the slice could not be deleted, 74 copying, installing or starting failed, 75 preempted once too often."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags; `command` holds what follows `--`. Ends the program with code 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="scripts/tpu/launch", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("name", metavar="NAME", help="of the queued resource and of its node")
    add("--accelerator_type", metavar="TYPE", help="v4-8, v4-32, v5litepod-16, v5p-8, v6e-8, ...")
    add("--zone", metavar="ZONE", required=True, help="where, as in us-central2-b")
    add("--project", metavar="ID", help="gcloud's own default if left out")
    add("--runtime_version", metavar="VERSION", help="software of the machines; by default the generation's own")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--spot", action="store_true", help="cheaper, may be taken away at any time")
    kind.add_argument("--reserved", action="store_true", help="from your reservation")
    add("--wait_minutes", metavar="N", type=float, default=720, help="give up when no slice came (default 720)")
    add("--max_restarts", metavar="N", type=int, default=50, help="new slices after preemptions (default 50)")
    add("--include", metavar="PATH", action="append", default=[], help="copy this file or folder of the checkout too")
    add("--env", metavar="NAME=VALUE", action="append", default=[], help="set for the command on every worker")
    add("--setup_command", metavar="SHELL", action="append", default=[],
        help="run on every worker after installing, as to mount a shared disk; may run more than once")  # fmt: skip
    add("--create_flag", metavar="FLAG", action="append", default=[], help="more for `queued-resources create`")
    add("--ssh_flag", metavar="FLAG", action="append", default=[], help="more for every ssh and scp")
    add("--log_dir", metavar="DIR", type=Path, default=Path("tpu_logs"), help="keeps the logs in DIR/NAME")
    add("--show_all", action="store_true", help="show the lines of all workers, not of worker 0 alone")
    add("--poll_seconds", metavar="S", type=float, default=30, help="how often the cloud is asked (default 30)")
    add("--grace_seconds", metavar="S", type=float, default=180,
        help="how long other workers may go on after one failed (default 180)")  # fmt: skip
    add("--keep", action="store_true", help="do not delete the slice at the end: it stays billed")
    add("--reuse", action="store_true", help="continue on the slice NAME if there is one, and follow its running job")
    add("--clean_up", action="store_true", help="only delete the slice NAME")
    add("--dry_run", action="store_true", help="print every command and run none")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    flags = parser.parse_args(arguments[:cut])
    flags.command = arguments[cut + 1 :]
    flaw = _first_flaw(flags)
    if flaw:
        parser.exit(2, f"scripts/tpu/launch: {flaw}.\n")
    return flags


def place(flags: argparse.Namespace) -> list[str]:
    return [f"--zone={flags.zone}", *([f"--project={flags.project}"] if flags.project else [])]


def request(flags: argparse.Namespace) -> list[str]:
    """What `queued-resources create` is asked for."""
    kind = slices.accelerator(flags.accelerator_type)
    return [
        f"--accelerator-type={kind.name}",
        f"--runtime-version={flags.runtime_version or kind.runtime_version}",
        # The cloud drops a request that nobody waits for any more, should this machine die meanwhile.
        f"--valid-until-duration={max(1, round(flags.wait_minutes))}m",
        *(["--spot"] if flags.spot else []),
        *(["--reserved"] if flags.reserved else []),
        *flags.create_flag,
    ]


def words(flags: argparse.Namespace) -> list[str]:
    """The command as the workers run it."""
    return [*(["env", *flags.env] if flags.env else []), *flags.command]


def _first_flaw(flags: argparse.Namespace) -> str:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", flags.name):
        return f"{flags.name!r} is no name for a slice: lower-case letters, digits and hyphens, a letter first"
    if flags.clean_up:
        return "--clean_up takes no command" if flags.command else ""
    if not flags.accelerator_type:
        return "--accelerator_type is missing, as in --accelerator_type=v4-8"
    try:
        slices.accelerator(flags.accelerator_type)
    except ValueError as error:
        return str(error)
    if not flags.command:
        return "the command is missing: write it after --, as in -- speccascade infer ..."
    for setting in flags.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", setting, re.DOTALL):
            return f"--env={shlex.quote(setting)} is not NAME=VALUE"
    for name in flags.include:
        path = job.ROOT / name
        if not path.exists() or job.ROOT not in path.resolve().parents:
            return f"--include={name} is no file or folder of the checkout {job.ROOT}"
    if min(flags.wait_minutes, flags.poll_seconds, flags.grace_seconds, flags.max_restarts) < 0:
        return "times and numbers cannot be negative"
    return ""
