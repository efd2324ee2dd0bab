"""What is typed wrong for large models, or for a model that does not take it, is one line, and nothing is written."""

import pytest
from helpers import PROMPT, mistake, randomise, thinned
from published import write_flux, write_sd3, write_sdxl
from safetensors.torch import save_file
from test_sample import make

from tinyldm.folders.save import save_model, save_part
from tinyldm.models.taesd import TAESD, TAESDConfig


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Models of all families, tiny autoencoders of 4 channels and 16, and things that are neither."""
    folder, model = tmp_path_factory.mktemp("models"), make()
    save_model(folder / "sd1", net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults=model.defaults)
    write_sdxl(folder / "sdxl"), write_sd3(folder / "sd3"), write_flux(folder / "dev"), write_flux(folder / "schnell", guidance=False)
    for channels in (4, 16):
        save_part(folder / f"tiny{channels}", randomise(TAESD(TAESDConfig(latent_channels=channels, width=8, blocks=(1, 1)))))
    net = {f"model.diffusion_model.{name}": tensor for name, tensor in model.net.state_dict().items()}
    save_file(net, folder / "net.safetensors")
    (folder / "empty").mkdir()
    (folder / "init.txt").write_text("no picture")
    return folder


NOT_A_SCALE, SIZES_OF = "is not a guidance scale", "is for networks that are told sizes (Stable Diffusion XL)"
ALL_LAYERS = "--skip-layers is for Stable Diffusion 3 and 3.5: this model's network cannot be run without some of its layers"
WITHOUT_T5 = "cannot draw without text_encoder_3: only the T5 of Stable Diffusion 3 can be left out"
MISTAKES = [
    *((f"{model} --true-cfg 3", "--true-cfg 3.0 is for networks that are told a guidance scale (FLUX dev): use --cfg with this model")
      for model in ("sd1", "sdxl", "sd3")),
    *((f"schnell {flag} 3", "distilled to draw in a few steps without guidance: leave out --cfg and --true-cfg")
      for flag in ("--cfg", "--true-cfg")),
    *((f"dev --true-cfg {scale}", f"--true-cfg {float(scale)} {NOT_A_SCALE}: 1 or less is none, 7.5 is usual")
      for scale in ("nan", "inf", "1e9")),
    ("sd1 --cfg nan", f"--cfg nan {NOT_A_SCALE}"),
    ("dev --true-cfg x", "argument --true-cfg: invalid float value: 'x'"),
    ("dev --negative-prompt ugly", "has no effect at --true-cfg 1: use --true-cfg above 1, or leave it out"),
    ("dev --guidance-rescale 0.5", "has no guidance to change: use it with --true-cfg above 1"),
    ("sd1 --cfg 1 --guidance-rescale 0.5", "has no guidance to change: use it with --cfg above 1"),
    *((f"{model} --skip-layers 0", ALL_LAYERS) for model in ("sd1", "sdxl", "dev", "schnell")),
    *((f"sd3 --skip-layers {layer}", f"--skip-layers {layer}: the network has layers 0 to 1") for layer in (2, -1)),
    ("sd3 --skip-layers x", "argument --skip-layers: invalid int value: 'x'"),
    *((f"sd3 --skip-layers 0 --skip-scale {scale}", f"--skip-scale {scale} {NOT_A_SCALE}: 2.8 is usual") for scale in ("nan", "inf")),
    ("sd3 --skip-scale 2", "--skip-scale needs the layers to skip: --skip-layers 7 8 9"),
    ("sd3 --skip-interval 0 1", "--skip-interval needs the layers to skip: --skip-layers 7 8 9"),
    *((f"sd3 --skip-layers 0 --skip-interval {span}", "must be two rising fractions of the steps, such as 0.01 0.2")
      for span in ("0.5 0.2", "nan 0.2", "0 nan", "-1 0.5", "0 2")),
    *((f"{model} --original-size 64 64", f"--original-size {SIZES_OF}") for model in ("sd1", "sd3", "dev")),
    *((f"{model} --crop 0 0", f"--crop {SIZES_OF}") for model in ("sd1", "sd3", "dev")),
    *((f"sdxl --original-size {size} 64", f"--original-size {size} must lie between 1 and 16384, in pixels") for size in (0, -4, 10**20)),
    *((f"sdxl --crop 0 {size}", f"--crop {size} must lie between 0 and 16384, in pixels") for size in (-5, 99999)),
    *((f"dev --{side} {size}", f"--{side} {size} must lie between 0 and 16384, in pixels")
      for side in ("width", "height") for size in (-8, 10**7)),
    ("sdxl --original-size 64", "argument --original-size: expected 2 arguments"),
    *((f"{model} --without-t5", f"{model} {WITHOUT_T5}") for model in ("sd1", "sdxl", "dev")),
    ("net.safetensors --without-t5", "net.safetensors"),
    ("sd3 --parts tiny16", "--parts tiny16 is for a single file, and sd3 is a model folder, which has all of its parts"),
    ("sd3 --parts", "argument --parts: expected at least one argument"),
    ("sd1 --offload block", "--offload block: use auto, parts or blocks, or put the caption before it"),
    ("sd1 --offload blocks --compile", "use --offload parts with it"),
    ("sd3 --preview tiny4", "--preview tiny4 has 4 latent channels, the model 16"),
    *((f"sd1 --preview {name}", f"--preview takes the folder or hub id of a tiny autoencoder, or taesd: {name}{said}")
      for name, said in (("empty", "/config.json does not exist"), ("taessd", " does not exist"), ("some/id", " is not a path here"))),
    ("sd1 --init-image nowhere.png", "nowhere.png"),
    ("sd1 --init-image init.txt", "init.txt: it is not a picture that can be read"),
    ("sd3 --width 200", "200x32 pixels have more positions than this network's table: at most 48 on each side"),
    ("sd1 --width 30", "image size 30 is not a multiple of 4: use 28 or 32"),
    ("sd1 --interpolate 5 --frames 3 --preview empty", "--preview takes the folder"),
]


@pytest.mark.parametrize("words, said", thinned(2, MISTAKES), ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(words, said, places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(places)
    before = sorted(places.rglob("*"))
    error = mistake("sample", [PROMPT, "--model", *words.split(), "--device", "cpu", "--steps", 2, "--out", tmp_path / "out"], capsys)
    assert said in error and not (tmp_path / "out").exists() and sorted(places.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--parts", "--preview", "--offload", "--invert", "--interpolate"])
def test_a_caption_that_a_flag_has_taken_for_its_value_is_said(flag, capsys):
    words = ["--init-image", "x.png", flag, PROMPT]
    assert mistake("sample", words, capsys) == f'error: no prompt: python sample.py "a red fox" {flag} ...: captions come before {flag}'


@pytest.mark.parametrize("words, said", [(["--cfg", "nan"], "--cfg nan is not a guidance scale"),
                                         (["--true-cfg", "inf"], "--true-cfg inf is not a guidance scale"),
                                         (["--offload", "block"], "--offload block: use auto, parts or blocks, or put RUN before it")])
def test_evaluate_refuses_the_same(words, said, places, tmp_path, capsys):
    assert said in mistake("evaluate", [places / "sd1", *words, "--out", tmp_path / "out"], capsys) and not (tmp_path / "out").exists()
