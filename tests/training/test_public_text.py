"""Training on the frozen text encoders of published models: all of them are encoded with, saved, and drawn with."""

import json

import numpy as np
import pytest
import torch
from helpers import SMALL, load_script, thinned, train_here
from PIL import Image
from published import write_flux, write_sd3, write_sdxl

from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model
from tinyldm.models.unet import UNet
from tinyldm.pipeline import draw, draw_settings

WORDS = [*SMALL, "--val-every", "0", "--max-steps", "2", "--sample-every", "0"]
UNET = "widths=16,32 attention=False,True heads=1,2 groups=4 transformer_layers=1,2 pooled_dim=128".split()
MMDIT = ["width=64", "layers=2", "heads=2", "max_positions=16"]
FLUX = ["width=64", "heads=2", "double_layers=1", "single_layers=1", "rope_axes=4,14,14", "guidance=True"]
RUNS = {"sdxl": (write_sdxl, ["--network", "unet", "--unet", *UNET], 2), "sd3": (write_sd3, ["--network", "mmdit", "--net", *MMDIT], 3),
        "flux": (write_flux, ["--network", "flux", "--net", *FLUX, "--process", "dynamic_flow"], 2)}


@pytest.fixture(scope="module")
def train():
    return load_script("train")


@pytest.fixture(scope="module")
def vae(train, tmp_path_factory):
    """An autoencoder that all runs here have in common."""
    folder = tmp_path_factory.mktemp("vae")
    with pytest.MonkeyPatch.context() as patch:
        train_here(train, ["--out", str(folder / "run"), *WORDS, "--max-steps", "1"], patch)
    return folder / "run" / "vae"


@pytest.mark.parametrize("family", thinned(3, RUNS))
def test_a_run_on_a_public_model_s_text_encoders_saves_them_all_and_goes_on(family, train, vae, tmp_path, monkeypatch):
    write, words, encoders = RUNS[family]
    published = tmp_path / "published"
    write(published)
    words = ["--out", str(tmp_path / "run"), *WORDS, "--text-weights", str(published), "--vae-weights", str(vae), *words]
    train_here(train, words, monkeypatch, stop_after=1)
    for file in published.glob("text_encoder*/*.safetensors"):
        file.unlink()                                           # a resumed run has copies of its own
    train_here(train, ["--out", str(tmp_path / "run"), "--resume", "yes"], monkeypatch)
    folder = tmp_path / "run" / "checkpoints" / "step-000002" / "model"
    model = load_model(folder)
    write(published.with_name("again"))
    whole = load_model(published.with_name("again"))
    assert model.text.join == whole.text.join == family and len(model.text.encoders) == encoders
    for one, two in zip(model.text.encoders, whole.text.encoders):
        assert all(torch.equal(p, two.module.state_dict()[name]) for name, p in one.module.state_dict().items())
    assert torch.equal(model.text.tokenize(["a red fox"]), whole.text.tokenize(["a red fox"]))
    pictures = [draw(model, [prompt], [0], draw_settings(model, steps=2)) for prompt in ("a red fox", "a small green triangle")]
    assert pictures[0].shape == (1, 16, 16, 3) and (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize("own, zeros", thinned(2, [({}, False), ({"zero_negative": True}, True)]))
def test_a_saved_model_says_what_a_missing_negative_prompt_is(own, zeros, tmp_path):
    """diffusers takes zeros unless it is told otherwise; what is trained here learns the encoded empty caption."""
    write_sdxl(tmp_path / "published")
    model = load_model(tmp_path / "published")
    save_model(tmp_path / "saved", net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults={"text_join": "sdxl"} | own)
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline" and index["force_zeros_for_empty_prompt"] is zeros
    assert bool(load_model(tmp_path / "saved").defaults.get("zero_negative")) is zeros


def test_the_sizes_of_a_run_s_pictures_reach_its_network(train, vae, tmp_path, monkeypatch):
    """Pictures of 24 x 16 are cropped to 16 x 16; a model that is told so is drawn with and without the crop."""
    write_sdxl(tmp_path / "published")
    (tmp_path / "d").mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (24, 16, 3), dtype=np.uint8)).save(tmp_path / "d" / f"{i}.png")
        (tmp_path / "d" / f"{i}.txt").write_text("a red fox")
    seen, forward = [], UNet.forward

    def watched(net, x, t, cond):
        seen.append((net.training, cond.extra["sizes"]))
        return forward(net, x, t, cond)

    monkeypatch.setattr(UNet, "forward", watched)
    words = ["--text-weights", str(tmp_path / "published"), "--vae-weights", str(vae), "--unet", *UNET]
    train_here(train, ["--out", str(tmp_path / "run"), *WORDS, "--data", str(tmp_path / "d"), "--grad-accum", "2", *words], monkeypatch)
    training = torch.cat([sizes for training, sizes in seen if training and sizes.device.type == "cpu"])
    assert training.tolist() == [[24, 16, 4, 0, 16, 16]] * 8
    model = load_model(tmp_path / "run" / "checkpoints" / "step-000002" / "model")
    settings = draw_settings(model, steps=2)
    latents = []                                                # two steps of training hardly show in the pixels
    for sizes in (None, (24, 16, 4, 0)):
        draw(model, ["a red fox"], [0], settings._replace(sizes=sizes), on_step=latents.append)
    assert seen[-1][1].tolist()[0] == [24, 16, 4, 0, 16, 16] and (latents[1] != latents[3]).any()


def test_a_cache_without_sizes_is_refused_before_anything_is_trained(train, vae, tmp_path, monkeypatch):
    write_sdxl(tmp_path / "published")
    words = [*WORDS, "--text-weights", str(tmp_path / "published"), "--vae-weights", str(vae), "--unet", *UNET]
    train_here(train, ["--out", str(tmp_path / "run"), *words], monkeypatch)
    latents = tmp_path / "run" / "latents"
    index = json.loads((latents / "index.json").read_text())
    for source in index["sources"]:
        for shard in source["shards"]:
            del shard["sizes"]
    (latents / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{latents} was made before the sizes of pictures were noted"):
        train_here(train, ["--out", str(tmp_path / "second"), "--cache", str(latents), *words], monkeypatch)
    assert not (tmp_path / "second").exists()


def test_a_width_that_is_not_that_of_the_pooled_text_is_refused_before_anything_is_written(train, vae, tmp_path, monkeypatch):
    write_sdxl(tmp_path / "published")
    words = [*WORDS, "--text-weights", str(tmp_path / "published"), "--vae-weights", str(vae), "--unet", *UNET[:-1], "pooled_dim=64"]
    with pytest.raises(ValueError, match="told pooled text"):
        train_here(train, ["--out", str(tmp_path / "run"), *words], monkeypatch)
    assert not (tmp_path / "run").exists()
