"""The loss of the first stage: the terms together, what is drawn for them, the discriminator's turn, and settings that are refused."""

import numpy as np
import pytest
import torch
from preparing import VAE, make_vae
from small_models import write_lpips
from torch.nn import functional as F

from tinyldm.config import make_config
from tinyldm.folders.lpips import load_lpips
from tinyldm.objectives import Turn, map_tensors, split
from tinyldm.objectives.autoencoder import AutoencoderBatch, AutoencoderObjective, last_layer, transform
from tinyldm.objectives.autoencoder_settings import loss_weights
from tinyldm.random_streams import Stream, generator
from tinyldm.training.first_stage import optimisation, random_crops

BATCH = 5
GAN = dict(width=4, layers=1, norm="none", start=0.0, warmup=0.0)


def make(loss=None, kl=0.0, vae=VAE, **settings) -> AutoencoderObjective:
    torch.manual_seed(0)
    return AutoencoderObjective(make_config(vae_loss={"kl": kl} | (loss or {}), **settings).autoencoder, vae)


def pictures(count=BATCH, size=(8, 12)) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(count, *size, 3), dtype=np.uint8)


def drawn(objective, seed=0, step=2, part=slice(None), size=(8, 12)) -> AutoencoderBatch:
    return objective.draw(pictures(size=size)[part], generator(Stream.POSTERIOR, seed, step), BATCH, part)


def losses(objective, vae, batch, turn=0, progress=1.0) -> torch.Tensor:
    return objective.losses(objective.turns[turn], {"vae": vae, **objective.networks}, batch, progress)


# ---------------------------------------------------------------- terms


@torch.no_grad()
@pytest.mark.parametrize("kl", [0.0, 3.0])
def test_the_loss_is_that_of_the_formula(kl):
    vae, objective = make_vae(), make(kl=kl)
    batch = drawn(objective)
    found = losses(objective, vae, batch)
    mean, logvar = vae.encode(batch.pixels)
    error = vae.decode(mean + (logvar / 2).exp() * batch.noise) - batch.pixels
    nats = (0.5 * (mean**2 + logvar.exp() - 1 - logvar)).sum((1, 2, 3))
    expected = error.abs().mean((1, 2, 3)) + (error**2).mean((1, 2, 3)) + kl * nats / (3 * 8 * 12)
    assert found.shape == (BATCH,) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    if kl:                                                      # which is no small part of it here
        assert (kl * nats / (3 * 8 * 12) > 0.1 * found).all()


@torch.no_grad()
def test_with_l1_and_kl_it_is_the_paper_s_sum_divided_by_the_number_of_values():
    """arXiv:2112.10752, App. G: absolute errors and nats, both summed over a picture, the latter times 1e-6."""
    vae, objective = make_vae(), make(dict(mse=0, kl=1e-6))
    batch = drawn(objective)
    posterior = vae.encode(batch.pixels)
    paper = (vae.decode(posterior.sample(batch.noise)) - batch.pixels).abs().sum((1, 2, 3)) + 1e-6 * posterior.kl()
    torch.testing.assert_close(losses(objective, vae, batch), paper / (3 * 8 * 12))


@torch.no_grad()
def test_the_default_weights_are_those_of_before_at_64_pixels():
    """Earlier versions had 1e-6 per nat beside means: their config.json files are read as what that was."""
    objective = AutoencoderObjective(make_config().autoencoder, VAE)
    assert objective.weights == {"l1": 1.0, "mse": 1.0, "kl": 0.012288} and 0.012288 == pytest.approx(1e-6 * 3 * 64**2)
    assert make_config(vae_kl=1e-6).autoencoder.loss == {"kl": pytest.approx(0.012288)}
    assert make_config(vae_kl=1e-5, vae_crop=32, resolution=256).autoencoder.loss == {"kl": pytest.approx(1e-5 * 3 * 32**2)}
    assert make_config(vae_kl=1e-5, resolution=256).autoencoder.loss == {"kl": pytest.approx(1e-5 * 3 * 256**2)}


