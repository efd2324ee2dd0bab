"""Whole pipelines: sample.py draws, from a folder that diffusers saved, the picture that diffusers draws from it. The constructors
of its pipelines change the configs of their parts: that, what an absent field means, and every class that is read, is here too.

To one 8-bit step: float32 rounds differently in the two. The networks are small and random, with well-scaled
weights; the picture's contrast is checked, so that neither grey nor saturated pictures can agree by accident.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from helpers import later, randomise, thinned
from PIL import Image

from tinyldm.diffusion.noise import initial_noise, make_generators
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_loaded
from tinyldm.pictures.pixels import to_pixels
from tinyldm.pipeline import Canvas, draw, draw_settings, picture_size
from tinyldm.text.tokenizer import Tokenizer
from tinyldm.vendor_loaders import pipelines

ROOT = Path(__file__).parent.parent
PROMPT, NEGATIVE = "a red square on the left of a blue circle", "a small green triangle"
SEED, STEPS, SCALE, SIZE = 3, 8, 7.5, 48
SD1 = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)

SCHEDULERS = {
    "ddim": ("DDIMScheduler", dict(set_alpha_to_one=False, steps_offset=1, clip_sample=False)),
    "ddpm": ("DDPMScheduler", dict(clip_sample=False, steps_offset=1)),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m karras": ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True)),
    "pndm": ("PNDMScheduler", dict(skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)),
    "lms": ("LMSDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "ddim zero snr": ("DDIMScheduler", dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)),
}
FAST = {("ddim", "sd2"), ("euler ancestral", "sd1")}
CASES = [pytest.param(scheduler, kind, marks=[] if (scheduler, kind) in FAST else pytest.mark.slow)
         for scheduler in SCHEDULERS for kind in ("sd1", "sd2") if (scheduler, kind) != ("ddim zero snr", "sd1")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Networks of a thousandth of Stable Diffusion's size: SD1 enters transformers by convolution, SD2 by Linear."""
    tokenizer = Tokenizer.train([PROMPT, NEGATIVE] * 3, vocab_size=600, context_length=16)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    vae = randomise(diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8, latent_channels=4), 3)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.35                    # random pictures with little that is clipped
    shape = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32, sample_size=SIZE // 2,
                 down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    nets = {"sd1": diffusers.UNet2DConditionModel(**shape, attention_head_dim=4),
            "sd2": diffusers.UNet2DConditionModel(**shape, attention_head_dim=(2, 4), use_linear_projection=True)}
    common = dict(vae=vae, text_encoder=randomise(text, 4), tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
                  safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return {kind: common | {"unet": randomise(net, 5)} for kind, net in nets.items()}


@pytest.fixture
def pipeline(parts):
    def make(kind, name, **options):
        predicts = {"prediction_type": "v_prediction" if kind == "sd2" else "epsilon"}
        scheduler = getattr(diffusers, name)(**SD1 | predicts | options)
        made = diffusers.StableDiffusionPipeline(**parts[kind], scheduler=scheduler)
        made.set_progress_bar_config(disable=True)
        return made
    return make


def sample(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "sample.py", *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def drawn_by_sample_py(folder, out, *words):
    sample(PROMPT, "--negative-prompt", NEGATIVE, "--model", folder, "--seed", SEED, "--steps", STEPS, "--cfg", SCALE, "--out", out,
           *words)
    return np.asarray(Image.open(out)).astype(int)


def drawn_by(pipeline):
    generator = torch.Generator().manual_seed(SEED)
    image = pipeline(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=SCALE, generator=generator).images[0]
    return np.asarray(image).astype(int)


def assert_same_picture(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 20 and ((theirs == 0) | (theirs == 255)).mean() < 0.5
    assert abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("scheduler, kind", CASES)
def test_sample_py_draws_the_picture_that_diffusers_draws_from_the_same_folder(pipeline, tmp_path, scheduler, kind):
    name, options = SCHEDULERS[scheduler]
    theirs = pipeline(kind, name, **options)
    theirs.save_pretrained(tmp_path / "model")
    assert_same_picture(drawn_by_sample_py(tmp_path / "model", tmp_path / "ours.png"), drawn_by(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_karras", "lms", "unipc"])
def test_a_named_sampler_draws_what_its_class_made_from_the_folder_s_config_draws(pipeline, tmp_path, sampler):
    """Stable Diffusion 1.5's own scheduler config, which is silent about spacing."""
    theirs = pipeline("sd1", "PNDMScheduler")
    theirs.save_pretrained(tmp_path / "model")
    config = SD1 | {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
                    "trained_betas": None, "clip_sample": False}
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    ours = drawn_by_sample_py(tmp_path / "model", tmp_path / "ours.png", "--sampler", sampler)
    name = SCHEDULERS[{"euler_a": "euler ancestral", "dpmpp_2m_karras": "dpmpp_2m"}.get(sampler, sampler)][0]
    karras = {"use_karras_sigmas": True} if sampler.endswith("karras") else {}
    theirs.scheduler = getattr(diffusers, name).from_config(config, **karras)
    assert_same_picture(ours, drawn_by(theirs))


# ---- what the constructors of diffusers' pipelines change


@pytest.fixture
def folder(pipeline, tmp_path):
    """folder(changes to files, pipeline class) saves a model and then edits its JSON files: None removes a field."""
    def make(edits={}, kind="StableDiffusionPipeline", scheduler="DDIMScheduler", which="sd1", **fields):
        pipeline(which, scheduler, **fields).save_pretrained(tmp_path / "model")
        for file, changes in (edits | {"model_index.json": {"_class_name": kind} | edits.get("model_index.json", {})}).items():
            path = tmp_path / "model" / file
            content = json.loads(path.read_text()) | changes
            path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
        return tmp_path / "model"
    return make


def opened(kind, folder):
    found = getattr(diffusers, kind).from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    return found


def drawn_here(folder, steps=STEPS, cfg=SCALE, **options):
    model = load_model(folder)
    return draw(model, [PROMPT], [SEED], draw_settings(model, steps=steps, cfg=cfg), negative=NEGATIVE, **options)[0].astype(int)


CONFIG = "scheduler/scheduler_config.json"
REWRITTEN = [("DDIMScheduler", {"steps_offset": 0, "clip_sample": True}), ("DDIMScheduler", {"steps_offset": None, "clip_sample": None}),
             ("DDIMScheduler", {"steps_offset": 7, "clip_sample": False}), ("DDPMScheduler", {"steps_offset": None, "clip_sample": None}),
             *(("PNDMScheduler", {"steps_offset": offset, "skip_prk_steps": True}) for offset in (None, 5)),
             ("HeunDiscreteScheduler", {"steps_offset": 3, "timestep_spacing": "leading", "clip_sample": True}),
             *((name, {"steps_offset": offset, "timestep_spacing": "leading"}) for name in
               ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler",
                "UniPCMultistepScheduler") for offset in (None, 4))]
RARE = {"LMSDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"}


@pytest.mark.parametrize("name, fields", [pytest.param(*case, marks=pytest.mark.slow if case[0] in RARE else later(2, i))
                                          for i, case in enumerate(REWRITTEN)])
def test_steps_offset_is_1_and_nothing_is_clipped_whatever_the_scheduler_s_file_says_or_leaves_out(folder, name, fields):
    made = folder({CONFIG: fields}, scheduler=name)
    assert_same_picture(drawn_here(made), drawn_by(opened("StableDiffusionPipeline", made)))


def test_the_scheduler_s_class_is_the_one_that_model_index_json_names(folder):
    made = folder({"model_index.json": {"scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"]}}, steps_offset=1)
    theirs = opened("StableDiffusionPipeline", made)
    assert type(theirs.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert json.loads((made / CONFIG).read_text())["_class_name"] == "DDIMScheduler"
    assert_same_picture(drawn_here(made), drawn_by(theirs))


@pytest.mark.parametrize("version, size, expected", [
    ("0.6.0", 24, (128, 128)), ("0.8.1", 63, (128, 128)), ("0.6.0", 72, (144, 144)), ("0.9.0", 24, (48, 48)), ("0.10.2", 24, (48, 48)),
    ("0.9.0.dev0", 24, (48, 48)), (None, 24, (48, 48)), (None, [24, 32], (48, 64)), (None, [16, 16], (32, 32)),
    ("0.8.1", [24, 16], (48, 32))])
def test_the_size_of_a_picture_is_that_of_the_u_net_s_config_and_of_old_ones_at_least_64(folder, version, size, expected):
    made = folder({"unet/config.json": {"_diffusers_version": version, "sample_size": size}}, steps_offset=1, clip_sample=False)
    theirs = opened("StableDiffusionPipeline", made)
    latent = theirs.unet.config.sample_size
    assert [side * theirs.vae_scale_factor for side in (latent if isinstance(latent, list) else [latent] * 2)] == list(expected)
    assert picture_size(load_model(made)) == expected[::-1]     # width, height
    if expected == (48, 64):
        assert_same_picture(drawn_here(made), drawn_by(theirs))


def test_stable_diffusion_s_pipeline_takes_no_account_of_a_shift_factor_and_neither_do_we(folder):
    made = folder({"vae/config.json": {"shift_factor": 40.0}}, steps_offset=1, clip_sample=False)      # these latents are large
    assert_same_picture(drawn_here(made), drawn_by(opened("StableDiffusionPipeline", made)))


@pytest.mark.parametrize("scale", [*thinned(2, [1.0, 0.5]), 1.5, *thinned(2, [0.0, -3.0])])
def test_a_guidance_scale_of_at_most_1_is_the_prompt_alone_as_in_diffusers(folder, scale):
    made = folder(steps_offset=1, clip_sample=False)
    theirs, generator = opened("StableDiffusionPipeline", made), torch.Generator().manual_seed(SEED)
    image = theirs(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=scale, generator=generator).images[0]
    ours = drawn_here(made, cfg=scale)
    assert_same_picture(ours, np.asarray(image).astype(int))
    assert (abs(ours - drawn_here(made, cfg=1.0)).max() == 0) == (scale <= 1)


# ---- folders that other pipelines saved


def test_a_folder_of_the_pipeline_from_a_picture_draws_from_noise_and_from_a_picture(folder):
    made = folder({CONFIG: {"steps_offset": None, "clip_sample": None}}, "StableDiffusionImg2ImgPipeline")
    assert_same_picture(drawn_here(made), drawn_by(opened("StableDiffusionPipeline", made)))
    picture = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = to_pixels(np.array(Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC))[None])
    theirs = opened("StableDiffusionImg2ImgPipeline", made)
    latent = theirs.vae.encode(pixels).latent_dist.mode() * theirs.vae.config.scaling_factor
    image = theirs(PROMPT, image=latent, strength=0.5, negative_prompt=NEGATIVE, num_inference_steps=20, guidance_scale=SCALE,
                   generator=torch.Generator().manual_seed(SEED)).images[0]
    assert_same_picture(drawn_here(made, steps=20, canvas=Canvas(pixels, 0.5)), np.asarray(image).astype(int))


def test_a_folder_of_the_inpainting_pipeline_with_an_ordinary_u_net_draws_what_it_draws_where_all_is_masked(folder):
    """Its constructor leaves out PNDM's Runge-Kutta start, which the file's silence means."""
    made = folder({CONFIG: {"steps_offset": None, "skip_prk_steps": None}}, "StableDiffusionInpaintPipeline", "PNDMScheduler")
    noise = initial_noise((4, SIZE // 2, SIZE // 2), make_generators([SEED]))
    white = Image.new("L", (SIZE, SIZE), 255)
    image = opened("StableDiffusionInpaintPipeline", made)(
        PROMPT, image=Image.new("RGB", (SIZE, SIZE)), mask_image=white, strength=1.0, latents=noise, height=SIZE, width=SIZE,
        negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=SCALE).images[0]
    assert_same_picture(drawn_here(made), np.asarray(image).astype(int))


def test_what_an_inpainting_pipeline_would_clip_is_refused(folder):
    made = folder({CONFIG: {"clip_sample": None}}, "StableDiffusionInpaintPipeline")
    assert opened("StableDiffusionInpaintPipeline", made).scheduler.config.clip_sample is True
    with pytest.raises(ValueError, match="clip_sample=True: clamping"):
        drawn_here(made)


def test_a_folder_of_the_safe_pipeline_is_drawn_with_as_the_plain_one_does_and_says_so(folder, capsys):
    made = folder({CONFIG: {"steps_offset": None, "clip_sample": None}}, "StableDiffusionPipelineSafe")
    assert_same_picture(drawn_here(made), drawn_by(opened("StableDiffusionPipeline", made)))
    assert "without its guidance away from unsafe content" in capsys.readouterr().err


@pytest.fixture(scope="module")
def consistent(parts, tmp_path_factory):
    """A latent consistency model as published: (its folder, diffusers' pipeline)."""
    theirs = parts["sd1"]["unet"]
    stated = {name: value for name, value in theirs.config.items() if name != "_use_default_values"}
    net = randomise(type(theirs).from_config(stated | {"time_cond_proj_dim": 256}), 6)
    folder = tmp_path_factory.mktemp("lcm") / "model"
    made = diffusers.LatentConsistencyModelPipeline(**parts["sd1"] | {"unet": net}, scheduler=diffusers.LCMScheduler(**SD1))
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return folder, made


@pytest.mark.parametrize("steps, cfg", [(1, None), (2, None), (4, None), (4, 1.5)])
def test_a_latent_consistency_model_draws_the_latents_and_the_picture_of_diffusers(consistent, steps, cfg):
    (folder, theirs), latents = consistent, []
    model, given = load_model(folder), {} if cfg is None else {"guidance_scale": cfg}
    settings = draw_settings(model, steps=steps, cfg=cfg)
    assert (settings.sampler, settings.told, settings.guided) == ("lcm", cfg or 8.5, False)
    ours = draw(model, [PROMPT], [SEED], settings, on_step=latents.append)[0].astype(int)
    found = [theirs(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(SEED), output_type=kind, **given).images
             for kind in ("latent", "pil")]
    assert len(latents) == steps and abs(latents[-1] - found[0]).max() < 2e-5 * found[0].abs().max()
    assert_same_picture(ours, np.asarray(found[1][0]).astype(int))


def test_a_latent_consistency_model_draws_as_its_pipeline_does_unless_told_otherwise_and_so_do_its_copies(consistent, tmp_path):
    """Four steps at a scale of 8.5. Written again it is a folder of Stable Diffusion's pipeline, which tells such a U-Net the scale too."""
    folder, theirs = consistent
    model = load_model(folder)
    how = draw_settings(model)
    assert (how.steps, how.told, how.cfg) == (4, 8.5, 1.0)
    ours = draw(model, [PROMPT], [SEED], how)[0].astype(int)
    assert_same_picture(ours, np.asarray(theirs(PROMPT, generator=torch.Generator().manual_seed(SEED)).images[0]).astype(int))
    save_loaded(tmp_path / "copy", model)
    again = load_model(tmp_path / "copy")
    assert np.array_equal(draw(again, [PROMPT], [SEED], draw_settings(again))[0], ours)
    copy = opened("StableDiffusionPipeline", tmp_path / "copy")
    image = copy(PROMPT, num_inference_steps=4, guidance_scale=8.5, generator=torch.Generator().manual_seed(SEED)).images[0]
    assert_same_picture(ours, np.asarray(image).astype(int))


REASONS = {"FlaxStableDiffusionPipeline": "msgpack", "OnnxStableDiffusionPipeline": "another runtime",
           "StableDiffusionOnnxPipeline": "another runtime", "ORTStableDiffusionPipeline": "another runtime",
           "StableDiffusionControlNetPipeline": "further network", "Flux2Pipeline": "language model", "FluxFillPipeline": "further picture",
           "StableDiffusionLatentUpscalePipeline": "more than noise", "StableDiffusionDepth2ImgPipeline": "more than noise",
           "StableDiffusionInstructPix2PixPipeline": "more than noise",
           "AltDiffusionPipeline": "not CLIP's", "PixArtAlphaPipeline": "transformer", "DiTPipeline": "number of a class",
           "StableDiffusionSAGPipeline": "write that _class_name into", "DDPMPipeline": "write that _class_name into", None: "_class_name"}


@pytest.mark.parametrize("kind", REASONS)
def test_folders_of_other_pipelines_are_refused_with_the_reason(folder, kind):
    made = folder(kind=kind)
    with pytest.raises(ValueError, match=REASONS[kind]) as error:
        load_model(made)
    assert f"{made} holds a {kind}, which cannot be read: " in str(error.value) and "\n" not in str(error.value)


def test_a_folder_with_its_own_code_is_refused_whatever_its_class_is_called(folder):
    made = folder(kind=["pipeline", "StableDiffusionPipeline"])
    with pytest.raises(ValueError, match="holds a pipeline StableDiffusionPipeline, which cannot be read: it may have the parts"):
        load_model(made)


def test_what_is_written_is_read_too_and_what_is_read_is_not_refused(monkeypatch):
    monkeypatch.setitem(pipelines.PIPELINES, "NewPipeline", pipelines.PIPELINES[pipelines.OWN])    # one from outside
    for kind in pipelines.PIPELINES:
        assert pipelines.find({"_class_name": kind}, "x").written_as == kind
    for kind, reading in pipelines.READ.items():
        assert reading.written_as in pipelines.PIPELINES and not any(re.fullmatch(pattern, kind) for pattern in pipelines.REFUSED)


@pytest.mark.parametrize("channels, needs", [(9, "a mask and the masked picture"), (5, "a depth map"), (8, "a picture to edit"),
                                             (7, "to enlarge"), (6, "not of the same model")])
def test_a_u_net_that_takes_more_than_noise_is_refused_with_what_it_needs(folder, parts, channels, needs):
    made = folder(kind="StableDiffusionInpaintPipeline", clip_sample=False)
    theirs = parts["sd1"]["unet"]
    stated = {name: value for name, value in theirs.config.items() if name != "_use_default_values"}
    type(theirs).from_config(stated | {"in_channels": channels}).save_pretrained(made / "unet")
    with pytest.raises(ValueError, match=f"takes {channels} channels, the VAE makes 4: .*{needs}"):
        drawn_here(made)
