"""scripts/tpu/launch against a gcloud that records what it is told and fails where a test wants it to.

The fake's workers are folders: what goes over ssh really runs there, by bash, so scripts/tpu/worker is tested as well.
Only Python environments are not made: the `python3.11` of the workers is a stub that notes what it was asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TPU = ROOT / "scripts" / "tpu"
FAKE = Path(__file__).with_name("fake_gcloud.py")
PLACE = ["--zone=us-central2-b"]
QUICK = ["--poll_seconds=0.4", "--grace_seconds=0.4"]

# Makes "environments" that hold the job of the test as `speccascade`, and notes what pip is asked for.
PYTHON_STUB = """#!/bin/bash
case "$*" in
  "-c import ensurepip, venv") exit 0 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$FAKE_CLOUD/job" "$3/bin/speccascade" ;;
  *) echo "$*" >>"$HOME/pip" ;;
esac
"""


class Cloud:
    """A fake cloud, the checkout that is launched from, and what came of it."""

    def __init__(self, folder: Path):
        self.folder = folder / "cloud"
        self.checkout = folder / "checkout"
        self.bin = folder / "bin"
        self.started: list[subprocess.Popen] = []
        for path in (self.folder / "remote", self.bin):
            path.mkdir(parents=True)
        # A checkout that is quick to copy; `test_the_archive_*` packs the real one.
        shutil.copytree(TPU, self.checkout / "scripts" / "tpu", ignore=shutil.ignore_patterns("__pycache__"))
        (self.checkout / "scripts" / "tpu" / "requirements.lock").write_text("jax==0.10.2\n")
        for name in ("gin_configs", "speccascade_t5x", "tasks"):
            (self.checkout / name).mkdir()
        for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
            (self.checkout / name).write_text(f"{name}\n")
        executable(self.bin / "gcloud", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -E {FAKE} "$@"\n')
        executable(self.folder / "remote" / "curl", '#!/bin/sh\nprintf "%s" "$FAKE_WORKER"\n')
        executable(self.folder / "remote" / "python3.11", PYTHON_STUB)
        self.job("exit 0")
        self.happens()

    def job(self, *lines: str) -> None:
        """What `speccascade` is on the workers, in bash; $worker is the worker's number, $FAKE_CLOUD outlives it."""
        executable(self.folder / "job", "\n".join(["#!/bin/bash", "worker=$FAKE_WORKER", *lines, ""]))

    def happens(self, **steps: list[dict]) -> None:
        (self.folder / "script.json").write_text(json.dumps(steps))

    def start(
        self, *flags: str, kind: str = "v4-8", command: Sequence[str] = ("speccascade",), stderr: int = subprocess.PIPE
    ) -> subprocess.Popen:
        python = [sys.executable, "-S", "-E", str(self.checkout / "scripts" / "tpu" / "launch")]
        words = [*python, "run", *PLACE, *QUICK, *flags]
        if command:
            words += [f"--accelerator_type={kind}", "--", *command]
        environment = {**os.environ, "FAKE_CLOUD": str(self.folder), "PATH": f"{self.bin}:{os.environ['PATH']}"}
        process = subprocess.Popen(
            words, cwd=self.folder, env=environment, text=True, start_new_session=True, stdout=subprocess.PIPE,
            stderr=stderr,
        )  # fmt: skip
        self.started.append(process)
        return process

    def launch(self, *flags: str, **options) -> subprocess.CompletedProcess:
        process = self.start(*flags, **options)
        out, errors = process.communicate(timeout=30)
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> list[str]:
        """What was asked of gcloud, without the questions and the fetching of logs."""
        found = []
        for words in self.calls():
            remote = re.search(r"/worker (\w+)", " ".join(words))
            if "describe" not in words and not any(":speccascade/jobs/" in word for word in words):
                found.append(remote[1] if remote and words[3] == "ssh" else words[3])
        return found

    @property
    def billed(self) -> bool:
        return (self.folder / "slice.json").exists()

    def wait_until_followed(self) -> None:
        wait_for(self.folder / "calls.jsonl", "/worker follow")
        wait_for(self.folder / "running")

    def log(self, worker: int, job: int = 1) -> str:
        (path,) = self.folder.glob(f"tpu_logs/run/*/job-{job}/worker-{worker}.log")
        return path.read_text()


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def wait_for(path: Path, text: str = "") -> None:
    for _ in range(600):
        if path.exists() and text in path.read_text(encoding="utf-8"):
            return
        time.sleep(0.02)
    raise AssertionError(f"{path.name} never came")


def wait_for_end(pid: int) -> None:
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    fake = Cloud(tmp_path)
    yield fake
    for process in fake.started:
        process.kill()
        process.communicate()
    for pid in fake.folder.glob("workers/*/speccascade/jobs/*/pid"):  # what --keep left running
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


