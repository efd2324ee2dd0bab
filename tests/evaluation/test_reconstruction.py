"""Metric 'reconstruction' and evaluate.py --vae: the figures, the sheet of the worst pictures, what is refused."""

import json
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import load_script, pictures, randomise
from PIL import Image
from small_models import write_lpips

from tinyldm.cli import guard
from tinyldm.evaluation.reconstruction import SHOWN, resolution, summary
from tinyldm.folders.load import load_vae
from tinyldm.folders.lpips import load_lpips
from tinyldm.folders.save import save_part
from tinyldm.models.taesd import TAESD, TAESDConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.pictures.pixels import difference, psnr, ssim, to_bytes, to_pixels

evaluate = load_script("evaluate")
SIZE, COUNT = 16, 14


def make_vae() -> AutoencoderKL:
    return randomise(AutoencoderKL(VAEConfig(widths=(8, 16), depth=1, groups=4, sample_size=SIZE)), 2)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """An autoencoder in every form in which one can be named; pictures without captions; LPIPS."""
    folder = tmp_path_factory.mktemp("reconstruction")
    save_part(folder / "run" / "vae", make_vae())
    shutil.copytree(folder / "run" / "vae", folder / "kl")
    shutil.copy(folder / "kl" / "diffusion_pytorch_model.safetensors", folder / "alone.safetensors")
    shutil.copy(folder / "kl" / "config.json", folder / "config.json")
    save_part(folder / "taesd", randomise(TAESD(TAESDConfig(latent_channels=4, width=8, blocks=(1, 1), sample_size=SIZE))))
    for file in pictures(folder / "photos", COUNT, (SIZE, SIZE)).glob("*.*"):
        if file.suffix != ".png":
            file.unlink()
    write_lpips(folder / "lpips.safetensors")
    return folder


def run(*words) -> int:
    """evaluate.py in this process -> its exit code."""
    try:
        evaluate.ARGS = evaluate.parse([*map(str, words), "--device", "cpu", "--dtype", "fp32"])
        guard(evaluate.main)
    except SystemExit as end:
        return end.code
    return 0


def measured(places, out, *words, vae="kl") -> dict:
    assert run("--vae", places / vae, "--data", places / "photos", "--out", out, *words) == 0
    return json.loads((out / "reconstruction.json").read_text())


def originals(places) -> dict[str, np.ndarray]:
    return {file.name: np.array(Image.open(file))[None] for file in sorted((places / "photos").glob("*.png"))}


@torch.no_grad()
def through(vae, images: np.ndarray) -> np.ndarray:
    return to_bytes(vae.decode(vae.encode(to_pixels(images)).mean))


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("batch_size", [3, 50])
def test_every_picture_has_its_figures_at_any_batch_size(places, tmp_path, batch_size):
    record = measured(places, tmp_path, "--batch-size", batch_size, "--vae-lpips", places / "lpips.safetensors")
    vae, lpips, found = load_vae(places / "kl"), load_lpips(places / "lpips.safetensors"), {row["key"]: row for row in record["pictures"]}
    assert len(found) == COUNT == record["count"] and record["enlarged"] == 0 and record["left_out"] == {}
    for key, image in originals(places).items():
        decoded = through(vae, image)
        row = found[key]
        assert row["psnr"] == pytest.approx(psnr(decoded, image)[0], abs=0.02)          # a byte may be rounded the other way
        assert row["ssim"] == pytest.approx(ssim(decoded, image)[0], abs=2e-3)
        assert row["lpips"] == pytest.approx(float(lpips(to_pixels(decoded), to_pixels(image))), rel=0.02)
    for name in ("psnr", "ssim", "lpips"):
        assert record["means"][name]["mean"] == pytest.approx(np.mean([row[name] for row in found.values()]))


def test_means_have_students_interval():
    values = [20.0, 23.5, 21.0, 26.0]
    found = summary(values)
    assert found["interval"] == pytest.approx(scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values)))
    assert (found["mean"], found["lowest"], found["highest"]) == (pytest.approx(22.625), 20, 26)


def test_without_weights_there_is_no_row_for_lpips_and_a_line_says_how_to_get_one(places, tmp_path, capsys):
    record = measured(places, tmp_path)
    assert record["means"].keys() == {"psnr", "ssim"}
    printed = capsys.readouterr().out
    assert "PSNR, dB" in printed and "\nLPIPS" not in printed and "--vae-lpips names its weights" in printed
    measured(places, tmp_path, "--vae-lpips", places / "lpips.safetensors")
    printed = capsys.readouterr().out
    assert "\nLPIPS " in printed and "--vae-lpips" not in printed


def test_the_worst_column_has_the_lowest_psnr_and_the_largest_distance(places, tmp_path, capsys):
    means = measured(places, tmp_path, "--vae-lpips", places / "lpips.safetensors")["means"]
    lines = {line.split()[0].strip(","): line.split()[-2:] for line in capsys.readouterr().out.splitlines() if line[:4] in ("PSNR", "LPIP")}
    assert lines["PSNR"] == [f"{means['psnr']['lowest']:.2f}", f"{means['psnr']['highest']:.2f}"]
    assert lines["LPIPS"] == [f"{means['lpips']['highest']:.4f}", f"{means['lpips']['lowest']:.4f}"]


