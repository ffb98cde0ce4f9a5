"""The layering of the package, read from its imports, and what `import speccascade_t5x` loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "speccascade_t5x"

_MODELS = {"trees", "interfaces", "core", "models"}
_DECODING = {"trees", "interfaces", "core", "drafting", "decoding"}
_DEFERRAL = _MODELS | _DECODING | {"deferral"}
_RUNTIME = _DEFERRAL | {"runtime", "checkpoints"}
_EVALUATION = _RUNTIME | {"evaluation", "tpu"}
# Which layers each layer may import. Imports point one way; `tasks` serves the command line only.
ALLOWED = {
    "trees": set(),
    "interfaces": {"trees"},
    "core": {"trees", "interfaces", "core"},
    "models": _MODELS,
    "drafting": {"trees", "interfaces", "core", "drafting"},
    "decoding": _DECODING,
    "deferral": _DEFERRAL,
    "runtime": _RUNTIME,
    "checkpoints": _RUNTIME,
    "evaluation": _EVALUATION,
    "tpu": _EVALUATION,
    "__init__": _EVALUATION,
    "tasks": {"interfaces", "runtime", "tasks"},
    "cli": _EVALUATION | {"cli", "tasks", "__init__"},
}

# Libraries that only some layers (or single modules) may name, lazily or not.
_DATA_EDGE = {"cli", "tasks", "runtime.data"}
ONLY_IN = {
    "tensorflow": _DATA_EDGE,
    "tensorflow_datasets": _DATA_EDGE,
    "tensorflow_text": _DATA_EDGE,
    "seqio": _DATA_EDGE | {"runtime.t5x_model"},  # whose model hands T5X's scripts a feature converter
    "clu": _DATA_EDGE,
    "gin": {"cli", "tasks"},
    "rich": _DATA_EDGE,
    "rouge_score": {"cli", "tasks"},
    "sacrebleu": {"cli", "tasks"},
    "absl": {"cli"},
    "matplotlib": {"cli", "evaluation"},
    "t5x": set(),
    "flax": {"models", "deferral", "runtime", "checkpoints", "evaluation", "tpu", "cli"},
    "optax": {"deferral", "runtime", "checkpoints", "cli"},
    "orbax": {"runtime", "checkpoints", "cli"},
    "jax": set(ALLOWED) - {"tasks"},
}
# What `import speccascade_t5x` must not load. rich is missing here: flax loads it by itself.
HEAVY = ("tensorflow", "seqio", "gin", "clu", "sacrebleu", "matplotlib", "t5x")
# Process-wide settings are read and made at the edges; the corpus folder of a task is one.
SETTINGS = {("os", "environ"), ("os", "getenv"), ("jax", "config")}
SETTINGS_ALLOWED = {"cli", "tasks"}
LIGHT_LAYERS = ("core", "models", "drafting", "decoding", "deferral", "checkpoints")


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
            # `from package import layer` names a layer; deeper than that the module says enough.
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
    layer = importer.partition(".")[0] or "__init__"
    top, _, rest = name.partition(".")
    if top in ("tasks", "gin_configs"):
        return f"imports {name}: these travel as {PACKAGE}.{top}, under no other name"
    if top == PACKAGE:
        target = rest.partition(".")[0]
        # Anything the package offers beside its layers comes from its own __init__.
        target = target if target in ALLOWED else "__init__"
        if target in ALLOWED[layer]:
            return None
        may = ", ".join(sorted(ALLOWED[layer])) or "no layer"
        return f"imports {name}: {layer} may import {may}"
    allowed = ONLY_IN.get(top)
    if allowed is None or layer in allowed or importer in allowed:
        return None
    return f"imports {name}: {top} belongs to {', '.join(sorted(allowed)) or 'no module'}"


def faults(root: Path) -> list[str]:
    """Every import below `root` that breaks the layering, as 'file:line what'."""
    found = []
    files = sorted((root / PACKAGE).rglob("*.py")) + sorted((root / "tasks").rglob("*.py"))
    for file in files:
        name = module_name(file, root)
        if name.partition(".")[0] not in {*ALLOWED, ""}:
            found.append(f"{file.relative_to(root)}:1 lies outside every layer")
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
        ("runtime/planted.py", "from gin import config\n", "gin belongs to"),
        ("evaluation/planted.py", "from speccascade_t5x.cli import infer\n", "evaluation may"),
        ("runtime/planted.py", "from speccascade_t5x.tasks import l10n\n", "runtime may import"),
        ("cli/planted.py", "from tasks import l10n\n", "under no other name"),
        ("../tasks/planted.py", "import jax.numpy as jnp\n", "jax belongs to"),
        ("runtime/planted.py", "import os\nFAST = os.environ.get('FAST')\n", "reads os.environ"),
        ("tpu/planted.py", "from jax import config\n", "reads jax.config"),
        ("elsewhere/planted.py", "import os\n", "outside every layer"),
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


def test_what_the_layers_need_is_allowed(tmp_path):
    """The check would be worthless if it refused everything."""
    for file, source in {
        "__init__.py": "from speccascade_t5x.runtime.paths import install_checkout_finder\n",
        "core/a.py": "import jax\nimport numpy\nfrom speccascade_t5x.interfaces import Array\n",
        "decoding/a.py": "from speccascade_t5x.core import rules\nfrom . import loop\n",
        "runtime/data.py": "import seqio\nimport tensorflow as tf\n",
        "cli/a.py": "import gin, os\nos.getenv('A')\nfrom speccascade_t5x import tasks\n",
    }.items():
        path = tmp_path / PACKAGE / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert faults(tmp_path) == []


def test_the_library_loads_no_heavy_module():
    layers = [layer for layer in LIGHT_LAYERS if (ROOT / PACKAGE / layer).is_dir()]
    lines = [
        "import importlib, pkgutil, sys",
        f"import {PACKAGE}",
        f"for layer in {layers!r}:",
        f"    package = importlib.import_module('{PACKAGE}.' + layer)",
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):",
        "        importlib.import_module(found.name)",
        f"print([name for name in {HEAVY!r} if name in sys.modules])",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
