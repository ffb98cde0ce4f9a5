"""The command on the workers of a slice: code copied, environment installed, job started, followed and judged."""

from __future__ import annotations

import os
import re
import shlex
import sys
import tarfile
import tempfile
from pathlib import Path

from .gcloud import Done, Gcloud, tell
from .outcomes import HOST_LOST, PREEMPTED, REMOTE, LaunchError, SliceLost
from .slices import Slice

ROOT = Path(__file__).resolve().parents[3]
# What the package is built from, and what runs on the workers. Nothing else leaves this machine unasked.
SHIPPED = (
    "LICENSE", "README.md", "gin_configs", "pyproject.toml", "scripts/tpu", "setup.py", "speccascade_t5x", "tasks",
)  # fmt: skip
ARCHIVE = "speccascade-code.tar.gz"
WORKER = "speccascade/code/scripts/tpu/worker"
UNPACK = f"rm -rf speccascade/code && mkdir -p speccascade/code && tar -xzf {ARCHIVE} -C speccascade/code"
_TRIES = 3
_LAST_LINES = 20
_LINE = re.compile(r"\[(\d+) (\d+)\] (.*)", re.DOTALL)
_EXIT = re.compile(r"\[(\d+) exit (\d+|lost)\]")
_NEWEST = re.compile(r"\[(\d+) newest (\d+) (running|ended)\]")
# A connection that has died is noticed after two minutes instead of never.
_KEEP_ALIVE = ["--ssh-flag=-oServerAliveInterval=30", "--ssh-flag=-oServerAliveCountMax=4"]


