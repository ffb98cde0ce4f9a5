"""The files of a decoding run, each written atomically.

    <output_dir>/<task>-predict.jsonl-00000-of-0000N   one JSON object per example
    <output_dir>/<task>-metrics.json, <task>-timing.json, <task>-summary.md
    <output_dir>/<task>-predict.config.txt             the settings the records were made with
    <output_dir>/<task>-predict.chunks/                finished chunks, until the shard is whole

A file is renamed to its name after its bytes are on disk, so no reader sees a partial file. A
killed run that is started again writes only the missing chunks; the final file is made of the
chunks alone, so it is byte-identical to that of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import difflib
import numbers
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speccascade_t5x.common import storage
from speccascade_t5x.interfaces import UserError

_MOST_DIFFERENCES = 10


def claim(output_dir: Path, task: str) -> Path:
    """The file that holds the settings with which the records of a task were made."""
    return output_dir / f"{storage.file_stem(task)}-predict.config.txt"


class RecordWriter:
    """Collects the records of one run, chunk by chunk, and survives being killed.

    Args:
      output_dir: folder of the files; created if missing.
      task: name of the task, or of the input.
      config_text: the resolved settings of the run. Records of other settings are never mixed in.
      num_chunks: how many chunks `write_chunk` will be called with, in all.

    Raises:
      UserError: the folder holds records of other settings; the message shows what differs.
    """

    def __init__(self, output_dir: str | Path, task: str, config_text: str, num_chunks: int):
        self.output_dir = Path(output_dir)
        self.num_chunks = num_chunks
        self._stem = storage.file_stem(task)
        self._shard = "00000-of-00001"  # one process writes the records of all
        self._chunk_dir = self.output_dir / f"{self._stem}-predict.chunks" / self._shard
        self.path = self.output_dir / f"{self._stem}-predict.jsonl-{self._shard}"
        settings = storage.as_utf8(config_text.rstrip("\n")) + f"\n# {num_chunks} chunks, 1 shards\n"
        self._claim(settings)
        for leftover in self.output_dir.glob(f".{_escape(self.path.name)}.*.partial"):
            leftover.unlink(missing_ok=True)  # a killed `finish`

    def _claim(self, settings: str) -> None:
        """Binds the output to these settings, or rejects a folder bound to others."""
        path = claim(self.output_dir, self._stem)
        try:
            found = path.read_text("utf-8")
        except FileNotFoundError:
            if self.path.exists():
                raise UserError(
                    f"{self.path} exists, but {path.name} with the settings it was made with does not: "
                    "choose another output folder, or move the file away"
                ) from None
            storage.write_text(path, settings)
            return
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if found == settings:
            return
        changes = [
            line
            for line in difflib.unified_diff(found.splitlines(), settings.splitlines(), lineterm="", n=0)
            if not line.startswith(("---", "+++", "@@"))
        ]
        shown = "\n".join(f"  {line}" for line in changes[:_MOST_DIFFERENCES])
        more = f"\n  and {len(changes) - _MOST_DIFFERENCES} more" if len(changes) > _MOST_DIFFERENCES else ""
        raise UserError(
            f"{self.output_dir} holds records of {self._stem!r} made with other settings: choose another folder, "
            f"or remove {path.name} and the records to start again. Lines that differ (- then, + now):\n{shown}{more}"
        )

    def _chunk_path(self, chunk: int) -> Path:
        return self._chunk_dir / f"{chunk:05d}-of-{self.num_chunks:05d}.jsonl"

    def done_chunks(self) -> list[int]:
        """Chunks that need not be decoded again, in order."""
        if self.path.exists():
            return list(range(self.num_chunks))
        return [i for i in range(self.num_chunks) if self._chunk_path(i).exists()]

    def write_chunk(self, chunk: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Stores the records of one chunk; once it returns, a restart skips this chunk."""
        if not 0 <= chunk < self.num_chunks:
            raise UserError(f"there is no chunk {chunk}: this run has chunks 0 to {self.num_chunks - 1}")
        lines = [(storage.to_json(record) + "\n").encode("utf-8") for record in records]
        storage.write_bytes(self._chunk_path(chunk), lines)

    def finish(self, order: Sequence[int] | None = None) -> Path:
        """Joins the chunks into the final file and returns its path. Safe to repeat.

        Args:
          order: the final file's record i is the order[i]-th record written, counted over the chunks in
            order; None keeps the order of the chunks.

        Raises:
          UserError: a chunk is missing.
        """
        if not self.path.exists():
            missing = sorted(set(range(self.num_chunks)) - set(self.done_chunks()))
            if missing:
                raise UserError(
                    f"{self.path} is not complete: chunk {missing[0]} of {self.num_chunks} has not been written"
                )
            chunks = (self._chunk_path(i).read_bytes() for i in range(self.num_chunks))
            if order is not None:
                lines = [line for chunk in chunks for line in chunk.splitlines(keepends=True)]
                chunks = (lines[i] for i in order)
            storage.write_bytes(self.path, chunks)
        shutil.rmtree(self._chunk_dir, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._chunk_dir.parent.rmdir()  # stays while other shards still write
        return self.path

    def read_all(self) -> Iterator[dict[str, Any]]:
        """The records written so far, in order."""
        paths = [self.path] if self.path.exists() else [self._chunk_path(i) for i in self.done_chunks()]
        for path in paths:
            yield from storage.read_records(path)

    def write_metrics(self, metrics: Mapping[str, Any]) -> Path:
        """Writes `<task>-metrics.json` and returns its path."""
        return storage.write_json(self.output_dir / f"{self._stem}-metrics.json", metrics)

    def write_timing(self, timing: Mapping[str, Any]) -> Path:
        """Writes `<task>-timing.json` and returns its path."""
        return storage.write_json(self.output_dir / f"{self._stem}-timing.json", timing)

    def write_summary(self, markdown: str) -> Path:
        """Writes `<task>-summary.md` and returns its path."""
        return storage.write_text(self.output_dir / f"{self._stem}-summary.md", markdown)


def shown(value: Any) -> str:
    """A metric in one human-readable line: numbers with four digits, commas between the parts of a list."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "-"
    if isinstance(value, numbers.Number) and not isinstance(value, bool):
        return f"{value:.4g}"
    return "-" if value is None else " ".join(str(value).split())


def _escape(name: str) -> str:
    """`name` as a literal glob pattern."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
