"""Drawing with a picture to start from, with masks, previews, half precision and tiles, on small random networks."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from helpers import PROMPT, combinations, load_script, randomise, script, small_text, thinned
from PIL import Image

import sample
from tinyldm import pipeline
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model, save_part
from tinyldm.model import Model
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.taesd import TAESD, TAESDConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.pictures.pixels import to_bytes, to_pixels
from tinyldm.pipeline import Canvas, decode, draw, draw_settings, encode
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.vendor_loaders.scheduler import PUBLISHED, from_config, to_config

SEED = 3
STOCHASTIC = ("ddpm", "euler_a")


@pytest.fixture(scope="module")
def parts():
    tokenizer, text = small_text()
    unet = UNetConfig(widths=(16, 32), depth=1, attention=(True, False), heads=(4, 4), context_dim=32, groups=8, sample_size=16)
    vae = randomise(AutoencoderKL(VAEConfig(widths=(16, 32), depth=1, groups=8, sample_size=32)), 3)
    c = vae.config.latent_channels
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.35                    # random pictures with little that is clipped
        vae.quant_conv.weight[c:], vae.quant_conv.bias[c:] = 0, -30      # a posterior of no width: diffusers samples from it
        vae.config = replace(vae.config, scaling_factor=1.0)
    return dict(net=randomise(UNet(unet), 1), vae=vae, texts=[randomise(CLIPText(text), 4)], tokenizers=[tokenizer])


@pytest.fixture
def model(parts):
    config = to_config("scaled_linear", {}, "v", "ddim")
    text = TextEncoders(map(TextEncoder, parts["texts"], parts["tokenizers"]))
    return Model(parts["net"], parts["vae"], text, *from_config(config), config, {"steps": 4, "cfg": 3.0, "sampler": "ddim"})


@pytest.fixture
def folder(model, parts, tmp_path):
    save_model(tmp_path / "model", **parts, scheduler=model.scheduler, defaults=model.defaults)
    return tmp_path / "model"


def scene(width=32, height=32, seed=0):
    """A smooth colourful picture, uint8 [h, w, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def canvas(image, strength=0.5, mask=None):
    return Canvas(to_pixels(image[None]), strength, None if mask is None else torch.as_tensor(mask)[None, None].float())


def drawn(model, how=None, seeds=(SEED,), **options):
    pictures = draw(model, [PROMPT] * len(seeds), seeds, how or draw_settings(model), **options).astype(int)
    return pictures[0] if len(seeds) == 1 else pictures


def contrasting(picture):
    return picture.std() > 20 and ((picture == 0) | (picture == 255)).mean() < 0.5



@pytest.fixture
def save_picture(tmp_path):
    def save(image, name="init.png"):
        Image.fromarray(np.asarray(image, np.uint8)).save(tmp_path / name)
        return tmp_path / name
    return save


# ---- from a picture


@pytest.mark.parametrize("sampler, strength", thinned(2, [
    ("ddim", 0.5), ("dpmpp_2m", 0.8), ("euler", 0.5), ("euler", 1.0), ("dpmpp_2m", 0.2), ("ddim", 0.07), ("unipc", 0.5)]))
def test_from_a_picture_diffusers_draws_the_same(model, parts, tmp_path, sampler, strength):
    config = to_config("scaled_linear", {}, "v", sampler)
    save_model(tmp_path / "model", **parts, scheduler=config, defaults={"steps": 20, "cfg": 3.0, "sampler": sampler})
    loaded = load_model(tmp_path / "model")
    ours = drawn(loaded, canvas=canvas(scene(40, 32), strength))
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "model")
    theirs.set_progress_bar_config(disable=True)
    latent = theirs.vae.encode(to_pixels(scene(40, 32)[None])).latent_dist.mode()       # or it draws noise for the posterior first
    image = theirs(PROMPT, image=latent * theirs.vae.config.scaling_factor, strength=strength, num_inference_steps=20,
                   guidance_scale=3.0, generator=torch.Generator().manual_seed(SEED)).images[0]
    assert contrasting(ours) and ours.shape == (32, 40, 3)
    assert abs(ours - np.asarray(image).astype(int)).max() <= 1


