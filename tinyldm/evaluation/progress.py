"""Progress of an evaluation: a bar on a terminal, a line now and then in a log file, where nobody would see a bar move. Of several
processes the first shows its own."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm

EVERY = 30.0                # seconds between lines in a file


def progress(total: int | None, label: str = "", shown: bool = True) -> tqdm:
    """A bar over pictures."""
    every: dict[str, Any] = {} if sys.stderr.isatty() else {"mininterval": EVERY, "maxinterval": EVERY}
    return tqdm(total=total, unit="picture", desc=label or None, disable=not shown or int(os.environ.get("RANK", 0)) > 0, **every)
