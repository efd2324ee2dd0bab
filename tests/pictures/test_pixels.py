"""Pictures as bytes and as numbers, and files of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from tinyldm.pictures.pixels import difference, psnr, ssim, to_bytes, to_pixels, write_picture

EVERY = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)


def test_every_byte_comes_back_and_lies_in_minus_1_to_1():
    pixels = to_pixels(EVERY)
    assert pixels.shape == (1, 3, 16, 16) and pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1) and pixels[0, 0, 0, 1] == pytest.approx(2 / 255 - 1)
    assert (to_bytes(pixels) == EVERY).all() and (to_pixels(torch.from_numpy(EVERY)) == pixels).all()


def test_numbers_beyond_the_range_are_clipped_and_those_between_two_bytes_rounded():
    pixels = torch.tensor([-3.0, 9.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_bytes(pixels)[0, :, :, 0].tolist() == [[0, 255], [0, 1]]
    assert to_bytes(to_pixels(EVERY).bfloat16()).dtype == np.uint8


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "picture.png"
    write_picture(file, EVERY[0])
    assert (np.asarray(Image.open(file)) == EVERY[0]).all() and [path.name for path in file.parent.iterdir()] == ["picture.png"]
    monkeypatch.setattr("tinyldm.files.flush", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_picture(file, 255 - EVERY[0])
    assert (np.asarray(Image.open(file)) == EVERY[0]).all()


def test_psnr_is_20_log10_of_255_over_the_error_and_100_db_for_equal_pictures():
    other = EVERY.copy()
    other[:, ::2] ^= 1                                         # half of all bytes are off by one
    found = psnr(np.concatenate([EVERY, other, other]), np.concatenate([EVERY, EVERY, other]))
    assert found == pytest.approx([100, 20 * np.log10(255) + 10 * np.log10(2), 100])


def test_a_picture_is_written_without_touching_the_files_beside_it(tmp_path):
    for name in ("sheet.tmp", "sheet", "sheet.v2.tmp"):
        (tmp_path / name).write_text("somebody's own")
    for name in ("sheet.png", "sheet.v2.png"):
        write_picture(tmp_path / name, EVERY[0])
    assert {path.name for path in tmp_path.iterdir()} == {"sheet.tmp", "sheet", "sheet.v2.tmp", "sheet.png", "sheet.v2.png"}
    assert (tmp_path / "sheet.tmp").read_text() == "somebody's own"


def noisy_pair(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture and a noisy copy, each uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width][..., None]
    smooth = 128 + 100 * np.sin(x / rng.uniform(2, 9, 3) + y / rng.uniform(2, 9, 3))
    return smooth.astype(np.uint8), (smooth + rng.normal(0, 40, smooth.shape)).clip(0, 255).astype(np.uint8)


def ssim_of_the_paper(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of Wang et al. 2004, Eq. 13 to 17, place by place: weighted means, variances and covariances under an 11 x 11 window."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))[..., None]
    window, c1, c2, found = window / window.sum(), (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (each[top:top + 11, left:left + 11].astype(float) for each in (x, y))
            mean = lambda values: (window * values).sum((0, 1))
            mean_a, mean_b = mean(a), mean(b)
            covariance = mean((a - mean_a) * (b - mean_b))
            found.append((2 * mean_a * mean_b + c1) * (2 * covariance + c2) / (mean_a**2 + mean_b**2 + c1)
                         / (mean((a - mean_a) ** 2) + mean((b - mean_b) ** 2) + c2))
    return float(np.mean(found))


def test_ssim_is_that_of_the_paper_picture_by_picture():
    pairs = [noisy_pair(seed, 19, 14) for seed in range(3)]
    found = ssim(*(np.stack(each) for each in zip(*pairs)))
    assert found.dtype == np.float64 and found == pytest.approx([ssim_of_the_paper(*pair) for pair in pairs], abs=1e-12)
    assert 0.1 < found.min() < found.max() < 0.9


def test_ssim_equals_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    one, two = noisy_pair(4, 40, 33)
    theirs = metrics.structural_similarity(one, two, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                           data_range=255)
    assert ssim(one[None], two[None]) == pytest.approx([theirs], abs=1e-9)


def test_ssim_of_flat_pictures_compares_their_brightness_alone_and_is_1_for_equal_ones():
    flat = lambda value: np.full((1, 11, 11, 3), value, np.uint8)
    assert ssim(flat(50), flat(200)) == pytest.approx([(2 * 50 * 200 + 2.55**2) / (50**2 + 200**2 + 2.55**2)])
    assert ssim(flat(7), flat(7)) == pytest.approx([1]) and ssim(EVERY, EVERY) == pytest.approx([1])
    with pytest.raises(ValueError, match="16 x 10 px are too small for SSIM: it takes 11 px or more"):
        ssim(EVERY[:, :10], EVERY[:, :10])


def test_differences_are_absolute_and_times_four():
    one, two = np.array([[[[0, 10, 250]]]], np.uint8), np.array([[[[1, 7, 100]]]], np.uint8)
    assert difference(one, two).tolist() == difference(two, one).tolist() == [[[[4, 12, 255]]]]