@torch.no_grad()
def test_weights_add_terms_and_0_takes_them_away():
    vae, objective = make_vae(), make(dict(l1=0, mse=0.5, edge=2.0))
    batch, plain = drawn(objective), make(dict(l1=0))
    edges = make(dict(l1=0, mse=0, edge=1.0))
    expected = 0.5 * losses(plain, vae, batch) + 2 * losses(edges, vae, batch)
    torch.testing.assert_close(losses(objective, vae, batch), expected)


def test_gradients_reach_encoder_and_decoder():
    vae, objective = make_vae(), make(dict(se=0.25), kl=1e-6)
    assert objective.turns == (Turn("autoencoder", ("vae",)),)
    losses(objective, vae, drawn(objective)).mean().backward()
    assert all(p.grad is not None for p in vae.parameters())


def test_latents_can_be_halved_at_every_size_that_equivariance_draws():
    """Of 4 latents on a side, half the size would be odd where it were rounded to 1 or 3."""
    vae, objective = make_vae(), make(dict(se=0.25), vae_latents=dict(eq=1.0))
    seen, decode = set(), vae.decode
    vae.decode = lambda z: seen.add(tuple(z.shape[2:])) or decode(z)
    for step in range(12):
        assert losses(objective, vae, drawn(objective, step=step, size=(16, 16))).isfinite().all()
    assert len(seen) > 3


def test_lpips_is_a_frozen_network_of_the_objective_that_no_checkpoint_holds(tmp_path):
    vae, objective = make_vae(), make(dict(lpips=0.7), vae_lpips=[write_lpips(tmp_path / "lpips.safetensors")])
    batch = drawn(objective, size=(16, 16))
    found, plain = losses(objective, vae, batch), losses(make(), vae, batch)
    decoded = vae.decode(vae.encode(batch.pixels).sample(batch.noise))
    torch.testing.assert_close(found, plain + 0.7 * load_lpips(tmp_path / "lpips.safetensors")(decoded, batch.pixels))
    found.mean().backward()
    assert all(p.grad is not None for p in vae.parameters()) and not any(p.requires_grad for p in objective.networks["lpips"].parameters())
    assert [*objective.networks] == ["lpips"] and not objective.saved


# ---------------------------------------------------------------- the discriminator


def test_the_discriminator_takes_its_turn_from_the_start_on_and_the_decoder_listens_after_that():
    vae, objective = make_vae(), make(dict(gan=0.5), vae_gan=GAN | dict(start=0.5, warmup=0.2, lr=0.03, betas=(0.1, 0.2), adaptive=False))
    plain, batch = make(), drawn(objective)
    turn = objective.turns[1]
    assert (turn.trains, turn.start, turn.betas) == (("discriminator",), 0.5, (0.1, 0.2)) and objective.saved == ("discriminator",)
    assert (turn.optimisation.lr, turn.optimisation.optimizer, turn.optimisation.weight_decay) == (0.03, "adamw", 0.0)
    at = {progress: losses(objective, vae, batch, progress=progress).detach() for progress in (0.0, 0.49, 0.5, 0.6, 0.7, 1.0)}
    adversarial = -objective.adversary.net(vae.decode(vae.encode(batch.pixels).sample(batch.noise))).flatten(1).mean(1).detach()
    for progress, ramp in zip(at, (0, 0, 0, 0.5, 1, 1)):
        torch.testing.assert_close(at[progress], losses(plain, vae, batch).detach() + 0.5 * ramp * adversarial)
    adaptive = make(dict(gan=0.5), vae_gan=GAN | dict(start=0.5))
    for progress, measured in ((0.49, False), (0.5, True)):     # before that, no time is spent on it
        losses(adaptive, vae, batch, progress=progress)
        assert bool(adaptive.adversary.pulls) == bool(adaptive.decoded) == measured
    with torch.no_grad():                                       # in validation
        assert torch.equal(losses(objective, vae, batch), losses(plain, vae, batch))