class Job:
    """One command on all workers of a slice.

    Args:
      cloud: runs gcloud.
      target: the slice.
      hosts: how many workers it has.
      command: the words of the command.
      include: more files or folders of the checkout to copy.
      setup_commands: shell commands for every worker, after the environment is installed.
      ssh_flags: for every ssh and scp.
      log_dir: where the workers' logs are kept on this machine.
      show_all: print the lines of all workers, not only of worker 0.
      poll_seconds: how often the slice is looked after while the job runs.
      grace_seconds: how long the other workers may go on after one has failed.
    """

    def __init__(
        self, cloud: Gcloud, target: Slice, *, hosts: int, command: list[str], include: list[str],
        setup_commands: list[str], ssh_flags: list[str], log_dir: Path, show_all: bool, poll_seconds: float,
        grace_seconds: float,
    ):  # fmt: skip
        self._cloud = cloud
        self._slice = target
        self._hosts = hosts
        self._command = command
        self._include = include
        self._setup_commands = setup_commands
        self._ssh_flags = ssh_flags
        self._logs = log_dir
        self._show_all = show_all
        self._poll_seconds = poll_seconds
        self._grace_seconds = grace_seconds
        self._shown: dict[int, int] = {}  # worker: how many lines of its log have arrived
        self._exits: dict[int, str] = {}  # worker: exit code or "lost", in the order of arrival

    def newest(self) -> tuple[int, bool]:
        """Number of the job last started on this slice (0: none yet), and whether a worker still runs it.

        Raises:
          LaunchError: the workers cannot be asked.
        """
        found: list[tuple[int, bool]] = []
        # No code may have been copied yet, which is no job.
        ask = f"test ! -x {WORKER} || bash {WORKER} newest"
        for line in self._remote("ask for jobs", ask):
            match = _NEWEST.fullmatch(line)
            if match:
                found.append((int(match[2]), match[3] == "running"))
        return max(found, default=(0, False))

    def prepare(self) -> None:
        """Copies the code to every worker and installs the locked environment.

        Raises:
          LaunchError: it failed on some worker more than once, the slice being healthy.
          SliceLost: the slice went away.
        """
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / ARCHIVE
            if self._cloud.dry_run:
                archive = Path(ARCHIVE)
            else:
                pack(archive, self._include)
            self._cloud.say(f"Copying the code: {', '.join([*SHIPPED, *self._include])}.")
            copy = ["compute", "tpus", "tpu-vm", "scp", str(archive), f"{self._slice.name}:{ARCHIVE}"]
            self._retried("copy the code", [*copy, *self._slice.place, "--worker=all", *self._ssh_flags, "--quiet"])
        self._cloud.say("Installing the locked environment.")
        self._remote("install", f"{UNPACK} && bash {WORKER} setup")
        for command in self._setup_commands:
            self._remote("run the set-up command", command)

    def start(self, number: int) -> None:
        """Starts the command as job `number`. Raises as `prepare` does."""
        self._cloud.say("Starting the job on every worker.")
        self._remote("start the job", shlex.join(["bash", WORKER, "start", str(number), *self._command]))

    def follow(self, number: int) -> int:
        """Shows the job's log until every worker has ended; the exit code of the whole.

        The code of the first worker that failed by itself, the logs having been fetched; else PREEMPTED if some were
        told to stop, have vanished or miss another; else 0.

        Raises:
          SliceLost: the slice went away.
        """
        self._shown, self._exits = {}, {}
        self._cloud.say(f"Following the job; the workers' logs go to {self._logs / f'job-{number}'}.")
        failures = 0
        while True:
            before = dict(self._shown), len(self._exits)
            if not self._follow_once(number):
                self._stop_the_rest()
                break
            if self._cloud.dry_run or len(self._exits) == self._hosts:
                break
            # The connection broke. Not every worker need have lost it, and a new one repeats no line.
            self._slice.check()
            failures = 0 if (dict(self._shown), len(self._exits)) != before else failures + 1
            if failures >= _TRIES and self._slice.node_state() != "UNKNOWN":
                raise SliceLost("its workers do not answer any more")
            self._cloud.say("The connection to the workers broke; connecting again.")
            self._cloud.pause(min(self._poll_seconds, 10.0))
        return self._judge(number)

    def _follow_once(self, number: int) -> bool:
        """One connection; False if a worker failed and the rest has had its time to end."""
        shown = ",".join(f"{worker}:{lines}" for worker, lines in sorted(self._shown.items()))
        words = self._ssh(shlex.join(["bash", WORKER, "follow", str(number), *([shown] if shown else [])]))
        # The job goes on whatever becomes of this connection.
        left = self._grace_seconds
        lines = self._cloud.stream([*words, *_KEEP_ALIVE], self._poll_seconds)
        try:
            for line in lines:
                if line is not None:
                    self._take(number, line)
                    continue
                self._slice.check()
                if any(code != "0" for code in self._exits.values()):
                    left -= self._poll_seconds
                    if left <= 0:
                        return False
            return True
        finally:
            lines.close()

    def _take(self, number: int, line: str) -> None:
        ended = _EXIT.fullmatch(line)
        if ended:
            self._exits.setdefault(int(ended[1]), ended[2])
            return
        logged = _LINE.fullmatch(line)
        if not logged:  # from ssh or gcloud
            tell(line, sys.stderr)
            return
        worker, count, text = int(logged[1]), int(logged[2]), logged[3]
        if count <= self._shown.get(worker, 0):
            return
        self._shown[worker] = count
        path = self._log(number, worker)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        if self._show_all:
            tell(f"[{worker}] {text}", sys.stdout)
        elif worker == 0:
            tell(text, sys.stdout)

    def _stop_the_rest(self) -> None:
        running = [worker for worker in range(self._hosts) if worker not in self._exits]
        self._cloud.say(f"Workers {running} did not end after another had failed; ending them.")
        try:
            self._remote("end the job", f"bash {WORKER} stop")
        except LaunchError as error:
            raise SliceLost(f"workers {running} do not answer any more") from error

    def _judge(self, number: int) -> int:
        resumable = {"lost", str(PREEMPTED), *([str(HOST_LOST)] if self._hosts > 1 else [])}
        stopped = [worker for worker, code in self._exits.items() if code in resumable]
        failed = [(worker, code) for worker, code in self._exits.items() if worker not in stopped and code != "0"]
        if not failed:
            return PREEMPTED if stopped else 0
        # Either some failed because others were taken away, or others stopped because some failed. The cloud knows, if
        # not at once.
        self._slice.check()
        if stopped:
            self._cloud.pause(min(self._grace_seconds, 60.0))
            self._slice.check()
        worker, code = failed[0]
        self._fetch_logs(number)
        self._cloud.say(f"Worker {worker} failed with exit code {code}; its last lines:")
        lines = self._log(number, worker).read_text(encoding="utf-8", errors="replace").splitlines()
        tell("\n".join(lines[-_LAST_LINES:]), sys.stderr)
        self._cloud.say(f"All logs: {self._logs / f'job-{number}'}")
        return int(code)

    def _fetch_logs(self, number: int) -> None:
        """Fetches the whole log of every worker; what was streamed stays where a copy fails."""
        for worker in range(self._hosts):
            path = self._log(number, worker)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            partial = path.with_name(f"{path.name}.partial")
            source = f"{self._slice.name}:speccascade/jobs/{number}/log"
            words = ["compute", "tpus", "tpu-vm", "scp", source, str(partial), *self._slice.place]
            if not self._cloud.run([*words, f"--worker={worker}", *self._ssh_flags, "--quiet"]).code:
                os.replace(partial, path)

    def _log(self, number: int, worker: int) -> Path:
        return self._logs / f"job-{number}" / f"worker-{worker}.log"

    def _ssh(self, command: str) -> list[str]:
        words = ["compute", "tpus", "tpu-vm", "ssh", self._slice.name, *self._slice.place, "--worker=all"]
        return [*words, f"--command={command}", *self._ssh_flags, "--quiet"]

    def _remote(self, purpose: str, command: str) -> list[str]:
        return self._retried(purpose, self._ssh(command)).splitlines()

    def _retried(self, purpose: str, words: list[str]) -> str:
        """Runs a command that may be run twice, until it succeeds; its output.

        Fresh machines refuse connections for a while, and keys take time to arrive.
        """
        done = Done(0, "", "")
        for attempt in range(_TRIES):
            if attempt:
                self._slice.check()
                self._cloud.say(f"Could not {purpose} ({done.reason}); trying again.")
                self._cloud.pause(min(self._poll_seconds, 10.0))
            done = self._cloud.run(words)
            if not done.code:
                return done.out
        self._slice.check()
        raise LaunchError(f"Could not {purpose} on every worker: {done.reason}", REMOTE)


def pack(archive: Path, include: list[str]) -> None:
    """Writes what SHIPPED and `include` name, without caches, as a tar.gz with paths relative to the checkout."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = os.path.basename(member.name)
        if name == "__pycache__" or name.endswith((".pyc", ".egg-info")):
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name in dict.fromkeys([*SHIPPED, *include]):
            tar.add(ROOT / name, arcname=name, filter=kept)
