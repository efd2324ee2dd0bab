"""Every flag of sample.py and evaluate.py, and every setting of drawing, reaches what it is for, and nothing else: two pictures whose
command lines differ in a flag differ in the aspects that its row names, and in no other."""

import contextlib
import inspect
import io
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import load_script, randomise, thinned
from outcomes import Row, same
from PIL import Image
from small_models import write_lpips
from test_sample import OTHER, PROMPT, make

from tinyldm.adapters.embedding import save_embedding
from tinyldm.adapters.files import save_adapter
from tinyldm.adapters.lora import LoRA, LoRAConfig
from tinyldm.diffusion.guidance import SkipLayers
from tinyldm.evaluation import base, reconstruction
from tinyldm.evaluation.base import Measurement
from tinyldm.evaluation.metrics import METRICS, Metric
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model, save_part
from tinyldm.models.flux import Flux, FluxConfig
from tinyldm.models.mmdit import MMDiT, MMDiTConfig
from tinyldm.models.taesd import TAESD, TAESDConfig
from tinyldm.models.unet import UNet
from tinyldm.pictures.pixels import to_pixels
from tinyldm.pipeline import Canvas, DrawSettings, Morph, draw, draw_settings
from tinyldm.shortcuts import Shortcut
from tinyldm.training import learned
from tinyldm.training.vae_validation import reconstruct


def flags_of(module, patch) -> set[str]:
    """The names of a script's flags and arguments."""
    seen = []
    patch.setattr(module, "Parser", lambda **options: seen.append(Parser(**options)) or seen[-1])
    Parser = sys.modules["tinyldm.cli"].Parser
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        module.parse(["--nothing-of-this-name"])
    return {action.dest for action in seen[0]._actions} - {"help", "version", "quiet"}


@pytest.fixture(scope="module")
def once():
    """A function: the outcome of a command line, which is run the first time."""
    memo = {}

    def once(script, words, run):
        if (script, *words) not in memo:
            memo[(script, *words)] = run(*words)
        return memo[(script, *words)]
    return once


