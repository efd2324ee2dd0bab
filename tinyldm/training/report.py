"""Writes RUN/report.html: one page that shows a run, during training and afterwards, from the files in its folder.

The page is the template report.html beside this file with one block of JSON in it. It needs no network and no library:
thinned curves are in the page, and the sample grids are links into RUN/samples. A file that is missing or damaged leaves a gap
on the page and never raises an error: a report must not end a training run.
"""

from __future__ import annotations

import datetime
import html
import importlib.metadata
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from tinyldm.cli import best_effort
from tinyldm.config import FINETUNES, PRESETS, AutoencoderConfig, flatten, make_config
from tinyldm.config.fields import SETTINGS
from tinyldm.config.finetune import finetune_row
from tinyldm.durations import parse_date, parse_duration
from tinyldm.files import read_json, write_file
from tinyldm.training import log
from tinyldm.training.portable import portable_settings
from tinyldm.version import version

POINTS = 2000          # points of a curve, at most
BINS = 16              # curves by noise level t, at most
EVENTS = 400           # plans shown, and other events shown, at most
CHANNELS = 64          # of latents whose statistics are shown, at most
TEXT = 400             # characters shown of an event, at most; ten times as many of a setting
SCALARS = ("loss lr_factor grad_norm update_ratio val_raw val_ema val_psnr val_text_to_image val_image_to_text scale eval_prompts "
           "eval_prompts_held_out eval_fid eval_clip images_per_second mfu memory_gb skipped").split()
VECTORS = ("t_bins", "val_bins")


def write_report(run: Path, environment: dict | None = None) -> Path:
    """Write RUN/report.html atomically -> its path. OSError where the page cannot be written.

    environment: further names and values to show with the versions of Python, torch and the platform; an equal name replaces one.
    """
    config = read_json_or_nothing(run / "config.json")
    rows = read_rows(run / "log.jsonl")
    kept = keep_newest(events := [row for row in rows if "event" in row])
    saved = checkpoints(run)
    names = dict.fromkeys(row["stage"] for row in [*rows, *saved]) or ["step"]
    stages = {name: stage(name, [row for row in rows if row["stage"] == name], config, saved)
              for name in sorted(names, key=lambda name: name != "vae")}
    only = config.get("only") == "vae"
    name, finished = run.resolve().name, (run / "vae").is_dir() if only else is_finished(config, rows, saved)
    data = {
        "name": name, "folder": f"…/{name}" if run.is_absolute() else str(run),
        "preset": str(config.get("vae_preset" if only else "preset", "")),
        "finished": finished, "only": only, "latents": latents(rows),
        "written": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "stages": stages, "hours": running_hours(rows), "time": time_to_go(config), "checkpoints": saved, "samples": samples(run),
        "events": [shown(event) for event in kept], "events_left_out": len(events) - len(kept),
        "prompts": prompts(config), "config": compare(config),
        "environment": {str(key): text(value) for key, value in {**versions(), **trained_by(config), **(environment or {})}.items()},
    }
    parts = {"TITLE": html.escape(name), "DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
             "REFRESH": "" if finished else '<meta http-equiv="refresh" content="60">'}
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = re.sub("@(TITLE|DATA|REFRESH)@", lambda match: parts[match[1]], template)
    write_file(run / "report.html", page.encode("utf-8", "replace"))
    return run / "report.html"


# ---------------------------------------------------------------- reading the folder


def read_json_or_nothing(path: Path) -> dict:
    """A JSON object from a file; {} where it is missing or damaged."""
    try:
        return read_json(path, "")
    except (OSError, ValueError):
        return {}


def read_rows(path: Path) -> list[dict]:
    """The rows of the log that have a stage and a step, sorted by step within each stage."""
    try:
        rows = log.read(path)
    except (OSError, ValueError):
        return []
    rows = [row for row in rows
            if isinstance(row, dict) and isinstance(row.get("stage"), str) and math.isfinite(number(row.get("step")))]
    stages = dict.fromkeys(row["stage"] for row in rows)
    return [row for name in stages for row in sorted((r for r in rows if r["stage"] == name), key=itemgetter("step"))]


def checkpoints(run: Path) -> list[dict]:
    """The checkpoints on disk, oldest first: {name, stage, step, finished}."""
    found = []
    for path in run.glob("checkpoints/*/state.json"):
        state, match = read_json_or_nothing(path), re.fullmatch(r"(\w+)-(\d{1,15})", path.parent.name)
        if state and match:
            found.append({"name": path.parent.name, "stage": match[1], "step": int(match[2]),
                          "finished": state.get("finished") is True})
    return sorted(found, key=lambda one: (one["stage"] != "vae", one["step"]))


def samples(run: Path) -> list[dict]:
    """The pictures in RUN/samples, sorted by step: {src: relative address, label, step: None where the name has none}."""
    found = [{"src": f"samples/{quote(os.fsencode(path.name))}", "label": path.stem,
              "step": int(match[1]) if (match := re.fullmatch(r"step-(\d{1,15})", path.stem)) else None}
             for path in run.glob("samples/*.png")]
    return sorted(found, key=lambda one: (one["step"] or 0, one["label"]))


