"""log.jsonl over interruptions."""

import json
import math
from contextlib import contextmanager

import pytest

from tinyldm.training.log import Log, read


def test_a_resumed_log_forgets_the_steps_that_are_taken_again(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for stage, step in (("vae", 10), ("vae", 500), ("step", 10), ("step", 20)):
        log.write(stage=stage, step=step, loss=0.5)
    Log(tmp_path / "log.jsonl", "step", 10)
    assert [(row["stage"], row["step"]) for row in read(tmp_path / "log.jsonl")] == [("vae", 10), ("vae", 500), ("step", 10)]
    Log(tmp_path / "log.jsonl", "vae", 10)
    assert [(row["stage"], row["step"]) for row in read(tmp_path / "log.jsonl")] == [("vae", 10)]


def test_a_torn_line_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"stage": "vae", "step": 1}\n{"stage": "va')
    assert read(tmp_path / "log.jsonl") == [{"stage": "vae", "step": 1}]


@contextmanager
def full_disk(size: int):
    """No file can grow beyond this size: a write takes what fits, and the next one fails."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_that_a_full_disk_does_not_take_follow_later_whole_and_in_order(tmp_path, capsys):
    log, seen = Log(tmp_path / "log.jsonl", on_row=lambda row: seen.append(row["step"])), []
    log.write(stage="vae", step=1)
    size = (tmp_path / "log.jsonl").stat().st_size
    with full_disk(size + 9):                                   # the next line is cut after nine characters
        for step in (2, 3):
            log.write(stage="vae", step=step)
        with pytest.raises(OSError, match=r"log\.jsonl cannot be written \(File too large\): make room, and continue with --resume yes"):
            log.flush()
    assert (tmp_path / "log.jsonl").read_text() == '{"stage": "vae", "step": 1}\n{"stage":'
    assert capsys.readouterr().out.count("its rows are kept") == 1
    log.write(stage="vae", step=4)
    log.flush()
    assert (tmp_path / "log.jsonl").read_text() == "".join(f'{{"stage": "vae", "step": {step}}}\n' for step in (1, 2, 3, 4))
    assert seen == [1, 2, 3, 4]


def test_rows_of_a_full_disk_are_written_at_the_end_of_a_stage_where_no_other_row_follows(tmp_path, capsys):
    log = Log(tmp_path / "log.jsonl")
    with full_disk(0):
        log.write(stage="vae", step=1)
    log.write_out()
    assert read(tmp_path / "log.jsonl") == [{"stage": "vae", "step": 1}]
    Log(None).write_out()


def test_numbers_that_are_not_finite_are_null_and_every_line_is_json(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"stage": "vae", "step": 1, "loss": NaN}\n')           # by an older version
    rows, log = [], Log(tmp_path / "log.jsonl", "step", on_row=lambda row: rows.append(row))
    log.write(stage="step", step=2, loss=math.nan, val_bins=[0.5, math.inf, None], lr=0.123456789, event="x", skipped=0)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    found = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert found[0] == {"stage": "vae", "step": 1, "loss": None}
    assert found[1] == {"stage": "step", "step": 2, "loss": None, "val_bins": [0.5, None, None], "lr": 0.123457, "event": "x", "skipped": 0}
    assert rows == [found[1]]