OTHER_NETWORKS = {                                  # for the flags that make()'s network has no use for
    "sizes": lambda: UNet(replace(make().net.config, pooled_dim=32)),
    "told": lambda: Flux(FluxConfig(in_channels=4, out_channels=4, width=32, heads=2, double_layers=1, single_layers=1, context_dim=32,
                                    pooled_dim=32, guidance=True, rope_axes=(4, 6, 6))),
    "layers": lambda: MMDiT(MMDiTConfig(in_channels=4, out_channels=4, width=32, layers=2, heads=2, context_dim=32, pooled_dim=32,
                                        max_positions=16, sample_size=16)),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model with raw weights beside its averages, another one, pictures and masks, a file of captions."""
    folder = tmp_path_factory.mktemp("flags")
    for name, seed in (("model", 1), ("another", 9)):
        model = make()
        raw = {"net": randomise(UNet(model.net.config), 7).state_dict(), "text": model.text.modules["text"].state_dict()}
        save_model(folder / name, net=randomise(model.net, seed), vae=model.vae, texts=[*model.text.modules.values()],
                   tokenizers=model.text.tokenizers, scheduler=model.scheduler, defaults=model.defaults | {"preset": name}, non_ema=raw)
    for name, net in OTHER_NETWORKS.items():
        model = make("flow", "flow")
        save_model(folder / name, net=randomise(net(), 1), vae=model.vae, texts=[*model.text.modules.values()],
                   tokenizers=model.text.tokenizers, scheduler=model.scheduler, defaults=model.defaults)
    style = LoRA(make().net, LoRAConfig(2))
    for branch in style.branches.values():
        torch.nn.init.ones_(branch.up)
    save_adapter(folder / "style.safetensors", {"net": style}, make(), {})
    save_embedding(folder / "dog.safetensors", "<my-dog>", {"text": torch.ones(2, model.text.modules["text"].config.width)}, model)
    save_part(folder / "tiny", randomise(TAESD(TAESDConfig(latent_channels=4, width=8, blocks=(1, 1)))))
    ramp = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
    Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], -1)).save(folder / "init.png")
    Image.fromarray(np.where(ramp > 120, 255, 0).astype(np.uint8)).save(folder / "mask.png")
    (folder / "captions.txt").write_text(f"{OTHER}\n")
    return folder


@pytest.fixture
def opened(monkeypatch):
    """A function: let a script open models of any name, and the list of what it asked for."""
    asked = []

    def load(source, device=torch.device("cpu"), dtype=torch.float32, ema=True, variant=None, tokenizer=None, prediction=None, parts=(),
             without=()):
        asked.append((str(source), dtype, ema, variant, tokenizer, prediction, parts, without))
        return load_model(source if "hub/" not in str(source) else load.local, device, dtype, ema)

    def open_with(module, local):
        load.local = local
        monkeypatch.setattr(module, "load_model", load)
        monkeypatch.setattr(learned, "load_model", load)
        return asked
    return open_with


# ---------------------------------------------------------------- sample.py

INIT = ("--init-image", "init.png")
SKIP = ["--model", "layers", "--skip-layers", "0", "--steps", "6"]
WHOLE = {"picture", "metadata"}                     # another picture, which says why
SEVERAL = {"picture", "metadata", "files", "batches"}
SAMPLE = {
    "prompt": Row([OTHER], SEVERAL, which_way=lambda a, b: len(b.files) == 3 and b.batches == [2]),
    "from_file": Row(["--from-file", "captions.txt"], SEVERAL, which_way=lambda a, b: "0002-0-a-small-green-triangle.png" in b.files),
    "negative_prompt": Row(["--negative-prompt", "green"], WHOLE),
    "model": Row(["--model", "another"], {"loaded", *WHOLE}),
    "revision": Row(["--revision", "older"], {"loaded", "metadata"}, ["--model", "hub/model"],
                    lambda a, b: b.loaded[0][0] == "hub/model@older"),
    "variant": Row(["--variant", "fp16"], {"loaded", "metadata"}, which_way=lambda a, b: b.loaded[0][3] == "fp16"),
    "tokenizer": Row(["--tokenizer", "there"], {"loaded", "metadata"}, which_way=lambda a, b: b.loaded[0][4] == ["there"]),
    "parts": Row(["--parts", "a", "b"], {"loaded", "metadata"}, which_way=lambda a, b: b.loaded[0][6] == ["a", "b"]),
    "without_t5": Row(["--without-t5"], {"loaded", "metadata"}, which_way=lambda a, b: b.loaded[0][7] == {"text_encoder_3"}),
    "prediction": Row(["--prediction", "eps"], {"loaded", "metadata"}, which_way=lambda a, b: b.loaded[0][5] == "eps"),
    "no_ema": Row(["--no-ema"], {"loaded", *WHOLE}, which_way=lambda a, b: b.loaded[0][2] is False),
    "lora": Row(["--lora", "style.safetensors:0.5"], WHOLE),
    "embedding": Row(["--embedding", "dog.safetensors"], WHOLE, ["a <my-dog>"]),
    "cfg": Row(["--cfg", "7"], WHOLE),
    "steps": Row(["--steps", "5"], WHOLE),
    "sampler": Row(["--sampler", "heun"], WHOLE),
    "schedule": Row(["--schedule", "karras"], WHOLE),
    "guidance_rescale": Row(["--guidance-rescale", "0.7"], WHOLE),
    "true_cfg": Row(["--true-cfg", "3"], WHOLE, ["--model", "told"]),
    "skip_layers": Row(["--skip-layers", "0"], WHOLE, ["--model", "layers", "--steps", "6"]),
    "skip_scale": Row(["--skip-scale", "1"], WHOLE, SKIP),
    "skip_interval": Row(["--skip-interval", "0.3", "0.9"], WHOLE, SKIP),
    "guidance": Row(["--guidance", "apg"], WHOLE),
    "autoguidance": Row(["--autoguidance", "another"], {"loaded", *WHOLE}, which_way=lambda a, b: b.loaded[1][0] == "another"),
    "first_block_cache": Row(["--first-block-cache", "0.9"], WHOLE, ["--model", "layers", "--steps", "6"]),
    "deep_cache": Row(["--deep-cache", "2"], WHOLE),
    "original_size": Row(["--original-size", "64", "40"], WHOLE, ["--model", "sizes"]),
    "crop": Row(["--crop", "8", "4"], WHOLE, ["--model", "sizes"]),
    "guidance_interval": Row(["--guidance-interval"], WHOLE, which_way=lambda a, b: "Guidance interval: 0.28 to 5.42" in b.metadata[0]),
    "prompt_weights": Row(["--prompt-weights"], WHOLE, ["a (red:1.5) square"]),
    "eta": Row(["--eta", "0.5"], WHOLE),
    "seed": Row(["--seed", "5"], {"picture", "metadata", "files"}),
    "num_images": Row(["-n", "2"], SEVERAL, which_way=lambda a, b: b.files[1].startswith("0002-1-") and b.batches == [2] and
                      all(f"Seed: {seed}," in text for seed, text in zip((0, 1, 0), b.metadata, strict=True))),
    "batch_size": Row(["--batch-size", "2"], {"batches"}, ["-n", "3"], lambda a, b: b.batches == [2, 1], ["picture"]),
    "width": Row(["--width", "40"], WHOLE, which_way=lambda a, b: b.picture[0].shape == (32, 40, 3)),
    "height": Row(["--height", "40"], WHOLE, which_way=lambda a, b: b.picture[0].shape == (40, 32, 3)),
    "init_image": Row(INIT, WHOLE),
    "strength": Row(["--strength", "0.5"], WHOLE, INIT),
    "mask": Row(["--mask", "mask.png"], WHOLE, INIT),
    "invert": Row(["--invert", OTHER], WHOLE, INIT),
    "interpolate": Row(["--interpolate", "5"], SEVERAL, which_way=lambda a, b: b.batches == [16]),
    "frames": Row(["--frames", "3"], {"picture", "metadata", "batches"}, ["--interpolate", "5"], lambda a, b: b.batches == [3]),
    "preview": Row(["--preview", "tiny"], {"files", "picture", "metadata"}, which_way=lambda a, b: b.files == [*a.files, "preview.png"]),
    "out": Row(["--out", "out/fox.png"], {"files"}, which_way=lambda a, b: b.files == ["fox.png"]),
    "dtype": Row(["--dtype", "bf16"], {"loaded", *WHOLE}, which_way=lambda a, b: b.loaded[0][1] == torch.bfloat16),
    "quantize": Row(["--quantize", "fp8"], WHOLE),
    "compile": Row(["--compile"], {"compiled"}),
}
NOT_SAMPLE = {"map_weights": "the same picture: tests/folders/test_weights.py",
              "more_prompts": "the same as captions without a flag: tests/test_other_names.py", "device": "there may be one alone",
              "offload": "the same picture: tests/test_sample_memory.py, tests/test_offload.py",
              "dry_run": "no picture: tests/test_sample_memory.py"}


def sampled(module, asked: list, monkeypatch, tmp_path, *words: str) -> dict[str, Any]:
    """The outcome of sample.py."""
    batches, compiled = [], []
    monkeypatch.setattr(module, "draw", lambda model, prompts, *more, **options: batches.append(len(prompts)) or draw(
        model, prompts, *more, **options))
    monkeypatch.setattr(module, "compile_blocks", lambda net: compiled.append(True))
    asked.clear()
    captions = [*takewhile(lambda word: not word.startswith("-"), words)]
    module.ARGS = module.parse([PROMPT, *captions, "--model", "model", "--out", "out", *words[len(captions):]])
    module.main()
    files = sorted((tmp_path / "out").glob("[!.]*"))
    found = dict(files=[file.name for file in files], picture=[np.asarray(Image.open(file).convert("RGB")) for file in files],
                 metadata=[Image.open(file).info.get("parameters") for file in files], batches=batches, compiled=compiled, loaded=[*asked])
    for file in files:
        file.unlink()
    return found


@pytest.mark.parametrize("name", thinned(2, SAMPLE))
def test_a_flag_of_sample_changes_what_it_is_for_and_nothing_else(name, places, opened, once, monkeypatch, tmp_path):
    module = load_script("sample")
    asked = opened(module, places / "model")
    for each in places.iterdir():
        (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    row, run = SAMPLE[name], partial(sampled, module, asked, monkeypatch, tmp_path)
    row.check(once("sample", row.over, run), run(*row.over, *row.value))


def test_every_flag_of_sample_has_a_row_or_a_reason(monkeypatch):
    assert flags_of(load_script("sample"), monkeypatch) == SAMPLE.keys() | NOT_SAMPLE.keys()


# ---------------------------------------------------------------- how to draw


def test_every_setting_of_drawing_changes_the_picture():
    model, mask = make(), torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    pixels = to_pixels(np.array(Image.linear_gradient("L").resize((32, 32)).convert("RGB"))[None])
    how, canvas, morph = draw_settings(model, steps=2), Canvas(pixels, 0.5), Morph(OTHER, 5, [0.5])

    drawn = lambda how=how, **options: draw(model, ["a (red:1.5) square"], [3], how, **options)
    sampling = draw_settings(model, sampler="euler_a").sampling             # of which `sampler` and `schedule` are the names
    settings = dict(sampling=sampling, steps=5, cfg=6.0, rescale=0.7, interval=(0.5, 3.0), weighted=True,
                    guidance="apg", worse=replace(model, net=randomise(UNet(model.net.config), 9)))
    others = dict(told=("told", 2.0), sizes=("sizes", (40, 64, 8, 4)), skip=("layers", SkipLayers((0,), start=0.0, stop=1.0)),
                  shortcut=("layers", Shortcut("first_block_cache", 0.9, OTHER_NETWORKS["layers"]())))
    assert settings.keys() | others.keys() | {"sampler", "schedule"} == set(DrawSettings._fields)
    plain, from_canvas, morphed = drawn(), drawn(canvas=canvas), drawn(morph=morph)
    changed = {name: not same(plain, drawn(how._replace(**{name: value}))) for name, value in settings.items()}
    for name, (network, value) in others.items():
        other = replace(make("flow", "flow"), net=randomise(OTHER_NETWORKS[network]()))
        plain_how = draw_settings(other, steps=3)
        pair = [draw(other, [PROMPT], [3], each) for each in (plain_how, plain_how._replace(**{name: value}))]
        changed[name] = not same(*pair)
    for name, value in dict(negative=OTHER, width=40, height=40, eta=1.0, canvas=canvas, morph=morph).items():
        changed[name] = not same(plain, drawn(**{name: value}))
    for name, value in dict(pixels=-pixels, strength=1.0, mask=mask, shows=OTHER).items():
        changed[f"canvas.{name}"] = not same(from_canvas, drawn(canvas=canvas._replace(**{name: value})))
    inverted = [drawn(canvas=canvas._replace(shows=shows)) for shows in ("", OTHER)]
    changed["the caption of an inverted picture"] = not same(*inverted)
    for name, value in dict(prompt="blue", seed=6, fractions=[0.7]).items():
        changed[f"morph.{name}"] = not same(morphed, drawn(morph=morph._replace(**{name: value})))
    assert all(changed.values()), changed


def test_weights_are_read_in_every_caption_negative_ones_and_a_morph_s_end_included():
    """Weights of 1 change nothing; where they are not read, their parentheses and numbers do."""
    model, written, plain = make(), "a (green:1) triangle", "a green triangle"
    how = draw_settings(model, steps=2)._replace(weighted=True)
    for options in (lambda text: dict(prompts=[text]), lambda text: dict(negative=text), lambda text: dict(morph=Morph(text, 5, [0.5])),
                    lambda text: dict(morph=Morph(text, 5, [0.5]), negative=text)):
        one, two, other = (draw(model, seeds=[3], settings=settings, **dict(prompts=[PROMPT]) | options(text))
                           for text, settings in ((written, how), (plain, how), (written, how._replace(weighted=False))))
        assert same(one, two) and not same(one, other)


def test_a_model_that_says_nothing_is_drawn_with_diffusers_number_of_steps_and_guidance():
    model = make()
    model.defaults = {}
    theirs = inspect.signature(diffusers.StableDiffusionPipeline.__call__).parameters
    found = draw_settings(model)
    assert (found.steps, found.cfg) == (theirs["num_inference_steps"].default, theirs["guidance_scale"].default) == (50, 7.5)
    assert (found.sampler, found.rescale, found.interval, found.weighted) == ("ddim", 0.0, None, False)
    model.defaults = dict(steps=3, cfg=2.0, sampler="heun")
    found, typed = draw_settings(model), draw_settings(model, cfg=5, steps=9, sampler="euler")
    assert (found.sampler, found.steps, found.cfg) == ("heun", 3, 2) and (typed.sampler, typed.steps, typed.cfg) == ("euler", 9, 5)


# ---------------------------------------------------------------- evaluate.py

EVALUATE = {
    "run": Row(["another"], {"record", "loaded", "picture", "folder"}),
    "metric": Row(["--metric", "probe", "second"], {"measured"}, which_way=lambda a, b: b.measured == ["probe", "second"]),
    "count": Row(["--count", "4"], {"picture", "batches"}, which_way=lambda a, b: b.batches == [4]),
    "cfg": Row(["--cfg", "7"], {"record", "picture"}, which_way=lambda a, b: b.record["cfg"] == 7),
    "true_cfg": Row(["--true-cfg", "3"], {"record", "picture"}, ["told"], lambda a, b: (a.record["cfg"], b.record["cfg"]) == (1, 3)),
    "steps": Row(["--steps", "5"], {"record", "picture"}, which_way=lambda a, b: b.record["steps"] == 5),
    "sampler": Row(["--sampler", "heun"], {"record", "picture"}, which_way=lambda a, b: b.record["sampler"] == "heun"),
    "schedule": Row(["--schedule", "karras"], {"record", "picture"}),
    "guidance": Row(["--guidance", "apg"], {"record", "picture"}, which_way=lambda a, b: b.record["guidance"] == "apg"),
    "guidance_rescale": Row(["--guidance-rescale", "0.7"], {"record", "picture"},
                            which_way=lambda a, b: b.record["guidance_rescale"] == 0.7),
    "guidance_interval": Row(["--guidance-interval", "0.3", "5"], {"record", "picture"},
                             which_way=lambda a, b: b.record["guidance_interval"] == [0.3, 5]),
    "autoguidance": Row(["--autoguidance=another"], {"record", "loaded", "picture"},
                        which_way=lambda a, b: b.record["autoguidance"] == ["another"]),
    "first_block_cache": Row(["--first-block-cache", "0.9"], {"record", "picture"}, ["told"],
                             lambda a, b: b.record["first_block_cache"] == 0.9),
    "deep_cache": Row(["--deep-cache", "2"], {"record", "picture"}, which_way=lambda a, b: b.record["deep_cache"] == 2),
    "batch_size": Row(["--batch-size", "2"], {"batches"}, which_way=lambda a, b: b.batches == [2, 1], rounding=["picture"]),
    "seed": Row(["--seed", "1"], {"record", "picture"}, which_way=lambda a, b: abs(b.picture[0].astype(int) - a.picture[1]).max() <= 1),
    "dtype": Row(["--dtype", "bf16"], {"record", "picture"}, ["--dtype", "fp32"], lambda a, b: b.record["dtype"] == "bf16"),
    "quantize": Row(["--quantize", "fp8"], {"record", "picture"}, which_way=lambda a, b: b.record["quantize"] == ["fp8"]),
    "lora": Row(["--lora", "style.safetensors", "--out", "model/evaluation"], {"record", "picture"}),
    "embedding": Row(["--embedding", f"dog.safetensors:{PROMPT}"], {"record", "picture"}, ["--out", "elsewhere"]),
    "offload": Row(["--offload", "parts"], {"offloaded"}, which_way=lambda a, b: b.offloaded == [("parts", 3)]),
    "out": Row(["--out", "elsewhere"], {"folder"}, which_way=lambda a, b: b.folder == "elsewhere"),
    "no_ema": Row(["--no-ema"], {"record", "loaded", "picture"}, which_way=lambda a, b: b.record["no_ema"] is True),
}
EVALUATE_VAE = {                                    # with --vae: what is measured is an autoencoder on pictures
    "vae": Row(["--vae", "tiny"], {"record", "figures", "folder"}, which_way=lambda a, b: b.folder == "tiny/evaluation"),
    "data": Row(["--data", "gradients"], {"record", "figures", "read", "names"}, which_way=lambda a, b: b.names == ["init.png", "mask.png"]),
    "resolution": Row(["--resolution", "48"], {"record", "figures", "read"}, which_way=lambda a, b: b.record["resolution"] == 48),
    "vae_lpips": Row(["--vae-lpips", "lpips.safetensors"], {"record", "figures"}, which_way=lambda a, b: "lpips" in b.figures[0]),
    "metric": Row(["--metric", "reconstruction", "seams"], {"seams"}, ["--vae", "tiny"], lambda a, b: b.seams["tile"] == 64),
    "count": Row(["--count", "5"], {"record", "figures", "read", "names"}, which_way=lambda a, b: len(b.figures) == 5),
    "batch_size": Row(["--batch-size", "2"], {"read"}, which_way=lambda a, b: b.read == [(2, 32)] * 3, rounding=["figures", "record"]),
    "seed": Row(["--seed", "1"], {"record", "figures"}, which_way=lambda a, b: b.record["seed"] == 1),
    "dtype": Row(["--dtype", "bf16"], {"record", "figures"}, ["--dtype", "fp32"], lambda a, b: b.record["dtype"] == "bf16"),
    "out": Row(["--out", "elsewhere"], {"folder"}, which_way=lambda a, b: b.folder == "elsewhere"),
}
NOT_EVALUATE = {"device": "there may be one alone",
                **dict.fromkeys(("reference", "captions", "weights", "replicates", "fid_resize", "tower"),
                                "of metrics of pictures: tests/evaluation/test_picture_metrics.py"),
                "clip": "it needs a CLIP: tests/training/test_contrastive_runs.py"}


@pytest.mark.parametrize("name", thinned(2, EVALUATE))
def test_a_flag_of_evaluate_changes_what_it_is_for_and_nothing_else(name, places, opened, once, monkeypatch, tmp_path):
    measured, batches, found, offloaded = [], [], [], []

    def measure(name):
        def measured_by(evaluation):
            measured.append(name)
            found[:] = evaluation.draw([PROMPT] * evaluation.count).images
            return Measurement([], {key: value for key, value in evaluation.facts(0).items() if key not in ("seconds", "model")} | {
                "model": str(evaluation.source)})
        return measured_by

    for each in ("probe", "second"):
        monkeypatch.setitem(METRICS, each, Metric(each, measure(each)))
    monkeypatch.setattr(base, "draw", lambda model, prompts, *more: batches.append(len(prompts)) or draw(model, prompts, *more))
    module = load_script("evaluate")
    asked = opened(module, places / "model")
    monkeypatch.setattr(module, "offload_to_fit", lambda model, device, how, order: offloaded.append((how, order.at_once)) or model)
    monkeypatch.chdir(tmp_path)
    for each in ("model", "another", "told", "dog.safetensors", "style.safetensors"):
        (tmp_path / each).symlink_to(places / each)

    def run(*words):
        for noted in (measured, batches, asked, offloaded):
            noted.clear()
        place = next((word for word in words if word in ("another", "told")), "model")
        module.ARGS = module.parse([place, *(["--metric", "probe"] if "--metric" not in words else []), "--count", "3",
                                    *(word for word in words if word != place)])
        module.main()
        out = module.ARGS.out or f"{place}/evaluation"
        record = json.loads((tmp_path / out / "probe.json").read_text())
        return dict(record=record, measured=[*measured], batches=[*batches], loaded=[*asked], picture=[*found], folder=out,
                    offloaded=[*offloaded])

    row = EVALUATE[name]
    row.check(once("evaluate", row.over, run), run(*row.over, *row.value))


@pytest.mark.parametrize("name", thinned(2, EVALUATE_VAE))
def test_a_flag_of_evaluate_with_an_autoencoder_changes_what_it_is_for_and_nothing_else(name, places, once, monkeypatch, tmp_path):
    read, module = [], load_script("evaluate")
    monkeypatch.setattr(reconstruction, "reconstruct", lambda vae, images, *more: read.append(images.shape[:2]) or reconstruct(vae, images, *more))
    monkeypatch.chdir(tmp_path)
    for each in ("model", "tiny"):
        shutil.copytree(places / each, tmp_path / each)
    write_lpips(tmp_path / "lpips.safetensors")
    (tmp_path / "gradients").mkdir()
    for each in ("init.png", "mask.png"):
        shutil.copy(places / each, tmp_path / "gradients")

    def run(*words):
        read.clear()
        usual = {"--vae": "model/vae", "--data": "toyworld", "--count": "6", "--resolution": "32"}
        typed = [part for flag, value in usual.items() if flag not in words for part in (flag, value)]
        module.ARGS = module.parse([*typed, *words])
        module.main()
        out = module.ARGS.out or f"{module.ARGS.vae}/evaluation"
        record = json.loads((tmp_path / out / "reconstruction.json").read_text())
        seams = tmp_path / out / "seams.json"
        names = [row.pop("key") for row in record["pictures"]]
        return dict(figures=record.pop("pictures"), names=names, folder=out, read=[*read], seams=json.loads(seams.read_text()) if seams.exists()
                    else {}, record={name: value for name, value in record.items() if name != "seconds"})

    row = EVALUATE_VAE[name]
    row.check(once("evaluate --vae", row.over, run), run(*row.over, *row.value))


def test_every_flag_of_evaluate_has_a_row_or_a_reason(monkeypatch):
    assert flags_of(load_script("evaluate"), monkeypatch) == EVALUATE.keys() | EVALUATE_VAE.keys() | NOT_EVALUATE.keys()
