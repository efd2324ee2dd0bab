"""The engine of the bench: sides of a case are checked for equal output, then timed in turn, then written as rows and as JSON.

A side is faster than another by the median of the ratios of their times in the same rounds. The spread is that of these ratios, from the
first to the third quartile: a machine that is slower for a while is so for both.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.bench import measure

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}      # by which outputs may differ, in units of their norm: rounding


class Options(NamedTuple):
    """What the command line says. Only texts, numbers and truth values: processes of sides get it as JSON."""

    command: str
    scale: str = "full"
    dtype: str = "fp32"
    device: str = "cpu"
    peer: str = "diffusers"         # "none": our sides alone
    compile: bool = False           # further sides under torch.compile
    approximate: bool = False       # further sides that change the picture
    flash: bool = True              # False: torch's flash attention is off, for all sides
    steps: int = 20                 # of sampling
    folder: str = ""                # for files that sides read


class Turn(NamedTuple):
    seconds: float
    notes: dict[str, float]         # further measurements by name, in seconds


class Work:
    """One side at work in this process.

    call: what is timed; it may return further measurements by name. output: computes what is compared with the other sides (default: what
    `call` returns)."""

    def __init__(self, call: Callable[[], Any], device: torch.device, output: Callable[[], Tensor] | None = None):
        self.call, self.device, self.compute = call, device, output or call

    def output(self) -> tuple[Tensor, float]:
        """The output, and the seconds that this first call took: with torch.compile nearly all of it goes into compiling."""
        found: list[Tensor] = []
        took = measure.seconds(lambda: found.append(self.compute()), self.device)
        return found[0].detach().float().cpu(), took

    def run(self) -> Turn:
        found: list[Any] = []
        took = measure.seconds(lambda: found.append(self.call()), self.device)
        return Turn(took, found[0] if isinstance(found[0], dict) else {})

    def peak(self) -> float | None:
        return measure.peak_gb(self.call, self.device)

    def launches(self) -> int:
        return measure.launches(self.call, self.device)


class Worker(Protocol):
    """A Work, or one in another process (processes.py)."""

    def output(self) -> tuple[Tensor, float]: ...
    def run(self) -> Turn: ...
    def peak(self) -> float | None: ...
    def launches(self) -> int: ...


class Side(NamedTuple):
    """One of the ways to do the same work."""

    name: str
    build: Callable[[], Work]
    peer: bool = False                          # another library, or whatever else ours is compared with
    exact: bool = True                          # False: its output is not the same, and its error is only shown
    settings: Callable[[], None] = lambda: None     # what its script sets for a whole process


class Case(NamedTuple):
    """A row of a table: work that all sides do with the same weights and inputs."""

    name: str
    sides: Sequence[Side]
    flops: Callable[[], int]                    # useful ones: what the shapes of the work ask for, however a side does it
    tolerance: float
    prepare: Callable[[], None] = lambda: None  # writes the files that sides read
    fresh: bool = False                         # every turn in a new process


class Result(NamedTuple):
    """What was found of a side. Times in seconds, memory in GB."""

    side: str
    peer: bool
    seconds: list[float]
    first: float
    error: float | None                         # of its output, relative to the norm of the reference; None: it is the reference
    peak: float | None
    launches: int
    notes: dict[str, float]
    ratios: dict[str, tuple[float, float, float]]       # peer -> how many times as fast: median, first and third quartile

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Findings(NamedTuple):
    case: str
    flops: int                                  # of one call
    matmul: float                               # FLOP/s of large products in the same rounds, median
    results: list[Result]


def error_of(found: Tensor, reference: Tensor) -> float:
    """The norm of the difference in units of the reference's; NaN where a number is not finite, infinite for different shapes."""
    if found.shape != reference.shape:
        return math.inf
    return float((found.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30))


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return quartiles[1], quartiles[0], quartiles[2]


def check(case: Case, outputs: Sequence[Tensor]) -> list[float | None]:
    """The error of each side, relative to the reference, which has none: the first peer, or the first side where there is no peer. That of
    a side that is not exact is relative to the first side, so that another library's rounding is no part of it. ValueError where an exact
    side's error is larger than rounding explains."""
    chosen = next((i for i, side in enumerate(case.sides) if side.peer), 0)
    reference = lambda side: outputs[chosen if side.exact else 0]
    errors = [None if i == chosen else error_of(found, reference(side)) for i, (side, found) in enumerate(zip(case.sides, outputs))]
    for side, error in zip(case.sides, errors):
        if side.exact and error is not None and not error <= case.tolerance:        # so that NaN is refused
            raise ValueError(f"{case.name}: the output of {side.name} differs from that of {case.sides[chosen].name} by {error:.1e} of its "
                             f"norm, where {case.tolerance:.0e} is rounding: nothing was timed, since the two do not do the same work")
    return errors


