"""What lies beside scripts/tpu/launch: the workers' script, its flags, the lock, the JobSet, the examples of the docs.

tests/scripts/test_tpu_launch.py tests the launcher as a whole.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TPU = ROOT / "scripts" / "tpu"
PLACE = ["--zone=us-central2-b"]


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path.name} never came")


def test_without_gcloud(tmp_path: Path):
    words = [sys.executable, "-S", str(TPU / "launch"), "run", *PLACE, "--accelerator_type=v4-8", "--", "true"]
    done = subprocess.run(words, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "gcloud cannot be run" in done.stderr and "Traceback" not in done.stderr


def worker(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    (home / "remote").mkdir(exist_ok=True)
    executable(home / "remote" / "curl", "#!/bin/sh\nexit 6\n")
    executable(home / "remote" / "hostname", "#!/bin/sh\necho t1v-n-0a1b2c3d-w-7\n")
    path = f"{home}/remote:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(TPU / "worker"), *words], env={**os.environ, "HOME": str(home), "PATH": path, **environment},
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip


def test_a_worker_passes_sigterm_on_and_knows_its_number(tmp_path: Path):
    (tmp_path / "speccascade" / "code").mkdir(parents=True)
    job = f"trap 'sleep 0.3; echo stopped; exit 75' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
    assert worker(tmp_path, "start", "1", "bash", "-c", job).returncode == 0
    wait_for(tmp_path / "up")
    assert worker(tmp_path, "newest").stdout == "[7 newest 1 running]\n"
    assert worker(tmp_path, "start", "2", "true").returncode != 0  # one job at a time
    os.kill(int((tmp_path / "speccascade/jobs/1/pid").read_text()), signal.SIGTERM)
    assert worker(tmp_path, "follow", "1", "6:9,7:0").stdout == "[7 1] stopped\n[7 exit 75]\n"
    assert worker(tmp_path, "follow", "1", "7:1").stdout == "[7 exit 75]\n"


def test_a_job_whose_keeper_vanished_is_lost(tmp_path: Path):
    (tmp_path / "speccascade" / "code").mkdir(parents=True)
    assert worker(tmp_path, "start", "1", "sleep", "60").returncode == 0
    assert worker(tmp_path, "newest").stdout == "[7 newest 1 running]\n"
    os.killpg(int((tmp_path / "speccascade/jobs/1/pid").read_text()), signal.SIGKILL)
    assert worker(tmp_path, "follow", "1").stdout == "[7 exit lost]\n"


def test_a_worker_without_the_right_python_fetches_it(tmp_path: Path):
    code = tmp_path / "speccascade" / "code" / "scripts" / "tpu"
    code.mkdir(parents=True)
    (code / "requirements.lock").write_text("jax==0.10.2\n")
    (tmp_path / "remote").mkdir()
    executable(tmp_path / "remote" / "python3.11", "#!/bin/sh\nexit 1\n")
    stub = f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\n[ "$5" != --managed-python ] || echo {tmp_path}/managed\n'
    executable(tmp_path / "remote" / "python3", stub)
    venv = 'case "$2" in venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;; esac'
    executable(tmp_path / "managed", f"#!/bin/sh\n{venv}\n")
    done = worker(tmp_path, "setup")
    assert done.returncode == 0, done.stderr
    assert "Worker 7 is ready." in done.stdout
    pip, install, _ = (tmp_path / "asked").read_text().splitlines()
    assert re.fullmatch(r"-m pip install --quiet --user uv==[\d.]+", pip)
    assert install == "-m uv python install --quiet 3.11"
    assert (tmp_path / "speccascade" / "venv" / "bin" / "python").exists()


@pytest.fixture(scope="module")
def launcher() -> Iterator[object]:
    sys.path.insert(0, str(TPU))
    try:
        from launcher import flags

        yield flags
    finally:
        sys.path.remove(str(TPU))
        for name in [name for name in sys.modules if name.partition(".")[0] == "launcher"]:
            del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "hosts", "software"),
    [
        ("v4-8", 1, "tpu-ubuntu2204-base"), ("v4-16", 2, "tpu-ubuntu2204-base"), ("v4-32", 4, "tpu-ubuntu2204-base"),
        ("v3-8", 1, "tpu-ubuntu2204-base"), ("v3-32", 4, "tpu-ubuntu2204-base"), ("v5p-16", 2, "v2-alpha-tpuv5"),
        ("v5litepod-1", 1, "v2-alpha-tpuv5-lite"), ("v5litepod-8", 1, "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", 4, "v2-alpha-tpuv5-lite"), ("v6e-8", 1, "v2-alpha-tpuv6e"), ("v6e-32", 8, "v2-alpha-tpuv6e"),
    ],
)  # fmt: skip
def test_hosts_of_a_slice(launcher, name: str, hosts: int, software: str):
    """Numbers of the documentation of Cloud TPU, "TPU configurations" of each generation."""
    assert launcher.slices.accelerator(name) == (name, hosts, software)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["Run", "--accelerator_type=v4-8", "--", "x"], "'Run' is no name"),
        (["run", "--", "x"], "--accelerator_type is missing"),
        (["run", "--accelerator_type=v4-8"], "the command is missing"),
        (["run", "--accelerator_type=v4-12", "--", "x"], "does not fill its hosts"),
        (["run", "--accelerator_type=h100-8", "--", "x"], "no accelerator type"),
        (["run", "--accelerator_type=v4-8", "--env=A", "--", "x"], "not NAME=VALUE"),
        (["run", "--accelerator_type=v4-8", "--include=../x", "--", "x"], "no file or folder"),
        (["run", "--accelerator_type=v4-8", "--spot", "--reserved", "--", "x"], "not allowed with"),
        (["run", "--accelerator_type=v4-8", "--poll_seconds=-1", "--", "x"], "cannot be negative"),
        (["run", "--clean_up", "--", "x"], "takes no command"),
    ],
)
def test_mistakes_in_the_flags(launcher, capsys, words: list[str], sentence: str):
    with pytest.raises(SystemExit) as stopped:
        launcher.parse([*words[:1], *PLACE, *words[1:]])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_archive_holds_what_the_package_is_built_from_and_no_more(launcher, tmp_path: Path):
    launcher.job.pack(tmp_path / "code.tar.gz", ["scripts/tpu", "docs/launch.md"])
    with tarfile.open(tmp_path / "code.tar.gz") as tar:
        names = tar.getnames()
    assert len(names) == len(set(names))
    assert {"setup.py", "speccascade_t5x/__init__.py", "docs/launch.md", "scripts/tpu/worker"} <= set(names)
    assert not [name for name in names if re.search(r"__pycache__|\.pyc$|egg-info|^tests|^\.", name)]


def test_the_launcher_needs_nothing_but_an_old_python():
    files = [TPU / "launch", *(TPU / "launcher").glob("*.py")]
    assert len(files) > 4
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            outside = {name.partition(".")[0] for name in names} - {"launcher", *sys.stdlib_module_names}
            assert not outside, f"{path.name} imports {outside}"


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


def test_the_jobset_asks_for_one_whole_slice(launcher):
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
    x, y, z = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    for amount in (container["resources"]["requests"], container["resources"]["limits"]):
        assert amount == {"google.com/tpu": 4}
    # A chip of a v4 has two cores, which is what accelerator types count.
    hosts = launcher.slices.accelerator(f"v4-{2 * x * y * z}").hosts
    assert job["completions"] == job["parallelism"] == hosts == x * y * z // 4
    assert (replicated["replicas"], job["backoffLimit"], job["completionMode"]) == (1, 0, "Indexed")
    # Restarted when it was told to stop or lost its host, not when it failed by itself.
    disruption, exits = job["podFailurePolicy"]["rules"]
    assert (disruption["action"], disruption["onPodConditions"][0]["type"]) == ("Count", "DisruptionTarget")
    assert (exits["action"], exits["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert exits["onExitCodes"]["containerName"] == container["name"]
    assert {69, 75} <= set(exits["onExitCodes"]["values"])
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    flags = dict(word[2:].split("=") for word in container["command"] if "=" in word)
    assert (ROOT / "gin_configs" / flags["gin_file"]).is_file()
    assert (ROOT / "gin_configs" / "topologies" / f"{flags['topology']}.gin").is_file()
    assert any(flags["output_dir"].startswith(mount["mountPath"]) for mount in container["volumeMounts"])


def test_the_examples_of_the_docs_print_what_they_say():
    text = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^    \$ (scripts/tpu/launch (?:.*\\\n)*.*)\n\n((?:    .*\n|\n(?=    ))+)", text, re.MULTILINE)
    kinds = set()
    for command, printed in blocks:
        words = shlex.split(command.replace("\\\n", " "))
        kinds |= {word for word in words if word.startswith("--accelerator_type")}
        assert "--dry_run" in words
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert done.stdout.rstrip() == re.sub(r"^    ", "", printed, flags=re.MULTILINE).rstrip()
    assert kinds == {"--accelerator_type=v4-8", "--accelerator_type=v4-32"}
