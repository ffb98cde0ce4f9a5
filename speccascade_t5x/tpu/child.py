"""Compiles the programs of one cell in a process of its own: `python -m speccascade_t5x.tpu.child < request`.

The request is JSON: {"cell": Cell.to_json(), "programs": [names], "file": path}. After every program the file holds all
results so far, so a crash of the compiler loses only the current program. User errors are written there as well.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from speccascade_t5x.common import storage
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tpu import slice_cells


def read(file: Path, cell: slice_cells.Cell) -> dict[str, Any]:
    """The results of a cell so far; empty if the file is missing or damaged."""
    empty = {"cell": cell.to_json(), "programs": {}}
    try:
        found = json.loads(file.read_text("utf-8"))
        return found if isinstance(found["programs"], dict) and "cell" in found else empty
    except (OSError, ValueError, KeyError, TypeError):
        return empty


def main() -> int:
    """Reads the request from standard input. Returns the exit code."""
    request = json.load(sys.stdin)
    cell, file = slice_cells.Cell.from_json(request["cell"]), Path(request["file"])
    found = read(file, cell)
    found["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}

    def done(report: dict[str, Any]) -> None:
        found["programs"][report["program"]] = report
        storage.write_json(file, found)

    try:
        from speccascade_t5x.tpu import compiling  # the compiler loads after the request is known to be good

        compiling.compile_all(cell, request["programs"], done)
    except UserError as error:
        storage.write_json(file, {**found, "refused": str(error)})
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
