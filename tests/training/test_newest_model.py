"""Which model is taken where several would do: of several runs the one that finished last, of a run the newest checkpoint."""

import os
from pathlib import Path

import pytest

from tinyldm.training import checkpoint
from tinyldm.training.run_folder import find_model


def run(folder: Path, *steps: int, finished: bool, when: int) -> Path:
    """The folder of a run with a checkpoint of each of these steps, the last of them written at this time."""
    for step in steps:
        state = {"finished": finished and step == steps[-1]}
        checkpoint.write(folder, "step", step, lambda place: (place / "model").mkdir(), state, keep=9)
    for file in folder.rglob("state.json"):
        os.utime(file, (when, when))
    return folder


def test_of_several_runs_the_one_that_finished_last_is_taken_and_of_it_the_newest_checkpoint(tmp_path):
    run(tmp_path / "b old", 4, 900, finished=True, when=1000)
    newest = run(tmp_path / "c newest", 20, 100, finished=True, when=3000)
    run(tmp_path / "d middle", 5000, finished=True, when=2000)
    run(tmp_path / "a unfinished", 70, finished=False, when=4000)
    assert find_model(None, tmp_path) == newest / "checkpoints" / "step-000100" / "model"


def test_of_a_run_that_is_named_the_newest_checkpoint_of_its_network_is_taken_finished_or_not(tmp_path):
    folder = run(tmp_path / "run", 9, 10, 200, finished=False, when=1000)
    checkpoint.write(folder, "vae", 300, lambda place: (place / "vae").mkdir(), {}, keep=9)
    assert find_model(str(folder)) == folder / "checkpoints" / "step-000200" / "model"


def test_where_no_run_has_finished_the_advice_is_to_train_one(tmp_path):
    run(tmp_path / "run", 3, finished=False, when=1000)
    with pytest.raises(ValueError, match="no finished run under .*train one with 'python train.py --preset tiny'"):
        find_model(None, tmp_path)
