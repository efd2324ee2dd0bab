"""The loss of the first stage: L1 + MSE + KL of an autoencoder, and what is drawn for it."""

import numpy as np
import pytest
import torch
from preparing import VAE, make_vae

from tinyldm.config import make_config
from tinyldm.objectives.autoencoder import AutoencoderBatch, AutoencoderObjective
from tinyldm.random_streams import Stream, generator
from tinyldm.training.first_stage import optimisation, random_crops

BATCH = 5


def make(kl=0.0) -> AutoencoderObjective:
    return AutoencoderObjective(make_config(vae_kl=kl).autoencoder, VAE)


def pictures(count=BATCH) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(count, 8, 12, 3), dtype=np.uint8)


def drawn(objective, seed=0, step=2, part=slice(None)) -> AutoencoderBatch:
    return objective.draw(pictures()[part], generator(Stream.POSTERIOR, seed, step), BATCH, part)


@torch.no_grad()
@pytest.mark.parametrize("kl", [0.0, 1e-2])
def test_the_loss_is_that_of_the_formula(kl):
    vae, objective = make_vae(), make(kl)
    batch = drawn(objective)
    losses = objective.losses(objective.turns[0], {"vae": vae}, batch, 0.0)
    mean, logvar = vae.encode(batch.pixels)
    error = vae.decode(mean + (logvar / 2).exp() * batch.noise) - batch.pixels
    nats = (0.5 * (mean**2 + logvar.exp() - 1 - logvar)).sum((1, 2, 3))
    expected = error.abs().mean((1, 2, 3)) + (error**2).mean((1, 2, 3)) + kl * nats
    assert losses.shape == (BATCH,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)
    if kl:                                                     # which is no small part of it here
        assert (kl * nats > 0.1 * losses).all()


def test_gradients_reach_encoder_and_decoder():
    vae, objective = make_vae(), make(1e-6)
    assert objective.turns[0].trains == ("vae",)
    objective.losses(objective.turns[0], {"vae": vae}, drawn(objective), 0.0).mean().backward()
    assert all(p.grad is not None for p in vae.parameters())


def test_noise_is_a_function_of_seed_and_step_and_of_the_whole_batch():
    objective = make()
    one, again = drawn(objective), drawn(make())
    assert one.noise.shape == (BATCH, 4, 4, 6) and torch.equal(one.noise, again.noise)
    assert not torch.equal(one.noise, drawn(objective, seed=1).noise) and not torch.equal(one.noise, drawn(objective, step=3).noise)
    several = [drawn(objective, part=part) for part in (slice(0, 2), slice(2, 5))]
    assert all(torch.equal(whole, torch.cat(parts)) for whole, parts in zip(one, zip(*several)))
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
