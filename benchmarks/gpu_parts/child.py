"""The process of one part: python -m gpu_parts.child MODULE:FUNCTION JOB RESULTS

JOB is a JSON file. What the part reports is appended to RESULTS at once, one JSON object a line, so that a crash loses nothing."""

from __future__ import annotations

import json
import sys
import traceback
from importlib import import_module
from pathlib import Path

from gpu_parts.findings import FAILED, NOT_HERE, Detail, Finding, Job, NotPossible, one_line
from tinyldm.cli import allow_expandable_segments

KINDS = {"finding": Finding, "detail": Detail}
WHOLE = "the part as a whole"       # name of the finding where a part ends before its time


def read_results(file: Path) -> list[Finding | Detail]:
    """What a part has reported so far. A line that was cut off by a crash is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.append(KINDS[row.pop("kind")](**row))
    return found


def run(function: str, job: Job, results: Path) -> int:
    """Run a part in this process. -> exit code"""
    with open(results, "a", encoding="utf-8") as file:
        def report(item: Finding | Detail) -> None:
            kind = next(name for name, known in KINDS.items() if isinstance(item, known))
            file.write(json.dumps({"kind": kind, **item._asdict()}) + "\n")
            file.flush()

        module, _, name = function.partition(":")
        try:
            getattr(import_module(module), name)(job, report)
        except NotPossible as reason:
            report(Finding(WHOLE, verdict=NOT_HERE, note=str(reason)))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            report(Finding(WHOLE, verdict=FAILED, note=one_line(error)))
            return 1
    return 0


if __name__ == "__main__":
    allow_expandable_segments()         # before a part loads torch, as train.py does: in this process it would come too late
    sys.exit(run(sys.argv[1], Job(**json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))), Path(sys.argv[3])))