def test_the_least_strength_gives_back_nearly_what_the_autoencoder_makes_of_the_picture(model):
    how = draw_settings(model, steps=500, cfg=1.0)
    pixels = to_pixels(scene()[None])
    with torch.no_grad():
        plain = to_bytes(decode(model.vae, encode(model.vae, pixels)))[0].astype(int)
    distances = [abs(drawn(model, how, canvas=canvas(scene(), strength)) - plain).mean() for strength in (0.002, 0.02, 0.2)]
    assert distances[0] < 3 and distances[0] < distances[1] < distances[2]


def test_strength_1_starts_from_almost_pure_noise(model):
    one, other = (drawn(model, canvas=canvas(scene(seed=seed), 1.0)) for seed in (0, 1))
    near, far = (drawn(model, canvas=canvas(scene(seed=seed), 0.25)) for seed in (0, 1))
    assert abs(one - other).mean() < 0.35 * abs(near - far).mean()
    assert abs(one - drawn(model)).mean() < 0.35 * abs(near - drawn(model)).mean()       # sqrt(alpha_bar) is still 0.068


@pytest.mark.parametrize("sampler, strength", combinations(6, PUBLISHED, [0.5, 1.0]))
def test_a_seed_gives_one_picture_at_any_batch_size_from_a_picture_too(model, sampler, strength):
    how, start = draw_settings(model, sampler=sampler), canvas(scene(), strength)
    batch = drawn(model, how, seeds=(3, 4, 5), canvas=start)
    for i, seed in enumerate((3, 4, 5)):
        assert abs(batch[i] - drawn(model, how, seeds=(seed,), canvas=start)).max() <= 1
    assert abs(batch[0] - batch[1]).mean() > 5
    if sampler in STOCHASTIC:                                  # the noise along the way is there, and is the seed's too
        assert abs(batch[0] - drawn(model, draw_settings(model, sampler="ddim"), canvas=start)).mean() > 1


# ---- masks


HALF = np.zeros((32, 32), np.float32)
HALF[:, 16:] = 1


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m", "unipc", "pndm"])
def test_outside_the_mask_the_picture_stays_exactly_and_inside_it_changes(model, sampler):
    image = drawn(model, draw_settings(model, sampler=sampler), canvas=canvas(scene(), 1.0, HALF))
    assert (image[:, :16] == scene()[:, :16]).all()
    assert abs(image[:, 16:] - scene()[:, 16:].astype(int)).mean() > 20


def test_a_mask_that_is_all_white_is_no_mask(model):
    for strength in (0.5, 1.0):
        masked, plain = (drawn(model, canvas=canvas(scene(), strength, mask)) for mask in (np.ones((32, 32)), None))
        assert (masked == plain).all()


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun"])
def test_the_known_latents_are_kept_at_every_step_and_the_rest_sees_them(model, sampler):
    how, seen = draw_settings(model, sampler=sampler), []
    drawn(model, how, canvas=canvas(scene(), 1.0, HALF), on_step=seen.append)
    with torch.no_grad():
        known = encode(model.vae, to_pixels(scene()[None]))
    assert len(seen) == 4 and all(torch.equal(x0[..., :8], known[..., :8]) for x0 in seen)
    assert not any(torch.allclose(x0[..., 8:], known[..., 8:], atol=0.1) for x0 in seen)
    other = scene().copy()
    other[:, :16] = scene(seed=5)[:, :16]
    again = []
    drawn(model, how, canvas=canvas(other, 1.0, HALF), on_step=again.append)
    assert (seen[-1] - again[-1])[..., 9:].abs().max() > 0.05


