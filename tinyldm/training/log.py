"""log.jsonl: one JSON object per line, ordered by stage and step even after interruptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tinyldm.files import flush, write_file


class Log:
    """Rows with at least `stage` and `step`. Opening the log at (stage, step) removes the rows of later steps, which a resumed
    run takes again. path None: nothing is written. on_row: called with every row."""

    def __init__(self, path: Path | None, stage: str = "vae", step: int = 0, on_row: Callable[[dict], None] = lambda row: None):
        self.path, self.on_row = path, on_row
        if path and path.exists():
            kept = [row for row in read(path) if (row["stage"] != "vae", row["step"]) <= (stage != "vae", step)]
            write_file(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row) -> None:
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        self.on_row(row)

    def flush(self) -> None:
        """Flush the rows to the disk. Called before a checkpoint is written: the run resumes after these rows and never
        repeats them."""
        if self.path and self.path.exists():
            flush(self.path)


def read(path: Path) -> list[dict]:
    """All rows; a line that a crash left incomplete is skipped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
