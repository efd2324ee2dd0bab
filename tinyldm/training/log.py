"""log.jsonl: one JSON object per line, ordered by stage and step even after interruptions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyldm.files import flush, write_file
from tinyldm.unicode import read_lines


class Log:
    """Rows with at least `stage` and `step`. Opening the log at (stage, step) removes the rows of later steps, which a resumed
    run takes again. path None: nothing is written. on_row: called with every row.

    A number that is not finite is written as null, since JSON has no NaN. Rows that a full disk does not take are kept and written with
    the next ones: a run need not end before a checkpoint for want of a few bytes."""

    def __init__(self, path: Path | None, stage: str = "vae", step: int = 0, on_row: Callable[[dict], None] = lambda row: None):
        self.path, self.on_row, self.unwritten, self.reported = path, on_row, b"", False
        if path and path.exists():
            kept = [row for row in read(path) if (row["stage"] != "vae", row["step"]) <= (stage != "vae", step)]
            write_file(path, b"".join(line(storable(row)) for row in kept))

    def write(self, **row) -> None:
        row = storable(row)
        if self.path:
            self.unwritten += line(row)
            self.write_out()
        self.on_row(row)

    def flush(self) -> None:
        """Flush the rows to the disk. Called before a checkpoint is written: the run resumes after these rows and never
        repeats them. OSError where they cannot be written."""
        if self.path and (self.unwritten or self.path.exists()):
            try:
                self._append()
                flush(self.path)
            except OSError as error:
                raise OSError(f"{self.path} cannot be written ({error.strerror or error}): make room, and continue with "
                              "--resume yes") from error

    def write_out(self) -> None:
        """Write the rows that are not in the file yet, if that can be done."""
        try:
            self._append()
        except OSError as error:
            if not self.reported:
                print(f"{self.path} cannot be written ({error.strerror or error}): its rows are kept, and written as soon as that can "
                      "be done", flush=True)
            self.reported = True

    def _append(self) -> None:
        """A full disk may take a part of a line. The file is not buffered, so it is known which part; the rest of the line follows it."""
        if self.unwritten:
            with open(self.path, "ab", buffering=0) as file:
                while self.unwritten:
                    self.unwritten = self.unwritten[file.write(self.unwritten):]


def storable(value: Any) -> Any:
    """A value of a row in the form in which it is written: six digits are enough, and None stands for NaN and infinities."""
    if isinstance(value, dict):
        return {name: storable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def line(row: dict) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def read(path: Path) -> list[dict]:
    """All rows; a line that a crash left incomplete is skipped."""
    rows = []
    for text in read_lines(path):
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return rows
