"""The results page, in Markdown: the machine, tables of the parts, and a verdict for every line at its end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date

from gpu_parts.findings import VERDICTS, Detail, Finding, Part

MEANING = """**ok**: as expected. **off**: measured, and not as expected; both numbers are given. **failed**: no result, the note has the
reason. **not possible here**: this machine lacks what it takes. **no time**: the time of the run was over (`--minutes`). Notes name
the source of what is expected; what is called an estimate was computed from FLOPs and bytes, before any of this had run on a GPU."""


def slug(name: str) -> str:
    """NVIDIA GeForce RTX 5090 -> rtx-5090"""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"NVIDIA|GeForce", "", name).lower()).strip("-") or "gpu"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> str:
    """A Markdown table. right: the columns that are aligned on the right."""
    line = lambda cells: f"| {' | '.join(cells)} |"
    rule = "|".join("---:" if i in right else "---" for i in range(len(head)))
    return "\n".join([line(head), f"|{rule}|", *(line(map(cell, row)) for row in rows)])


def cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def summary(findings: Iterable[Finding]) -> str:
    counts = Counter(finding.verdict for finding in findings)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def render(name: str, command: str, commit: str, results: dict[Part, list[Finding | Detail]], waiting: Sequence[Part], seconds: float,
           today: date) -> str:
    """The whole page. results: what each part has reported so far; waiting: the parts that have not ended yet."""
    lines = [f"# First run on {name}, {today.isoformat()}", "",
             f"`{command}`, commit {commit}, {seconds:.0f} seconds. Every figure on this page was measured by that run.", ""]
    for part, items in results.items():
        for item in (item for item in items if isinstance(item, Detail)):
            lines += [f"## {item.title}", "", item.text.rstrip(), ""]
    rows = [(part.name, *item) for part, items in results.items() for item in items if isinstance(item, Finding)]
    lines += ["## Verdicts", "", MEANING, "", table(["part", *Finding._fields], rows), ""]
    if waiting:
        lines += [f"Still to come, or cut off: {', '.join(part.name for part in waiting)}.", ""]
    return "\n".join([*lines, f"**{summary(Finding(*row[1:]) for row in rows)}**", ""])
