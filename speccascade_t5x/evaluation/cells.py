"""What a sweep keeps on disk while it runs: every finished cell, written atomically.

    <output_dir>/sweep.json              what the sweep measures; the folder of another sweep is rejected
    <output_dir>/cells.jsonl             one row per finished cell: every figure of the report comes from these rows
    <output_dir>/cells/<cell>.json.gz    the row and its records: predictions, tokens, who wrote them, counters
    <output_dir>/timing/block-00000.json wall times of all timed points on a few examples, see `timing`

cells.jsonl is made anew, in one step, of the files in cells/ whenever a cell is finished, so a killed sweep leaves it
whole and a restart continues at the first missing cell. Of several hosts each writes the cells it measures, and the
first one all that there is once.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speccascade_t5x.common import storage
from speccascade_t5x.interfaces import UserError

FORMAT, VERSION = "speccascade_t5x.sweep", 1
ROWS, DESCRIPTION = "cells.jsonl", "sweep.json"
_DONE, _FAILED = "done", "failed"


@dataclasses.dataclass(frozen=True)
class StoredCell:
    """A finished cell.

    Attributes:
      row: its line of cells.jsonl.
      records: one per example, in input order.
      references: figures per example on the references, see `teacher_forced`; None where there are none.
    """

    row: dict[str, Any]
    records: list[dict[str, Any]]
    references: dict[str, list[float]] | None


class CellStore:
    """The folder of a sweep.

    Args:
      output_dir: made if missing.
      config: what the sweep measures, as JSON values by name. Two sweeps with equal ones are the same sweep.
      first: whether this is the host that writes what is written once. The others open the folder after it.
      reading: only reports what is there: a sweep may be at work in the folder, whose half-written files stay.

    Raises:
      UserError: the folder holds another sweep; the message says what differs.
    """

    def __init__(self, output_dir: str | Path, config: Mapping[str, Any], first: bool = True, reading: bool = False):
        self.folder, self._first, self._reading = Path(output_dir), first, reading
        self.config = json.loads(storage.to_json(dict(config)))
        self._claim()
        self._rows: dict[str, dict[str, Any]] = {}
        self._read: dict[Path, int] = {}
        if first and not reading:
            for leftover in self.folder.glob("**/.*.partial"):
                leftover.unlink(missing_ok=True)  # of a killed write
        self.read_anew()

    def read_anew(self) -> None:
        """Reads the cells that were finished since, by whichever host."""
        for path in sorted((self.folder / "cells").glob("*.json.gz")):
            written = path.stat().st_mtime_ns
            if self._read.get(path) != written:
                row = self._load(path)["row"]
                self._rows[row["cell"]], self._read[path] = row, written
        if self._rows:
            self._write_rows()

    def _claim(self) -> None:
        path = self.folder / DESCRIPTION
        ours = {"format": FORMAT, "version": VERSION, **self.config}
        if not path.exists():
            if (self.folder / ROWS).exists():
                raise UserError(f"{self.folder} holds {ROWS} but no sweep.json that says of what: use another folder")
            storage.write_json(path, ours)
            return
        try:
            found = storage.from_json(path.read_text("utf-8"))
            known = found["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read as a sweep's description: use another output folder") from error
        changes = [
            f"{name}: then {storage.to_json(found.get(name))}, now {storage.to_json(ours.get(name))}"
            for name in dict.fromkeys([*ours, *found])
            if found.get(name) != ours.get(name)
        ]
        if changes or not known:
            raise UserError(
                f"{self.folder} holds another sweep; use another output folder, or the settings it was made with. What "
                f"differs: {'; '.join(changes)}"
            )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the finished cells, in the order they were finished."""
        return sorted(self._rows.values(), key=lambda row: row["order"])

    @property
    def done(self) -> list[dict[str, Any]]:
        """Rows of the cells that succeeded."""
        return [row for row in self.rows if row["status"] == _DONE]

    def row(self, cell: str) -> dict[str, Any] | None:
        """The row of a cell that succeeded, or None."""
        row = self._rows.get(cell)
        return row if row and row["status"] == _DONE else None

    def has(self, cell: str) -> bool:
        """Whether a cell is on disk, even if it failed."""
        return self._path(cell).exists()

    def read(self, cell: str) -> StoredCell:
        """A finished cell with its records."""
        stored = self._load(self._path(cell))
        return StoredCell(stored["row"], stored["records"], stored["references"])

    def write(
        self,
        row: Mapping[str, Any],
        found: Sequence[Mapping[str, Any]],
        references: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Stores a cell that succeeded; once it returns, a restart skips the cell. Returns its row."""
        return self._write({**row, "status": _DONE}, found, references)

    def write_failure(
        self, row: Mapping[str, Any], reason: str, found: Sequence[Mapping[str, Any]] = ()
    ) -> dict[str, Any]:
        """Notes why a cell failed, and keeps what was decoded of it; a restart tries it again."""
        return self._write({**row, "status": _FAILED, "error": reason}, found, None)

    def unscored(self, cell: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(records, times) of a cell that was decoded and then failed, as where a metric broke; else empty."""
        row = self._rows.get(cell)
        if row is None or row["status"] != _FAILED:
            return [], {}
        return self.read(cell).records, row.get("decoding", {})

    def _write(
        self, row: dict[str, Any], found: Sequence[Mapping[str, Any]], references: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        before = self._rows.get(row["cell"])
        row["order"] = before["order"] if before else row.get("order", len(self._rows))
        text = storage.to_json({"row": row, "records": list(found), "references": references})
        storage.write_bytes(self._path(row["cell"]), [gzip.compress(text.encode("utf-8"), mtime=0)])
        self._rows[row["cell"]] = json.loads(text)["row"]
        self._write_rows()
        return self._rows[row["cell"]]

    def _write_rows(self) -> None:
        if not self._first or (self._reading and (self.folder / ROWS).exists()):
            return
        lines = [(storage.to_json(row) + "\n").encode("utf-8") for row in self.rows]
        storage.write_bytes(self.folder / ROWS, lines)

    def _path(self, cell: str) -> Path:
        return self.folder / "cells" / f"{cell}.json.gz"

    def _load(self, path: Path) -> dict[str, Any]:
        try:
            return storage.from_json(gzip.decompress(path.read_bytes()))
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path} is damaged: remove it, and the sweep measures this cell again") from error

    def block(self, index: int) -> dict[str, Any] | None:
        """A finished block of wall times, or None."""
        path = self.folder / "timing" / f"block-{index:05d}.json"
        try:
            return storage.from_json(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged: remove it, and the sweep measures this block again") from error

    def write_block(self, index: int, block: Mapping[str, Any]) -> None:
        """Stores a block of wall times."""
        storage.write_json(self.folder / "timing" / f"block-{index:05d}.json", block)
