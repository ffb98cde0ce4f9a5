"""The three ways to have the package: a wheel, an editable install, a bare checkout.

Each is asked, in a process of its own, to import the tasks and to find the gin files. The copies
are installed without dependencies; these come from the environment that runs the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("speccascade_t5x", "tasks", "gin_configs")
# What is run against the installed wheel: quick, and without paths of the checkout.
OUTSIDE = (
    *("test_where.py", "core/test_accounting.py", "core/test_divergences.py", "text"),
    "checkpoints/test_packaged_pair.py",
)
# Says where things were found; `l10n` registers its tasks and must do so only once.
PROBE = """
import pathlib, sys
import speccascade_t5x
from speccascade_t5x.common import paths
if "l10n" in sys.argv:
    from speccascade_t5x.tasks import l10n
    from speccascade_t5x.data.seqio_tasks import seqio
    assert {"restore_de", "l10n_en_de"} <= set(seqio.TaskRegistry.names())
else:
    from speccascade_t5x.tasks import folding
    assert "tensorflow" not in sys.modules
import speccascade_t5x.gin_configs.models
print(pathlib.Path(speccascade_t5x.__file__).parent)
print(pathlib.Path(sys.modules["speccascade_t5x.tasks"].__file__).parent)
print(paths.gin_configs_dir())
assert (paths.gin_configs_dir() / "runs").is_dir()
assert (paths.pretrained_dir() / "planted/nested/.hidden").read_bytes() == b"\\x00\\xff"
"""


def copy_checkout(target: Path) -> Path:
    """Copies what ships, and plants the kinds of file that packaging tends to lose."""
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SHIPPED:
        shutil.copytree(ROOT / name, target / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    nested = target / "speccascade_t5x" / "pretrained" / "planted" / "nested"
    nested.mkdir(parents=True)
    (nested / ".hidden").write_bytes(b"\x00\xff")
    (nested / "no_suffix").write_bytes(b"\x00\xff")
    (target / "gin_configs" / "runs" / "planted.gin").write_text("# planted\n")
    return target


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Runs a command with no PYTHONPATH but the one given, and returns what it printed."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def probe(*arguments: str, cwd: Path, python: str = sys.executable, **variables: str) -> list[str]:
    """Runs PROBE and returns where it found the package, the tasks and the gin files."""
    return run(python, "-c", PROBE, *arguments, cwd=cwd, **variables).splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of its own, for a build leaves folders behind."""
    source = copy_checkout(tmp_path_factory.mktemp("source"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_everything_and_nothing_else(wheel, checkout):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        about = archive.read(metadata).decode()
        licences = [n for n in archive.namelist() if ".dist-info/" in n and "LICENSE" in n]
        (entry,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        scripts = archive.read(entry).decode()
    wanted = set()
    for folder in SHIPPED:
        for path in (checkout / folder).rglob("*"):
            name = path.relative_to(checkout).as_posix()
            name = name if folder == "speccascade_t5x" else f"speccascade_t5x/{name}"
            ships = path.suffix in (".py", ".gin", ".typed") or name.startswith("speccascade_t5x/pretrained/")
            if path.is_file() and "__pycache__" not in name and ships:
                wanted.add(name)
    assert held == wanted
    assert "speccascade_t5x/pretrained/planted/nested/.hidden" in held
    assert len(licences) == 1
    assert "speccascade = speccascade_t5x.cli.__main__:main" in scripts
    required = [line for line in about.splitlines() if line.startswith("Requires-Dist:")]
    assert required
    assert all(">=" in line and "<" in line for line in required if "setuptools" not in line)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed by pip into a folder."""
    folder = tmp_path_factory.mktemp("site")
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--no-index", "--target", str(folder), str(wheel)),
        cwd=folder,
    )
    return folder


def test_an_installed_wheel_finds_tasks_and_configs(site, tmp_path):
    package = site / "speccascade_t5x"
    found = probe("l10n", cwd=tmp_path, PYTHONPATH=str(site))
    assert found == [str(package), str(package / "tasks"), str(package / "gin_configs")]


def test_tests_of_the_installed_wheel_pass_outside_the_checkout(site, tmp_path):
    """The mathematics, text and the packaged weights, with nothing of this checkout in sight."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "test_where.py").write_text(
        "import speccascade_t5x\n\n\ndef test_it_is_the_wheel():\n"
        f"    assert speccascade_t5x.__file__.startswith({str(site)!r})\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = tests\nmarkers =\n    slow\n    sharding\n")
    options = ("-q", "--import-mode=importlib", "-m", "not slow", "-p", "no:cacheprovider", f"--rootdir={tmp_path}")
    said = run(
        *(sys.executable, "-m", "pytest", *options, *(f"tests/{name}" for name in OUTSIDE)),
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    assert " passed" in said


def test_a_bare_checkout_finds_tasks_and_configs(checkout):
    found = probe("l10n", cwd=checkout)
    assert found == [str(checkout / name) for name in SHIPPED]


def test_a_clone_that_shadows_an_installed_wheel_uses_its_own_folders(checkout, site):
    """`python -c` puts the working directory before everything installed."""
    found = probe(cwd=checkout, PYTHONPATH=str(site))
    assert found == [str(checkout / name) for name in SHIPPED]


def test_an_editable_install_finds_tasks_and_configs(checkout, tmp_path):
    """In a virtual environment of its own, which sees the libraries of this one through a .pth.

    Also from inside another clone, whose package then shadows the installed one.
    """
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=tmp_path)
    python = str(environment / "bin" / "python")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    libraries = run(sys.executable, "-c", where, cwd=tmp_path).strip()
    own = Path(run(python, "-c", where, cwd=tmp_path).strip())
    (own / "libraries.pth").write_text(libraries + "\n")
    run(
        *(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--no-build-isolation", "--no-index", "--ignore-installed", "--editable", str(checkout)),
        cwd=tmp_path,
    )
    expected = [str(checkout / name) for name in SHIPPED]
    assert probe(cwd=tmp_path, python=python) == expected
    assert probe(cwd=checkout, python=python) == expected
    assert (environment / "bin" / "speccascade").is_file()
    other = copy_checkout(tmp_path / "other")
    assert probe(cwd=other, python=python) == [str(other / name) for name in SHIPPED]
