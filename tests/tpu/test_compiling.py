"""Programs really compiled for TPU slices. Skipped where libtpu, which holds the compiler, is not installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gin
import pytest

from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.tpu.precompile import FILE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the TPU compiler (700 MB): pip install 'speccascade_t5x[tpu]'",
)


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def compiled(folder: Path, *flags: str) -> dict[tuple[str, str], dict]:
    """(slice, program) -> its report, from the verb."""
    assert cli.main(["precompile", f"--output_dir={folder}", *flags]) == 0
    results = json.loads((folder / FILE).read_text("utf-8"))["results"]
    return {
        (result["cell"]["topology"], name): report for result in results for name, report in result["programs"].items()
    }


def assert_sensible(report: dict, chip_bytes: int, unknown: int = 0) -> None:
    """Sizes add up, and the compiler's estimates are there."""
    memory = report["memory"]
    assert report["status"] == "fits" and report["capacity"] == chip_bytes and report["over"] == 0
    parts = sum(memory[name] for name in ("arguments", "outputs", "temporaries", "code", "idle")) - memory["aliased"]
    assert report["needed"] == parts
    # Tiles pad what is small, so arguments take no less than what was asked for; and parameters stay resident.
    assert memory["arguments"] + memory["idle"] >= memory["parameters"] > 0
    for cost in report["costs"].values():
        assert 0 < cost["cycles"][0] <= cost["cycles"][1] and cost["unknown"] <= unknown


def test_a_small_pair_for_v4_8(tmp_path, capsys):
    flags = ["--pairs=restore_de_drafter:restore_de_verifier", "--topologies=v4:2x2x1", "--model=1"]
    sizes = ["--batch_size=4", "--input_len=32", "--max_len=16", "--draft_len=2"]
    flags += [*sizes, "--gin.slice_cells.Options.train_batch_size=4", "--gin.slice_cells.Options.targets_len=16"]
    found = compiled(tmp_path / "out", *flags, "--programs=encoder,loop,refill,train_drafter")
    assert {name for _, name in found} == {"encoder", "loop", "refill", "train_drafter"}
    for (_, name), report in found.items():
        assert_sensible(report, 32 * 2**30, unknown=name == "refill")  # how many rounds lie between two pauses
    loop, refill = found["v4:2x2x1", "loop"], found["v4:2x2x1", "refill"]
    assert refill["memory"]["caches"] == 2 * loop["memory"]["caches"] <= 2 * refill["memory"]["aliased"]
    rounds, pauses = (program["costs"]["round"] for program in (loop, refill))
    assert pauses["unknown"] == 1 and pauses["cycles"] > rounds["cycles"]
    # Groups of one chip share nothing but whether all rows are done: one number per round.
    assert loop["costs"]["round"]["collectives"] == {"all-reduce": {"count": 1, "bytes": 4}}
    assert loop["memory"]["caches"] > 0 and loop["memory"]["aliased"] >= loop["memory"]["caches"]  # donated
    assert found["v4:2x2x1", "encoder"]["costs"]["run"]["collectives"] == {}
    assert sum(each["count"] for each in found["v4:2x2x1", "train_drafter"]["costs"]["run"]["collectives"].values()) > 0
    out = capsys.readouterr()
    assert "restore_de_drafter:restore_de_verifier" in out.out
    assert f"wrote {tmp_path / 'out' / 'precompile.md'}" in out.out
    assert "libtpu" not in out.err and "WARNING" not in out.err  # what its library says stays in the child
    kept = (tmp_path / "out" / FILE).read_text("utf-8")
    assert compiled(tmp_path / "out", *flags, "--programs=encoder,loop,refill,train_drafter") == found
    assert (tmp_path / "out" / FILE).read_text("utf-8") == kept  # nothing was compiled again


@pytest.mark.slow
def test_small_to_xxl_for_v4_8_and_a_larger_slice(tmp_path):
    found = compiled(
        tmp_path / "out", "--pairs=t5_1_1_small_xxl", "--topologies=v4:2x2x1,v4:2x2x4", "--programs=encoder,loop"
    )
    for report in found.values():
        assert_sensible(report, 32 * 2**30)
    for name in ("v4:2x2x1", "v4:2x2x4"):
        loop = found[name, "loop"]
        assert 11e9 < loop["memory"]["parameters"] < 12.5e9  # a quarter of 11 billion float32 values
        sent = loop["costs"]["round"]["collectives"]
        # Three all-reduces for each of XXL's 24 layers, and more for the drafter.
        assert sent["all-reduce"]["count"] >= 3 * 24
    # Four times the chips, the same batch: a quarter of the rows and of their caches on each.
    small, large = (found[name, "loop"]["memory"]["caches"] for name in ("v4:2x2x1", "v4:2x2x4"))
    assert large * 4 == small
