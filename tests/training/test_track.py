"""The log shown elsewhere: what TensorBoard and W&B are given, and that neither can end a run.

Both are stood in for; the real TensorBoard writes and is read back where it is installed.
"""

import json
import math
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tinyldm.training import track
from tinyldm.training.track import Tracker, flat

ROW = {"stage": "step", "step": 20, "loss": 0.5, "skipped": 3, "t_bins": [0.1, None, 0.3], "grad_norm": math.nan, "name": "x", "good": True}
PLAN = {"stage": "step", "step": 30, "event": "plan", "text": "measured", "total_steps": 900}
NUMBERS = {"step/loss": 0.5, "step/skipped": 3, "step/t_bins/0": 0.1, "step/t_bins/2": 0.3}


@pytest.fixture
def board(monkeypatch):
    """What TensorBoard was told: [(folder, call, arguments)]."""
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder = folder.replace("\\", "/").rpartition("/tensorboard/")[2]
            told.append((self.folder, "begin", purge_step))

        def __getattr__(self, call):
            return lambda *arguments, **named: told.append((self.folder, call, *arguments))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return told


@pytest.fixture
def wandb(monkeypatch):
    """A module that notes what it is told: .begun, .metrics, .logged, .finished."""
    module = ModuleType("wandb")
    module.begun, module.metrics, module.logged, module.finished = [], [], [], []

    def init(**settings):
        module.begun.append(settings)
        return SimpleNamespace(define_metric=lambda name, step_metric: module.metrics.append((name, step_metric)),
                               log=module.logged.append, finish=lambda: module.finished.append(True))

    module.init, module.Image = init, lambda file: ("image", file)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def red(tmp_path):
    Image.new("RGBA", (4, 2), (200, 30, 10, 255)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_without_a_kind_nothing_is_imported_or_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tracker = Tracker("", tmp_path, {}, 0)
    tracker.row(ROW)
    tracker.picture("grid", tmp_path / "is not there.png", 1)
    tracker.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_answered_with_the_command_that_installs_it(tmp_path, monkeypatch, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf'--track {kind} needs .* pip install {kind}$'):
        Tracker(kind, tmp_path, {}, 0)


def test_an_unknown_kind_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="unknown --track 'tensorbord': did you mean 'tensorboard'"):
        Tracker("tensorbord", tmp_path, {}, 0)


def test_rows_are_taken_apart_into_finite_numbers():
    assert flat(ROW) == {"loss": 0.5, "skipped": 3, "t_bins/0": 0.1, "t_bins/2": 0.3}


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_is_given_curves_texts_and_pictures(tmp_path, board, red):
    tracker = Tracker("tensorboard", tmp_path, {"lr": 0.5}, 10)
    for row in (ROW, PLAN, {"stage": "vae", "step": 2, "loss": 1.0}):
        tracker.row(row)
    tracker.picture("grid", red, 40)
    tracker.close()
    assert [call[2:] for call in board if call[:2] == ("step", "add_scalar")] == [(name, value, 20) for name, value in NUMBERS.items()]
    assert ("step", "add_text", "step/plan", 'measured {"total_steps": 900}', 30) in board
    assert ("vae", "add_scalar", "vae/loss", 1.0, 2) in board and ("settings", "add_text", "settings", "    lr: 0.5\n", 10) in board
    folder, call, name, pixels, step = next(call for call in board if call[1] == "add_image")
    assert (folder, name, step, pixels.shape) == ("pictures", "grid", 40, (2, 4, 3)) and (pixels == (200, 30, 10)).all()
    assert {call[0] for call in board if call[1] == "close"} == {"settings", "step", "vae", "pictures"}


def test_tensorboard_forgets_the_steps_that_are_taken_again(tmp_path, board):
    Tracker("tensorboard", tmp_path, {}, 10).row(ROW)
    assert ("step", "begin", 11) in board


def test_the_real_tensorboard_shows_every_step_of_a_resumed_run_once(tmp_path, red):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def go(start, end, stage, loss):
        tracker = Tracker("tensorboard", tmp_path, {}, start)
        for step in range(start + 1, end + 1):
            tracker.row({"stage": stage, "step": step, "loss": loss})
        tracker.row(PLAN | {"step": end})
        tracker.picture("grid", red, end)
        tracker.close()

    def seen(part):
        found = EventAccumulator(str(tmp_path / "tensorboard" / part), size_guidance={"scalars": 0})
        found.Reload()
        return found

    go(0, 9, "vae", 3.0)
    go(0, 5, "step", 2.0)
    go(3, 6, "step", 1.0)
    assert [(one.step, one.value) for one in seen("step").Scalars("step/loss")] == [(1, 2), (2, 2), (3, 2), (4, 1), (5, 1), (6, 1)]
    assert len(seen("vae").Scalars("vae/loss")) == 9 and "step/plan/text_summary" in seen("step").Tags()["tensors"]
    assert seen("pictures").Images("grid")[-1].width == 4


