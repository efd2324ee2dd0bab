"""The terms of the autoencoder's loss, each against its formula in numpy's float64."""

import numpy as np
import pytest
import torch
from preparing import make_vae

from tinyldm.config.fields import SETTINGS
from tinyldm.models.vae import Posterior
from tinyldm.objectives.reconstruction import TERMS, Reconstruction, bands

PIXELS = {name: term.function for name, term in TERMS.items() if term.pixels and term.function}


def pair(shape=(3, 3, 12, 10), seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    return pixels + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64), pixels


def edge(decoded: np.ndarray, pixels: np.ndarray) -> float:
    total = 0.0
    for axis in (1, 2):
        steps = [np.abs(np.take(x, range(1, x.shape[axis]), axis) - np.take(x, range(x.shape[axis] - 1), axis)) for x in (decoded, pixels)]
        total += np.abs(steps[0] - steps[1]).mean()
    return total


def focal(decoded: np.ndarray, pixels: np.ndarray) -> float:
    total = 0.0
    for channel in range(3):
        distance = np.abs(np.fft.fft2(decoded[channel], norm="ortho") - np.fft.fft2(pixels[channel], norm="ortho"))
        total += (distance / distance.max() * distance**2).mean()
    return total / 3


def fft(decoded: np.ndarray, pixels: np.ndarray) -> float:
    error = np.fft.fft2(decoded, norm="ortho") - np.fft.fft2(pixels, norm="ortho")
    return (np.abs(error.real).mean() + np.abs(error.imag).mean()) / 2


FORMULAS = {"l1": lambda a, b: np.abs(a - b).mean(), "mse": lambda a, b: ((a - b) ** 2).mean(), "edge": edge, "fft": fft,
            "focal_frequency": focal}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_term_is_its_formula_for_every_picture(name):
    decoded, pixels = pair()
    found = TERMS[name].function(decoded, pixels)
    expected = [FORMULAS[name](a.numpy(), b.numpy()) for a, b in zip(decoded, pixels)]
    assert found.shape == (3,) and found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", PIXELS)
def test_a_term_is_0_for_equal_pictures_and_its_gradient_is_that_of_small_steps(name):
    decoded, pixels = pair((2, 3, 6, 5), seed=1)
    assert not PIXELS[name](pixels, pixels).any()
    decoded.requires_grad_()
    if name == "focal_frequency":                               # its weights are constants to the gradient
        gradient, = torch.autograd.grad(PIXELS[name](decoded, pixels).sum(), decoded)
        assert gradient.isfinite().all() and gradient.any()
    else:
        assert torch.autograd.gradcheck(lambda x: PIXELS[name](x, pixels), decoded, eps=1e-7, atol=1e-5)
    equal = pixels.clone().requires_grad_()
    assert torch.autograd.grad(PIXELS[name](equal, pixels).sum(), equal)[0].isfinite().all()


def test_the_laplacian_pyramid_counts_an_error_of_any_size_the_same():
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(16, 16).expand(1, 3, 32, 32)
    assert PIXELS["laplacian"](pixels + 0.5, pixels).item() == pytest.approx(0.5)          # the coarsest rest alone
    assert PIXELS["laplacian"](0.5 * board, pixels).item() == pytest.approx(0.5)           # the finest band alone
    for size in ((32, 32), (9, 7), (1, 1)):                     # the bands add up to the picture
        x = torch.randn(1, 1, *size, dtype=torch.float64)
        *fine, rest = bands(x)
        for band in reversed(fine):
            rest = band + torch.nn.functional.interpolate(rest, size=band.shape[2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(rest, x)


def test_frequency_terms_see_one_frequency_where_it_is():
    pixels, wave = torch.zeros(1, 3, 16, 16, dtype=torch.float64), torch.cos(2 * torch.pi * 3 * torch.arange(16, dtype=torch.float64) / 16)
    decoded = wave.expand(1, 3, 16, 16)                         # two coefficients per channel of the size 16 / 2, of 256
    assert PIXELS["fft"](decoded, pixels).item() == pytest.approx(2 * 8 / (2 * 256))
    assert PIXELS["focal_frequency"](decoded, pixels).item() == pytest.approx(2 * 64 / 256) == pytest.approx(0.5)


def made(vae, pixels: torch.Tensor, compare) -> Reconstruction:
    posterior = vae.encode(pixels)
    return Reconstruction(pixels, vae.decode(posterior.mean), posterior, posterior.mean, vae.decode, compare)


def test_kl_is_in_nats_and_its_weight_is_divided_by_the_number_of_values():
    mean, logvar = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    posterior = Posterior(mean, logvar)
    one = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0))
    found = TERMS["kl"].function(Reconstruction(None, None, posterior, None, None, None))
    torch.testing.assert_close(found, one.sum((1, 2, 3)))
    assert TERMS["kl"].summed and not any(term.summed for name, term in TERMS.items() if name != "kl")
    assert TERMS["kl"].default / (3 * 64 * 64) == pytest.approx(1e-6, rel=1e-12)


@torch.no_grad()
def test_scale_equivariance_compares_the_decoded_latents_of_half_the_size_with_the_picture_of_half_the_size():
    vae, asked = make_vae(), []
    pixels = torch.rand(2, 3, 16, 8) * 2 - 1
    found = TERMS["se"].function(made(vae, pixels, lambda *two: asked.append(two) or two[0].mean((1, 2, 3))))
    z = vae.encode(pixels).mean
    half = (z[:, :, ::2, ::2] + z[:, :, 1::2, ::2] + z[:, :, ::2, 1::2] + z[:, :, 1::2, 1::2]) / 4
    (decoded, small), = asked
    torch.testing.assert_close(decoded, vae.decode(half))
    torch.testing.assert_close(small, torch.nn.functional.interpolate(pixels, size=(8, 4), mode="bilinear"))     # the same at one half
    torch.testing.assert_close(found, vae.decode(half).mean((1, 2, 3)))


def test_the_help_of_the_flag_names_every_term_and_its_default():
    text = SETTINGS["vae_loss"].help
    assert all(name in text for name in TERMS)
    assert {name: term.default for name, term in TERMS.items() if term.default} == {"l1": 1.0, "mse": 1.0, "kl": 0.012288}
    assert "l1 (default 1), mse (1), kl (0.0123" in text
