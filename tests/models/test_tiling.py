import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from torch import nn

from tinyldm.models.tiling import decode_tiled, tiled
from tinyldm.models.vae import AutoencoderKL, VAEConfig


def field(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def enlarge(x):
    return F.interpolate(x, scale_factor=8, mode="nearest")


def convolutions(*layers):
    return randomise(nn.Sequential(*layers))


def decoder():
    """Output 4 times larger; a pixel depends on fewer than 2 latents on each side."""
    return convolutions(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1),
                        nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1))


def encoder():
    """Output 4 times smaller; a latent depends on 5 pixels on each side."""
    return convolutions(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1),
                        nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1))


@pytest.mark.parametrize("size", [(33, 20), (16, 47), (40, 41)])
@pytest.mark.parametrize("tile, overlap", [(16, 8), (20, 9), (13, 12)])
@torch.no_grad()
def test_tiles_of_convolutions_that_look_no_further_than_a_quarter_of_the_overlap_are_exact(size, tile, overlap):
    decode, z = decoder(), field(2, 3, *size)
    plain = decode(z)
    assert (decode_tiled(decode, z, 4, tile, overlap) - plain).abs().max() < 1e-5 * plain.abs().max()


@torch.no_grad()
def test_an_encoder_of_convolutions_is_tiled_exactly_too():
    encode, pixels = encoder(), field(2, 3, 92, 148)
    plain = encode(pixels)
    assert (tiled(encode, pixels, 1 / 4, tile=48, overlap=24) - plain).abs().max() < 1e-5 * plain.abs().max()


@pytest.mark.parametrize("tile, overlap", [(1, 0), (2, 1), (7, 0), (7, 3), (7, 6), (64, 16)])
def test_any_size_from_1x1_comes_out_whole(tile, overlap):
    for height, width in [(1, 1), (1, 9), (2, 7), (8, 1), (13, 15)]:
        z = field(1, 2, height, width)
        torch.testing.assert_close(decode_tiled(enlarge, z, 8, tile, overlap), enlarge(z))


def test_a_single_tile_is_the_plain_decode():
    z = field(1, 3, 16, 9)
    assert decode_tiled(lambda part: part if part is z else None, z, 1, tile=16, overlap=4) is z


def test_tiles_have_one_size_and_are_never_larger_than_asked():
    seen = set()
    def record(part):
        seen.add(tuple(part.shape))
        return enlarge(part)
    decode_tiled(record, field(2, 4, 100, 37), 8, tile=24, overlap=6)
    decode_tiled(record, field(2, 4, 100, 11), 8, tile=24, overlap=6)
    assert seen == {(2, 4, 24, 24), (2, 4, 24, 11)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_decoder_s_dtype_and_no_tint(dtype):
    pixels = decode_tiled(lambda part: enlarge(part * 0 + 0.7), field(1, 3, 30, 30).to(dtype), 8, tile=12, overlap=4)
    assert pixels.dtype == dtype
    torch.testing.assert_close(pixels, torch.full_like(pixels, 0.7), rtol=1e-6, atol=0)


@pytest.mark.parametrize("change, fix", [
    ({"overlap": 16}, "for instance 4"), ({"overlap": -1}, "0 <= overlap"), ({"scale": 1 / 8, "overlap": 5}, "overlap 5 .* use 8"),
    ({"scale": 1 / 8, "tile": 20, "overlap": 8}, "tile 20 .* use 24"), ({"scale": 4}, "scale=4 is wrong"),
])
def test_what_cannot_be_tiled_is_refused_with_the_fix(change, fix):
    with pytest.raises(ValueError, match=fix):
        tiled(enlarge, field(1, 3, 32, 40), **({"scale": 8, "tile": 16, "overlap": 4} | change))


@torch.no_grad()
def test_tiles_of_a_normed_and_attending_autoencoder_join_without_a_visible_line():
    """Its tiles differ in tone (statistics of GroupNorm). The difference to the plain decode must not change faster from
    one row or column to the next in the overlap, where a hard cut puts it into one line (ratio 3 to 6), than elsewhere."""
    vae = randomise(AutoencoderKL(VAEConfig(widths=(16, 16, 32, 32), depth=1, groups=8)))
    z = field(1, 4, 48, 48) + 2 * F.interpolate(field(1, 4, 3, 3, seed=1), (48, 48), mode="bicubic")  # tone varies
    plain = vae.decode(z)
    error = decode_tiled(vae.decode, z, 8, tile=28, overlap=8) - plain           # overlap: latents 20 .. 28
    assert error.abs().mean() > 0.01 * plain.abs().mean()                        # the tiles do differ in tone
    for axis in (2, 3):
        jump = error.diff(dim=axis).abs().mean(dim=[0, 1, 5 - axis])
        assert jump[20 * 8 - 1:28 * 8].max() < 2 * jump.median()