@pytest.mark.parametrize("latents", [{}, dict(eq=1.0, noise=0.2)])
def test_the_discriminator_sees_what_the_autoencoder_s_turn_decoded_or_the_same_again(latents):
    vae, objective = make_vae(), make(dict(gan=0.5), vae_gan=GAN, vae_latents=latents)
    batch, seen = drawn(objective, size=(16, 16)), []
    objective.adversary.discriminator_losses = lambda real, fake: seen.append((real, fake)) or real.mean((1, 2, 3))
    calls, encode = [], vae.encode
    vae.encode = lambda pixels: calls.append(len(pixels)) or encode(pixels)
    for count in (2, 3):                                        # the second time as after memory has run out in the second turn
        for part in split(batch, 2):
            losses(objective, vae, part)
        for part in split(batch, count):
            losses(objective, vae, part, turn=1)
    assert calls == [3, 2, 3, 2, 2, 2, 1]                       # parts of 3 and 2 are kept, those of 2, 2 and 1 are decoded again
    first, again = (torch.cat([fake for _, fake in part]) for part in (seen[:2], seen[2:]))
    torch.testing.assert_close(first, again)
    assert not first.requires_grad and all(real.shape == fake.shape for real, fake in seen)
    objective.after_step(1)
    assert not objective.decoded


def test_the_adaptive_weight_is_measured_at_the_last_layer_of_the_decoder():
    vae, objective = make_vae(), make(dict(gan=0.5), vae_gan=GAN)
    batch = drawn(objective)
    last = last_layer(vae)
    assert last is vae.decoder.conv_out.weight
    decoded = vae.decode(vae.encode(batch.pixels).sample(batch.noise))
    error = decoded - batch.pixels
    both = (error.abs().mean() + error.square().mean(), -objective.adversary.net(decoded).mean())       # without KL
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in both]
    losses(objective, vae, batch).mean().backward()
    objective.after_step(1)
    torch.testing.assert_close(objective.adversary.weight, norms[0] / (norms[1] + 1e-4))
    assert objective.log_row() == {} and objective.notes() == []        # the discriminator has not begun


# ---------------------------------------------------------------- the decoder alone, latents


def test_with_a_frozen_encoder_only_the_decoder_gets_gradients_and_there_is_no_kl():
    vae, objective, usual = make_vae(), make(dict(kl=9.0), vae_freeze="encoder"), make()
    assert objective.turns == (Turn("autoencoder", ("vae.decoder", "vae.post_quant_conv")),)
    batch = drawn(objective)
    found = losses(objective, vae, batch)
    torch.testing.assert_close(found, losses(usual, vae, batch))
    found.mean().backward()
    assert {name.split(".")[0] for name, p in vae.named_parameters() if p.grad is not None} == {"decoder", "post_quant_conv"}


@torch.no_grad()
def test_decoder_noise_is_drawn_per_picture_relative_to_its_latents():
    vae, objective, usual = make_vae(), make(vae_latents=dict(noise=0.3)), make()
    batch, plain = drawn(objective), drawn(usual)
    assert torch.equal(batch.pixels, plain.pixels) and torch.equal(batch.noise, plain.noise)     # drawn before
    sizes = batch.jitter.std((1, 2, 3))
    assert sizes.max() > 1.5 * sizes.min() and 0.05 < sizes.mean() < 0.6
    several = [drawn(objective, part=part) for part in (slice(0, 2), slice(2, 5))]
    assert torch.equal(torch.cat([part.jitter for part in several]), batch.jitter)
    z = vae.encode(batch.pixels).sample(batch.noise)
    decoded = vae.decode(z + z.std((1, 2, 3), correction=0, keepdim=True) * batch.jitter)
    error = decoded - batch.pixels
    torch.testing.assert_close(losses(objective, vae, batch), error.abs().mean((1, 2, 3)) + error.square().mean((1, 2, 3)))


