"""Export: what train.py saved becomes a folder from which diffusers draws the picture that sample.py draws.

To one 8-bit step, at the model's own steps and guidance, from the same seed. The networks are small and random, with
well-scaled weights; the picture's contrast is checked, so that neither grey nor saturated ones can agree by accident.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from helpers import PROMPT, randomise, small_text, thinned
from originals import compvis_unet
from PIL import Image
from published import write_flux, write_sd3, write_sdxl
from safetensors import safe_open
from safetensors.torch import save_file

from tinyldm import export
from tinyldm.config import PRESETS, preset_config
from tinyldm.folders import single_file
from tinyldm.folders.load import load_model
from tinyldm.folders.rename import published_shapes
from tinyldm.folders.save import save_model, written_rules
from tinyldm.folders.single_file import why_not_one_file
from tinyldm.model import Model, architecture
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.flux import Flux, FluxConfig
from tinyldm.models.mmdit import MMDiT, MMDiTConfig
from tinyldm.models.taesd import TAESD, TAESDConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.pipeline import draw, draw_settings
from tinyldm.planning.flops import meta_networks
from tinyldm.text.encoders import JOINS, TextEncoder, TextEncoders
from tinyldm.training.run_folder import find_model
from tinyldm.vendor_loaders.families import SD1
from tinyldm.vendor_loaders.scheduler import PUBLISHED, from_config, to_config

ROOT = Path(__file__).parent.parent
SEED = 3
DEFAULTS = {"preset": "tiny", "data": "toyworld", "steps": 4, "cfg": 3.0, "sampler": "ddim", "step": 6}
RUN = {"batch_size": 64, "optimizer": "muon", "lr": 0.004, "ema_decay": 0.995, "caption_dropout": 0.1, "seed": 0}


@pytest.fixture(scope="module")
def parts():
    tokenizer, text = small_text()
    unet = UNetConfig(widths=(16, 32), depth=1, attention=(True, False), heads=(4, 4), context_dim=32, groups=8, sample_size=16)
    vae = VAEConfig(widths=(16, 32), depth=1, groups=8, sample_size=32)
    return SimpleNamespace(
        net=randomise(UNet(unet), 1), dit=randomise(DiT(DiTConfig(width=32, layers=2, heads=2, mlp_width=64, context_dim=32)), 2),
        vae=contrasting(vae, 3), text=randomise(CLIPText(text), 4), tokenizer=tokenizer,
        wide=randomise(UNet(replace(unet, in_channels=16, out_channels=16)), 5),
        shifted=contrasting(replace(vae, latent_channels=16, quant_convs=False, scaling_factor=0.36, shift_factor=0.6), 6),
        both=contrasting(replace(vae, shift_factor=-0.5), 7),
        projected=randomise(CLIPText(replace(text, projection_dim=24)), 4))


@torch.no_grad()
def contrasting(config, seed):
    """An autoencoder whose random pictures are neither grey nor much clipped."""
    vae = randomise(AutoencoderKL(config), seed)
    vae.decoder.conv_out.weight *= 0.35
    return vae


@pytest.fixture
def make_run(parts, tmp_path):
    """make_run(process, options, prediction, ...) writes a run folder as train.py leaves it, and returns its path."""
    def make(process="scaled_linear", options={}, prediction="eps", name="run", config={}, raw=None, **changes):
        whole = dict(net=parts.net, vae=parts.vae, texts=[parts.text], tokenizers=[parts.tokenizer], defaults=DEFAULTS) | changes
        last = tmp_path / name / "checkpoints" / "step-000006"
        save_model(last / "model", **whole, non_ema=raw, scheduler=to_config(
            process, options, prediction, whole["defaults"].get("sampler"), flow_match=isinstance(whole["net"], DiT)))
        (last / "state.json").write_text(json.dumps({"stage": "step", "step": 6, "finished": True}))
        (tmp_path / name / "config.json").write_text(json.dumps(RUN | config))
        return tmp_path / name
    return make


@pytest.fixture
def exported(monkeypatch, tmp_path):
    """exported(run, "--flag", ...) runs the command in this process and returns the folder that it wrote."""
    def run(source, *words, name="public"):
        folder = tmp_path / "given" / name
        monkeypatch.setattr(export, "ARGS", export.parse([str(source), str(folder), *map(str, words)]), raising=False)
        export.main()
        return folder
    return run


def ours(source, **size):
    """What sample.py draws."""
    model = load_model(find_model(str(source)))
    return draw(model, [PROMPT], [SEED], draw_settings(model), **size)[0].astype(int)


def theirs(folder, **size):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    how = json.loads((folder / "tinyldm.json").read_text())
    image = pipeline(PROMPT, num_inference_steps=how["steps"], guidance_scale=how["cfg"],
                     generator=torch.Generator().manual_seed(SEED), **size).images[0]
    return np.asarray(image).astype(int)


def assert_same(*pictures):
    first = pictures[0]
    assert first.std() > 20 and ((first == 0) | (first == 255)).mean() < 0.5
    for other in pictures[1:]:
        assert first.shape == other.shape and abs(first - other).max() <= 1


def command(module, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *module, *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=environment)


# ---- diffusers draws what sample.py draws

PAIRS = [(process, {}, prediction) for process in ("scaled_linear", "linear", "cosine") for prediction in ("eps", "x0", "v")
         if (process, prediction) != ("cosine", "eps")]        # which starts where rounding is amplified 20,000 times
PAIRS += [("flow", {"shift": shift}, "flow") for shift in (1.0, 3.0)] + [("scaled_linear", {"zero_snr": True}, "v")]
FEW = [("flow", {"shift": 3.0}, "flow"), pytest.param("scaled_linear", {}, "v", marks=pytest.mark.slow)]
MORE = [pytest.param(*pair, marks=pytest.mark.slow) for pair in (("cosine", {}, "x0"), ("scaled_linear", {"zero_snr": True}, "v"))]


@pytest.mark.slow
@pytest.mark.parametrize("process, options, prediction", FEW)
def test_the_command_writes_a_folder_that_diffusers_opens_and_draws_from(make_run, tmp_path, process, options, prediction):
    run, folder = make_run(process, options, prediction, defaults=DEFAULTS | {"sampler": "dpmpp_2m"}), tmp_path / "public"
    done = command(["-m", "tinyldm.export"], run, folder)
    assert done.returncode == 0, done.stderr
    assert f"--model {folder}" in done.stdout and "StableDiffusionPipeline" in done.stdout
    drawn = command(["sample.py"], PROMPT, "--model", folder, "--seed", SEED, "--out", tmp_path / "drawn.png")
    assert drawn.returncode == 0, drawn.stderr
    assert_same(theirs(folder), np.asarray(Image.open(tmp_path / "drawn.png")).astype(int), ours(run))


@pytest.mark.parametrize("process, options, prediction", thinned(4, PAIRS))
def test_every_pair_that_diffusers_implements_draws_the_same_picture_there(make_run, exported, process, options, prediction):
    run = make_run(process, options, prediction)
    folder = exported(run)
    assert_same(theirs(folder), ours(folder), ours(run))


def test_a_tiny_autoencoder_is_published_as_one(make_run, exported):
    vae = randomise(TAESD(TAESDConfig(latent_channels=4, width=16, blocks=(1, 2), scaling_factor=0.7, sample_size=32)), 3)
    vae.decoder[-1].weight.data *= 0.35                                    # so that pictures are not much clipped
    run = make_run("flow", {"shift": 3.0}, "flow", vae=vae)
    folder = exported(run)
    assert json.loads((folder / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderTiny"]
    assert_same(theirs(folder), ours(folder), ours(run))


@pytest.mark.parametrize("sampler", thinned(4, PUBLISHED))
@pytest.mark.parametrize("process, options, prediction", [("scaled_linear", {}, "v"), FEW[0], *MORE])
def test_a_named_sampler_is_the_folder_s_in_diffusers_too_or_is_refused(make_run, exported, process, options, prediction, sampler):
    run = make_run(process, options, prediction)
    there = (sampler in ("ddim", "euler", "dpmpp_2m", "unipc") if process == "flow" else
             prediction in PUBLISHED[sampler].predictions and (PUBLISHED[sampler].zero_snr or not options))
    if not there:
        with pytest.raises(ValueError, match=f"'{sampler}'.*the nearest is"):
            exported(run, "--sampler", sampler)
        assert not (run.parent / "given").exists()
        return
    folder = exported(run, "--sampler", sampler)
    model = load_model(run / "checkpoints/step-000006/model")
    named = draw(model, [PROMPT], [SEED], draw_settings(model, sampler=sampler))[0].astype(int)
    assert_same(theirs(folder), ours(folder), named)


def test_a_default_sampler_that_diffusers_lacks_is_replaced_and_the_command_says_so(make_run, exported, capsys):
    run = make_run("flow", {}, "flow", defaults=DEFAULTS | {"sampler": "heun"})
    folder = exported(run)
    assert "heun" in (said := capsys.readouterr().out) and "dpmpp_2m" in said
    assert_same(theirs(folder), ours(folder))


@pytest.mark.parametrize("size", [{}, {"width": 56, "height": 40}])
@pytest.mark.parametrize("net, vae", [("wide", "shifted"), ("net", "both")])
@pytest.mark.slow
def test_shift_and_projection_which_that_pipeline_misreads_are_folded_away(make_run, exported, parts, net, vae, size):
    run = make_run("flow", {}, "flow", net=getattr(parts, net), vae=getattr(parts, vae), texts=[parts.projected])
    assert json.loads((find_model(str(run)) / "model_index.json").read_text())["_class_name"] == "TinyLDMPipeline"
    folder = exported(run)
    model = load_model(folder)
    assert model.vae.config.shift_factor == 0 and model.text.modules["text"].projection is None
    assert_same(theirs(folder, **size), ours(folder, **size), ours(run, **size))
    pixels = torch.rand(1, 3, 36, 52, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, two = (v.to_latents(v.encode(pixels).mean) for v in (model.vae, getattr(parts, vae)))
    assert (one - two).abs().max() < 1e-5 * two.abs().max()


PUBLISHED_AS = [{"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1, "timestep_spacing": "leading"},
                {"_class_name": "DPMSolverMultistepScheduler", "lower_order_final": False, "final_sigmas_type": "sigma_min"},
                {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}]


@pytest.mark.parametrize("fields", thinned(3, PUBLISHED_AS))
def test_a_converted_model_keeps_its_scheduler_with_order_and_variant_and_its_oblong_size(parts, exported, tmp_path, fields):
    curve = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction",
             "steps_offset": 1}
    net = UNet(replace(parts.net.config, sample_size=(16, 24)))
    net.load_state_dict(parts.net.state_dict())
    save_model(tmp_path / "source", net=net.eval(), vae=parts.vae, texts=[parts.text], tokenizers=[parts.tokenizer],
               scheduler=curve | fields, defaults={"steps": 4, "cfg": 3.0})
    folder = exported(tmp_path / "source")
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text()) == curve | fields
    assert json.loads((folder / "unet/config.json").read_text())["sample_size"] == [16, 24]
    assert ours(folder).shape == (32, 48, 3)
    assert_same(theirs(folder), ours(folder), ours(tmp_path / "source"))


@pytest.mark.parametrize("kind", ["DiT", "U-Net"])
def test_the_size_of_the_autoencoder_s_config_may_be_oblong_too_and_counts_where_the_network_states_none(parts, exported, tmp_path, kind):
    vae = AutoencoderKL(replace(parts.vae.config, sample_size=(24, 40)))
    vae.load_state_dict(parts.vae.state_dict())
    save_model(tmp_path / "source", net=parts.dit if kind == "DiT" else parts.net, vae=vae.eval(), texts=[parts.text],
               tokenizers=[parts.tokenizer], scheduler=to_config("flow", {}, "flow", flow_match=kind == "DiT"), defaults={"steps": 2})
    folder = exported(tmp_path / "source")
    assert load_model(folder).vae.config.sample_size == (24, 40)
    assert ours(folder).shape == ((24, 40, 3) if kind == "DiT" else (32, 32, 3))


def test_a_dit_is_for_sample_py_and_the_command_says_so(make_run, exported, parts, capsys):
    run = make_run("flow", {"shift": 3.0}, "flow", net=parts.dit, defaults=DEFAULTS | {"sampler": "heun"})
    folder = exported(run)
    assert "No stock pipeline of diffusers" in capsys.readouterr().out
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "TinyLDMPipeline"
    assert "StableDiffusionPipeline" not in (folder / "README.md").read_text()
    assert_same(ours(folder), ours(run))
    assert load_model(exported(run, "--sampler", "lms", name="lms")).defaults["sampler"] == "lms"


def test_a_u_net_with_two_text_encoders_is_for_sample_py_and_the_command_says_so(make_run, exported, parts, monkeypatch, capsys):
    monkeypatch.setitem(JOINS, "first", JOINS["single"])
    run = make_run("flow", {}, "v", texts=[parts.text, parts.projected], tokenizers=[parts.tokenizer] * 2, vae=parts.both,
                   defaults=DEFAULTS | {"sampler": "heun", "text_join": "first"})
    folder = exported(run)
    output, model = capsys.readouterr().out, load_model(folder)
    assert "No stock pipeline of diffusers fits (StableDiffusionPipeline needs one text encoder" in output
    assert "from_pretrained" not in output + (folder / "README.md").read_text()
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "TinyLDMPipeline"
    assert model.defaults["sampler"] == "heun" and model.text.join == "first" and model.vae.config == parts.both.config
    assert [module.config for module in model.text.modules.values()] == [parts.text.config, parts.projected.config]
    assert_same(ours(folder), ours(run))


# ---- the real presets


@pytest.mark.parametrize("preset", [name for name, row in PRESETS.items() if row.get("network", "unet") == "unet"])
def test_every_u_net_preset_has_the_names_and_shapes_of_published_classes(preset):
    of_diffusers = lambda config: getattr(diffusers, config["_class_name"]).from_config(config)
    made = {"net": of_diffusers, "vae": of_diffusers,
            "text": lambda config: transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))}
    short = lambda shapes: {name.removeprefix("text_model."): tuple(shape) for name, shape in shapes.items()}
    for part, module in meta_networks(preset_config(preset))._asdict().items():
        shapes = published_shapes(module.state_dict(), written_rules(module))
        row = architecture(module)
        config = row.to_config(module.config)
        assert row.from_config(config) == module.config
        with torch.device("meta"):
            published = made[part](config).state_dict()
        assert short(shapes) == short({name: tensor.shape for name, tensor in published.items()})


# ---- what is written


def stored_dtypes(folder):
    found = set()
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {tensors.get_tensor(name).dtype for name in tensors.keys()}
    return found


@pytest.mark.parametrize("name, dtype", thinned(2, [("fp16", torch.float16), ("bf16", torch.bfloat16)]))
def test_dtype_stores_all_weights_in_it(make_run, exported, parts, name, dtype):
    run = make_run("flow", {}, "flow", vae=parts.both)
    folder, whole = exported(run, "--dtype", name), exported(run, name="whole")
    assert stored_dtypes(folder) == {dtype}
    assert abs(ours(folder) - ours(whole)).mean() < (2 if name == "fp16" else 8)


def test_no_ema_gives_away_the_raw_weights(make_run, exported, parts):
    run = make_run(raw={"net": {name: 2 * p for name, p in parts.net.state_dict().items()}})
    averaged, raw = (load_model(exported(run, *words, name=str(len(words)))).net for words in ([], ["--no-ema"]))
    assert torch.equal(averaged.conv_in.weight, parts.net.conv_in.weight)
    assert torch.equal(raw.conv_in.weight, 2 * parts.net.conv_in.weight)
    assert not list((run.parent / "given").rglob("*non_ema*"))


def test_the_model_card_tells_what_is_known_of_the_training(make_run, exported, parts):
    text = (exported(make_run("flow", {"shift": 3.0}, "flow"), "--sampler", "unipc") / "README.md").read_text()
    rows = dict(row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ") and len(row) > 5)
    told = (exported(exported(make_run(name="other"), name="mine"), name="copy") / "README.md").read_text()     # no run around it
    assert "trained with the network" not in told and "trained first" not in told and "| process | scaled_linear" in told
    count = sum(p.numel() for p in parts.net.parameters()) / 1e6
    assert rows == {
        "preset": "tiny", "network": f"UNet, {count:.1f} million parameters", "text encoder": "trained with the network, 0.0 million parameters",
        "autoencoder": "trained first, 0.2 million parameters", "data": "toyworld", "process": "flow (shift 3)", "prediction": "flow",
        "steps": "6", "pictures per step": "64", "optimizer": "muon", "learning rate": "0.004", "caption dropout": "0.1",
        "EMA decay": "0.995", "seed": "0", "sampler": "unipc, 4 steps, guidance 3"}
    assert "num_inference_steps=4, guidance_scale=3" in text


def test_a_name_that_is_not_utf_8_is_written_with_escapes(make_run, exported):
    folder = exported(make_run(defaults=DEFAULTS | {"data": "caf\udce9"}))         # the byte E9, as Python reads it from a command line
    assert r"| data | caf\udce9 |" in (folder / "README.md").read_text(encoding="utf-8")
    assert load_model(folder).defaults["data"] == ["caf\udce9"]                    # JSON has escapes of its own


@pytest.mark.parametrize("older", [False, True])                # older checkpoints have one text with paths
def test_no_path_of_this_machine_leaks_into_the_folder(make_run, exported, tmp_path, older):
    data, weights = tmp_path / "acme corp" / "pictures", tmp_path / "clip"
    url = "https://alice:SECRET@host.org/x.tar"
    folder = exported(make_run(defaults=DEFAULTS | {"data": str(data) if older else [f"{data}:0.7", f"{url}?token=SECRET:0.3"]},
                               config={"text_weights": str(weights), "vae_weights": "stabilityai/sd-vae-ft-mse"}))
    for file in folder.rglob("*"):
        if file.is_file():
            assert not any(word.encode() in file.read_bytes() for word in (str(tmp_path), "acme", "SECRET", "alice")), file
    text = (folder / "README.md").read_text()
    named = "pictures" if older else "pictures:0.7, https://host.org/x.tar:0.3"
    assert f"| data | {named} |" in text and "| clip, " in text and "stabilityai/sd-vae-ft-mse" in text
    assert load_model(folder).defaults["data"] == named.split(", ")


# ---- refusals


@pytest.mark.parametrize("process, prediction", [("flow", "eps"), ("flow", "x0"), ("flow", "v"), ("scaled_linear", "flow"),
                                                 ("cosine", "flow")])
def test_pairs_that_no_scheduler_of_diffusers_computes_are_refused_with_the_reason(make_run, exported, process, prediction):
    run = make_run(process, {}, prediction)
    with pytest.raises(ValueError, match="cannot be exported.*train with.*sample.py draws with its run folder") as error:
        exported(run)
    assert "\n" not in str(error.value) and not (run.parent / "given").exists()


def test_a_refusal_is_one_line_with_exit_code_2_and_writes_nothing(make_run, tmp_path):
    done = command(["-m", "tinyldm.export"], make_run("flow", {}, "v"), tmp_path / "given" / "public")
    assert done.returncode == 2 and done.stderr.startswith("error: this model cannot be exported") and done.stderr.count("\n") == 1
    assert not (tmp_path / "given").exists()


def test_a_folder_that_is_not_empty_is_refused_and_untouched(make_run, exported, tmp_path, capsys):
    (tmp_path / "given" / "public").mkdir(parents=True)
    (tmp_path / "given" / "public" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as error:
        exported(make_run())
    assert error.value.code == 2 and "name another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "given").rglob("*")] == ["public", "mine.txt"]
    (tmp_path / "given" / "public" / "mine.txt").unlink()
    assert (exported(make_run(name="again")) / "model_index.json").exists()      # an empty one is filled


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_what_fails_on_the_way_leaves_no_folder(make_run, exported, monkeypatch, failure):
    def fail(*args):
        raise failure
    monkeypatch.setattr(export, "card", fail)                  # all the weights are written by then
    run = make_run()
    with pytest.raises(type(failure)):
        exported(run)
    assert not list((run.parent / "given").iterdir())


# ---- models with several text encoders


PUBLISHED_FAMILIES = {"sdxl": (write_sdxl, {}, {}), "sd3": (write_sd3, {"qk_norm": True, "dual": True}, {}),
                      "sd3 without T5": (write_sd3, {"t5": False}, {}), "dev": (write_flux, {}, {}),
                      "schnell": (write_flux, {"guidance": False}, {"max_sequence_length": 256})}


def drawn_there(folder, pipeline=None, **how):
    """What the snippet of the model card draws, at a size of its own. pipeline: another to draw with."""
    kind, left_out = re.search(r'\npipeline = (\w+)\.from_pretrained\("\w+"(.*)\)\n', text := (folder / "README.md").read_text()).groups()
    if pipeline is None:
        absent = dict.fromkeys(re.findall(r", (\w+)=None", left_out))
        pipeline = getattr(diffusers, kind).from_pretrained(folder, **absent)
    snippet = re.search(r"\npipeline\((.*)\)\.images", text)[1]
    named = dict(word.split("=") for word in snippet.split(", ")[1:])
    pipeline.set_progress_bar_config(disable=True)
    values = {name: json.loads(value) for name, value in named.items()} | {"num_inference_steps": 3} | how
    return np.asarray(pipeline(PROMPT, generator=torch.Generator().manual_seed(SEED), width=48, height=32, **values).images[0]).astype(int)


def drawn_here(folder):
    model = load_model(folder)
    return draw(model, [PROMPT], [SEED], draw_settings(model, steps=3), width=48, height=32)[0].astype(int)


@pytest.mark.parametrize("family", thinned(2, PUBLISHED_FAMILIES))
def test_a_published_model_of_several_text_encoders_is_exported_for_its_pipeline(exported, tmp_path, capsys, family):
    write, options, how = PUBLISHED_FAMILIES[family]
    theirs = write(tmp_path / "source", **options)
    capsys.readouterr()
    folder = exported(tmp_path / "source")
    kind = type(theirs).__name__
    assert f"{kind}.from_pretrained" in capsys.readouterr().out and f"from diffusers import {kind}" in (folder / "README.md").read_text()
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == kind
    picture = drawn_there(folder, **how)
    assert_same(picture, drawn_here(folder), drawn_here(tmp_path / "source"))
    named = {"guidance_scale": 7.0} if "sd3" in family else {"guidance_scale": 5.0} if family == "sdxl" else {"guidance_scale": 3.5}
    assert_same(picture, drawn_there(folder, theirs, **named, **how))


@pytest.mark.parametrize("shift", thinned(2, [0.0, 0.1159]))
def test_clips_without_projection_get_the_identity_where_the_pipeline_wants_one(parts, exported, tmp_path, capsys, shift):
    theirs = write_sd3(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    plain = [*map(export.without_projection, model.text.modules.values())]
    vae = AutoencoderKL(replace(model.vae.config, shift_factor=shift))
    vae.load_state_dict(model.vae.state_dict())
    save_model(tmp_path / "source", net=model.net, vae=vae.eval(), texts=plain, tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults=model.defaults)
    assert json.loads((tmp_path / "source" / "model_index.json").read_text())["_class_name"] == "TinyLDMPipeline"
    folder = exported(tmp_path / "source")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == type(theirs).__name__
    assert_same(drawn_there(folder), drawn_here(folder))


@pytest.mark.parametrize("which", ["mmdit", "flux", "u-net with sizes"])
def test_a_network_with_one_clip_is_for_sample_py_and_the_reason_is_printed(make_run, exported, parts, capsys, which):
    pooled = parts.text.config.width
    net, reason = {
        "mmdit": (MMDiT(MMDiTConfig(in_channels=4, out_channels=4, width=64, layers=2, heads=2, context_dim=32, pooled_dim=pooled,
                                    max_positions=16, sample_size=16)), "StableDiffusion3Pipeline needs two CLIP text encoders"),
        "flux": (Flux(FluxConfig(in_channels=4, out_channels=4, width=64, heads=2, double_layers=1, single_layers=1, context_dim=32,
                                 pooled_dim=pooled, rope_axes=(4, 14, 14))), "FluxPipeline needs the text encoders CLIP and T5"),
        "u-net with sizes": (UNet(replace(parts.net.config, pooled_dim=pooled)), "StableDiffusionXLPipeline needs CLIP's text encoder"),
    }[which]
    folder = exported(make_run("flow", {"shift": 3.0}, "flow", net=randomise(net, 8)))
    said = capsys.readouterr().out
    assert "No stock pipeline of diffusers" in said and reason in said and reason in (folder / "README.md").read_text()
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "TinyLDMPipeline"
    assert_same(ours(folder), ours(folder.parent.parent / "run"))


def test_a_single_file_with_its_parts_is_exported_as_a_folder(exported, tmp_path):
    theirs = write_sdxl(tmp_path / "theirs")
    net = {f"model.diffusion_model.{name}": tensor for name, tensor in
           compvis_unet(theirs.unet.state_dict(), load_model(tmp_path / "theirs").net.config).items()}
    save_file(net, tmp_path / "xl.safetensors")
    folder = exported(tmp_path / "xl.safetensors", "--tokenizer", tmp_path / "theirs", "--parts", tmp_path / "theirs")
    assert_same(drawn_here(folder), drawn_here(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="a U-Net of Stable Diffusion 1's shape"):
        exported(tmp_path / "theirs", "--single-file", tmp_path / "one.safetensors", name="more")


# ---- one file


def test_a_single_file_of_another_shape_is_refused_and_nothing_is_written(make_run, exported, tmp_path):
    run = make_run()
    with pytest.raises(ValueError, match="--single-file: .*a U-Net of Stable Diffusion 1's shape"):
        exported(run, "--single-file", tmp_path / "one.safetensors")
    with pytest.raises(SystemExit):
        exported(run, "--single-file", tmp_path / "nowhere" / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists() and not (tmp_path / "given").exists()


@pytest.mark.slow
def test_a_full_size_stable_diffusion_1_fits_into_one_file_and_deviations_do_not(parts):
    def whole(unet={}, vae={}, text={}, scheduler={}, network=None, encoders=1):
        config = SD1 | {"prediction_type": "epsilon"} | scheduler
        learned = from_config(config)
        with torch.device("meta"):
            text_encoders = TextEncoders([TextEncoder(CLIPText(CLIPTextConfig(**text)), parts.tokenizer)] * encoders)
            return Model(network or UNet(UNetConfig(**unet)), AutoencoderKL(VAEConfig(**vae)), text_encoders, *learned, config, {})
    assert why_not_one_file(whole()) is None and why_not_one_file(export.public(whole(), "dpmpp_2m")) is None
    assert why_not_one_file(whole(unet={"sample_size": 32}, text={"bos_token_id": 0})) is None     # which no weight depends on
    for change, reason in (({"network": parts.dit}, "U-Net"), ({"unet": {"widths": (192, 384, 768, 768)}}, "U-Net"),
                           ({"unet": {"linear_projection": True}}, "U-Net"), ({"vae": {"scaling_factor": 0.13025}}, "VAE"),
                           ({"text": {"activation": "gelu"}}, "quick_gelu"), ({"text": {"layers": 11}}, "CLIP-L"),
                           ({"encoders": 2}, "CLIP-L"),
                           ({"scheduler": {"prediction_type": "v_prediction"}}, "eps-prediction"),
                           ({"scheduler": {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}}, "scaled_linear"),
                           ({"scheduler": {"beta_schedule": "linear"}}, "scaled_linear")):
        assert reason in why_not_one_file(whole(**change)), change


def test_one_file_in_compvis_layout_draws_the_same_picture(make_run, exported, parts, tmp_path, monkeypatch):
    shape = dict(context_dim=64, sample_size=64)
    run = make_run("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}, "eps",
                   net=randomise(UNet(UNetConfig(widths=(32, 64), depth=1, attention=(True, False), heads=(8, 8), **shape))),
                   vae=contrasting(VAEConfig(widths=(32, 64), depth=1), 3),
                   texts=[randomise(CLIPText(replace(parts.text.config, width=64, heads=1, bos_token_id=len(parts.tokenizer) - 2)))])
    model = load_model(find_model(str(run)))
    for module in (export, single_file):                       # the full size takes gigabytes
        monkeypatch.setattr(module, "why_not_one_file", lambda model: None)
    exported(run, "--single-file", tmp_path / "one.safetensors")
    parts.tokenizer.save(tmp_path / "tokenizer")
    again = load_model(tmp_path / "one.safetensors", tokenizer=str(tmp_path / "tokenizer"))
    assert_same(*(draw(one, [PROMPT], [SEED], draw_settings(model), width=32, height=40)[0].astype(int) for one in (model, again)))
