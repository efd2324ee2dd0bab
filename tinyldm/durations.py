"""Parses and formats durations and dates: 7d, 1h30m, 2030-01-31T18:00."""

from __future__ import annotations

import math
import re
import time
from datetime import datetime

UNITS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
DURATION = re.compile("".join(rf"(?:([0-9]+(?:\.[0-9]+)?){unit})?" for unit in UNITS))


def parse_duration(text: str) -> float:
    """"7d", "1d12h", "1.5h", "20m", "90s" -> seconds. ValueError for anything else, and for "" or 0."""
    found = DURATION.fullmatch(text.strip().lower())
    result = sum(float(number or 0) * size for number, size in zip(found.groups(), UNITS.values())) if found else 0.0
    if not 0 < result < math.inf:
        raise ValueError(f"'{text}' is not a span of time: use days, hours, minutes, seconds, as in 7d, 1d12h, 1.5h, 20m, 90s")
    return result


def parse_date(text: str) -> float:
    """"2030-01-31T18:00", local time unless it names a zone -> seconds since 1970. ValueError for anything else."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):                # the last two: a year that the system's clock does not have
        raise ValueError(f"'{text}' is not a date and time: write it as in 2030-01-31T18:00") from None


def with_zone(text: str) -> str:
    """"2030-01-31T18:00" -> "2030-01-31T18:00-05:00" in New York: the same moment wherever it is read. Text that names its zone, or is
    no date, stays as it is."""
    try:
        date = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return text
    seconds = "auto" if date.second or date.microsecond else "minutes"
    try:
        return date.astimezone().isoformat(timespec=seconds) if date.tzinfo is None else text
    except (ValueError, OverflowError, OSError):                # as in parse_date, which refuses it
        return text


def show_duration(seconds: float) -> str:
    """Seconds -> 3 d 4 h, 1 h 5 m, 20 m 3 s, 7 s: the two largest units."""
    left, parts = round(seconds), []
    for unit, size in UNITS.items():
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def show_date(seconds: float) -> str:
    """The date in this number of seconds from now, in local time: Fri 27 Nov 14:05."""
    return time.strftime("%a %d %b %H:%M", time.localtime(time.time() + min(seconds, 1e9)))
