"""Durations and dates, read and shown."""

import json
import time

import pytest

from tinyldm.config import flatten, parse
from tinyldm.durations import parse_date, parse_duration, show_date, show_duration, with_zone
from tinyldm.training.schedule import make_schedule


@pytest.mark.parametrize("text, value", [("7d", 604_800), ("20m", 1200), ("90s", 90), ("1d12h", 129_600), ("36h", 129_600),
                                         ("1.5h", 5400),
                                         (" 1H30m ", 5400), ("1d1h1m1s", 90_061), ("0.5d", 43_200)])
def test_durations_are_read(text, value):
    assert parse_duration(text) == value


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "0s", "1h1d", "1h1h", "1w", "1e3s", "5 apples", "nan", "1.d",
                                  "9" * 400 + "d"])
def test_what_is_no_duration_is_refused_with_examples(text):
    with pytest.raises(ValueError, match="7d, 1d12h, 1.5h, 20m, 90s"):
        parse_duration(text)


@pytest.mark.parametrize("seconds, shown", [(0.2, "0 s"), (0, "0 s"), (7, "7 s"), (9.4, "9 s"), (1203, "20 m 3 s"), (1800, "30 m 0 s"),
                                            (3900, "1 h 5 m"), (4500, "1 h 15 m"), (273_600, "3 d 4 h"), (604_800, "7 d 0 h"),
                                            (396_000, "4 d 14 h")])
def test_durations_are_shown_in_their_two_largest_units(seconds, shown):
    assert show_duration(seconds) == shown


def test_a_date_is_local_unless_it_names_its_zone():
    assert parse_date("2030-01-31T18:00+00:00") == 1896112800
    with pytest.raises(ValueError, match="'tomorrow' is not a date and time: write it as in 2030-01-31T18:00"):
        parse_date("tomorrow")


def test_a_date_so_many_seconds_ahead_is_shown_even_where_it_is_out_of_reach(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: parse_date("2026-11-27T13:05"))
    assert show_date(3600) == "Fri 27 Nov 14:05" and show_date(float("inf")) == show_date(1e9)


@pytest.fixture
def zone(monkeypatch):
    if not hasattr(time, "tzset"):
        pytest.skip("the time zone cannot be changed here")

    def set_zone(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield set_zone
    monkeypatch.undo()
    time.tzset()


def test_a_date_with_the_zone_written_out_is_the_same_moment_everywhere(zone):
    zone("America/New_York")
    winter, summer = with_zone("2030-01-31T18:00"), with_zone("2030-07-31T18:00:30")
    assert (winter, summer) == ("2030-01-31T18:00-05:00", "2030-07-31T18:00:30-04:00")
    assert with_zone(winter) == winter and with_zone("2030-01-31T18:00Z") == "2030-01-31T18:00Z"
    zone("UTC")
    assert parse_date(winter) == 1896112800 + 5 * 3600 and with_zone("2030-01-31") == "2030-01-31T00:00+00:00"
    assert [with_zone(text) for text in ("", "soon", None)] == ["", "soon", None]


def test_a_date_beyond_the_clock_s_range_is_refused_as_no_date(zone):
    zone("Asia/Tokyo")
    assert with_zone("0001-01-01T00:00") == "0001-01-01T00:00"
    with pytest.raises(ValueError, match="'0001-01-01T00:00' is not a date and time"):
        parse_date("0001-01-01T00:00")


def test_the_deadline_of_a_run_does_not_move_when_it_goes_on_in_another_time_zone(zone, tmp_path):
    words = ["--out", str(tmp_path), "--deadline", "2030-01-31T18:00"]
    zone("America/New_York")
    begun = parse(words, "")[0]
    (tmp_path / "config.json").write_text(json.dumps(flatten(begun)))
    saved = make_schedule(begun.optimisation, None, 10.0, 1896000000.0)
    zone("UTC")
    resumed = parse(["--out", str(tmp_path), "--resume", "auto"], "")[0]
    assert resumed.optimisation == begun.optimisation
    schedule = make_schedule(resumed.optimisation, json.loads(json.dumps(saved.state())), 10.0, 1896000000.0)
    assert schedule.deadline == saved.deadline == 1896112800 + 5 * 3600
    typed = parse([*words, "--resume", "auto"], "")[0]                          # here, by the clock of here
    assert parse_date(typed.optimisation.deadline) == 1896112800