ONCE = ["create", "scp", "setup", "start", "follow", "delete"]
WORDS = ["speccascade", "--gin.A='x y'", '$HOME;"\\', "--two=lines\nhere"]


def test_a_job_runs_on_every_worker_and_nothing_is_left(cloud: Cloud):
    cloud.job('printf "%s|" "$@"', "echo", 'echo "$NOTE, worker $worker" >&2', 'pwd >"$HOME/where"')
    done = cloud.launch("--spot", "--env=NOTE=a b", kind="v4-32", command=WORDS)
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == ONCE
    assert not cloud.billed
    for worker in range(4):  # streamed, whole, each into its own file
        assert cloud.log(worker) == "|".join(WORDS[1:]) + f"|\na b, worker {worker}\n"
        home = cloud.folder / "workers" / f"1-{worker}"
        assert (home / "where").read_text() == f"{home}/speccascade/code\n"
        locked, code = (home / "pip").read_text().splitlines()
        assert "--require-hashes" in locked and locked.endswith("/speccascade/code/scripts/tpu/requirements.lock")
        assert "--editable" in code and "--no-build-isolation" in code
    assert done.stdout == cloud.log(0)
    assert (cloud.folder / "workers/1-3/speccascade/code/setup.py").read_text() == "setup.py\n"
    (create,) = [words for words in cloud.calls() if "create" in words]
    assert create[:5] == ["compute", "tpus", "queued-resources", "create", "run"]
    assert {*create[5:]} == {
        "--node-id=run", *PLACE, "--accelerator-type=v4-32", "--runtime-version=tpu-ubuntu2204-base",
        "--valid-until-duration=720m", "--spot", "--quiet",
    }  # fmt: skip


def test_a_dry_run_prints_what_a_run_does_and_does_nothing(cloud: Cloud):
    flags = ["--project=p", "--setup_command=echo 'mounted'", "--ssh_flag=--internal-ip"]
    printed = cloud.launch("--dry_run", *flags, kind="v4-32", command=WORDS)
    assert printed.returncode == 0 and not printed.stderr
    assert not cloud.calls() and not (cloud.folder / "tpu_logs").exists()
    # A look after the slice while the job runs is no step of its own.
    assert cloud.launch("--poll_seconds=60", *flags, kind="v4-32", command=WORDS).returncode == 0
    shown = shlex.split(printed.stdout.replace(" \\\n    --", " --"), comments=True)
    starts = [index for index, word in enumerate(shown) if word == "gcloud"] + [len(shown)]
    commands = [shown[start + 1 : end] for start, end in itertools.pairwise(starts)]
    done = [[re.sub(r".*/(?=speccascade-code.tar.gz$)", "", word) for word in words] for words in cloud.calls()]
    assert commands == done


def test_one_failure_of_each_step_over_the_network_is_no_failure(cloud: Cloud):
    steps = ["scp", "setup", "start", "follow"]
    cloud.happens(**{step: [{"code": 255, "errors": "ssh: connect to host: Connection refused"}] for step in steps})
    cloud.job('echo run >>"$HOME/runs"', "echo done")
    done = cloud.launch()
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == ["create", *(again for step in steps for again in (step, step)), "delete"]
    assert done.stdout == "done\n" and not cloud.billed
    assert (cloud.folder / "workers/1-0/runs").read_text() == "run\n"


def test_a_start_whose_answer_was_lost_does_not_start_twice(cloud: Cloud):
    cloud.happens(start=[{"cut": 1.0}])
    cloud.job('echo run >>"$HOME/runs"')
    assert cloud.launch().returncode == 0
    assert cloud.steps().count("start") == 2
    assert (cloud.folder / "workers/1-0/runs").read_text() == "run\n"


def test_a_broken_connection_neither_repeats_nor_loses_lines(cloud: Cloud):
    cloud.happens(follow=[{"cut": 0.4}, {"cut": 0.4}])
    cloud.job("for i in $(seq 12); do echo line $i; sleep 0.1; done", 'printf "no end of line"')
    done = cloud.launch(kind="v4-16")
    assert done.returncode == 0, done.stderr
    assert cloud.steps().count("follow") >= 2
    lines = [f"line {i + 1}" for i in range(12)] + ["no end of line"]
    assert done.stdout.splitlines() == lines
    assert cloud.log(1).splitlines() == lines


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ({"create": [{"code": 1, "errors": "ERROR: RESOURCE_EXHAUSTED: Quota 'TPUV4' exhausted."}]}, "Quota 'TPUV4'"),
        ({"create": [{"code": 1, "errors": "ERROR: PERMISSION_DENIED: no"}]}, "PERMISSION_DENIED"),
        ({"describe": [{"state": "FAILED", "reason": "no more capacity"}]}, "no more capacity"),
        ({"describe": [{"state": "WAITING_FOR_RESOURCES"}] * 40}, "still WAITING_FOR_RESOURCES"),
    ],
)
def test_a_slice_that_is_not_to_be_had(cloud: Cloud, script: dict, reason: str):
    cloud.happens(**script)
    done = cloud.launch("--wait_minutes=0.005")
    assert done.returncode == 69
    assert reason in done.stderr
    assert cloud.steps()[0] == "create" and cloud.steps()[-1] == "delete"
    assert "scp" not in cloud.steps() and not cloud.billed


