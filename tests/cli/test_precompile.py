"""`speccascade precompile` and `slice_plan` as a user meets them, without the compiler."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import gin
import pytest

from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.cli import accelerators, precompile

ROOT = Path(__file__).resolve().parents[2]
PAIR = "restore_de_drafter:restore_de_verifier"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    gin.clear_config()


def test_names_of_pairs():
    assert precompile.parts("t5_1_1_small_xl") == ("t5_1_1_small", "t5_1_1_xl")
    assert precompile.parts("flan_t5_base_xxl") == ("flan_t5_base", "flan_t5_xxl")
    assert precompile.parts(PAIR) == tuple(PAIR.split(":"))
    assert precompile.all_pairs() == ("t5_1_1_base_xxl", "t5_1_1_small_large", "t5_1_1_small_xl")
    found = precompile.architectures(("t5_1_1_small_xl", PAIR))
    drafter, verifier = found["t5_1_1_small_xl"]
    assert (drafter.emb_dim, verifier.emb_dim, verifier.num_decoder_layers) == (512, 2048, 24)
    assert found[PAIR][0].vocab_size == found[PAIR][1].vocab_size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pairs=t5_1_1_smal_xl"], "needs models/t5_1_1_smal.gin, which there is not: did you mean 't5_1_1_small'?"),
        (["--topologies=v4:2x2x3"], "there is no TPU slice 'v4:2x2x3': did you mean 'v4:2x2x"),
        ([f"--pairs={PAIR}", "--model=3"], "model=3 does not divide the 4 chips of v4:2x2x1: use 1, 2, 4"),
        (["--programms=loop"], "unknown flag '--programms=loop': did you mean '--programs'?"),
        (["--model=x"], "argument --model: invalid int value: 'x'"),
    ],
)
def test_a_mistake_is_one_sentence(flags, message, capsys):
    assert cli.main(["precompile", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("speccascade precompile: ") and message in err and "Traceback" not in err


# The whole table comes that far only if every one of its cells can be.
@pytest.mark.parametrize("flags", [[f"--pairs={PAIR}"], ["--pairs=all", "--topologies=all"]])
def test_without_the_compiler_it_says_how_to_get_it(flags, capsys):
    if importlib.util.find_spec("libtpu") is not None:
        pytest.skip("libtpu is installed here")
    assert cli.main(["precompile", *flags]) == 2
    err = capsys.readouterr().err
    assert "libtpu, which holds the TPU compiler, is not installed: pip install 'libtpu==" in err
    assert "speccascade_t5x[tpu]" in err


def test_the_environment_of_a_child(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    found = precompile.environment()
    assert (found["JAX_PLATFORMS"], found["TPU_SKIP_MDS_QUERY"]) == ("cpu", "1")
    assert found["PYTHONPATH"] == os.pathsep.join([str(ROOT), "elsewhere"])


def platforms(tmp_path, environment: dict[str, str]) -> str:
    """What a verb's process lets JAX use, with a package called libtpu installed."""
    (tmp_path / "libtpu").mkdir(exist_ok=True)
    (tmp_path / "libtpu" / "__init__.py").write_text("raise RuntimeError('was loaded')\n")
    code = "import jax; from speccascade_t5x.cli import accelerators as a; a.settle(); print(jax.config.jax_platforms)"
    kept = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, "PYTHONPATH": paths, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_installed_compiler_is_no_accelerator(tmp_path):
    if accelerators.has_accelerator():
        pytest.skip("this machine has an accelerator")
    assert platforms(tmp_path, {}) == "cpu"
    assert platforms(tmp_path, {"JAX_PLATFORMS": "cpu,tpu"}) == "cpu,tpu"  # who says what to use is obeyed


def test_a_slice_plan(capsys):
    flags = ["--pair=t5_1_1_small_xl", "--topology=v5e:4x4", "--acceptance=0.8,0.7", "--batch_sizes=1,64"]
    assert cli.main(["slice_plan", *flags, "--draft_lens=2,5", "--output_dir=out"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and lines[0].startswith("t5_1_1_small_xl on v5e:4x4, model=")
    assert lines[2].split()[:3] == ["batch", "draft_len", "tokens/round"] and len(lines) == 3 + 6 + 1 + 3 + 1
    assert any(line.startswith("batch 1: draft_len") for line in lines)
    assert Path("out/slice_plan.json").is_file()
    assert "ACCEPTANCE = (0.8, 0.7)" in Path("out/config.gin").read_text("utf-8")
    assert cli.main(["slice_plan", "--pair=t5_1_1_small_xl"]) == 2
    assert "name either the acceptance (--acceptance=0.8, or one per position) or a plan" in capsys.readouterr().err
    assert cli.main(["slice_plan", "--acceptance=0.5", "--topology=v4:2x2x9"]) == 2
    assert "there is no TPU slice 'v4:2x2x9'" in capsys.readouterr().err
