from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import speccascade_t5x
from speccascade_t5x.common import paths

ROOT = Path(__file__).resolve().parents[2]


def test_this_checkout_is_known():
    assert paths.checkout_dir() == ROOT
    assert paths.gin_configs_dir() == ROOT / "gin_configs"
    assert paths.pretrained_dir() == Path(speccascade_t5x.__file__).parent / "pretrained"


def test_tasks_come_from_the_checkout_under_one_name():
    tasks = importlib.import_module("speccascade_t5x.tasks")
    assert Path(tasks.__file__) == ROOT / "tasks" / "__init__.py"
    folding = importlib.import_module("speccascade_t5x.tasks.folding")
    assert folding is sys.modules["speccascade_t5x.tasks.folding"]
    assert folding.__spec__.origin == str(ROOT / "tasks" / "folding.py")


def test_the_finder_is_installed_once():
    paths.install_checkout_finder()
    paths.install_checkout_finder()
    assert sum(isinstance(f, paths.CheckoutFinder) for f in sys.meta_path) == 1
    assert isinstance(sys.meta_path[0], paths.CheckoutFinder)


def test_the_finder_answers_for_two_packages_only(tmp_path):
    finder = paths.CheckoutFinder(tmp_path)
    assert finder.find_spec("speccascade_t5x.tasks") is None  # no such folder yet
    for name in ("tasks", "scripts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    spec = finder.find_spec("speccascade_t5x.tasks")
    assert spec.submodule_search_locations == [str(tmp_path / "tasks")]
    for name in ("tasks", "speccascade_t5x.scripts", "speccascade_t5x.tasks.l10n"):
        assert finder.find_spec(name) is None


def fake_install(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root / "speccascade_t5x"


def test_foreign_folders_beside_an_installed_package_are_left_alone(tmp_path, monkeypatch):
    """site-packages may hold somebody's `tasks`; without setup.py it is no checkout."""
    package = fake_install(
        tmp_path,
        "tasks/__init__.py",
        "gin_configs/__init__.py",
        "speccascade_t5x/gin_configs/__init__.py",
    )
    monkeypatch.setattr(paths, "_PACKAGE_DIR", package)
    assert paths.checkout_dir() is None
    assert paths.gin_configs_dir() == package / "gin_configs"


def test_a_copy_without_gin_files_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_PACKAGE_DIR", fake_install(tmp_path, "gin_configs/__init__.py"))
    with pytest.raises(FileNotFoundError, match="has no gin_configs"):
        paths.gin_configs_dir()
