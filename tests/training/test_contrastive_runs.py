"""A run of --objective contrastive from the command line to a CLIP that others open."""

import json

import numpy as np
import pytest
import torch
from helpers import SMALL, load_script, mistake, pictures, script, train_here, weights
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from tinyldm.data import toyworld
from tinyldm.evaluation.towers import load_vit
from tinyldm.folders.load import load_model, load_part, load_text, load_tokenizer
from tinyldm.model import CLIPS
from tinyldm.models.clip import CLIPFeatures, unit
from tinyldm.objectives.contrastive import normalised
from tinyldm.training.contrastive_stage import Captions
from tinyldm.training.log import read
from tinyldm.training.retrieval import recall

WORDS = ("--objective contrastive --scenes 60 --resolution 16 --batch-size 6 --max-steps 4 --log-every 1 --save-every 2 --val-every 2 "
         "--keep-last 9 --warmup-steps 1 --val-samples 6 --dtype fp32 "
         "--objective-options patch=8 width=16 layers=1 heads=2 embed=8 loss=LOSS --text width=16 layers=1 heads=2 mlp_width=32 context_length=24")


def words(loss: str = "clip") -> list[str]:
    return WORDS.replace("LOSS", loss).split()


@pytest.fixture(scope="module", params=["clip", "siglip"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrastive") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train_here(load_script("train"), [*words(request.param), "--out", str(folder)], patch)
    return folder


def scenes(count: int, size: int) -> tuple[np.ndarray, list[str]]:
    drawn = [toyworld.sample(i, size, 5) for i in range(count)]
    return np.stack([it.image for it in drawn]), [it.caption for it in drawn]


@torch.no_grad()
def test_transformers_opens_the_clip_and_computes_the_same_features(run):
    clip = run / "checkpoints" / "step-000004" / "clip"
    theirs, (images, captions) = CLIPModel.from_pretrained(clip).eval(), scenes(5, 16)
    ids = CLIPTokenizer.from_pretrained(clip)(captions, padding="max_length", max_length=24, return_tensors="pt").input_ids
    tokenizer = load_tokenizer(clip)
    assert torch.equal(ids, torch.from_numpy(tokenizer.encode(captions)))
    both = theirs(input_ids=ids, pixel_values=normalised(images))
    ours = load_part(clip, CLIPS.values(), "cpu", torch.float32)
    made = ours(normalised(images), ids)
    for found in (made, CLIPFeatures(unit(load_vit(clip)(normalised(images))), unit(load_text(clip)(ids).pooled))):
        assert torch.allclose(found.images, both.image_embeds, atol=1e-5) and torch.allclose(found.texts, both.text_embeds, atol=1e-5)
    assert torch.allclose(ours.log_scale, theirs.logit_scale) and float(made.images.std(0).mean()) > 1e-3
    assert json.loads((clip / "preprocessor_config.json").read_text())["crop_size"] == {"height": 16, "width": 16}


def test_recall_on_held_out_pictures_is_logged_and_the_pictures_are_forgotten(run):
    rows = read(run / "log.jsonl")
    validated = [row for row in rows if "val_ema" in row]
    assert [row["step"] for row in validated] == [2, 4]
    assert all(0 <= row[name] <= 1 for row in validated for name in ("val_text_to_image", "val_image_to_text"))
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4] and all(1 <= row["scale"] <= 100 for row in rows if "loss" in row)
    assert not [*run.glob("*vae-pictures*")] and (run / "report.html").exists()


def test_an_interrupted_run_ends_with_the_same_bits(run, tmp_path, monkeypatch):
    train = load_script("train")
    loss = json.loads((run / "config.json").read_text())["objective_options"]["loss"]
    train_here(train, [*words(loss), "--grad-accum", "1", "--out", str(tmp_path / "cut")], monkeypatch, stop_after=2)
    assert not (tmp_path / "cut" / "checkpoints" / "step-000004").exists()
    train_here(train, ["--out", str(tmp_path / "cut"), "--resume", "yes"], monkeypatch)
    for file in ("clip/model.safetensors", "clip/model.non_ema.safetensors", "optimizer.safetensors"):
        one, two = (load_file(folder / "checkpoints" / "step-000004" / file) for folder in (run, tmp_path / "cut"))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    drop = ("running", "seconds", "images_per_second", "memory_gb")
    one, two = ([{key: value for key, value in row.items() if key not in drop} for row in read(folder / "log.jsonl")]
                for folder in (run, tmp_path / "cut"))
    assert one == two


def test_micro_batches_train_as_the_whole_batch_does(run, tmp_path, monkeypatch):
    loss = json.loads((run / "config.json").read_text())["objective_options"]["loss"]
    train_here(load_script("train"), [*words(loss), "--grad-accum", "3", "--out", str(tmp_path / "run")], monkeypatch)
    one, two = ([row["loss"] for row in read(folder / "log.jsonl") if "loss" in row] for folder in (run, tmp_path / "run"))
    assert one == pytest.approx(two, rel=1e-4)


@torch.no_grad()
def test_evaluate_scores_pictures_by_a_run_without_a_download(run, tmp_path):
    folder, module = pictures(tmp_path / "set", 5), load_script("evaluate")
    module.ARGS = module.parse([str(folder), "--metric", "clip", "--clip", str(run), "--device", "cpu", "--out", str(tmp_path / "out")])
    module.main()
    found = json.loads((tmp_path / "out" / "clip.json").read_text())
    images = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])
    clip = run / "checkpoints" / "step-000004" / "clip"
    ids = torch.from_numpy(load_tokenizer(clip).encode([file.read_text() for file in sorted(folder.glob("*.txt"))]))
    made = load_part(clip, CLIPS.values(), "cpu", torch.float32)(normalised(images), ids)
    expected = 100 * (made.images * made.texts).sum(1).clamp(min=0).mean()
    assert found["results"][0]["values"]["CLIP score"]["value"] == pytest.approx(float(expected), rel=1e-4)
    assert (found["weights"], found["size"]) == (str(clip), 16)