@torch.no_grad()
def test_eq_vae_decodes_shrunk_and_turned_latents_to_equally_transformed_pictures():
    vae, objective = make_vae(), make(vae_latents=dict(eq=1.0))
    batches = [drawn(objective, step=step, size=(16, 8)) for step in range(40)]
    views = torch.stack([batch.view[0] for batch in batches])
    assert all((batch.view == batch.view[0]).all() for batch in batches)
    assert views[:, 0].min() >= 8 / 32 and views[:, 0].max() <= 31 / 32 and {*views[:, 1].tolist()} == {0, 1, 2, 3}
    batch = batches[0]._replace(view=torch.tensor([[0.5, 1.0]]).expand(BATCH, 2))
    z = F.interpolate(vae.encode(batch.pixels).sample(batch.noise), size=(4, 2), mode="bilinear").rot90(1, (2, 3))
    error = vae.decode(z) - F.interpolate(batch.pixels, size=(8, 4), mode="bilinear").rot90(1, (2, 3))
    torch.testing.assert_close(losses(objective, vae, batch), error.abs().mean((1, 2, 3)) + error.square().mean((1, 2, 3)))
    half = make(vae_latents=dict(eq=0.5))
    chosen = [drawn(half, step=step).view[0, 0] < 1 for step in range(200)]
    assert 70 < sum(chosen) < 130
    x = torch.rand(1, 3, 4, 6)
    assert torch.equal(transform(x, [4, 6], 0), x) and transform(x, [2, 3], 1).shape == (1, 3, 3, 2)
    moved = objective.to_device(batch, torch.device("cpu"))
    assert torch.equal(moved.view, batch.view) and map_tensors(batch, lambda tensor: tensor).view is batch.view


def test_eq_vae_shrinks_no_picture_below_what_the_networks_take():
    objective = make(dict(gan=0.5), vae_gan=GAN | dict(layers=2), vae_latents=dict(eq=1.0))
    smallest = objective.adversary.net.smallest
    sizes = [drawn(objective, step=step, size=(16, 16)).view[0, 0] * 16 for step in range(40)]
    assert min(sizes) == smallest == 12


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("settings, said", [
    (dict(vae_loss=dict(lpip=1)), "unknown term of the autoencoder's loss (--vae-loss) 'lpip': did you mean 'lpips'"),
    (dict(vae_loss=dict(l1=-1.0)), "--vae-loss l1=-1.0 must be 0 or a positive number"),
    (dict(vae_loss=dict(l1="much")), "--vae-loss l1=much must be"),
    (dict(vae_loss=dict(l1=0, mse=0)), "--vae-loss compares no pixels: leave l1 or mse in it"),
    (dict(vae_loss=dict(lpips=1)), "--vae-loss lpips needs weights: --vae-lpips timm/vgg16.tv_in1k FILE"),
    (dict(vae_lpips=["x"]), "--vae-lpips is for the term lpips: add --vae-loss lpips=0.5, or leave it out"),
    (dict(vae_gan=dict(width=4)), "--vae-gan is for the term gan"),
    (dict(vae_loss=dict(gan=1), vae_gan=dict(kind="hing")), "--vae-gan: unknown adversarial loss 'hing': did you mean 'hinge'"),
    (dict(vae_loss=dict(gan=1), vae_gan=dict(with_=4)), "unknown --vae-gan field 'with_': did you mean 'width'"),
    (dict(vae_latents=dict(eq=2.0)), "--vae-latents: noise=0.0 must be 0 or more, and eq=2.0 a probability"),
    (dict(vae_freeze="encode"), "unknown part to freeze (--vae-freeze) 'encode': did you mean 'encoder'")])
