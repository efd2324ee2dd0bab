"""The latent cache: an order that is a pure function, and a cache that is whole, fitting or remade."""

import numpy as np
import torch

from tinyldm.data import latents
from tinyldm.models.vae import AutoencoderKL, VAEConfig


def test_every_sample_comes_once_per_epoch():
    drawn = np.concatenate([latents.indices(10, seed=3, step=step, batch_size=4) for step in range(5)])
    assert sorted(drawn[:10]) == list(range(10)) and sorted(drawn[10:]) == list(range(10))
    assert list(drawn[:10]) != list(drawn[10:])


def test_a_batch_depends_on_seed_and_step_alone():
    assert (latents.indices(100, 0, 7, 16) == latents.indices(100, 0, 7, 16)).all()
    assert (latents.indices(100, 0, 7, 16) != latents.indices(100, 1, 7, 16)).any()


def test_one_large_batch_equals_the_small_ones_in_a_row():
    small = np.concatenate([latents.indices(50, 0, step, 8) for step in range(4)])
    assert (latents.indices(50, 0, 0, 32) == small).all()


def test_a_cache_comes_back_and_is_valid_for_its_fingerprint_only(tmp_path):
    z = np.random.default_rng(0).normal(size=(6, 4, 2, 2)).astype(np.float32)
    latents.write(tmp_path / "cache", z, list("abcdef"), "mark")
    assert latents.valid(tmp_path / "cache", "mark") and not latents.valid(tmp_path / "cache", "other")
    data = latents.Latents(tmp_path / "cache")
    batch = data.batch(np.array([4, 0]))
    assert batch.dtype == torch.float32 and np.allclose(batch.numpy(), z[[4, 0]], atol=2e-3) and data.captions[4] == "e"


def test_the_fingerprint_sees_weights_and_facts():
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(widths=(8, 8), depth=1, groups=4))
    before = latents.fingerprint(vae, resolution=64)
    assert before == latents.fingerprint(vae, resolution=64) != latents.fingerprint(vae, resolution=32)
    with torch.no_grad():
        vae.post_quant_conv.bias[0] += 1e-3
    assert latents.fingerprint(vae, resolution=64) != before
