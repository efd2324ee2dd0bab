"""What sample.py can do beside drawing a caption: guidance of all kinds, weighted captions, inversion, animation."""

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from helpers import mistake, randomise, script
from PIL import Image

from tinyldm.diffusion.noise import initial_noise, make_generators, slerp
from tinyldm.folders.save import save_model
from tinyldm.model import Model
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.pictures.animation import even_fractions, write_animation
from tinyldm.pictures.pixels import to_bytes, to_pixels
from tinyldm.pipeline import Canvas, Morph, decode, draw, draw_settings, encode, PromptFeatures
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.text.prompt_weights import parse_weights, plain, token_weights
from tinyldm.text.tokenizer import Tokenizer
from tinyldm.vendor_loaders.scheduler import from_config, to_config

PROMPT, OTHER = "a red square on the left of a blue circle", "a small green triangle"


def make(prediction="v", process="scaled_linear", options={}, channels=4):
    tokenizer = Tokenizer.train([PROMPT, OTHER] * 3, vocab_size=600, context_length=16)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    text = CLIPTextConfig(vocab_size=len(tokenizer), width=32, layers=2, heads=2, mlp_width=64, context_length=16, **ids)
    unet = UNetConfig(widths=(16, 32), depth=1, attention=(True, False), heads=(4, 4), context_dim=32, groups=8, sample_size=16,
                      out_channels=channels)
    vae = randomise(AutoencoderKL(VAEConfig(widths=(16, 32), depth=1, groups=8, sample_size=32)), 3)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.35
    net = randomise(UNet(unet), 1)
    config = to_config(process, options, prediction, "ddim")
    encoders = TextEncoders([TextEncoder(randomise(CLIPText(text), 4), tokenizer)])
    return Model(net, vae, encoders, *from_config(config), config, {"steps": 4, "cfg": 3.0, "sampler": "ddim"})


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(path, net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults=model.defaults)
    return path


def drawn(model, how=None, prompts=(PROMPT,), seeds=None, **options):
    return draw(model, prompts, seeds or [3] * len(prompts), how or draw_settings(model), **options).astype(int)


# ---- guidance


@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_rescaled_guidance_draws_what_diffusers_draws(model, folder, rescale):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    image = theirs(PROMPT, num_inference_steps=4, guidance_scale=7.5, guidance_rescale=rescale,
                   generator=torch.Generator().manual_seed(3)).images[0]
    ours, plain_cfg = (drawn(model, draw_settings(model, cfg=7.5)._replace(rescale=share))[0] for share in (rescale, 0.0))
    assert abs(ours - np.asarray(image).astype(int)).max() <= 1
    assert abs(ours - plain_cfg).mean() > 3


def test_an_interval_halves_the_networks_work_outside_of_it(model, monkeypatch):
    samples, forward = [], model.net.forward
    monkeypatch.setattr(model.net, "forward", lambda x, t, cond: (samples.append(len(x)), forward(x, t, cond))[1])
    how = draw_settings(model, steps=8)
    everywhere, nowhere, middle = (drawn(model, how._replace(interval=interval)) for interval in
                                   [(0.0, float("inf")), (1e6, 2e6), (0.5, 3.0)])
    assert samples[:8] == [2] * 8 and samples[8:16] == [1] * 8
    inside = samples[16:]
    assert sorted(inside, reverse=inside[0] == 2).count(2) < 8 and 2 in inside and inside[0] == inside[-1] == 1
    assert (everywhere == drawn(model, how)).all() and abs(nowhere - drawn(model, how._replace(cfg=1.0))).max() <= 1
    assert abs(middle - everywhere).mean() > 1 < abs(middle - nowhere).mean()


def test_a_network_that_learned_its_variance_draws_and_ddpm_uses_it():
    wide = make(channels=8)
    ddim, ddpm = (draw_settings(wide, sampler=sampler) for sampler in ("ddim", "ddpm"))
    with torch.no_grad():
        images = []
        for bias in (-1.0, 1.0):                               # the posterior's variance, and beta
            wide.net.conv_out.weight[4:], wide.net.conv_out.bias[4:] = 0, bias
            images.append([drawn(wide, how._replace(interval=interval)) for how in (ddim, ddpm) for interval in (None, (0.5, 3.0))])
    assert (images[0][0] == images[1][0]).all() and (images[0][1] == images[1][1]).all()
    assert abs(images[0][2] - images[1][2]).mean() > 1 < abs(images[0][3] - images[1][3]).mean()


