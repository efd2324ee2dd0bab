"""Model folders of Stable Diffusion XL, 3, 3.5 and FLUX.1: the pictures drawn here are those of diffusers' pipelines, to one 8-bit step."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ENVIRONMENT, PROMPT, ROOT, thinned
from PIL import Image
from published import NEGATIVE, write_flux, write_sd3, write_sdxl

from tinyldm.folders.load import load_model
from tinyldm.pipeline import draw, draw_settings

SIZE = dict(width=32, height=24)                     # not square: positions, crops and sizes have an order
SEEDS = [3, 4]
FAMILIES = {
    "sdxl": lambda folder: write_sdxl(folder),
    "sd3": lambda folder: write_sd3(folder),
    "sd35_medium": lambda folder: write_sd3(folder, qk_norm=True, dual=True),
    "sd3_without_t5": lambda folder: write_sd3(folder, qk_norm=True, t5=False),
    "flux_dev": lambda folder: write_flux(folder, guidance=True),
    "flux_schnell": lambda folder: write_flux(folder, guidance=False),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A function: family -> (its folder, diffusers' pipeline), written the first time."""
    memo = {}

    def written(family):
        if family not in memo:
            folder = tmp_path_factory.mktemp(family)
            memo[family] = folder, FAMILIES[family](folder)
        return memo[family]
    return written


