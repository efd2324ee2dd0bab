"""Clocks and plans: running time survives kills, what is done between steps is no part of them, later stages cost more."""

import json
import signal
import time

import pytest
import torch
from tinyldm.training.loop import mean_rate, out_of_memory

from tinyldm.config import parse, stages
from tinyldm.durations import moment, span
from tinyldm.training import checkpoint, distributed
from tinyldm.training import run as module
from tinyldm.training.clock import Clock, Pace
from tinyldm.training.log import Log
from tinyldm.training.rollback import RolledBack, passed_over
from tinyldm.training.schedule import make_schedule

NOW = 1.6e9


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

    monkeypatch.setattr(module, "write_file", full)
    clock = Clock(tmp_path)
    now[0] += 30
    assert clock.running() == 30


def test_other_processes_keep_no_count(tmp_path, now):
    clock = Clock(None)
    now[0] += 30
    assert clock.running() == 30
    clock.close()
    assert not list(tmp_path.iterdir())


def test_what_is_done_between_steps_is_no_part_of_them(now):
    pace = Pace()
    for _ in range(4):
        now[0] += 2
        pace.step()
    with pace.aside("validation"):
        now[0] += 8
    now[0] += 2
    pace.step()
    assert pace.seconds == 2 and pace.rate == 2 + 8 / 5 and pace.costs == {"validation": 8}


def test_later_stages_cost_what_their_pictures_cost():
    assert mean_rate(0.5, 0.0, 0, [1.0], [7.0]) == 0.5
    # half of the time at 1 s, half at 4 s a step: 0.5 + 0.125 steps in one unit of time
    assert mean_rate(1.0, 0.0, 0, [0.5, 0.5], [1.0, 4.0]) == pytest.approx(1 / 0.625)
    assert mean_rate(1.0, 0.25, 0, [0.5, 0.5], [1.0, 4.0]) == pytest.approx(0.75 / 0.375)
    assert mean_rate(4.0, 0.75, 1, [0.5, 0.5], [1.0, 4.0]) == pytest.approx(4.0)
    assert mean_rate(4.0, 1.0, 1, [0.5, 0.5], [1.0, 4.0]) == 4.0                # nothing is left


def config(*words):
    return parse(list(words), "")[0]


def test_a_resumed_run_keeps_its_plan_unless_another_end_is_asked_for():
    plan = make_schedule(config("--budget", "100s"), None, 10.0, NOW)
    plan.revise(20, 30.0, 1.0)
    saved = json.loads(json.dumps(plan.state()))
    assert make_schedule(config("--budget", "100s", "--warmup-steps", "7"), saved, 50.0, NOW).state() == plan.state()
    longer = make_schedule(config("--budget", "200s"), saved, 50.0, NOW)
    assert longer.budget == 200 and longer.begun == 10 and longer.factor(999, 50.0) == 1
    plan.share = saved["share"] = 0.5                          # in its decay: a little more time must not raise the rate again
    assert make_schedule(config("--budget", "105s"), saved, 90.0, NOW).share == 0.5
    assert make_schedule(config("--max-steps", "9"), saved, 50.0, NOW).done(9)


def test_a_budget_that_is_used_up_before_training_says_how_to_go_on():
    with pytest.raises(ValueError, match="running for 1 m 45 s: nothing is lost, go on with --resume auto and a larger --budget"):
        make_schedule(config("--budget", "100s"), None, 105.0, NOW)
    with pytest.raises(ValueError, match="later --deadline"):
        make_schedule(config("--deadline", "2001-01-01T00:00"), None, 5.0, NOW)


def test_progress_counts_training_alone():
    plan = make_schedule(config("--budget", "100s"), None, 20.0, NOW)
    assert plan.progress(5, 20.0) == 0 and plan.progress(5, 60.0) == 0.5 and plan.progress(5, 100.0) == 1
    assert make_schedule(config("--max-steps", "8"), None, 0.0, NOW).progress(2) == 0.25


@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True), (MemoryError(), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
    (RuntimeError("DefaultCPUAllocator: not enough memory"), True), (RuntimeError("shapes do not fit"), False), (ValueError("out of memory"), False)])
def test_a_lack_of_memory_is_told_from_other_errors(error, said):
    assert out_of_memory(error) is said


