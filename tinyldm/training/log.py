"""log.jsonl: one JSON object per line, in the order the run went, also across interruptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tinyldm.files import flush, write_file


class Log:
    """Rows with at least `stage` and `step`. Opening it at (stage, step) forgets the rows of steps that a resumed
    run is going to take again. Without a path nothing is written. also: is told every row, too."""

    def __init__(self, path: Path | None, stage: str = "vae", step: int = 0, also: Callable[[dict], None] = lambda row: None):
        self.path, self.also = path, also
        if path and path.exists():
            kept = [row for row in read(path) if (row["stage"] != "vae", row["step"]) <= (stage != "vae", step)]
            write_file(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row) -> None:
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        self.also(row)


    def flush(self) -> None:
        """To the disk, before a checkpoint says that these rows need not be written again."""
        if self.path and self.path.exists():
            flush(self.path)


def read(path: Path) -> list[dict]:
    """All whole rows; a line torn by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