def test_processes_of_exploding_variance_start_from_their_own_noise(model):
    seen, wide = [], make(process="ve", options={"sigma_max": 50.0})
    wide.net.forward = lambda x, t, cond: (seen.append(x.std().item()), torch.zeros_like(x))[1]
    drawn(wide, draw_settings(wide, steps=3, cfg=1.0))
    assert seen[0] == pytest.approx(1, abs=0.1)


# ---- weighted captions


@pytest.mark.parametrize("text, pieces", [                     # the examples in AUTOMATIC1111's own documentation
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
     [("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641),
      (".", 1.1)]),
    ("", [("", 1.0)]),
    ("never) opened: 12:30 [x:y]", [("never) opened: 12:30 ", 1.0), ("x:y", 1 / 1.1)]),
    ("(no: -0.5 )(half:.5)", [("no", -0.5), ("half", 0.5)]),
    (r"back\slash and \\", [("back\\slash and \\", 1.0)]),
])
def test_weights_are_read_as_published(text, pieces):
    found = parse_weights(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in pieces] and plain(text) == "".join(p for p, _ in pieces)
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def test_every_token_carries_the_weight_of_what_it_was_written_in(model):
    text = "(a:1.2) (Red  square:1.5) on the [left]"
    weights = token_weights(model.text.tokenizers[0], text)
    tokens = model.text.tokenizers[0]._backend.encode(plain(text)).tokens
    told = {token.removesuffix("</w>"): weight for token, weight in zip(tokens, weights)}
    assert len(weights) == 16 and told["red"] == told["square"] == 1.5 and told["left"] == pytest.approx(1 / 1.1)
    assert told["a"] == 1.2 and {told[word] for word in ("on", "the", "<|startoftext|>", "<|endoftext|>")} == {1.0}
    cut = token_weights(model.text.tokenizers[0], "a red square " * 8 + "(triangle:2)")
    assert cut == [1.0] * 16                                   # what does not fit weighs nothing


@torch.no_grad()
def test_a_weight_multiplies_a_tokens_features_and_nothing_else(model):
    plain_cond = PromptFeatures(model)(["a red square", OTHER])
    cond = PromptFeatures(model, weighted=True)(["a (red:1.5) square", OTHER])
    ratio = cond.context / plain_cond.context
    assert ratio[0, 2].allclose(torch.tensor(1.5)) and torch.equal(cond.pooled, plain_cond.pooled)
    ratio[0, 2] = 1
    assert torch.equal(ratio, torch.ones_like(ratio))


def test_parentheses_are_text_unless_weights_are_asked_for(model):
    off, on = draw_settings(model), draw_settings(model)._replace(weighted=True)
    assert (drawn(model, off) == drawn(model, on)).all()
    weighted, written = "a (red:1.5) square", "a red square"
    assert (drawn(model, on, [written]) == drawn(model, off, [written])).all()
    assert abs(drawn(model, on, [weighted]) - drawn(model, on, [written])).mean() > 0.5
    assert abs(drawn(model, on, [weighted]) - drawn(model, off, [weighted])).mean() > 0.5
    negative = [drawn(model, on, negative=text) for text in ("a (red:2) square", "a red square")]
    assert abs(negative[0] - negative[1]).mean() > 0.5


# ---- from one picture to another


def test_slerp_keeps_noise_noise_and_its_ends():
    a, b = initial_noise((4, 16, 16), make_generators([1, 2])).split(1)
    path = slerp(a, b, torch.tensor(even_fractions(9)).view(-1, 1, 1, 1), (1, 2, 3))
    torch.testing.assert_close(path[0], a[0])
    torch.testing.assert_close(path[-1], b[0])
    assert (path.std((1, 2, 3)) - 1).abs().max() < 0.05 and torch.lerp(a, b, torch.tensor(0.5)).std() < 0.75
    steps = [(one * two).sum() / one.norm() / two.norm() for one, two in zip(path, path[1:])]
    assert max(steps) - min(steps) < 0.02                      # of even length (both noises are about, not exactly, of one)
    torch.testing.assert_close(slerp(a, a, torch.tensor(0.3), (1, 2, 3)), a)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_morph_begins_and_ends_at_the_two_pictures_and_moves_evenly(model, sampler):
    how = draw_settings(model, sampler=sampler)
    frames = drawn(model, how, [PROMPT] * 9, [3] * 9, morph=Morph(OTHER, 3 if sampler == "ddpm" else 5, even_fractions(9)))
    assert abs(frames[0] - drawn(model, how)[0]).max() <= 1
    assert abs(frames[-1] - drawn(model, how, [OTHER], [3 if sampler == "ddpm" else 5])[0]).max() <= 1
    whole, moves = abs(frames[0] - frames[-1]).mean(), [abs(a - b).mean() for a, b in zip(frames, frames[1:])]
    assert whole > 5 and max(moves) < 0.5 * whole


