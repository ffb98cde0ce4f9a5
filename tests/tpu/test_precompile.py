"""The table of pairs x slices: what a dying process costs, what is kept, how results are told. No compiler needed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models import T5Config
from speccascade_t5x.tpu import compiling, precompile, programs_table, slice_cells

TINY = T5Config(vocab_size=32, emb_dim=8, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=4)
ARCHITECTURES = {"a": (TINY, TINY), "b": (TINY, TINY)}
COST = {
    "round": {"cycles": [2_000_000, 3_000_000], "seconds": [0.002, 0.003], "unknown": 0,
              "collectives": {"all-reduce": {"count": 7, "bytes": 2**21}, "all-gather": {"count": 1, "bytes": 2**20}}},
    "before": {"cycles": [5, 5], "seconds": None, "unknown": 0, "collectives": {}},
}  # fmt: skip
MEMORY = {"arguments": 2**30, "outputs": 0, "aliased": 0, "temporaries": 2**29, "code": 0, "idle": 2**28,
          "parameters": 2**30, "caches": 2**20}  # fmt: skip
FITS = {"program": "loop", "status": "fits", "needed": 7 * 2**28, "capacity": 2**35, "over": 0, "memory": MEMORY,
        "costs": COST, "compile_s": 12.4, "cpu_s": 20.3}  # fmt: skip


@pytest.fixture
def deadly(tmp_path: Path) -> dict[str, str]:
    """An environment in which every process dies while it starts, as one whose compiler crashes does."""
    folder = tmp_path / "deadly"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import os, sys\nprint('out of luck', file=sys.stderr)\nos._exit(9)\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(environment, tmp_path, **options):
    chosen = {"programs": ("loop",), "batch_size": 4, "train_batch_size": 4, "model": 1} | options
    return precompile.precompile(
        ARCHITECTURES, environment, ("a", "b"), ("v4:2x2x1",), slice_cells.Options(**chosen), tmp_path / "out"
    )


def test_a_process_that_dies_costs_its_program_only(deadly, tmp_path):
    found = run(deadly, tmp_path, programs=("encoder", "loop"))
    assert len(found.results) == 2
    for result in found.results:
        assert set(result["programs"]) == {"encoder", "loop"}
        for program in result["programs"].values():
            assert program["status"] == "crashed"
            assert program["message"] == "the compiler's process ended with code 9: out of luck"
    table = found.path.read_text("utf-8")
    assert table.count("| crashed |") == 4 and "out of luck" in table


def test_what_is_done_is_not_done_again(deadly, tmp_path):
    found = run(deadly, tmp_path)
    files = sorted((tmp_path / "out" / "cells").iterdir())
    assert len(files) == 2
    for file, program in zip(files, (FITS, {**FITS, "status": "crashed", "message": "earlier"}), strict=True):
        content = json.loads(file.read_text("utf-8"))
        content["programs"]["loop"] = program
        file.write_text(json.dumps(content), "utf-8")
    found = run(deadly, tmp_path)
    assert found.results[0]["programs"]["loop"] == FITS
    assert "ended with code 9" in found.results[1]["programs"]["loop"]["message"]  # a crash is tried again
    files[1].write_text("half of a fi", "utf-8")  # as nothing here writes it, but a disk may
    statuses = [result["programs"]["loop"]["status"] for result in run(deadly, tmp_path).results]
    assert statuses == ["fits", "crashed"]
    kept = json.loads((tmp_path / "out" / precompile.FILE).read_text("utf-8"))
    assert [result["programs"]["loop"]["status"] for result in kept["results"]] == statuses


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text("import time\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "slow")}
    chosen = slice_cells.Options(programs=("loop",), batch_size=4, model=1)
    found = precompile.precompile(ARCHITECTURES, environment, ("a",), ("v4:2x2x1",), chosen, timeout_s=1.0)
    (program,) = found.results[0]["programs"].values()
    assert (program["status"], program["message"]) == ("timed out", "not done after 1 s")
    assert found.path is None


def test_nothing_is_compiled_where_a_cell_cannot_be(deadly, tmp_path):
    with pytest.raises(UserError, match="batch_size=5 cannot be shared by the 4 parts"):
        run(deadly, tmp_path, batch_size=5)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="there is no TPU slice 'v9'"):
        precompile.precompile(ARCHITECTURES, deadly, ("a",), ("v4:2x2x1", "v9"), slice_cells.Options())


def result(program: dict, pair: str = "a") -> dict:
    cell = slice_cells.make(pair, TINY, TINY, "v4:2x2x1", slice_cells.Options(model=1)).to_json()
    return {"cell": cell, "programs": {program["program"]: program}, "versions": {"jax": "1", "libtpu": "2"}}


def test_a_row_says_what_fits_and_what_it_costs():
    (row,) = programs_table.rows([result(FITS)])
    assert row == (
        *("a", "v4:2x2x1", "model=1", "16", "loop", "yes, of 32.00", "1.75", "1.00", "0.00", "1.00", "0.50", "0.25"),
        *("7 all-reduce, 1 all-gather", "3.00", "2 to 3", "2 to 3 ms", "12 s (20)"),
    )
    large = {**FITS, "status": "too large", "over": 2**31, "capacity": 2**34}
    assert programs_table.rows([result(large)])[0][5] == "no: 2.00 over 16.00"
    bare = {"program": "loop", "status": "crashed", "message": "it burnt", "compile_s": 3.0}
    shown = programs_table.markdown([result(FITS), result(bare, "b")])
    assert shown.count("\n| ") == 2 and shown.startswith("| pair |")
    assert "- b for v4:2x2x1, loop: it burnt" in shown and "Compiled with jax 1, libtpu 2." in shown
    lines = programs_table.plain([result(FITS), result(bare, "b")]).splitlines()
    assert len(lines) == 4 and lines[0].split()[:3] == ["pair", "slice", "mesh"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (117.23G) "
            "exceeds available HBM (15.75G).",
            (117.23, 15.75),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 33.5G of "
            "30.75G hbm. Exceeded hbm capacity by 2.75G.\n\nTotal hbm usage >= 33.75G:",
            (33.5, 30.75),
        ),
    ],
)
def test_the_compiler_saying_that_memory_is_short(message, expected):
    assert compiling.out_of_memory(message) == tuple(round(value * 2**30) for value in expected)
    assert compiling.out_of_memory("INTERNAL: a bug") is None