# ---------------------------------------------------------------- W&B


def test_wandb_is_given_numbers_with_the_steps_of_their_stage(tmp_path, wandb, red):
    run = tmp_path / "my run"
    run.mkdir()
    tracker = Tracker("wandb", run, {"lr": 0.5}, 0)
    for row in ({"stage": "vae", "step": 900, "loss": 1.0}, ROW, ROW, PLAN):
        tracker.row(row)
    tracker.picture("grid", red, 40)
    tracker.close()
    settings = wandb.begun[0]
    assert (settings["project"], settings["name"], settings["dir"], settings["resume"]) == ("tinyldm", "my run", str(run), "allow")
    assert settings["config"] == {"lr": 0.5} and wandb.finished == [True]
    assert wandb.metrics == [("vae/*", "vae/step"), ("step/*", "step/step"), ("pictures/*", "pictures/step")]
    assert wandb.logged == [{"vae/loss": 1.0, "vae/step": 900}, *[NUMBERS | {"step/step": 20}] * 2,
                            {"step/plan": 'measured {"total_steps": 900}', "step/step": 30},
                            {"pictures/grid": ("image", str(red)), "pictures/step": 40}]


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_another_has_its_own(tmp_path, wandb):
    for name, step in (("a", 0), ("a", 50), ("b", 0)):
        (tmp_path / name).mkdir(exist_ok=True)
        Tracker("wandb", tmp_path / name, {}, step).close()
    first, again, other = (settings["id"] for settings in wandb.begun)
    assert first == again == (tmp_path / "a" / "wandb-id.txt").read_text() and other != first and len(first) >= 8


def test_the_end_does_not_wait_for_a_network_that_is_down(tmp_path, wandb, monkeypatch, capsys):
    monkeypatch.setattr(track, "PATIENCE", 0.05)
    tracker, up = Tracker("wandb", tmp_path, {}, 0), threading.Event()
    tracker.backend.run.finish = lambda: up.wait(60)
    tracker.close()
    assert not up.is_set() and "wandb sync" in capsys.readouterr().out
    up.set()


# ---------------------------------------------------------------- what must not end a run


@pytest.mark.parametrize("fails", ["log", "define_metric", "finish"])
def test_a_failure_is_told_once_and_ends_tracking_but_not_training(tmp_path, wandb, capsys, fails):
    tracker = Tracker("wandb", tmp_path, {}, 0)
    calls = []

    def broken(*arguments, **named):
        calls.append(arguments)
        raise ConnectionError("the server\nis gone")

    setattr(tracker.backend.run, fails, broken)
    if fails == "finish":
        tracker.backend.close = broken
    for _ in range(3):
        tracker.row(ROW)
    tracker.close()
    tracker.row(ROW)
    said = capsys.readouterr().out
    assert said == "--track wandb failed and is off from here on, training goes on: the server is gone\n" and len(calls) == 1


def test_no_start_and_rows_and_pictures_that_are_wrong_do_not_end_training(tmp_path, wandb, board, monkeypatch, capsys):
    for wrong in (lambda tracker: tracker.row({"loss": 1.0}),
                  lambda tracker: tracker.row(ROW | {"event": "x", "odd": {1, 2}}),
                  lambda tracker: tracker.picture("grid", tmp_path / "none.png", 1)):
        wrong(Tracker("tensorboard", tmp_path, {}, 0))
        assert "training goes on" in capsys.readouterr().out
    monkeypatch.setattr(wandb, "init", lambda **settings: 1 / 0)
    tracker = Tracker("wandb", tmp_path, {}, 0)
    tracker.row(ROW)
    assert "--track wandb failed" in capsys.readouterr().out and wandb.logged == []


def test_rows_as_the_log_holds_them_can_be_told(tmp_path, board):
    tracker = Tracker("tensorboard", tmp_path, {}, 0)
    tracker.row(json.loads(json.dumps(ROW | {"val_bins": [np.float64(0.5), 1]})))
    assert ("step", "add_scalar", "step/val_bins/1", 1, 20) in board