def theirs(pipeline, prompts=(PROMPT, PROMPT), seeds=SEEDS, steps=3, **options):
    """diffusers' pictures, int [b, h, w, 3]."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {name: [value] * len(prompts) if name == "negative_prompt" else value for name, value in options.items()}
    images = pipeline([*prompts], num_inference_steps=steps, generator=generators, output_type="np", **(SIZE | options)).images
    return (images * 255).round().astype(int)


def ours(folder, prompts=(PROMPT, PROMPT), seeds=SEEDS, steps=3, how={}, **options):
    model = load_model(folder)
    return draw(model, [*prompts], [*seeds], draw_settings(model, steps=steps, **how), **(SIZE | options)).astype(int)


def assert_same(one, two):
    assert one.shape == two.shape and abs(one - two).max() <= 1 and one.std() > 10      # a flat picture would prove nothing


def differ(one, two) -> bool:
    return one.shape != two.shape or bool(abs(one - two).max() > 4)


@pytest.mark.parametrize("negative", thinned(2, [None, "", NEGATIVE]))
def test_sdxl_is_drawn_as_diffusers_does_with_zeros_only_where_no_negative_prompt_is_given(published, negative):
    folder, pipeline = published("sdxl")
    given = {} if negative is None else {"negative_prompt": negative}
    drawn = ours(folder, negative=negative)
    assert_same(drawn, theirs(pipeline, **given))                          # guidance 5 by default
    others = [other for other in (None, "", NEGATIVE) if other != negative]
    assert all(differ(drawn, ours(folder, negative=other)) for other in others)


def test_sdxl_is_told_the_sizes_that_are_asked_for(published):
    folder, pipeline = published("sdxl")
    model = load_model(folder)
    told = draw_settings(model, steps=3)._replace(sizes=(40, 64, 8, 4))
    drawn = draw(model, [PROMPT] * 2, SEEDS, told, **SIZE).astype(int)
    assert_same(drawn, theirs(pipeline, original_size=(40, 64), crops_coords_top_left=(8, 4)))
    assert not np.array_equal(drawn, ours(folder))


@pytest.mark.parametrize("family", thinned(3, ["sd3", "sd35_medium", "sd3_without_t5"]))
def test_sd3_is_drawn_as_diffusers_does(published, family):
    folder, pipeline = published(family)
    assert_same(ours(folder), theirs(pipeline))                            # guidance 7 by default
    assert_same(ours(folder, negative=NEGATIVE, how={"cfg": 3.0}), theirs(pipeline, negative_prompt=NEGATIVE, guidance_scale=3.0))


def test_skip_layer_guidance_is_that_of_diffusers(published):
    from tinyldm.diffusion.guidance import SkipLayers
    folder, pipeline = published("sd35_medium")
    model = load_model(folder)
    settings = draw_settings(model, steps=6)._replace(skip=SkipLayers((0,), 2.8, 0.01, 0.5))
    drawn = draw(model, [PROMPT], [3], settings, **SIZE).astype(int)
    expected = theirs(pipeline, [PROMPT], [3], 6, skip_guidance_layers=[0], skip_layer_guidance_stop=0.5)
    assert_same(drawn, expected)
    assert differ(drawn, ours(folder, [PROMPT], [3], 6))


def test_a_t5_that_is_left_out_is_zeros_as_in_diffusers(published):
    folder, pipeline = published("sd3")
    model, parts = load_model(folder, without={"text_encoder_3"}), dict(pipeline.components)
    assert "text_3" not in model.modules
    drawn = draw(model, [PROMPT] * 2, SEEDS, draw_settings(model, steps=3), **SIZE).astype(int)
    assert_same(drawn, theirs(type(pipeline)(**parts | {"text_encoder_3": None, "tokenizer_3": None})))
    assert differ(drawn, ours(folder))
    with pytest.raises(ValueError, match="cannot draw without text_encoder_3"):
        load_model(published("sdxl")[0], without={"text_encoder_3"})


@pytest.mark.parametrize("size", thinned(2, [dict(width=64, height=48), SIZE]))        # the shift depends on the size
def test_flux_dev_is_drawn_as_diffusers_does(published, size):
    folder, pipeline = published("flux_dev")
    drawn = ours(folder, **size)
    assert_same(drawn, theirs(pipeline, **size))                           # told 3.5 by default
    told = ours(folder, how={"cfg": 1.5}, **size)
    assert_same(told, theirs(pipeline, guidance_scale=1.5, **size))
    assert differ(drawn, told)


def test_flux_dev_with_real_guidance_is_drawn_as_diffusers_does(published):
    folder, pipeline = published("flux_dev")
    drawn = ours(folder, negative=NEGATIVE, how={"true_cfg": 3.0})
    assert_same(drawn, theirs(pipeline, negative_prompt=NEGATIVE, true_cfg_scale=3.0))
    assert differ(drawn, ours(folder))


def test_flux_schnell_is_drawn_in_four_steps_without_guidance(published):
    folder, pipeline = published("flux_schnell")
    model = load_model(folder)
    found = draw_settings(model)
    assert (found.steps, found.guided, found.told) == (4, False, 1.0)
    assert_same(draw(model, [PROMPT] * 2, SEEDS, found, **SIZE).astype(int), theirs(pipeline, steps=4, max_sequence_length=256))
    for how in ({"cfg": 3.0}, {"true_cfg": 3.0}):
        with pytest.raises(ValueError, match="distilled .* leave out --cfg"):
            draw_settings(model, **how)


def test_a_true_scale_is_for_networks_that_are_told_one(published):
    with pytest.raises(ValueError, match="told a guidance scale"):
        draw_settings(load_model(published("sdxl")[0]), true_cfg=3.0)


@pytest.mark.parametrize("family", ["sdxl", "sd35_medium", "flux_dev"])
@pytest.mark.slow
def test_sample_draws_the_pictures_of_diffusers(published, tmp_path, family):
    """The whole program, two seeds in one batch."""
    folder, pipeline = published(family)
    negative = ["--negative-prompt", NEGATIVE, *(["--true-cfg", "3"] if family == "flux_dev" else [])]
    subprocess.run([sys.executable, ROOT / "sample.py", PROMPT, "-n", "2", "--model", folder, "--out", tmp_path, "--seed", "3", "--steps", "3",
                    "--width", "32", "--height", "24", *negative], check=True, env=ENVIRONMENT, timeout=300)
    files = sorted(tmp_path.glob("*-a-*.png")) or sorted(file for file in tmp_path.glob("*.png") if "grid" not in file.name)
    options = {"negative_prompt": NEGATIVE} | ({"true_cfg_scale": 3.0} if family == "flux_dev" else {})
    assert_same(np.stack([np.asarray(Image.open(file)).astype(int) for file in files]), theirs(pipeline, **options))


def test_a_pipeline_with_another_ones_network_is_refused(published, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for part in published("sdxl")[0].iterdir():
        (folder / part.name).symlink_to(part)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline with a UNet2DConditionModel, where a SD3Transformer2DModel belongs"):
        load_model(folder)
