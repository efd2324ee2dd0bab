"""What a part reports: findings, each with a verdict, and tables for the page. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

OK, OFF, FAILED, NOT_HERE, NO_TIME = VERDICTS = ("ok", "off", "failed", "not possible here", "no time")
LONGEST = 300               # characters of an error that the page shows


class Finding(NamedTuple):
    """One line of the page's verdicts."""

    name: str
    measured: str = "-"
    expected: str = "-"
    verdict: str = OK
    note: str = ""


class Detail(NamedTuple):
    """A section of the page, in Markdown, such as a table of kernels."""

    title: str
    text: str


Report = Callable[[Finding | Detail], None]


class Job(NamedTuple):
    """What a part has to know. Paths are text, because a job travels to the part's process as JSON."""

    device: str                     # cuda or cpu
    scale: str                      # full or tiny: which networks and sizes (materials.py)
    work: str                       # folder for what is needed meanwhile
    pictures: str                   # folder beside the page, for what is kept
    data: Sequence[str] = ()        # pictures for the training; (): the toy world
    train_seconds: float = 120
    memory_gb: float = 32.0         # training is measured as on a GPU with this memory, GB of 10^9 bytes
    trace: bool = False             # keep the traces of the profiled steps

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def full(self) -> bool:
        return self.scale == "full"

    def folder(self, name: str) -> Path:
        return Path(self.work) / name


class Part(NamedTuple):
    """A row of the table in gpu.py."""

    name: str
    shows: str
    function: str                   # "module:function", called with (job, report)
    seconds: float                  # that it may take at full scale; it begins only where half of them are left
    alone: bool = True              # False: it measures no time, and may run beside others


class Limit(NamedTuple):
    """When a measured figure agrees with the expected one: between low and high times that."""

    low: float
    high: float
    source: str                     # of the expected figure


class NotPossible(Exception):
    """A part or a check cannot be done on this machine; the message says why."""


def judge(name: str, measured: float, expected: float | None, limit: Limit, unit: str = "", note: str = "") -> Finding:
    """A finding from a number and the one that is expected. None: nothing is expected of this machine."""
    if expected is None:
        return Finding(name, quantity(measured, unit), "-", NOT_HERE, join(note, "measured, but figures are expected of GPUs only"))
    fits = limit.low * expected <= measured <= limit.high * expected        # false for nan, too
    shown = quantity(expected, unit)
    if limit.low == 0:
        shown = f"at most {quantity(limit.high * expected, unit)}"
    elif limit.high == float("inf"):
        shown = f"at least {quantity(limit.low * expected, unit)}"
    elif expected:
        shown += f" (x {limit.low:.3g} to {limit.high:.3g})"
    return Finding(name, quantity(measured, unit), shown, OK if fits else OFF, join(note, limit.source))


def judge_fact(name: str, fits: bool, measured: str, expected: str, note: str = "") -> Finding:
    """A finding about something that is as expected or is not."""
    return Finding(name, measured, expected, OK if fits else OFF, note)


def run_checks(job: Job, report: Report, *checks: Callable[[Job, Report], None]) -> None:
    """Run the checks of a part. One that fails becomes a finding, and the others run all the same."""
    for check in checks:
        name = check.__name__.replace("_", " ").replace("gpu", "GPU").replace("nccl", "NCCL")
        try:
            check(job, report)
        except NotPossible as reason:
            report(Finding(name, verdict=NOT_HERE, note=str(reason)))
        except Exception as error:
            report(Finding(name, verdict=FAILED, note=one_line(error)))


def quantity(value: float, unit: str = "") -> str:
    """1234.5, "ms" -> "1,234 ms"; "%" is written for a fraction."""
    if unit == "%":
        return f"{100 * value:.3g} %"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST]


def join(*sentences: str) -> str:
    return "; ".join(sentence for sentence in sentences if sentence)