def test_there_must_be_something_to_go_back_to_and_then_what_came_since_is_given_up(tmp_path):
    for step in (10, 20, 30):
        checkpoint.write(tmp_path, "step", step, lambda folder: (folder / "weights").write_text("w"), {}, keep=9)
    with pytest.raises(ValueError, match="about step 5, before the first checkpoint"):
        RolledBack(5, 25, 0).retreat(tmp_path)
    assert len(checkpoint.names(tmp_path)) == 3                # nothing was given up for nothing
    last, window = RolledBack(21, 41, 7).retreat(tmp_path)
    assert last.endswith("step-000020") and window == 7 + 21
    assert [path.name for path in checkpoint.names(tmp_path)] == ["step-000010", "step-000020"]
    log = Log(tmp_path / "log.jsonl", "step", 20)
    log.write(stage="step", step=20, event="rollback", window=window)
    assert passed_over(tmp_path, checkpoint.names(tmp_path)[-1]) == 28 and passed_over(tmp_path, checkpoint.names(tmp_path)[0]) == 0


def test_what_a_shell_ignores_for_us_stays_ignored():
    names = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = [signal.getsignal(number) for number in names]
    try:
        for number in names:
            signal.signal(number, signal.SIG_IGN if number == names[-1] else signal.SIG_DFL)
        signals = module.Signals()
        assert signal.getsignal(names[-1]) is signal.SIG_IGN and signal.getsignal(names[0]) == signals.remember
    finally:
        for number, handler in zip(names, before):
            signal.signal(number, handler)


def test_a_terminal_that_is_gone_is_not_missed(tmp_path):
    stream = open(tmp_path / "told", "w")
    lasting = module.Lasting(stream)
    print("heard", file=lasting)
    stream.close()
    print("not heard", file=lasting, flush=True)
    assert (tmp_path / "told").read_text() == "heard\n" and lasting.name == stream.name


def test_only_the_launch_that_began_a_run_goes_on_with_it_by_itself(tmp_path, monkeypatch):
    assert distributed.launch() == "" and not distributed.started_again(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    (tmp_path / "launch").write_text(distributed.launch())
    assert not distributed.started_again(tmp_path)             # the first attempt
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert distributed.started_again(tmp_path) and not distributed.started_again(tmp_path / "elsewhere")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert not distributed.started_again(tmp_path)
    (tmp_path / "launch").write_text("another 1")              # the same name, another parent: on process 0's host that is another
    assert not distributed.started_again(tmp_path)


@pytest.mark.parametrize("seconds, said", [(0.2, "0 s"), (7, "7 s"), (1203, "20 m 3 s"), (3900, "1 h 5 m"), (273_600, "3 d 4 h")])
def test_spans_of_time_are_said_briefly(seconds, said):
    assert span(seconds) == said


def test_a_date_is_local_unless_it_names_its_zone():
    assert moment("2030-01-31T18:00+00:00") == 1896112800
    with pytest.raises(ValueError, match="'tomorrow' is not a date and time: write it as in 2030-01-31T18:00"):
        moment("tomorrow")


# ---------------------------------------------------------------- stages and ends in the settings


def test_every_stage_has_its_size_its_shift_and_as_many_pixels_per_micro_batch():
    small, large = stages(config("--preset", "5090_week"))
    assert (small.resolution, large.resolution) == (256, 512) and (small.shift, large.shift) == (1, 2)
    assert (small.grad_accum, large.grad_accum) == (8, 32) and not small.stages and not large.stages
    alone = config("--resolution", "32")
    assert stages(alone) == [alone]
    capped = stages(config("--stages", "16=0.5", "64=0.5", "--batch-size", "4"))
    assert capped[1].grad_accum == 4                            # micro-batches of one picture


def test_what_is_typed_leaves_out_what_the_preset_says_otherwise(tmp_path):
    week = config("--preset", "5090_week", "--max-steps", "10")
    assert (week.max_steps, week.budget) == (10, "") and week.stages
    assert not config("--preset", "5090_week", "--resolution", "256").stages
    assert config("--preset", "5090_week", "--stages", "128=1").stages == {"128": 1}
    tiny = config("--budget", "20m")
    assert (tiny.max_steps, tiny.budget) == (0, "20m")
    (tmp_path / "config.json").write_text(json.dumps(vars(week)))
    again = config("--out", str(tmp_path), "--resume", "auto", "--resolution", "256")
    assert again.stages == week.stages


@pytest.mark.parametrize("words, said", [
    ("--max-steps 5 --budget 3m", "give one of the two"), ("--budget week", "--budget: 'week' is not a span of time"),
    ("--deadline soon", "--deadline: 'soon' is not a date"), ("--stages 256", "KEY=VALUE"), ("--stages 256=0", "--stages 256=0"),
    ("--stages big=1", "--stages big=1"), ("--vae-weights x --stages 16=1 32=1 --cache a", "name one for each")])
def test_ends_and_stages_that_make_no_sense_are_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        config(*words.split())
    assert end.value.code == 2 and said in capsys.readouterr().err