def test_a_soft_mask_blends_the_old_picture_and_the_new(model, monkeypatch):
    ramp = np.tile(np.linspace(0, 1, 32, dtype=np.float32), (32, 1))
    new = []
    monkeypatch.setattr(pipeline, "decode", lambda vae, x: new.append(decode(vae, x)) or new[-1])
    image = drawn(model, canvas=canvas(scene(), 1.0, ramp))
    change = abs(image - scene().astype(int)).mean((0, 2))     # by column
    assert change[0] == 0 and change[:8].mean() < change[12:20].mean() < change[24:].mean()
    blend = (1 - ramp[..., None]) * scene() + ramp[..., None] * (new[0][0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert abs(image - blend.clip(0, 255)).max() <= 0.51


# ---- sample.py's part


@pytest.fixture
def arguments(folder, tmp_path):
    return lambda *words: sample.parse([PROMPT, "--model", str(folder), "--out", str(tmp_path / "out"), *map(str, words)])


@pytest.mark.parametrize("size, words, expected", [
    ((96, 48), [], (64, 32)), ((48, 96), [], (32, 64)), ((70, 50), [], (44, 32)), ((10, 10), [], (32, 32)),
    ((96, 48), ["--width", 40, "--height", 40], (40, 40)), ((96, 48), ["--width", 32], (32, 32)),
    ((400, 20), [], (640, 32))])
def test_a_picture_keeps_its_shape_unless_a_size_is_asked_for(model, arguments, save_picture, size, words, expected):
    file = save_picture(scene(*size))
    start = sample.open_canvas(arguments("--init-image", file, *words), model)
    assert tuple(start.pixels.shape) == (1, 3, *expected[::-1]) and start.strength == 0.75 and start.mask is None


def test_a_size_that_is_asked_for_crops_the_middle_and_never_stretches(model, arguments, save_picture):
    image = np.zeros((48, 96, 3), np.uint8)
    image[:, 24:72] = 255                                      # the middle square is white
    start = sample.open_canvas(arguments("--init-image", save_picture(image), "--width", 32, "--height", 32), model)
    assert start.pixels[..., 2:-2].min() > 0.9


def test_a_mask_is_white_1_and_black_0_exactly_and_an_all_black_one_is_refused(model, arguments, save_picture):
    image, mask = save_picture(scene()), save_picture(HALF * 255, "mask.png")
    start = sample.open_canvas(arguments("--init-image", image, "--mask", mask), model)
    assert torch.equal(start.mask[0, 0], torch.as_tensor(HALF)) and start.strength == 1.0
    with pytest.raises(ValueError, match="has no white"):
        sample.open_canvas(arguments("--init-image", image, "--mask", save_picture(HALF * 0, "black.png")), model)


def test_a_mask_of_another_shape_than_the_picture_is_refused(model, arguments, save_picture):
    image, mask = save_picture(scene(96, 48)), save_picture(np.full((48, 48), 255), "mask.png")
    with pytest.raises(ValueError, match="--mask .* is 48x48.*96x48"):
        sample.open_canvas(arguments("--init-image", image, "--mask", mask), model)
    half = save_picture(np.full((24, 48), 255), "half.png")    # another size of the same shape will do
    assert sample.open_canvas(arguments("--init-image", image, "--mask", half), model).mask.min() == 1


def test_sample_py_draws_into_a_picture_where_the_mask_is_white(folder, model, save_picture, tmp_path, capsys):
    sample, mask = load_script("sample"), save_picture(HALF * 255, "mask.png")
    words = [PROMPT, "--model", folder, "--init-image", save_picture(scene()), "--mask", mask, "--seed", SEED, "--out", tmp_path / "a.png"]
    sample.ARGS = sample.parse([*map(str, words)])
    sample.main()
    assert "Warning" not in capsys.readouterr().err
    image = Image.open(tmp_path / "a.png")
    assert abs(np.asarray(image).astype(int) - drawn(model, canvas=canvas(scene(), 1.0, HALF))).max() <= 1
    assert (np.asarray(image)[:, :16] == scene()[:, :16]).all() and "Mask: mask.png" in image.info["parameters"]


# ---- previews


def tiny_vae(path, channels):
    save_part(path, randomise(TAESD(TAESDConfig(latent_channels=channels, width=8, blocks=(1, 1)))))
    return str(path)


def test_a_preview_needs_no_autoencoder(model, arguments, tmp_path):
    show = sample.open_preview(arguments("--preview"), model, tmp_path / "preview.png")
    show(torch.randn(2, 4, 16, 16))
    assert np.asarray(Image.open(tmp_path / "preview.png")).std() > 1
    with pytest.raises(ValueError, match="no tiny autoencoder is published"):
        sample.open_preview(arguments("--preview", "taesd"), replace(model, vae=AutoencoderKL(replace(model.vae.config, scaling_factor=2.0))),
                            tmp_path / "preview.png")


def test_a_preview_is_written_at_every_step_and_other_channels_are_refused(model, arguments, tmp_path):
    file, seen = tmp_path / "preview.png", []
    show = sample.open_preview(arguments("--preview", tiny_vae(tmp_path / "tiny", 4)), model, file)
    def look(x0):
        file.unlink(missing_ok=True)
        show(x0)
        seen.append(np.asarray(Image.open(file)))
    drawn(model, seeds=(1, 2, 3), on_step=look)
    assert len(seen) == 4 and seen[0].shape == (66, 66, 3) and not np.array_equal(seen[0], seen[-1])     # two by two, a gap
    with pytest.raises(ValueError, match="has 16 latent channels, the model 4"):
        sample.open_preview(arguments("--preview", tiny_vae(tmp_path / "other", 16)), model, file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_preview_takes_latents_of_half_precision(model, arguments, tmp_path, dtype):
    show = sample.open_preview(arguments("--preview", tiny_vae(tmp_path / "tiny", 4)), model, tmp_path / "preview.png")
    show(torch.randn(1, 4, 16, 16).to(dtype))
    assert np.asarray(Image.open(tmp_path / "preview.png")).shape == (32, 32, 3)


@pytest.mark.slow
def test_sample_py_leaves_a_preview_beside_its_pictures(folder, tmp_path):
    done = script("sample.py", PROMPT, "--model", folder, "--preview", tiny_vae(tmp_path / "tiny", 4), "--out", tmp_path / "out", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "preview.png").exists() and len(list((tmp_path / "out").glob("0001-*.png"))) == 1
    done = script("sample.py", PROMPT, "--model", folder, "--preview", tiny_vae(tmp_path / "other", 5), "--out", tmp_path / "again")
    assert done.returncode == 2 and "5 latent channels" in done.stderr and done.stderr.count("\n") == 1


# ---- guidance


@pytest.mark.parametrize("scale, batch", [(-2.0, 1), (0.0, 1), (0.99, 1), (1.0, 1), (1.01, 2), (7.5, 2)])
def test_a_scale_of_at_most_1_asks_for_the_prompt_alone_and_calls_the_network_for_nothing_else(model, monkeypatch, scale, batch):
    sizes, call = [], model.net.forward
    monkeypatch.setattr(model.net, "forward", lambda x, *args: (sizes.append(len(x)), call(x, *args))[1])
    how = draw_settings(model, cfg=scale)
    image = drawn(model, how, negative="a blue circle")
    assert how.guided == (batch == 2) and sizes == [batch] * 4
    assert (image == drawn(model, draw_settings(model, cfg=1.0))).all() == (batch == 1)


def test_the_help_says_which_scales_are_none_and_what_changes_guidance_is_refused_without(model, arguments, capsys):
    with pytest.raises(SystemExit):
        sample.parse(["--help"])
    assert "1 or less is none, the prompt alone" in " ".join(capsys.readouterr().out.split())
    for scale in (0, 0.5, 1):
        with pytest.raises(ValueError, match="use it with --cfg above 1"):
            sample.resolve(arguments("--cfg", scale, "--guidance-rescale", 0.7), model)
    assert sample.resolve(arguments("--cfg", 1.5, "--guidance-rescale", 0.7), model).guided


# ---- precision, tiles, trouble


# measured: 0.45 and 0.06 8-bit steps on average
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1.5), (torch.float16, 0.2)])
def test_half_precision_draws_nearly_the_picture_of_full_precision(folder, dtype, bound):
    whole, half = load_model(folder), load_model(folder, dtype=dtype)
    assert next(half.vae.parameters()).dtype == (torch.float32 if dtype == torch.float16 else dtype)
    for start in (None, canvas(scene(), 0.5, HALF)):
        one, other = (drawn(model, canvas=start) for model in (whole, half))
        assert 0 < abs(one - other).mean() < bound