def test_an_animation_is_written_with_its_settings_and_starts_over(tmp_path):
    images = [np.full((16, 24, 3), 20 * i, np.uint8) for i in range(6)]
    for name in ("x.webp", "x.gif"):
        write_animation(tmp_path / name, images, "a fox\nSteps: 4, ünï")
        opened = Image.open(tmp_path / name)
        assert opened.n_frames == 6 and opened.size == (24, 16) and opened.info["loop"] == 0
        told = opened.getexif().get_ifd(0x8769).get(0x9286, b"")[8:].decode("utf-16-be") or opened.info["comment"].decode()
        assert told == "a fox\nSteps: 4, ünï"
        for i, image in enumerate(images):
            opened.seek(i)
            assert abs(np.asarray(opened.convert("RGB")).astype(int) - image).max() <= 3


# ---- inversion


def flow_model():
    """One that is nearly a denoiser: its answer moves little with x."""
    model = make("flow", "flow")
    with torch.no_grad():
        model.net.conv_out.weight *= 0.1
    return model


def test_an_inverted_picture_is_drawn_again_and_closer_with_more_steps():
    model = flow_model()
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = to_pixels(np.array(Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC))[None])
    with torch.no_grad():
        wanted = to_bytes(decode(model.vae, encode(model.vae, pixels))).astype(int)
    steps = []
    rebuilt = {n: drawn(model, draw_settings(model, sampler="ddim", schedule="normal", steps=n, cfg=1.0), [PROMPT, OTHER],
                        canvas=Canvas(pixels, 1.0, shows=""), on_step=lambda x0: steps.append(len(x0))) for n in (5, 20)}
    errors = {n: abs(images - wanted).mean() for n, images in rebuilt.items()}
    assert errors[20] < 0.5 and errors[20] <= errors[5] and steps == [2] * 50
    how = draw_settings(model, sampler="ddim", schedule="normal", steps=20, cfg=1.0)
    other = drawn(model, how, [PROMPT], canvas=Canvas(pixels, 1.0, shows=OTHER))
    assert abs(other - wanted[:1]).mean() > 1                  # drawn as something else, it changes


# ---- the script



