"""The rooms of the package, read from its imports, and what `import speccascade_t5x` loads."""

from __future__ import annotations

import ast
import collections
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from speccascade_t5x.cli.__main__ import VERBS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "speccascade_t5x"

# The rooms from the inside out: each may import itself and those before it. `tasks` serves the command line only.
ROOMS = (
    *("moved", "trees", "interfaces", "common", "core", "text", "models", "drafting", "deferral", "decoding"),
    *("checkpoints", "distributed", "data", "inference", "training", "tpu", "planning", "evaluation", "cli"),
)
ALLOWED = {room: set(ROOMS[: place + 1]) for place, room in enumerate(ROOMS)}
ALLOWED["drafting"] -= {"models", "text"}  # drafting and decoding see models by Protocol alone
ALLOWED["decoding"] -= {"models", "text", "deferral"}
ALLOWED["training"] -= {"inference"}
ALLOWED["__init__"] = set(ROOMS) - {"cli"}
ALLOWED["cli"] |= {"tasks", "__init__"}
ALLOWED["tasks"] = {"interfaces", "common", "text", "data", "tasks"}

# Libraries that only some rooms (or single modules) may name, lazily or not.
_DATA_EDGE = {"cli", "tasks", "data.seqio_tasks"}
_ABOVE = {"distributed", "inference", "training", "tpu", "planning", "evaluation", "cli"}
ONLY_IN = {
    "tensorflow": _DATA_EDGE,
    "tensorflow_datasets": _DATA_EDGE,
    "tensorflow_text": _DATA_EDGE,
    "seqio": _DATA_EDGE | {"inference.t5x_model"},  # whose model hands T5X's scripts a feature converter
    "clu": _DATA_EDGE,
    "gin": {"cli", "tasks"},
    "rich": _DATA_EDGE,
    "rouge_score": {"cli", "tasks"},
    "sacrebleu": {"cli", "tasks"},
    "absl": {"cli"},
    "matplotlib": {"cli", "evaluation"},
    "t5x": set(),
    "flax": {"models", "deferral", "checkpoints"} | _ABOVE,
    "optax": {"deferral", "checkpoints", "training", "cli"},
    "orbax": {"checkpoints", "training", "cli"},
    "jax": set(ALLOWED) - {"tasks"},
}
# What `import speccascade_t5x` must not load. rich is missing here: flax loads it by itself.
HEAVY = ("tensorflow", "seqio", "gin", "clu", "sacrebleu", "matplotlib", "t5x")
# Process-wide settings are read and made at the edges; the corpus folder of a task is one.
SETTINGS = {("os", "environ"), ("os", "getenv"), ("jax", "config")}
SETTINGS_ALLOWED = {"cli", "tasks"}
LIGHT_ROOMS = ("common", "core", "text", "models", "drafting", "deferral", "decoding", "checkpoints", "training")


