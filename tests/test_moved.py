"""Old module paths, as gin files and scripts of the last release name them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import gin
import pytest

from speccascade_t5x import moved
from speccascade_t5x.cli import gin_flags


@pytest.mark.parametrize("old", sorted(moved.MOVED))
def test_an_old_path_is_the_new_module_and_says_so(old):
    sys.modules.pop(f"speccascade_t5x.{old}", None)
    new = importlib.import_module(f"speccascade_t5x.{moved.MOVED[old]}")
    with pytest.warns(FutureWarning, match=f"{old} is speccascade_t5x.{moved.MOVED[old]} now"):
        assert importlib.import_module(f"speccascade_t5x.{old}") is new
    assert new.__spec__.name == new.__name__ == f"speccascade_t5x.{moved.MOVED[old]}"


def test_a_saved_gin_file_of_the_last_release_resolves(tmp_path):
    (tmp_path / "config.gin").write_text(
        "from __gin__ import dynamic_registration\n\nfrom speccascade_t5x.runtime import generate\n"
        "from speccascade_t5x.runtime import infer\n\ngenerate.Settings.temperature = 0.5\ninfer.infer.limit = 3\n"
    )
    gin_flags.load([str(tmp_path / "config.gin")], [])
    from speccascade_t5x.inference import generate, infer

    assert gin.get_configurable(generate.Settings)().temperature == 0.5
    assert gin.query_parameter("infer.infer.limit") == 3
    assert gin.get_configurable(infer.infer) is not None


def test_what_never_was_is_not_found():
    done = subprocess.run(
        [sys.executable, "-c", "import speccascade_t5x.runtime.nothing"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "No module named 'speccascade_t5x.runtime.nothing'" in done.stderr
