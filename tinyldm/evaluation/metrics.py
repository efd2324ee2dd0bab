"""The table of metrics. To add one, write a file beside this one, and a row here.

The file defines `measure(evaluation) -> Measurement` and, where not every model will do, `check(evaluation)`; base.py says
what they get and give. This module is imported before the command line is parsed, so it must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from tinyldm.lookup import lookup

if TYPE_CHECKING:
    from tinyldm.evaluation.base import Evaluation, Measurement


class Metric(NamedTuple):
    help: str                                                   # one line for --help
    measure: Callable[[Evaluation], Measurement]
    check: Callable[[Evaluation], None] = lambda evaluation: None       # ValueError with the reason for a model it cannot measure
    flags: Mapping[str, Mapping[str, Any]] = {}     # its own flags: "--name" -> keywords of add_argument; metrics may share one


def deferred(file: str, function: str) -> Callable[[Evaluation], Any]:
    """A function of a file in this folder; the file, and torch with it, is imported when the function is called."""
    return lambda evaluation: getattr(import_module(f"tinyldm.evaluation.{file}"), function)(evaluation)


METRICS: dict[str, Metric] = {
    "prompts": Metric("share of pictures that show the caption's subject, colour and background",
                      deferred("prompts", "measure"), deferred("prompts", "check")),
}


def metric_names(words: Iterable[str]) -> list[str]:
    """Names as typed, ["a,b", "c"], one by one and each once. ValueError for an unknown one (with the nearest name) or none."""
    names = [name for word in words for name in word.split(",") if name]
    for name in names:
        lookup(METRICS, name, "metric")
    if not names:
        raise ValueError(f"no metric is named: known: {', '.join(METRICS)}")
    return list(dict.fromkeys(names))


def metric_flags() -> dict[str, Mapping[str, Any]]:
    """The flags of all metrics; one that several metrics share is there once."""
    return {flag: keywords for metric in METRICS.values() for flag, keywords in metric.flags.items()}
