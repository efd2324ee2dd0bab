"""Clocks: running time survives kills, and what is done between steps is no part of them."""

import json
import time

import pytest

from tinyldm.training import clock
from tinyldm.training.clock import Clock, StepTimer


@pytest.fixture
def now(monkeypatch):
    """A clock that goes when it is told."""
    at = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: at[0])
    monkeypatch.setattr(time, "perf_counter", lambda: at[0])
    return at


def test_running_time_adds_up_over_processes_and_a_kill_costs_seconds(tmp_path, now):
    first = Clock(tmp_path, begun=97.0)
    assert first.running() == 3
    now[0] += 1
    assert first.running() == 4 and json.loads((tmp_path / "running.json").read_text()) == {"seconds": 3}     # not at every look
    now[0] = 1000                                              # killed; the pause does not count
    second = Clock(tmp_path)
    assert second.running() == 3
    now[0] += 50
    second.close()
    assert Clock(tmp_path).running() == 53


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"seconds": "x"}', '{"seconds": -5}', '{"seconds": null}'])
def test_a_damaged_count_is_no_reason_to_stop(tmp_path, now, content):
    (tmp_path / "running.json").write_text(content)
    assert Clock(tmp_path).running() == 0


def test_a_full_disk_does_not_stop_the_clock(tmp_path, now, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(clock, "write_file", full)
    own = Clock(tmp_path)
    now[0] += 30
    assert own.running() == 30


def test_other_processes_keep_no_count(tmp_path, now):
    own = Clock(None)
    now[0] += 30
    assert own.running() == 30
    own.close()
    assert not list(tmp_path.iterdir())


def test_what_is_done_between_steps_is_no_part_of_them(now):
    timer = StepTimer()
    for _ in range(4):
        now[0] += 2
        timer.step()
    with timer.outside_steps("validation"):
        now[0] += 8
    now[0] += 2
    timer.step()
    assert timer.seconds == 2 and timer.rate == 2 + 8 / 5 and timer.costs == {"validation": 8}


def test_steps_of_another_length_are_timed_anew(now):
    timer = StepTimer()
    for took in (1, 1, 1):
        now[0] += took
        timer.step()
    now[0] += 50                                               # a network is compiled
    timer.restart()
    assert not timer.times
    now[0] += 4
    timer.step()
    assert timer.seconds == 4
