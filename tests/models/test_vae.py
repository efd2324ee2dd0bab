from dataclasses import replace

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from tinyldm.models.vae import AutoencoderKL, Posterior, VAEConfig

SMALL = VAEConfig(widths=(16, 32, 32), depth=1, groups=8, scaling_factor=0.7, shift_factor=0.3)
BARE = replace(SMALL, latent_channels=6, middle_attention=False, quant_convs=False)
CONFIGS = {"with everything": SMALL, "bare": BARE, "one level": replace(SMALL, widths=(16,))}


def build(config):
    torch.manual_seed(0)
    return AutoencoderKL(config)


def pictures(height=16, width=24, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("size", [(16, 24), (4, 4), (20, 12)])
def test_latents_are_downscale_times_smaller_and_pictures_come_back_in_their_size(config, size):
    vae, f = build(config), config.downscale
    posterior = vae.encode(pictures(*size))
    assert f == 2 ** (len(config.widths) - 1)
    assert posterior.mean.shape == posterior.logvar.shape == (2, config.latent_channels, size[0] // f, size[1] // f)
    assert vae.decode(posterior.mean).shape == (2, 3, *size)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_of_reconstruction_and_kl_reach_every_parameter(config):
    vae, x = build(config), pictures()
    posterior = vae.encode(x)
    z = posterior.sample(torch.randn_like(posterior.mean))
    ((vae.decode(z) - x).square().mean() + 1e-3 * posterior.kl().mean()).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.count_nonzero()] == []


def test_a_picture_s_latents_do_not_depend_on_its_batch():
    vae, x = build(SMALL), pictures(batch=3)
    with torch.no_grad():
        whole = vae.encode(x).mean
        decoded = vae.decode(whole)
        for i in range(3):
            assert (vae.encode(x[i:i + 1]).mean - whole[i:i + 1]).abs().max() < 1e-5 * whole.abs().max()
            assert (vae.decode(whole[i:i + 1]) - decoded[i:i + 1]).abs().max() < 1e-5 * decoded.abs().max()


def test_the_kl_is_that_of_the_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    q = Independent(Normal(mean, (0.5 * logvar).exp()), 3)
    p = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 3)
    torch.testing.assert_close(Posterior(mean, logvar).kl(), kl_divergence(q, p))


def test_the_kl_of_the_prior_is_zero_and_of_a_shift_by_one_half_a_nat_per_number():
    zero = torch.zeros(2, 4, 3, 3)
    assert Posterior(zero, zero).kl().tolist() == [0.0, 0.0]
    assert Posterior(zero + 1, zero).kl().tolist() == [18.0, 18.0]


def test_posterior_samples_have_its_mean_and_variance():
    mean, logvar = torch.tensor([-1.0, 2.0]), torch.tensor([0.0, -2.0])
    eps = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
    z = Posterior(mean, logvar).sample(eps)
    torch.testing.assert_close(z.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(0), logvar.exp(), atol=0.0, rtol=0.02)
    assert torch.equal(Posterior(mean, logvar).sample(torch.zeros(2)), mean)


def test_the_log_variance_is_clamped_to_what_exp_can_take():
    vae = build(SMALL)
    with torch.no_grad():
        vae.quant_conv.bias[4:6], vae.quant_conv.bias[6:] = 1e6, -1e6
        posterior = vae.encode(pictures())
    assert posterior.logvar[:, :2].unique().item() == 20 and posterior.logvar[:, 2:].unique().item() == -30
    assert posterior.sample(torch.ones_like(posterior.mean)).isfinite().all() and posterior.kl().isfinite().all()


def test_standardised_latents_turn_back_into_the_encoder_s():
    vae, z = build(SMALL), torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.from_latents(vae.to_latents(z)), z)
    torch.testing.assert_close(vae.to_latents(z), (z - 0.3) * 0.7)


def test_latents_with_the_data_s_mean_and_scale_become_standard():
    z = 5 * torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)) - 3
    vae = AutoencoderKL(replace(SMALL, shift_factor=z.mean().item(), scaling_factor=1 / z.std().item()))
    x = vae.to_latents(z)
    assert abs(x.mean().item()) < 1e-5 and abs(x.std().item() - 1) < 1e-5


def test_centring_moves_the_latents_and_leaves_reconstructions_as_they_were():
    torch.manual_seed(2)
    vae, x, mean = build(SMALL), pictures(), torch.randn(4)
    with torch.no_grad():
        before, decoded = vae.encode(x), vae.decode(vae.encode(x).mean)
        vae.centre(mean)
        after = vae.encode(x)
    torch.testing.assert_close(after.mean, before.mean - mean[:, None, None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.logvar, before.logvar)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(after.mean), decoded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size, fix", [((18, 16), "image size 18 is not a multiple of 4: use 16 or 20"),
                                       ((16, 23), "image size 23 is not a multiple of 4: use 20 or 24")])
def test_an_image_size_that_does_not_divide_is_refused_with_the_nearest_that_do(size, fix):
    with pytest.raises(ValueError, match=fix):
        build(SMALL).encode(pictures(*size))


def test_the_published_autoencoder_has_84_million_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoencoderKL(VAEConfig()).parameters()) == 83_653_863
