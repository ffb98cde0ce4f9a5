"""The `precompile` job: a table of pairs x slices, each cell compiled in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speccascade_t5x.common import checks as checks
from speccascade_t5x.common import storage
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models import T5Config
from speccascade_t5x.tpu import child, hardware, programs_table, slice_cells

# Called with a short description of the current step.
Progress = Callable[[str], None]
FILE, TABLE = "precompile.json", "precompile.md"
_CELLS = "cells"
_FINAL = ("fits", "too large", "failed")  # a crash may have been the machine's fault and is tried again


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of the job.

    Attributes:
      results: of each cell: {"cell", "programs": {name: report}, "versions"}, in the order asked for.
      path: of the table; None where no output folder was named.
    """

    results: list[dict[str, Any]]
    path: Path | None


@checks.arguments(timeout_s=(1.0,))
def precompile(
    architectures: Mapping[str, tuple[T5Config, T5Config]],
    environment: Mapping[str, str],
    pairs: Sequence[str],
    topologies: Sequence[str],
    options: slice_cells.Options,
    output_dir: str | Path | None = None,
    timeout_s: float = 3600.0,
    before: Callable[[], None] = lambda: None,
    progress: Progress = lambda _: None,
) -> Found:
    """Compiles every pair for every slice. Started again with the same options, it compiles what is missing.

    Args:
      architectures: pair -> (drafter, verifier).
      environment: of the child processes.
      pairs: names in `architectures`, the rows of the table.
      topologies: names of slices.
      options: what is compiled.
      output_dir: where results and tables go; None keeps nothing.
      timeout_s: time limit of one process, in seconds.
      before: called once the request has been checked.
      progress: called with a short description of the current step.

    Raises:
      UserError: a cell is not possible (before any is compiled), or the compiler rejects a slice.
    """
    if not pairs or not topologies:
        raise UserError("there is nothing to compile: name PAIRS and TOPOLOGIES")
    for name in topologies:
        hardware.named(name)
    chosen = [slice_cells.make(pair, *architectures[pair], name, options) for pair in pairs for name in topologies]
    before()
    with tempfile.TemporaryDirectory() as nowhere:
        folder = Path(nowhere if output_dir is None else output_dir)
        (folder / _CELLS).mkdir(parents=True, exist_ok=True)
        results = []
        for i, cell in enumerate(chosen):
            progress(f"{cell.pair} for {cell.topology}, model={cell.options.model} ({i + 1} of {len(chosen)})")
            results.append(_compiled(cell, folder / _CELLS / f"{cell.key}.json", environment, timeout_s, progress))
            if output_dir is not None:
                _write(folder, results)
    return Found(results, None if output_dir is None else Path(output_dir) / TABLE)


def _write(folder: Path, results: list[dict[str, Any]]) -> None:
    storage.write_json(folder / FILE, {"results": results})
    storage.write_text(folder / TABLE, programs_table.markdown(results))


def _compiled(
    cell: slice_cells.Cell, file: Path, environment: Mapping[str, str], timeout_s: float, progress: Progress
) -> dict[str, Any]:
    """The results of a cell: those that are there already, and the rest from child processes."""
    tried: set[str] = set()
    while True:
        found = child.read(file, cell)
        settled = {name for name, result in found["programs"].items() if result["status"] in _FINAL}
        missing = [name for name in cell.options.programs if name not in settled | tried]
        if not missing:
            wanted = {name: found["programs"][name] for name in cell.options.programs}
            return {**found, "programs": wanted}
        progress("  " + ", ".join(missing))
        begin = time.perf_counter()
        request = {"cell": cell.to_json(), "programs": missing, "file": str(file)}
        status, message = _run_child(request, environment, timeout_s)
        found = child.read(file, cell)
        if "refused" in found:
            storage.write_json(file, {name: value for name, value in found.items() if name != "refused"})
            raise UserError(found["refused"])
        finished = [name for name in missing if found["programs"].get(name, {}).get("status") in _FINAL]
        if len(finished) < len(missing):  # the first that is missing is what the process died of
            died = next(name for name in missing if name not in finished)
            seconds = round(time.perf_counter() - begin, 2)
            found["programs"][died] = {"program": died, "status": status, "message": message, "compile_s": seconds}
            storage.write_json(file, found)
            tried |= {died}


def _run_child(request: Mapping[str, Any], environment: Mapping[str, str], timeout_s: float) -> tuple[str, str]:
    """Runs one process. Returns a name and a reason for a program that it did not finish."""
    command = [sys.executable, "-m", child.__name__]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), env=dict(environment), timeout=timeout_s, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return "timed out", f"not done after {timeout_s:g} s"
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
    return "crashed", f"the compiler's process ended with code {done.returncode}: {said[-1][:300]}"
