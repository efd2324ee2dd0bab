"""Whole pipelines: sample.py draws, from a folder that diffusers saved, the picture that diffusers draws from it.

To one 8-bit step: float32 rounds differently in the two. The networks are small and random, with well-scaled
weights; the picture's contrast is checked, so that neither grey nor saturated pictures can agree by accident.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from helpers import randomise
from PIL import Image

from tinyldm.text.tokenizer import Tokenizer

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
FAST = {("pndm", "sd1"), ("ddim", "sd2"), ("euler ancestral", "sd1")}
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