@pytest.mark.slow
def test_all_of_guidance_from_the_keyboard(folder, tmp_path):
    done = script("sample.py", "a (red:1.3) square", "--model", folder, "--guidance-rescale", 0.7, "--guidance-interval", 0.3, 5, "--prompt-weights",
                  "--out", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    text = Image.open(tmp_path / "x.png").text["parameters"]
    assert text.startswith("a (red:1.3) square\nSteps: 4") and text.endswith(
        "CFG Rescale: 0.7, Guidance interval: 0.3 to 5, Emphasis: No norm")


@pytest.mark.slow
def test_an_animation_from_the_keyboard(folder, tmp_path):
    done = script("sample.py", PROMPT, OTHER, "--model", folder, "--interpolate", 5, "--frames", 5, "--batch-size", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    moving, strip = map(Path, done.stdout.splitlines())
    assert moving.stem == strip.stem and moving.suffix == ".webp" and strip.suffix == ".png" and strip.name.startswith("0001-0-")
    assert Image.open(moving).n_frames == 5 and Image.open(strip).size == (5 * 34 - 2, 32)
    assert Image.open(strip).text["parameters"].endswith("Variation seed: 5, Frames: 5")
    frames = np.asarray(Image.open(strip)).astype(int)
    for i, (prompt, seed) in ((0, (PROMPT, 0)), (4, (OTHER, 5))):
        alone = script("sample.py", prompt, "--model", folder, "--seed", seed, "--out", tmp_path / f"{i}.png")
        assert alone.returncode == 0
        assert abs(np.asarray(Image.open(tmp_path / f"{i}.png")).astype(int) - frames[:, 34 * i : 34 * i + 32]).max() <= 1


@pytest.mark.slow
def test_inversion_from_the_keyboard(folder, tmp_path):
    Image.new("RGB", (40, 32), (90, 120, 60)).save(tmp_path / "init.png")
    done = script("sample.py", PROMPT, "--model", folder, "--init-image", tmp_path / "init.png", "--invert", "a square, green", "--out", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "x.png").text["parameters"].endswith('Denoising strength: 0.75, Init image: init.png, Inverted as: "a square, green"')


@pytest.mark.parametrize("words, expected", [
    (["x", "--interpolate"], "a second caption, or another seed"),
    (["x", "--seed", "5", "--interpolate", "5"], "another seed"),
    (["x", "--seed", str(2**62)], f"--seed {2**62} must be below 2^62"),
    (["x", "--interpolate", str(2**62)], f"--interpolate {2**62} must be below 2^62"),
    (["x", "--interpolate", "9" * 5000], "(4300"),
    (["x", "--interpolate", "fox"], "must be a seed"),
    (["x", "y", "z", "--interpolate"], "one caption or two, not 3"),
    (["x", "--interpolate", "5", "-n", "2"], "no -n"),
    (["x", "--interpolate", "5", "--frames", "1"], "at least 2"),
    (["x", "--frames", "8"], "needs --interpolate"),
    (["x", "--out", "x.gif"], ".png"),
    (["x", "--out", __file__], "name a folder"),
    (["x", "--interpolate", "5", "--out", "x.mp4"], ".gif"),
    (["x", "--invert"], "--init-image"),
    (["x", "--init-image", "y.png", "--invert", "--mask", "z.png"], "leave out --mask"),
    (["x", "--guidance-rescale", "1.5"], "between 0 and 1"),
    (["x", "--guidance-interval", "5", "1"], "rising"),
    (["x", "--guidance-intervall", "1", "5"], "did you mean '--guidance-interval'"),
])
def test_mistakes_are_one_line_before_anything_is_loaded(words, expected, capsys):
    import sample
    with pytest.raises(SystemExit) as left:
        sample.parse(words)
    captured = capsys.readouterr().err
    assert left.value.code == 2 and expected in captured and captured.count("\n") == 1


@pytest.mark.slow
def test_guidance_that_is_off_cannot_be_rescaled(folder, tmp_path):
    done = script("sample.py", "x", "--model", folder, "--cfg", 1, "--guidance-rescale", 0.7, "--out", tmp_path / "x.png")
    assert done.returncode == 2 and "--cfg above 1" in done.stderr and "Traceback" not in done.stderr


# ---- two settings that exclude each other


@pytest.mark.parametrize("cfg", [1, 0, 0.5])
def test_a_negative_prompt_that_would_have_no_effect_is_refused(folder, tmp_path, capsys, cfg):
    error = mistake("sample", ["x", "--model", folder, "--cfg", cfg, "--negative-prompt", "ugly", "--out", tmp_path / "out"], capsys)
    assert error == f"error: --negative-prompt has no effect at --cfg {cfg:g}: use --cfg above 1, or leave it out"
    assert not (tmp_path / "out").exists()


def test_a_schedule_of_given_times_has_its_own_number_of_steps(model):
    how = draw_settings(model, schedule="999,500,100")
    assert how.steps == 3 == draw_settings(model, schedule="999,500,100", steps=3).steps != model.defaults["steps"]
    with pytest.raises(ValueError, match="schedule 999,500,100 has 3 steps, not 30: leave the number out"):
        draw_settings(model, schedule="999,500,100", steps=30)


def test_karras_in_a_sampler_s_name_is_a_schedule_that_another_one_contradicts(model):
    assert draw_settings(model, sampler="DPM++ 2M Karras").schedule == "karras"
    assert draw_settings(model, sampler="dpmpp_2m_karras", schedule="karras") == draw_settings(model, sampler="dpmpp_2m", schedule="karras")
    with pytest.raises(ValueError, match="sampler dpmpp_2m_karras and schedule trailing name two schedules: leave one out"):
        draw_settings(model, sampler="dpmpp_2m_karras", schedule="trailing")
    usual = replace(model, defaults=model.defaults | {"sampler": "dpmpp_2m_karras"})       # the model's own gives way to what is typed
    assert draw_settings(usual).schedule == "karras" and draw_settings(usual, schedule="trailing").schedule == "trailing"
    assert draw_settings(usual, sampler="dpmpp_2m").schedule != "karras"
