"""Statistics of latents, against closed forms."""

import math

import pytest
import torch
from scipy.fft import dctn

from tinyldm.training.latent_statistics import dct_matrix, latent_statistics, spectrum


def test_the_transform_is_scipys_orthonormal_dct():
    x = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dct_matrix(6) @ x @ dct_matrix(10).T, torch.from_numpy(dctn(x.numpy(), norm="ortho")))


def test_white_noise_has_power_one_at_every_frequency_whatever_its_scale():
    noise = 7 * torch.randn(400, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 5
    assert spectrum(noise) == pytest.approx([1.0] * 16, abs=0.05)
    assert len(spectrum(noise[:, :, :8, :12])) == 4 and spectrum(noise[:, :, :1, :1]) == []


@pytest.mark.parametrize("k, ring", [(2, 1), (5, 2), (15, 7)])
def test_a_cosine_has_all_of_its_power_in_the_ring_of_its_frequency(k, ring):
    """Frequency k of 16 along one axis, in 8 rings: a single coefficient of 16 * 16 times the variance, among those of its ring."""
    wave = torch.cos(math.pi * (torch.arange(16) + 0.5) * k / 16).view(1, 1, 1, 16).repeat(1, 1, 16, 1)
    radius = [math.hypot(y, x) / 16 for y in range(16) for x in range(16)][1:]
    members = sum(int(r * 8) == ring for r in radius)
    assert spectrum(wave) == pytest.approx([256 / members if i == ring else 0 for i in range(8)], abs=1e-3)


def test_a_mean_of_each_picture_is_no_structure():
    flat = torch.randn(9, 2, 1, 1, generator=torch.Generator().manual_seed(0)).expand(9, 2, 8, 8)
    assert max(spectrum(flat)) < 1e-10


def test_moments_and_correlations_are_those_of_the_channels():
    a, b, c = torch.randn(3, 50, 8, 8, generator=torch.Generator().manual_seed(0))
    z = torch.stack([a, 3 * a + 4 * b + 2, c, torch.full_like(a, 0.5)], 1)
    found = latent_statistics(z, torch.rand(50, 3, 16, 16))
    values = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(found["mean"]), values.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(found["std"]), values.std(1, correction=0), atol=1e-5, rtol=1e-5)
    assert found["correlation"][0][1] == found["correlation"][1][0] == pytest.approx(0.6, abs=0.02)      # 3 / sqrt(9 + 16)
    assert found["largest_correlation"] == pytest.approx(found["correlation"][0][1])
    assert found["correlation"][3] == [0, 0, 0, 0]                                                        # it has no variance
    assert len(found["spectrum"]) == 4 and len(found["picture_spectrum"]) == 8
    assert latent_statistics(a[:, None], torch.rand(50, 3, 16, 16))["largest_correlation"] == 0