def test_the_sheet_shows_original_reconstruction_and_difference_of_the_worst_first(places, tmp_path):
    record = measured(places, tmp_path)
    sheet, vae, images = np.asarray(Image.open(tmp_path / "worst.png")), load_vae(places / "kl"), originals(places)
    worst = sorted(record["pictures"], key=lambda row: row["psnr"])[:SHOWN]
    assert len(worst) < COUNT and sheet.shape == (SHOWN // 2 * (192 + 36), 6 * (192 + 8), 3)
    for i, row in enumerate(worst):
        original = images[row["key"]]
        decoded = through(vae, original)
        for j, wanted in enumerate((original, decoded, difference(decoded, original))):
            top, left = i // 2 * (192 + 36) + 4, (3 * (i % 2) + j) * (192 + 8) + 4
            found = sheet[top:top + 192:192 // SIZE, left:left + 192:192 // SIZE].astype(int)
            assert abs(found - wanted[0]).max() <= 4 * (j == 2) + (j == 1)


# ---------------------------------------------------------------- what is measured


@pytest.mark.parametrize("form", ["run", "run/vae", "alone.safetensors"])
def test_an_autoencoder_is_measured_in_every_form(places, tmp_path, form):
    found = [measured(places, tmp_path / name, vae=name) for name in ("kl", form)]
    assert found[0]["pictures"] == found[1]["pictures"]


def test_taesd_is_an_autoencoder_too(places, tmp_path, capsys):
    found = [measured(places, tmp_path / name, vae=name)["pictures"] for name in ("kl", "taesd")]
    assert found[0] != found[1] and "taesd: TAESD, 4 latent channels at 1/2; 14 pictures of 16 x 16 px" in capsys.readouterr().out


@pytest.mark.parametrize("trained, typed, wanted", [(64, None, 64), (1024, None, 256), ((96, 128), None, 96), (64, 48, 48)])
def test_pictures_have_the_size_of_training_but_256_at_most_unless_one_is_typed(trained, typed, wanted):
    class Stand:
        vae = AutoencoderKL(VAEConfig(widths=(8, 16), depth=1, groups=4, sample_size=trained))
        options = {"resolution": typed}

    assert resolution(Stand) == wanted


def test_broken_pictures_are_left_out_and_enlarged_ones_counted(places, tmp_path, capsys):
    shutil.copytree(places / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "9999.png").write_bytes(b"nothing")
    assert run("--vae", places / "kl", "--data", tmp_path / "photos", "--resolution", SIZE + 2, "--out", tmp_path) == 0
    record = json.loads((tmp_path / "reconstruction.json").read_text())
    assert (record["count"], record["enlarged"], sum(record["left_out"].values())) == (COUNT, COUNT, 1)
    printed = capsys.readouterr().out
    assert "left out as unusable: 1 " in printed and f"{COUNT} of {COUNT} pictures are smaller and were enlarged" in printed


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("words, message", [
    ("--vae kl", "--vae needs pictures: name them with --data"),
    ("--vae kl --data nowhere", "--data nowhere: there is no such file or folder"),
    ("--vae kl --data photos --resolution 17", "not a multiple of 2: use 16 or 18"),
    ("--vae kl --data photos --resolution 10", "pictures are compared from 11 px on"),
    ("--vae kl --data photos --resolution 14 --vae-lpips lpips.safetensors", "pictures are compared from 16 px on"),
    ("--vae kl --data photos --vae-lpips kl", "holds no trunk of LPIPS"),
    ("--vae nowhere --data photos", "nowhere does not exist"),
    ("--vae kl run --data photos", "both RUN (run) and --vae kl"),
    ("--vae kl --data photos --metric prompts", "'prompts' measures a model that draws: name it as RUN, without --vae"),
    ("run --metric reconstruction", "'reconstruction' measures an autoencoder: name it with --vae, without RUN"),
    ("--vae kl --data photos --cfg 0", "--cfg is for models that draw"),
    ("--vae kl --data photos --no-ema", "--no-ema is for models that draw"),
    ("--vae kl --data photos --metric seams --resolution 32", "--resolution is for --metric reconstruction"),
    ("run --data photos", "--data is for --metric reconstruction, seams"),
])
def test_what_cannot_be_measured_is_refused_in_one_line_before_anything_is_written(places, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(places)
    assert run(*words.split(), "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_weights_that_are_not_numbers_are_an_error_and_not_black_pictures(places, tmp_path, capsys):
    broken = make_vae()
    broken.encoder.conv_in.weight.data[0] = torch.nan
    save_part(tmp_path / "broken", broken)
    assert run("--vae", tmp_path / "broken", "--data", places / "photos", "--out", tmp_path / "out") == 2
    assert "latents of" in (error := capsys.readouterr().err) and "not finite numbers" in error
    assert not [*(tmp_path / "out").glob("[a-z]*")]


def test_one_usable_picture_has_no_interval(places, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    shutil.copy(places / "photos" / "0003.png", tmp_path / "one")
    assert run("--vae", places / "kl", "--data", tmp_path / "one", "--out", tmp_path / "out") == 2
    assert "one usable picture: intervals need two or more" in capsys.readouterr().err
