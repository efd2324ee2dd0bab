"""Metric 'seams': tiled and whole decodes compared where tiles overlap, and elsewhere."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import load_script, randomise

from tinyldm.cli import guard
from tinyldm.evaluation.seams import SIDE, seams
from tinyldm.folders.save import save_part
from tinyldm.models.taesd import TAESD, TAESDConfig
from tinyldm.models.tiling import OVERLAP, TILE
from tinyldm.models.vae import AutoencoderKL, Posterior, VAEConfig

evaluate = load_script("evaluate")
PIXELS = torch.rand(1, 3, 2 * SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def toned(tones: list[float]):
    """An autoencoder at 1/2 that decodes to grey, but each tile, in the order in which they are decoded, to a tone of its own."""
    left = iter(tones)
    grey = lambda z, tone: torch.full((1, 3, 2 * z.shape[2], 2 * z.shape[3]), tone)
    return SimpleNamespace(config=SimpleNamespace(downscale=2), encode=lambda x: Posterior(x[:, :, ::2, ::2], None),
                           decode=lambda z: grey(z, 0.0), decode_coarse=lambda z: z, decode_fine=lambda z: grey(z, next(left)))


def test_four_tiles_of_one_tone_are_apart_everywhere_and_have_no_seam():
    found = seams(toned([0.1] * 4), PIXELS)
    assert found["apart"] == pytest.approx({"border": 12.75, "elsewhere": 12.75}, rel=1e-5)
    assert found["step"] == pytest.approx({"border": 0, "elsewhere": 0}, abs=1e-4)


def test_between_tiles_of_two_tones_the_step_is_the_whole_difference_spread_over_the_overlap():
    found = seams(toned([0.0, 0.2, 0.0, 0.2]), PIXELS)                  # left and right
    side, overlap = 2 * SIDE, 2 * OVERLAP
    both = 2 * side * overlap - overlap**2                              # pixels that several tiles cover
    steps = 2 * both - 2 * overlap                                      # pairs of neighbours, down and to the right, that end in one
    assert found["step"] == pytest.approx({"border": 127.5 * 0.2 * side / steps, "elsewhere": 0}, rel=1e-4, abs=1e-4)
    assert found["apart"]["elsewhere"] == pytest.approx(127.5 * 0.1, rel=1e-4)


def test_convolutions_show_no_seams_and_norms_over_the_picture_do():
    local = randomise(TAESD(TAESDConfig(latent_channels=2, width=4, blocks=(1, 1))))
    normed = randomise(AutoencoderKL(VAEConfig(widths=(4, 4), depth=1, groups=2, latent_channels=2, middle_attention=False)))
    found = seams(local, PIXELS)
    assert max(found["apart"].values()) < 1e-3
    assert min(seams(normed, PIXELS * torch.linspace(0, 1, 2 * SIDE))["apart"].values()) > 0.1


def test_a_few_pictures_are_enlarged_to_2_x_2_tiles_and_the_figures_written(tmp_path, capsys):
    save_part(tmp_path / "vae", randomise(TAESD(TAESDConfig(latent_channels=2, width=4, blocks=(1, 1)))))
    evaluate.ARGS = evaluate.parse(["--vae", str(tmp_path / "vae"), "--data", "toyworld", "--metric", "seams", "--count", "2", "--seed", "5",
                                    "--out", str(tmp_path / "out"), "--device", "cpu"])
    guard(evaluate.main)
    record = json.loads((tmp_path / "out" / "seams.json").read_text())
    assert (record["size"], record["tile"], record["overlap"]) == (2 * (2 * TILE - OVERLAP), 64, 16) and len(record["pictures"]) == 2
    assert record["means"]["apart"]["border"] == pytest.approx(sum(row["apart"]["border"] for row in record["pictures"]) / 2)
    assert f"2 pictures of {record['size']} x {record['size']} px, decoded in 2 x 2 tiles and whole" in capsys.readouterr().out