def test_the_clip_is_named_once(run, tmp_path, capsys):
    folder = pictures(tmp_path / "set", 2)
    assert "leave one out" in mistake("evaluate", [folder, "--metric", "clip", "--clip", run, "--weights", f"clip={run}"], capsys)


def test_a_diffusion_model_is_conditioned_on_the_text_tower_of_a_run(run, tmp_path, monkeypatch):
    settings = [*SMALL[:SMALL.index("--text")], "--max-steps", "2", "--vae-steps", "2", "--sample-every", "0"]
    train_here(load_script("train"), [*settings, "--text-weights", str(run), "--out", str(tmp_path / "run")], monkeypatch)
    theirs = load_text(run / "checkpoints" / "step-000004" / "clip")
    model = load_model(tmp_path / "run" / "checkpoints" / "step-000002" / "model")
    ids = torch.from_numpy(model.text.tokenizers[0].encode(["a red fox"]))
    assert torch.equal(model.text.modules["text"](ids).hidden, theirs(ids).hidden)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_two_processes_train_a_clip_as_one_does(tmp_path, loss):
    settings = [*words(loss), "--optimizer", "adamw"]
    done = script("train.py", *settings, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    done = script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "train.py", *settings, "--grad-accum", 3,
                  "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("R@1 of 6 held-out pictures") == 1
    found = [[row[name] for row in read(tmp_path / run / "log.jsonl") for name in ("loss", "val_ema", "scale") if name in row]
             for run in ("one", "two")]
    assert len(found[0]) == 10 and found[0] == pytest.approx(found[1], rel=1e-5)
    one, two = (weights(tmp_path / run / "checkpoints" / "step-000004" / "clip") for run in ("one", "two"))
    apart = np.concatenate([np.abs(one[name] - two[name]).ravel() for name in one])
    assert np.mean(apart > 4e-5) < 0.01                         # a hundredth of a step of Adam's


def test_of_equal_captions_any_picture_is_right():
    tokens = torch.tensor([[1, 2], [1, 2], [3, 4], [5, 6]])
    images = torch.eye(4)
    texts = images[[1, 0, 2, 0]]                                # the first two are swapped, the last one is wrong
    found = recall(CLIPFeatures(images, texts), tokens)
    assert (found.text_to_image, found.image_to_text) == (0.75, 0.75) and found.chance == (4 + 1 + 1) / 16


def test_a_picture_s_captions_are_chosen_by_the_weights_of_their_keys():
    tokens = torch.arange(5)[:, None]
    captions = Captions([[(0, "a"), (1, "b"), (1, "c")], [(1, "d")], [(0, "e")]], tokens, [3.0, 1.0])
    pick = lambda picture, x: captions.tokens_of(np.array([picture]), np.array([x])).item()
    assert [pick(0, x) for x in (0.0, 0.74, 0.76, 0.87, 0.88, 0.999)] == [0, 0, 1, 1, 2, 2]
    assert pick(1, 0.5) == 3 and pick(2, 0.999) == 4


@pytest.mark.parametrize("more, said", [
    ("--only vae --vae-steps 2", "leave out --only vae"), ("--text-weights somewhere", "leave out --text-weights"),
    ("--text-encoder t5 --text width=8", "leave out --text-encoder t5"), ("--fsdp", "leave out --fsdp"), ("--buckets 2", "--buckets"),
    ("--eval-every 2", "leave out --eval-every 2"), ("--rollback", "leave out --rollback"), ("--text-lr 0.1", "leave out --text-lr"),
    ("--cache somewhere --vae-weights v", "leave out --cache"),
    ("--dry-run --gpu-gb 1", "--gpu-gb"), ("--batch-size 55", "fewer than --batch-size 55"),
    ("--resolution 20", "not a multiple of the patch size"),
    ("--objective-options loss=sigmoid", "contrastive loss")])
def test_what_a_clip_cannot_be_trained_with_is_refused(more, said, tmp_path, capsys):
    assert said in mistake("train", [*words(), *more.split(), "--out", tmp_path / "run"], capsys)


def test_a_run_of_a_clip_is_no_model_to_draw_with(run, capsys):
    assert "holds a CLIP, which draws nothing" in mistake("evaluate", [run], capsys)