def module_name(file: Path, root: Path) -> str:
    """The dotted name below the package: 'core.probs', 'tasks.l10n', '' for the package itself."""
    parts = list(file.relative_to(root).with_suffix("").parts)
    if parts[0] == PACKAGE:
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) of every import, also inside functions and by name.

    Args:
      tree: a parsed module.
      package: the absolute package that relative imports of the module start from.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import room` names a room; deeper than that the module says enough.
            names = [alias.name for alias in node.names] if base == PACKAGE else [None]
            yield from ((node.lineno, f"{base}.{name}" if name else base) for name in names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def settings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, name) of every touch of the environment or of `jax.config`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in SETTINGS:
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                if (node.module, alias.name) in SETTINGS:
                    yield node.lineno, f"{node.module}.{alias.name}"


def fault(importer: str, name: str) -> str | None:
    """Says what is wrong when module `importer` (below the package) imports `name`, or None."""
    room = importer.partition(".")[0] or "__init__"
    top, _, rest = name.partition(".")
    if top in ("tasks", "gin_configs"):
        return f"imports {name}: these travel as {PACKAGE}.{top}, under no other name"
    if top == PACKAGE:
        target = rest.partition(".")[0]
        # Anything the package offers beside its rooms comes from its own __init__.
        target = target if target in ALLOWED else "__init__"
        if target in ALLOWED[room]:
            return None
        may = ", ".join(sorted(ALLOWED[room])) or "no room"
        return f"imports {name}: {room} may import {may}"
    allowed = ONLY_IN.get(top)
    if allowed is None or room in allowed or importer in allowed:
        return None
    return f"imports {name}: {top} belongs to {', '.join(sorted(allowed)) or 'no module'}"


def faults(root: Path) -> list[str]:
    """Every import below `root` that points the wrong way, as 'file:line what'."""
    found = []
    files = sorted((root / PACKAGE).rglob("*.py")) + sorted((root / "tasks").rglob("*.py"))
    for file in files:
        name = module_name(file, root)
        if name.partition(".")[0] not in {*ALLOWED, ""}:
            found.append(f"{file.relative_to(root)}:1 lies outside every room")
            continue
        full = f"{PACKAGE}.{name}" if name else PACKAGE
        package = full if file.name == "__init__.py" else full.rpartition(".")[0]
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for line, imported in imported_names(tree, package):
            if what := fault(name, imported):
                found.append(f"{file.relative_to(root)}:{line} {what}")
        if name.partition(".")[0] not in SETTINGS_ALLOWED:
            for line, setting in settings(tree):
                found.append(f"{file.relative_to(root)}:{line} reads {setting}, as only cli may")
    return found


def test_imports_point_one_way():
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("core/planted.py", "from speccascade_t5x.models import t5\n", "core may import"),
        ("core/planted.py", "from ..models import t5\n", "core may import"),
        ("core/planted.py", "import flax.linen as nn\n", "flax belongs to"),
        ("decoding/planted.py", "def f():\n    import speccascade_t5x.models.t5\n", "decoding may"),
        ("models/planted.py", "from speccascade_t5x import decoding\n", "models may import"),
        ("drafting/planted.py", "import speccascade_t5x\n", "drafting may import"),
        ("deferral/planted.py", "def f():\n    import tensorflow as tf\n", "tensorflow belongs to"),
        ("checkpoints/planted.py", "import importlib\nimportlib.import_module('seqio')\n", "seqio"),
        ("training/planted.py", "from gin import config\n", "gin belongs to"),
        ("evaluation/planted.py", "from speccascade_t5x.cli import infer\n", "evaluation may"),
        ("data/planted.py", "from speccascade_t5x.tasks import l10n\n", "data may import"),
        ("cli/planted.py", "from tasks import l10n\n", "under no other name"),
        ("../tasks/planted.py", "import jax.numpy as jnp\n", "jax belongs to"),
        ("inference/planted.py", "import os\nFAST = os.environ.get('FAST')\n", "reads os.environ"),
        ("tpu/planted.py", "from jax import config\n", "reads jax.config"),
        ("elsewhere/planted.py", "import os\n", "outside every room"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, file, source, reason):
    planted = tmp_path / PACKAGE / file
    (tmp_path / PACKAGE).mkdir()
    planted.resolve().parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(source)
    (found,) = faults(tmp_path)
    assert "planted.py:" in found
    assert reason in found


def test_what_the_rooms_need_is_allowed(tmp_path):
    """The check would be worthless if it refused everything."""
    for file, source in {
        "__init__.py": "from speccascade_t5x.common.paths import install_checkout_finder\n",
        "core/a.py": "import jax\nimport numpy\nfrom speccascade_t5x.interfaces import Array\n",
        "decoding/a.py": "from speccascade_t5x.core import rules\nfrom . import loop\n",
        "data/seqio_tasks.py": "import seqio\nimport tensorflow as tf\n",
        "cli/a.py": "import gin, os\nos.getenv('A')\nfrom speccascade_t5x import tasks\n",
    }.items():
        path = tmp_path / PACKAGE / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert faults(tmp_path) == []


def file_imports(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package it imports anywhere in its file; names below the package."""
    names = {module_name(file, root): file for file in sorted((root / PACKAGE).rglob("*.py"))}
    found: dict[str, set[str]] = {}
    for name, file in names.items():
        full = f"{PACKAGE}.{name}" if name else PACKAGE
        package = full if file.name == "__init__.py" else full.rpartition(".")[0]
        targets = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for _, imported in imported_names(node, package) if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                below = imported.removeprefix(PACKAGE).removeprefix(".")
                inner = [f"{below}.{alias.name}".lstrip(".") for alias in node.names]
                targets |= {each for each in (inner if isinstance(node, ast.ImportFrom) else []) if each in names}
                if imported.partition(".")[0] == PACKAGE and not targets & set(inner):
                    targets.add(below if below in names else below.rpartition(".")[0])
        found[name] = targets - {name}
    return found


def cycles(imports: dict[str, set[str]]) -> list[list[str]]:
    """The groups of files that reach each other, each sorted."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        open_ends = list(imports[start])
        while open_ends:
            at = open_ends.pop()
            if at not in seen:
                seen.add(at)
                open_ends += imports.get(at, ())
        return seen

    reach = {name: reached(name) for name in imports}
    groups = {tuple(sorted(other for other in reach[name] if name in reach.get(other, ()))) for name in imports}
    return sorted(list(group) for group in groups if len(group) > 1)


def test_no_file_imports_a_file_that_imports_it_back():
    assert cycles(file_imports(ROOT)) == []


def test_a_planted_cycle_is_caught(tmp_path):
    room = tmp_path / PACKAGE / "core"
    room.mkdir(parents=True)
    (room / "a.py").write_text(f"from {PACKAGE}.core import b\n")
    (room / "b.py").write_text("def f():\n    from .c import g\n")
    (room / "c.py").write_text(f"import {PACKAGE}.core.a\n")
    (room / "d.py").write_text(f"from {PACKAGE}.core import a\n")
    assert cycles(file_imports(tmp_path)) == [["core.a", "core.b", "core.c"]]


def test_no_room_holds_more_than_a_sixth_of_the_package():
    lines = collections.Counter()
    for file in (ROOT / PACKAGE).rglob("*.py"):
        lines[module_name(file, ROOT).partition(".")[0]] += len(file.read_text(encoding="utf-8").splitlines())
    assert {room: count for room, count in lines.items() if count > lines.total() / 6} == {}


def test_a_file_name_stands_in_one_room_only():
    """But for `__init__`, and for the verbs in cli, which are named as what they run."""
    rooms = collections.defaultdict(list)
    for file in (ROOT / PACKAGE).rglob("*.py"):
        if file.stem != "__init__" and not (file.parent.name == "cli" and file.stem in VERBS):
            rooms[file.stem].append(str(file.parent.relative_to(ROOT / PACKAGE)))
    assert {name: where for name, where in rooms.items() if len(where) > 1} == {}


def test_the_library_loads_no_heavy_module():
    lines = [
        "import importlib, pkgutil, sys",
        f"import {PACKAGE}",
        f"for room in {LIGHT_ROOMS!r}:",
        f"    package = importlib.import_module('{PACKAGE}.' + room)",
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):",
        "        importlib.import_module(found.name)",
        f"print([name for name in {HEAVY!r} if name in sys.modules])",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