def compare(case: Case, workers: Sequence[Worker], rounds: int, matmul: Callable[[], float]) -> Findings:
    """Check, then time, then look at memory and operations. workers: of the case's sides. matmul: measures FLOP/s once."""
    outputs = [worker.output() for worker in workers]
    errors = check(case, [output for output, _ in outputs])
    *turns, rates = measure.in_turns([*(worker.run for worker in workers), matmul], rounds)
    times = {side.name: [turn.seconds for turn in found] for side, found in zip(case.sides, turns)}
    peers = [side.name for side in case.sides if side.peer]
    results = []
    for side, worker, found, error, (_, first) in zip(case.sides, workers, turns, errors, outputs):
        notes = {name: statistics.median(turn.notes[name] for turn in found) for name in found[0].notes}
        ratios = {peer: spread([theirs / own for theirs, own in zip(times[peer], times[side.name])]) for peer in peers if peer != side.name}
        results.append(Result(side.name, side.peer, times[side.name], first, error, worker.peak(), worker.launches(), notes, ratios))
    return Findings(case.name, case.flops(), statistics.median(rates), results)


# ---- rows and lines

HEAD = ("case", "side", "ms", "TFLOP/s", "of matmul", "peak GB", "operations", "first call s", "error", "times as fast as (quartiles)")


def rows(found: Findings) -> list[tuple[str, ...]]:
    """A row of cells for each side, in the order of HEAD."""
    made = []
    for i, result in enumerate(found.results):
        rate = found.flops / result.median
        speed = [f"{name} {middle:.2f} ({low:.2f} to {high:.2f})" for name, (middle, low, high) in result.ratios.items()]
        notes = [f"{name} {1e3 * value:,.0f} ms" for name, value in result.notes.items()]
        made.append((found.case if i == 0 else "", result.side, f"{1e3 * result.median:,.1f}",
                     *((f"{rate / 1e12:.3f}", f"{rate / found.matmul:.0%}") if found.flops else ("-", "-")),
                     "-" if result.peak is None else f"{result.peak:.2f}", f"{result.launches:,}", f"{result.first:.1f}",
                     "-" if result.error is None else f"{result.error:.1e}", "; ".join([*speed, *notes]) or "-"))
    return made


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def record(found: Findings, about: Mapping[str, Any]) -> dict[str, Any]:
    """A case as JSON. about: hardware, versions, date, options."""
    sides = []
    for result in found.results:
        rate = found.flops / result.median
        ratios = {name: dict(zip(("median", "q1", "q3"), three)) for name, three in result.ratios.items()}
        sides.append({"side": result.side, "peer": result.peer, "median_s": result.median, "seconds": result.seconds,
                      "first_s": result.first, "tflops": rate / 1e12, "of_matmul": rate / found.matmul, "peak_gb": result.peak,
                      "launches": result.launches, "error": result.error, "notes": result.notes, "times_as_fast_as": ratios})
    return {**about, "case": found.case, "flops": found.flops, "matmul_tflops": found.matmul / 1e12, "sides": sides}


def append(file: Path, content: Mapping[str, Any]) -> None:
    """Add a line to a .jsonl file, which is made where it is missing. What a crash left of a last line gets a line of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    finite = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    text = json.dumps({name: finite(value) for name, value in content.items()}, ensure_ascii=False) + "\n"
    with open(file, "ab+") as handle:
        if handle.tell():
            handle.seek(-1, 2)
            text = text if handle.read(1) == b"\n" else "\n" + text
        handle.write(text.encode())


def with_compiled(options: Options, name: str, build: Callable[[bool], Work], **fields: Any) -> list[Side]:
    """A side as it is and, with --compile, under torch.compile. build: takes whether to compile."""
    variants = [("", False), *[(" compiled", True)] * options.compile]
    return [Side(name + word, partial(build, compiled), **fields) for word, compiled in variants]