def is_finished(config: dict, rows: list[dict], saved: list[dict]) -> bool:
    """Whether the second stage reached its end and has not been continued since (a run can be made longer)."""
    ends = [one["step"] for one in saved if one["stage"] == "step" and one["finished"]]
    rows = [row for row in rows if row["stage"] == "step"]
    total = math.nan if any(row.get("event") == "plan" for row in rows) else number(config.get("max_steps"))
    return bool(ends) and not any(ends[-1] < step for step in [total, *(row["step"] for row in rows)])


# ---------------------------------------------------------------- curves


def number(value: Any) -> float:
    """The value as a float; NaN where it is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    with suppress(OverflowError):
        return float(value)
    return math.inf


def floats(values: Sequence[Any]) -> np.ndarray:
    if set(map(type, values)) <= {int, float}:
        with suppress(OverflowError):
            return np.array(values, np.float64)
    return np.array([number(value) for value in values])


def thin(steps: Sequence[float], values: Sequence[Any], points: int = POINTS) -> dict[str, list]:
    """Reduce a curve to about `points` points. -> {x, y: all points, or of each bucket the lowest and the highest; mx, my: the
    means of the buckets, where there are buckets; bad: the steps of values that are not finite, 200 at most}."""
    x, y = floats(steps), floats(values)
    x, y, bad = x[np.isfinite(y)], y[np.isfinite(y)], x[~np.isfinite(y)]
    bad = bad[np.linspace(0, len(bad) - 1, min(len(bad), 200)).astype(int)]
    if len(x) <= points:
        return {"x": plain(x), "y": plain(y), "bad": plain(bad)}
    edges = np.linspace(0, len(x), points // 2 + 1).astype(int)
    kept = {0, len(x) - 1}
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist()):
        kept |= {low + int(y[low:high].argmin()), low + int(y[low:high].argmax())}
    index, counts = np.array(sorted(kept)), np.diff(edges)
    # Divided before the sum, which therefore cannot overflow.
    means = [np.add.reduceat(z / np.repeat(counts, counts), edges[:-1]) for z in (x, y)]
    return {"x": plain(x[index]), "y": plain(y[index]), "mx": plain(means[0]), "my": plain(means[1]), "bad": plain(bad)}


def plain(values: np.ndarray) -> list:
    return [int(v) if v == int(v) and abs(v) < 1e15 else float(f"{v:.6g}") for v in values.tolist()]


def stage(name: str, rows: list[dict], config: dict, saved: list[dict]) -> dict:
    """The page's data for one stage: {step: its last known step, plan, curves: {name: curve}, bins: {name: [curve per bin]}}."""
    keys = set().union(*rows)
    curves = {key: found for key in SCALARS if key in keys and (found := curve(rows, lambda row: scalar(row, key)))}
    bins = {}
    for key in VECTORS:
        listed = [row for row in rows if isinstance(row.get(key), list)]
        length = min(BINS, max((len(row[key]) for row in listed), default=0))
        if length:
            bins[key] = [curve(listed, lambda row: row[key][i] if i < len(row[key]) else None) or thin([], [])
                         for i in range(length)]
    steps = [0] + [row["step"] for row in rows[-1:]] + [one["step"] for one in saved if one["stage"] == name]
    return {"step": max(steps), "plan": plan(name, rows, config), "curves": curves, "bins": bins}


def scalar(row: dict, key: str) -> Any:
    """A value of a row; NaN for null, as which numbers that are not finite are logged; None where the row has no such value."""
    return math.nan if key in row and row[key] is None else row.get(key)


def curve(rows: list[dict], pick: Callable[[dict], Any]) -> dict | None:
    values = [pick(row) for row in rows]
    steps = [row["step"] for row, value in zip(rows, values) if value is not None]
    return thin(steps, [value for value in values if value is not None]) if steps else None


def latents(rows: list[dict]) -> dict | None:
    """The newest statistics of latents in the log (latent_statistics.py): {step: ..., and of them what consists of finite numbers}; None
    where there are none."""
    found = [row for row in rows if isinstance(row.get("latents"), dict)]
    if not found:
        return None
    kept = {"step": found[-1]["step"]}
    for name, value in found[-1]["latents"].items():
        with suppress(ValueError, TypeError, OverflowError):
            array = np.array(value, np.float64)
            if np.isfinite(array).all() and max((0, *array.shape)) <= CHANNELS:
                kept[name] = array.tolist()
    return kept


def running_hours(rows: list[dict]) -> dict[str, dict]:
    """For each stage, the running time at every logged step: hours, added up over interruptions. Rows of older logs have no
    `running`; for those `seconds`, which starts again at 0 with each process, is added up."""
    before, last, curves = 0.0, 0.0, {}
    for row in rows:
        process, running = (max(0.0, number(row.get(key))) if number(row.get(key)) < math.inf else None for key in ("seconds", "running"))
        if process is not None:
            before += last if process < last else 0.0
            last = process
        if running is not None:
            before = running - last
        if process is not None or running is not None:
            curves.setdefault(row["stage"], []).append((row["step"], (before + last) / 3600))
    return {name: thin(*zip(*points)) for name, points in curves.items()}


