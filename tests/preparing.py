"""What the tests of the encoding job share: shards of plain pictures whose colours are their numbers, a small VAE."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from helpers import randomise
from PIL import Image

from tinyldm.config import Config, make_config
from tinyldm.data import prepare
from tinyldm.data.cache import Cache
from tinyldm.models.vae import AutoencoderKL, Posterior, VAEConfig
from tinyldm.pictures.pixels import to_pixels

CPU = torch.device("cpu")


def make_vae(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    return randomise(AutoencoderKL(VAEConfig(latent_channels=4, widths=(8, 8), depth=1, groups=4, middle_attention=False, **changes)))


VAE = make_vae()


class Overflowing(AutoencoderKL):
    """A VAE that returns infinity for the pictures for which fails(pixels), bool [b], is true."""

    def __init__(self, fails):
        super().__init__(VAE.config)
        self.load_state_dict(VAE.state_dict())
        self.fails = fails

    def encode(self, pixels):
        mean, logvar = super().encode(pixels)
        return Posterior(torch.where(self.fails(pixels)[:, None, None, None], float("inf"), mean), logvar)


def colour(i: int) -> tuple[int, int, int]:
    return (i * 37 % 256, i * 91 % 256, i * 151 % 256)


def picture(i: int, size=(12, 12), kind="PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour(i)).save(data, kind)
    return data.getvalue()


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for key, files in samples.items():
            for end, data in files.items():
                info = tarfile.TarInfo(f"{key}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def numbered(start: int, count: int, **more) -> dict[str, dict[str, bytes]]:
    return {f"{i:06d}": {"png": picture(i), "txt": f"picture {i}".encode()} for i in range(start, start + count)}


def settings(tmp_path, *data, **changes) -> Config:
    words = [str(tmp_path / name) for name in data]
    return make_config(**dict(data=words, resolution=8, vae_weights="the VAE", encode_batch_size=4, dtype="fp32") | changes)


def run(config: Config, folder: Path, vae=VAE, **options) -> Cache:
    assert prepare.prepare(config, folder, vae, CPU, **options)
    return Cache(folder)


def latent(i: int, vae=VAE, size=8) -> torch.Tensor:
    return vae.to_latents(vae.encode(to_pixels(np.full((1, size, size, 3), colour(i), np.uint8))).mean)[0].detach()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