def test_settings_that_cannot_work_are_refused_in_one_line(settings, said):
    with pytest.raises(ValueError) as error:
        AutoencoderObjective.check(make_config(**settings))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_pictures_that_are_too_small_are_refused_before_the_run_begins(tmp_path):
    source = [write_lpips(tmp_path / "lpips.safetensors")]
    for settings, said in (
            (dict(vae_loss=dict(gan=1), vae_crop=16), "(or crops, --vae-crop) of 16 px are too small for --vae-loss gan, which takes 24 px "
                                                      "or more, or fewer --vae-gan layers"),
            (dict(vae_loss=dict(lpips=1), vae_lpips=source, resolution=8), "of 8 px are too small for --vae-loss lpips, which takes 16 px"),
            (dict(vae_loss=dict(lpips=1, se=1), vae_lpips=source, vae_crop=16), "lpips, which takes 32 px"),
            (dict(vae_loss=dict(se=1), vae_crop=24), "--vae-loss se halves latents, so pictures (or crops, --vae-crop) of 24 px must be a "
                                                     "multiple of 16 px"),
            (dict(vae_loss=dict(lpips=1), vae_lpips=["nowhere.pth"]), "nowhere.pth does not exist")):
        with pytest.raises(ValueError) as error:
            AutoencoderObjective.check_sources(make_config(**settings), downscale=8)
        assert said in str(error.value)
    AutoencoderObjective.check_sources(make_config(vae_loss=dict(lpips=1, gan=1), vae_lpips=source, vae_crop=24), downscale=8)


def test_a_weight_of_0_takes_a_network_away_whose_settings_a_preset_has():
    objective = make(dict(gan=0, lpips=0), vae_gan=GAN, vae_lpips=["nowhere"])
    assert not objective.networks and len(objective.turns) == 1


def test_a_frozen_encoder_has_no_weight_of_kl():
    assert loss_weights(make_config(vae_freeze="encoder").autoencoder) == {"l1": 1.0, "mse": 1.0}


# ---------------------------------------------------------------- what is drawn


def test_noise_is_a_function_of_seed_and_step_and_of_the_whole_batch():
    objective = make()
    one, again = drawn(objective), drawn(make())
    assert one.noise.shape == (BATCH, 4, 4, 6) and torch.equal(one.noise, again.noise) and one.jitter is one.view is None
    assert not torch.equal(one.noise, drawn(objective, seed=1).noise) and not torch.equal(one.noise, drawn(objective, step=3).noise)
    several = [drawn(objective, part=part) for part in (slice(0, 2), slice(2, 5))]
    assert all(torch.equal(whole, torch.cat(parts)) for whole, parts in zip(one[:2], zip(*(part[:2] for part in several))))
    assert one.pixels.shape == (BATCH, 3, 8, 12) and one.pixels.min() >= -1 and one.pixels.max() <= 1


def test_crops_are_those_of_their_step():
    images = pictures(3)[:, :, :8]
    crops = [random_crops(images, 4, 6, seed=7, step=step) for step in range(4)]
    again, other = (random_crops(images, 4, 6, seed=seed, step=2) for seed in (7, 8))
    assert np.array_equal(again, crops[2]) and not np.array_equal(other, crops[2])
    assert all(crop.shape == (6, 4, 4, 3) for crop in crops) and not np.array_equal(crops[0], crops[1])
    windows = {image[y:y + 4, x:x + 4].tobytes() for image in images for y in range(5) for x in range(5)}
    assert {crop.tobytes() for batch in crops for crop in batch} <= windows
    whole = random_crops(images, 0, 6, seed=7, step=0)
    assert {picture.tobytes() for picture in whole} <= {image.tobytes() for image in images}


def test_the_first_stage_has_its_own_learning_rates_and_end():
    config = make_config(vae_lr=0.1, vae_muon_lr=0.2, vae_steps=30, vae_batch_size=3, lr=9.0, weight_decay=0.5, max_steps=0, budget="3m",
                         warmup_steps=7, grad_clip=2.0, rollback=True, optimizer="adamw")
    own = optimisation(config)
    assert (own.lr, own.muon_lr, own.max_steps, own.batch_size, own.decay) == (0.1, 0.2, 30, 3, 0.6)
    assert (own.budget, own.deadline, own.weight_decay, own.rollback) == ("", "", 0.0, False)
    assert (own.warmup_steps, own.grad_clip, own.optimizer) == (7, 2.0, "adamw")
