"""Previews by a linear map: the published numbers, which latents they are for, and the fit for any other VAE."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from PIL import Image
from torch import nn

from tinyldm.folders.load import load_vae
from tinyldm.models.taesd import TAESDConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.vendor_loaders import vae
from tinyldm.vendor_loaders.latent_rgb import FAMILIES, family, fit, preview

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
PUBLISHED = Path(__file__).parent / "published"

# Maps of the same latents that others fitted: InvokeAI (invokeai/app/util/step_callback.py), Stability-AI/sd3.5 (sd3_impls.py).
OTHERS = {
    "Stable Diffusion 1 and 2": [0.3444, 0.1385, 0.0670, 0.1247, 0.4027, 0.1494, -0.3192, 0.2513, 0.2103, -0.1307, -0.1874, -0.7445],
    "Stable Diffusion XL": [0.3816, 0.4930, 0.5320, -0.3753, 0.1631, 0.1739, 0.1770, 0.3588, -0.2048, -0.4350, -0.2644, -0.4289],
    "Stable Diffusion 3": [
        -0.0645, 0.0177, 0.1052, 0.0028, 0.0312, 0.0650, 0.1848, 0.0762, 0.0360, 0.0944, 0.0360, 0.0889, 0.0897, 0.0506, -0.0364, -0.0020,
        0.1203, 0.0284, 0.0855, 0.0118, 0.0283, -0.0539, 0.0658, 0.1047, -0.0057, 0.0116, 0.0700, -0.0412, 0.0281, -0.0039, 0.1106, 0.1171,
        0.1220, -0.0248, 0.0682, -0.0481, 0.0815, 0.0846, 0.1207, -0.0120, -0.0055, -0.0867, -0.0749, -0.0634, -0.0456, -0.1418, -0.1457,
        -0.1259]}


class Sealed(nn.Module):
    """A VAE that must not be run."""

    def __init__(self, name):
        super().__init__()
        channels, scaling, shift = FAMILIES[name].scaling
        self.config = VAEConfig(latent_channels=channels, scaling_factor=scaling, shift_factor=shift)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_map_multiplies_every_latent_pixel_and_needs_no_decoder(name, dtype):
    row = FAMILIES[name]
    x = torch.randn(2, row.scaling[0], 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    pixels = preview(Sealed(name))(x)
    assert pixels.shape == (2, 3, 24, 40) and pixels.dtype == torch.float32
    colours, bias = torch.tensor(row.colours), torch.tensor(row.bias)
    wanted = (x.float().permute(0, 2, 3, 1) @ colours + bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(pixels, F.interpolate(wanted, size=(24, 40), mode="bilinear"), rtol=1e-5, atol=1e-5)
    alone = preview(Sealed(name))(x[:, :, 1:2, 2:3])
    torch.testing.assert_close(alone, wanted[:, :, 1:2, 2:3].expand(2, 3, 8, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_a_published_map_resembles_the_one_that_others_fitted_to_these_latents(name):
    ours, others = torch.tensor(FAMILIES[name].colours).flatten(), torch.tensor(OTHERS[name])
    alike = [torch.corrcoef(torch.stack([ours, others.roll(shift)]))[0, 1] for shift in range(len(others))]
    assert alike[0] > 0.9 and max(alike[1:]) < 0.8          # shifted by a channel or a colour it does not


@pytest.mark.parametrize("file, name", [
    ("ft_mse_vae", "Stable Diffusion 1 and 2"), ("sd3_vae", "Stable Diffusion 3"), ("flux_vae", "FLUX.1")])
def test_a_family_is_recognised_by_its_published_config(file, name):
    config = vae.from_config(json.loads((PUBLISHED / f"{file}.json").read_text(encoding="utf-8"))["config"])
    assert family(config) is FAMILIES[name]


def test_sdxl_is_told_from_sd_1_by_its_scaling_and_own_models_belong_to_no_family():
    named = lambda scaling, channels=4: family(VAEConfig(latent_channels=channels, scaling_factor=scaling))
    assert named(0.13025) is FAMILIES["Stable Diffusion XL"] and named(0.18215) is FAMILIES["Stable Diffusion 1 and 2"]
    assert named(0.72) is None and named(0.18215, channels=8) is None and family(TAESDConfig()) is None


class Linear(nn.Module):
    """A VAE that decodes every latent to a square of one colour, linear in it."""

    def __init__(self, colours, bias, scaling=0.5, shift=0.25):
        super().__init__()
        self.config = SimpleNamespace(latent_channels=len(colours), scaling_factor=scaling, shift_factor=shift, downscale=4)
        self.colours, self.bias = nn.Parameter(colours), nn.Parameter(bias)

    from_latents = AutoencoderKL.from_latents

    def decode(self, z):
        standard = (z - self.config.shift_factor) * self.config.scaling_factor
        small = torch.einsum("bchw,cd->bdhw", standard, self.colours) + self.bias.view(1, 3, 1, 1)
        return F.interpolate(small, scale_factor=4, mode="nearest")


def test_the_fit_finds_a_linear_decoder_exactly():
    colours, bias = 0.02 * torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, -0.2, 0.1])
    linear = Linear(colours, bias)
    torch.testing.assert_close(fit(linear), torch.cat([colours, bias[None]]), rtol=1e-4, atol=1e-5)
    x = torch.ones(1, 6, 2, 3) / 3
    wanted = (colours.sum(0) / 3 + bias).view(1, 3, 1, 1).expand(1, 3, 8, 12)
    torch.testing.assert_close(preview(linear)(x), wanted, rtol=1e-4, atol=1e-5)


def test_the_fit_takes_a_vae_in_half_precision_and_is_the_same_each_time():
    net = randomise(AutoencoderKL(VAEConfig(widths=(8, 16), depth=1, groups=4, scaling_factor=0.7)))
    exact, again = fit(net), fit(net)
    assert torch.equal(exact, again) and exact.shape == (5, 3) and exact.dtype == torch.float32
    assert (fit(net.bfloat16()) - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.skipif(not (DATA / "taef2").exists(), reason="needs the published weights of a tiny autoencoder")
@torch.no_grad()
def test_photographs_are_recognisable_in_the_map_that_is_fitted_to_a_real_autoencoder(tmp_path):
    for half in ("encoder", "decoder"):
        (tmp_path / f"taef2_{half}.safetensors").symlink_to(DATA / "taef2" / f"taef2_{half}.safetensors")
    real, photographs = load_vae(tmp_path), []
    with tarfile.open(DATA / "photos256-000.tar") as archive:
        for member in archive:
            if member.name.endswith(".jpg") and len(photographs) < 12:
                photographs.append(np.asarray(Image.open(io.BytesIO(archive.extractfile(member).read())).resize((96, 96))))
    x = torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2) / 127.5 - 1
    small = F.avg_pool2d(preview(real)(real.to_latents(real.encode(x).mean)), 8)
    assert torch.corrcoef(torch.stack([small.flatten(), F.avg_pool2d(x, 8).flatten()]))[0, 1] > 0.75      # 0.80 on 24 of them
