"""log.jsonl over interruptions."""

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
