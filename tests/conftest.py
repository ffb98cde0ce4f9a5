"""What every test shares: eight simulated CPU devices, and the material beside the checkout."""

from __future__ import annotations

import gc
import os
from importlib import metadata
from pathlib import Path

# Read when JAX and TensorFlow load, so they stand before any import that could bring them in.
# Compiling is three quarters of what tests of the decoder do, so LLVM optimizes nothing and fused loops are written by
# XLA's older emitters, which takes a third of the time; XLA's own passes stay. Programs are not split for threads to
# compile, which costs more than it brings where every core runs tests. What runs for long is compiled by
# `optimized.optimized_jit`. To test what users have, name them: XLA_FLAGS="--xla_backend_optimization_level=3
# --xla_cpu_use_fusion_emitters=true".
_FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_backend_optimization_level": 0,
    "--xla_cpu_parallel_codegen_split_count": 1,
}
if metadata.version("jaxlib").startswith("0.10."):  # jaxlib 0.11 has no others, and ends at a flag it does not know
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

from corpora import ROWS, write_split

# Tracing makes objects by the million, and looking for garbage among them so often finds little.
gc.set_threshold(100_000, 20, 20)

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """The eight simulated devices."""
    found = jax.devices()
    assert len(found) == 8, f"expected 8 simulated devices, JAX has {len(found)}"
    assert {d.platform for d in found} == {"cpu"}
    return found


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of checkpoints and expected values that travel with the tests; see its README."""
    return Path(__file__).resolve().parent / "fixtures"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared material beside the checkout; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared material (../shared), which is not beside this checkout")
    return SHARED.resolve()


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus folder whose three splits hold `corpora.ROWS`, named by the environment variable."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        write_split(folder, split, ROWS)
    monkeypatch.setenv("SPECCASCADE_L10N_DIR", str(folder))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Frees a module's compiled programs: a process that keeps thousands of them runs out of memory maps."""
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()  # what is left, mostly libraries, stays: half a second less at the end of every later module