def plan(name: str, rows: list[dict], config: dict) -> dict:
    """The newest plan of a stage, from its events, else from the settings; None for what neither of them gives."""
    events = [row for row in rows if row.get("event") == "plan"]
    planned = shown(events[-1]) if events else {}
    settings = {key: value for key, value in config.items() if 0 < number(value) < math.inf}
    counted = name == "vae" and not (config.get("only") and (config.get("budget") or config.get("deadline")))
    total = planned.get("total_steps") or settings.get("vae_steps" if counted else "max_steps")
    decay = settings.get("vae_decay", AutoencoderConfig.decay) if name == "vae" else settings.get("decay")
    default = round(total * (1 - decay)) if total and decay is not None else None
    return {"total": total, "decay_from": planned.get("decay_from", default), "finish": planned.get("finish"),
            "warmup": settings.get("warmup_steps", 0)}


def time_to_go(config: dict) -> dict:
    """When the run must end: {hours: its budget, ends: its deadline in seconds since 1970}, each only if the run has one."""
    found = {}
    for key, name, convert in (("hours", "budget", lambda text: parse_duration(text) / 3600), ("ends", "deadline", parse_date)):
        with suppress(ValueError, OverflowError, OSError):     # OSError: a year outside the range of Windows
            if isinstance(config.get(name), str):
                found[key] = convert(config[name])
    return found


# ---------------------------------------------------------------- events, settings, environment


def text(value: Any, length: int = TEXT) -> str:
    """A value as text of at most `length` characters."""
    full = value if isinstance(value, str) else json.dumps(value, default=str)
    return full if len(full) <= length else full[: length - 1] + "…"


def keep_newest(events: list[dict]) -> list[dict]:
    """The newest EVENTS plans and the newest EVENTS other events, oldest first."""
    plans = [event for event in events if event["event"] == "plan"][-EVENTS:]
    kept = {id(event) for event in plans + [event for event in events if event["event"] != "plan"][-EVENTS:]}
    return [event for event in events if id(event) in kept]


def shown(event: dict) -> dict:
    """The parts of an event that the page shows, each only if it is present and of the right kind."""
    kept = {"stage": event["stage"], "step": event["step"], "event": text(event["event"], 40)}
    numbers = {key: event[key] for key in ("total_steps", "decay_from", "resolution") if 0 < number(event.get(key)) < math.inf}
    texts = {key: text(event[key]) for key in ("text", "finish") if event.get(key)}
    return kept | numbers | texts


def prompts(config: dict) -> list[str]:
    joined = config.get("sample_prompts")
    return [text(prompt) for prompt in joined.split("|")[:100]] if isinstance(joined, str) and joined else []


def compare(config: dict) -> list[dict]:
    """All settings: {name, value, usual: the preset's value, differs, help}. usual: None for settings that this version lacks."""
    preset = str(config.get("preset", ""))
    row = finetune_row({"finetune": preset}) if preset in FINETUNES else PRESETS.get(preset, {})
    usual = json.loads(json.dumps(flatten(make_config(**row | {"preset": preset}))))
    usual["data"] = " ".join(usual["data"]) if isinstance(config.get("data"), str) else usual["data"]
    helps = {name: setting.help for name, setting in SETTINGS.items()}
    return [{"name": name, "value": text(value, 10 * TEXT), "usual": text(usual[name], 10 * TEXT) if name in usual else None,
             "differs": name in usual and config[name] != usual[name], "help": helps.get(name, "")}
            for name, value in portable_settings(config).items()]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"tinyldm": version()}


def trained_by(config: dict) -> dict[str, str]:
    """The version that trained the run last, where its config.json says it."""
    return {"tinyldm": str(config["version"])} if "version" in config else {}


class Refresher:
    """Keeps report.html up to date while a stage trains: called in every step that is logged, it acts once a minute, and the first time.

    draw: first writes a picture that shows how far the stage is."""

    def __init__(self, run: Path, shown: bool, draw: Callable[[], None], seconds: float = 60.0):
        self.run, self.shown, self.draw, self.seconds, self.due = run, shown, draw, seconds, 0.0

    def __call__(self, timer: Any) -> None:
        if self.shown and time.monotonic() >= self.due:
            with timer.outside_steps("report.html"):
                best_effort("the picture of the stage", self.draw)
                refresh_report(self.run)
            self.due = time.monotonic() + self.seconds


def refresh_report(run: Path) -> None:
    """Write RUN/report.html during training; a failure does not end the run."""
    best_effort("report.html", lambda: write_report(run, {"Python": platform.python_version(), "torch": torch.__version__,
                                                      "machine": platform.platform()}))
