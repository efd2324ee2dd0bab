"""train.py --eval-every: what is measured while a model is trained."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SMALL, load_script, mistake, pictures, thinned, train_here
from safetensors.torch import load_file
from torch import nn

from tinyldm.evaluation import while_training
from tinyldm.evaluation.progress import progress
from tinyldm.evaluation.recogniser import Reading
from tinyldm.evaluation.towers import TOWERS, Tower
from tinyldm.models.inception import InceptionFeatures
from tinyldm.training.distributed import World
from tinyldm.training.log import read

WORDS = [*SMALL, "--eval-every", "2", "--eval-num", "4", "--dtype", "fp32", "--sample-every", "0"]


class Reader:
    """Stands in for the recogniser: it reads a red fox in grass from everything."""

    def read(self, images):
        return [Reading("fox", "red", "grass")] * len(images)


class Thumbnail(nn.Module):
    """Stands in for Inception: the picture at 2 x 2 pixels [b, 12]."""

    def __init__(self):
        super().__init__()
        self.none = nn.Parameter(torch.empty(0))

    def forward(self, x):
        rows = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return InceptionFeatures(rows, rows)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    monkeypatch.setattr(while_training, "get_recogniser", lambda device: Reader())
    monkeypatch.setitem(TOWERS, "inception", Tower(lambda source, device: Thumbnail(), "tensorflow1", 8, (0.0,) * 3, (1.0,) * 3, None, ""))
    (tmp_path / "inception.pth").touch()


def evaluations(run) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "stage"} for row in read(run / "log.jsonl")
            if any(name.startswith("eval_") for name in row)]


def final(run) -> dict:
    return load_file(run / "checkpoints" / "step-000006" / "model" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_prompts_are_measured_and_training_does_not_notice_and_goes_on_the_same_when_resumed(tmp_path, monkeypatch):
    train = load_script("train")
    train_here(train, [*WORDS, "--out", str(tmp_path / "whole")], monkeypatch)
    found = evaluations(tmp_path / "whole")
    assert [row["step"] for row in found] == [2, 4, 6]
    assert all(row.keys() == {"step", "eval_prompts", "eval_prompts_held_out"} for row in found)
    train_here(train, [*WORDS, "--eval-every", "0", "--out", str(tmp_path / "without")], monkeypatch)
    assert not evaluations(tmp_path / "without")
    train_here(train, [*WORDS, "--out", str(tmp_path / "cut")], monkeypatch, stop_after=3)
    train_here(train, ["--out", str(tmp_path / "cut"), "--resume", "yes"], monkeypatch)
    assert evaluations(tmp_path / "cut") == found
    one, *others = (final(tmp_path / name) for name in ("whole", "without", "cut"))
    assert all(torch.equal(one[name], other[name]) for other in others for name in one)
    page = (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    data = json.loads(page[page.index('{"name"'):page.index("</script>", page.index('{"name"'))])
    assert data["stages"]["step"]["curves"]["eval_prompts"]["x"] == [2, 4, 6]


def test_fid_compares_with_the_run_s_own_held_out_pictures(tmp_path, monkeypatch):
    seen = []
    real = while_training.gather
    monkeypatch.setattr(while_training, "gather", lambda tower, found: seen.append(
        (found.label, np.concatenate([images for images, _ in found.batches(World())]))) or real(tower, found))
    words = [*WORDS, "--eval-metric", "fid", "--eval-weights", f"inception={tmp_path / 'inception.pth'}", "--max-steps", "4"]
    train_here(load_script("train"), [*words, "--out", str(tmp_path / "run")], monkeypatch)
    rows = evaluations(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4] and all(row["eval_fid"] >= 0 for row in rows)
    assert [(label, images.shape) for label, images in seen] == [("drawn", (4, 16, 16, 3)), ("held out", (2, 16, 16, 3)),
                                                                 ("drawn", (4, 16, 16, 3))]         # the reference is read once
    assert seen[1][1].std() > 1


def test_the_real_pictures_are_those_of_the_cache_where_the_autoencoder_is_trained_along():
    """Latents in the cache are those of the autoencoder with which the run began: another one would decode them to something else."""
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    samples = SimpleNamespace(latents=None, pictures=lambda: torch.from_numpy(images).movedim(3, 1))
    stage = SimpleNamespace(loader=SimpleNamespace(held_out_batch=lambda: samples), trained=SimpleNamespace(modules={"net": None, "vae": None}))
    assert np.array_equal(while_training.held_out(None, stage), images)


@pytest.mark.parametrize("rank, shown", [("0", True), ("1", False)])
def test_of_several_processes_the_first_shows_its_progress(rank, shown, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    with progress(4, "pictures drawn") as bar:
        bar.update(4)
    assert ("pictures drawn" in capsys.readouterr().err) == shown


def test_an_evaluation_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def broken(device):
        raise ValueError("no recogniser today")

    monkeypatch.setattr(while_training, "get_recogniser", broken)
    train_here(load_script("train"), [*WORDS, "--out", str(tmp_path / "run")], monkeypatch)
    assert final(tmp_path / "run") and not evaluations(tmp_path / "run")
    said = capsys.readouterr()
    assert "no recogniser today" in said.out + said.err


@pytest.mark.parametrize("more, said", thinned(2, [
    ("--eval-metric prompt --eval-every 0", "did you mean 'prompts'"), ("--eval-metric prompt", "did you mean 'prompts'"), ("--eval-metric fid", "--eval-weights inception=FILE"),
    ("--eval-metric fid --eval-weights inception=nowhere.pth", "does not exist"), ("--eval-metric clip --val-samples 0", "--val-samples"),
    ("--data OTHER --eval-metric prompts", "toyworld's pictures only"), ("--data OTHER", "--eval-metric fid needs weights"),
    ("--eval-num 1", "at least 2"), ("--eval-weights tower", "expected TOWER=SOURCE"), ("--eval-weights dino=x", "tower of --eval-weights"),
    ("--eval-metric ,", "--eval-metric , names no metric: known: prompts, fid, clip")]))
def test_evaluations_that_cannot_work_are_refused_before_the_run(more, said, tmp_path, capsys):
    pictures(tmp_path / "other", 20)
    words = more.replace("OTHER", str(tmp_path / "other")).split()
    assert said in mistake("train", [*WORDS, *words, "--out", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()