def test_what_exists_already_is_left_alone(cloud: Cloud):
    (cloud.folder / "slice.json").write_text(json.dumps({"slice": 1, "hosts": 1, "kind": "v4-8"}))
    done = cloud.launch()
    assert done.returncode == 69 and "exists already" in done.stderr
    assert cloud.steps() == ["create"] and cloud.billed


@pytest.mark.parametrize("step", ["scp", "start"])
def test_workers_that_stay_out_of_reach_are_given_back(cloud: Cloud, step: str):
    cloud.happens(**{step: [{"code": 255, "errors": "no route to host"}] * 9})
    done = cloud.launch()
    assert done.returncode == 74 and "no route to host" in done.stderr
    assert cloud.steps()[-4:] == [step] * 3 + ["delete"] and not cloud.billed


RESUMABLE = 'n=$(cat "$FAKE_CLOUD/chunks" 2>/dev/null || echo 0); echo chunk $n; echo $((n + 1)) >"$FAKE_CLOUD/chunks"'


def test_a_preempted_job_goes_on_on_a_new_slice(cloud: Cloud):
    cloud.job(RESUMABLE, "[ $n -ge 2 ] || exit 75")
    done = cloud.launch()
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == ONCE * 3 and not cloud.billed
    assert done.stdout == "chunk 0\nchunk 1\nchunk 2\n"


def test_a_node_that_is_preempted_under_the_job(cloud: Cloud):
    followed = 'until grep -q "worker follow" "$FAKE_CLOUD/calls.jsonl"; do sleep 0.1; done; sleep 0.3'
    cloud.job(RESUMABLE, f'[ $n -ge 1 ] || {{ {followed}; echo PREEMPTED >"$FAKE_CLOUD/node"; sleep 20; }}')
    done = cloud.launch("--spot")
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == ONCE * 2 and not cloud.billed
    assert "restart 1" in done.stderr
    assert "is SUSPENDED" in done.stderr or "node is PREEMPTED" in done.stderr  # whichever was asked for first


def test_a_failure_that_was_a_preemption(cloud: Cloud):
    """The hosts that are left fail when one goes away; the state of the node tells the difference."""
    cloud.job(RESUMABLE, '[ $n -ge 1 ] || { echo TERMINATED >"$FAKE_CLOUD/node"; exit 1; }')
    done = cloud.launch()
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == ONCE * 2


def test_the_cloud_may_refuse_for_a_while_once_a_job_is_under_way(cloud: Cloud):
    quota = {"code": 1, "errors": "ERROR: RESOURCE_EXHAUSTED: no capacity"}
    cloud.happens(create=[{}, quota, {}], describe=[{}, {"state": "ACTIVE"}])
    cloud.job(RESUMABLE, "[ $n -ge 1 ] || exit 75")
    assert cloud.launch().returncode == 0
    assert cloud.steps().count("create") == 3 and not cloud.billed


def test_a_request_that_is_suspended_before_it_is_served_is_made_again(cloud: Cloud):
    cloud.happens(describe=[{"state": "PROVISIONING"}, {"state": "SUSPENDED"}])
    assert cloud.launch().returncode == 0
    assert cloud.steps() == ["create", "delete", *ONCE]


def test_preempted_once_too_often(cloud: Cloud):
    cloud.job("exit 75")
    done = cloud.launch("--max_restarts=1")
    assert done.returncode == 75 and "--max_restarts=1" in done.stderr
    assert cloud.steps() == ONCE * 2 and not cloud.billed


def test_a_failed_job_leaves_its_logs_and_its_exit_code(cloud: Cloud):
    cloud.job("echo started", "[ $worker = 2 ] || exit 0", "for i in $(seq 30); do echo trouble $i; done", "exit 3")
    done = cloud.launch(kind="v4-32")
    assert done.returncode == 3
    assert cloud.log(2).splitlines() == ["started", *(f"trouble {i + 1}" for i in range(30))]
    assert cloud.log(3) == "started\n"
    assert "Worker 2 failed with exit code 3" in done.stderr
    assert "trouble 30" in done.stderr and "trouble 11\n" in done.stderr and "trouble 10\n" not in done.stderr
    fetched = [words[4] for words in cloud.calls() if words[3] == "scp" and words[4].startswith("run:")]
    assert fetched == ["run:speccascade/jobs/1/log"] * 4
    assert cloud.steps() == ONCE and not cloud.billed