@pytest.mark.parametrize("at_once, fits, batches", [
    (32 * 32, 9, [1, 1, 1]), (2 * 32 * 32 + 1, 9, [2, 1]), (9 * 32 * 32, 9, [3]), (9 * 32 * 32, 2, [3, 1, 1, 1]), (33 * 31, 9, None)])
def test_pictures_are_decoded_in_batches_of_so_many_pixels_and_smaller_ones_where_memory_runs_out(model, monkeypatch, at_once, fits, batches):
    plain, tried, decode_batch = drawn(model, seeds=(1, 2, 3)), [], model.vae.decode

    def decode_few(z):
        tried.append(len(z))
        if len(z) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode_batch(z)

    monkeypatch.setattr(pipeline, "PIXELS_AT_ONCE", at_once)
    monkeypatch.setattr(model.vae, "decode", decode_few)
    assert abs(drawn(model, seeds=(1, 2, 3)) - plain).max() <= 1 or not batches
    assert tried == (batches or [])                            # None: too large even alone, so decoded in tiles


def test_four_pictures_of_512_pixels_are_decoded_at_once_and_larger_ones_than_1024_never_whole():
    assert [max(1, pipeline.PIXELS_AT_ONCE // side**2) for side in (256, 512, 768, 1024)] == [16, 4, 1, 1] and pipeline.PIXELS_AT_ONCE == 1024**2


@torch.no_grad()
def test_very_large_pictures_are_encoded_and_decoded_in_tiles_close_to_the_whole(model, monkeypatch):
    pixels, shapes, fine = to_pixels(scene(160, 144)[None]), [], model.vae.decode_fine
    z = encode(model.vae, pixels)
    plain = to_bytes(decode(model.vae, z)).astype(int)
    monkeypatch.setattr(pipeline, "PIXELS_AT_ONCE", 160 * 144 - 1)
    monkeypatch.setattr(model.vae, "decode_fine", lambda x: (shapes.append(tuple(x.shape[2:])), fine(x))[1])
    tiled, there = to_bytes(decode(model.vae, z)).astype(int), encode(model.vae, pixels)
    assert set(shapes) == {(64, 64)} and len(shapes) == 4
    assert contrasting(plain) and abs(tiled - plain).mean() < 4          # measured: 2.6
    assert np.corrcoef(tiled.ravel(), plain.ravel())[0, 1] > 0.98
    assert there.shape == z.shape and np.corrcoef(there.ravel(), z.ravel())[0, 1] > 0.95


def test_pictures_that_are_not_finite_are_an_error_with_the_fix(model):
    net = UNet(model.net.config).requires_grad_(False)
    net.conv_out.bias[0] = float("inf")                        # what float16 makes of 65520
    with pytest.raises(ValueError, match="--dtype fp32"):
        drawn(replace(model, net=net))


def test_a_model_that_draws_only_with_more_than_noise_and_text_is_refused(model):
    with pytest.raises(ValueError, match="takes 9 channels.*--mask"):
        drawn(replace(model, net=randomise(UNet(replace(model.net.config, in_channels=9)))))