def test_a_failure_that_stops_the_others_is_no_preemption(cloud: Cloud):
    """Hosts that miss one of theirs exit with 69: what that one failed at by itself, it would fail at again."""
    cloud.job("[ $worker = 1 ] && exit 1; sleep 0.1; exit 69")
    assert cloud.launch("--grace_seconds=5", kind="v4-16").returncode == 1  # a busy machine may take that long
    assert cloud.steps() == ONCE and not cloud.billed


def test_hosts_that_miss_each_other_are_resumed(cloud: Cloud):
    cloud.job("codes=(69 75)", '[ ! -e "$HOME/../1-0/0" ] || [[ $HOME == */1-* ]] || exit 0', "touch $HOME/0",
              "exit ${codes[$worker]}")  # fmt: skip
    assert cloud.launch(kind="v4-16").returncode == 0
    assert cloud.steps() == ONCE * 2 and not cloud.billed


def test_workers_that_hang_after_one_has_failed_are_ended(cloud: Cloud):
    cloud.job('[ $worker = 1 ] && exit 9; echo $$ >"$HOME/pid"; sleep 60')
    done = cloud.launch(kind="v4-16")
    assert done.returncode == 9
    assert cloud.steps() == [*ONCE[:-1], "stop", "delete"] and not cloud.billed
    wait_for_end(int((cloud.folder / "workers/1-0/pid").read_text()))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_launcher_that_is_told_to_stop_cleans_up(cloud: Cloud, signum: int):
    cloud.job('touch "$FAKE_CLOUD/running"; sleep 60')
    with open("/dev/full", "w", encoding="utf-8") as closed:  # a terminal that is closed takes no more lines
        process = cloud.start(stderr=closed.fileno() if signum == signal.SIGHUP else subprocess.PIPE)
    cloud.wait_until_followed()
    process.send_signal(signum)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signum
    assert cloud.steps() == ONCE and not cloud.billed


def test_a_request_that_was_sent_is_taken_back(cloud: Cloud):
    cloud.happens(create=[{"late": 0.8}])
    process = cloud.start()
    wait_for(cloud.folder / "calls.jsonl")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    time.sleep(0.8)  # for a request that nobody waited for
    assert process.returncode == 130
    assert cloud.steps() == ["create", "delete"] and not cloud.billed


def test_a_second_signal_does_not_stop_the_cleaning(cloud: Cloud):
    cloud.happens(delete=[{"seconds": 0.8}])
    cloud.job('touch "$FAKE_CLOUD/running"; sleep 60')
    process = cloud.start()
    cloud.wait_until_followed()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130 and not cloud.billed


def test_deleting_is_tried_again_and_its_failure_is_not_kept_quiet(cloud: Cloud):
    cloud.happens(delete=[{"code": 1, "errors": "ERROR: still PROVISIONING"}] * 2)
    assert cloud.launch().returncode == 0
    assert cloud.steps().count("delete") == 3 and not cloud.billed
    cloud.happens(delete=[{"code": 1, "errors": "ERROR: no"}] * 99)
    done = cloud.launch("--poll_seconds=0.01")
    assert done.returncode == 70 and cloud.billed
    assert "MAY STILL BE BILLED" in done.stderr
    assert "gcloud compute tpus queued-resources delete run --zone=us-central2-b --force" in done.stderr


def test_keep_reuse_and_clean_up(cloud: Cloud):
    cloud.job('touch "$FAKE_CLOUD/running"; echo 1; while [ ! -e "$FAKE_CLOUD/go" ]; do sleep 0.05; done; echo 2')
    process = cloud.start("--keep")
    cloud.wait_until_followed()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and cloud.billed and "STAYS BILLED" in errors
    # The job went on; it is found, followed from its start, and not started again.
    (cloud.folder / "calls.jsonl").unlink()
    process = cloud.start("--reuse", "--keep")
    cloud.wait_until_followed()
    (cloud.folder / "go").touch()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and out == "1\n2\n"
    assert cloud.steps() == ["newest", "follow"] and cloud.billed
    # Now none runs: the next one is started beside it, in the same environment.
    assert cloud.launch("--reuse", "--keep").returncode == 0
    assert cloud.steps()[-5:] == ["newest", "scp", "setup", "start", "follow"]
    assert (cloud.folder / "workers/1-0/pip").read_text().count("--require-hashes") == 1
    assert cloud.launch("--reuse", kind="v4-16").returncode == 69 and cloud.billed
    assert cloud.launch("--clean_up", command=()).returncode == 0
    assert not cloud.billed and cloud.launch("--reuse").returncode == 0 and not cloud.billed
