"""The table of towers: what their features depend on, and what they do not."""

import numpy as np
import pytest
import torch
from helpers import randomise
from photos import photos
from torch import nn

from tinyldm.evaluation.towers import TOWERS, OpenTower, features, full_float32, open_tower, outputs
from tinyldm.folders import hub
from tinyldm.models.inception import InceptionFeatures
from tinyldm.models.vit import ViT, ViTConfig
from tinyldm.pictures.resizing import RESIZES

SMALL = ViTConfig(image_size=32, patch=8, width=32, layers=2, heads=2, mlp_width=48, projection_dim=12)


def small(name="clip") -> OpenTower:
    return OpenTower(name, TOWERS[name], randomise(ViT(SMALL)), "random", TOWERS[name].size or 32)


@pytest.mark.parametrize("name", TOWERS)
def test_every_row_names_a_resize_and_how_to_get_its_weights(name):
    row = TOWERS[name]
    assert row.resize in RESIZES and len(row.mean) == len(row.std) == 3 and "\n" not in row.get
    assert row.source in row.get if row.source else row.get.startswith("download https://")


def test_colours_are_normalised_as_published():
    """Of black, the value is -mean / std of colours in 0..1; of white (1 - mean) / std."""
    seen = []
    tower = small()
    tower.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for value in (0, 255):
        features(tower, np.full((1, 32, 32, 3), value, np.uint8))
    published = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in published)
    torch.testing.assert_close(seen[0][0], (-mean / std).expand(3, 32, 32))
    torch.testing.assert_close(seen[1][0], ((1 - mean) / std).expand(3, 32, 32))


def test_features_do_not_depend_on_the_batch_or_its_order():
    tower, images = small(), photos(5, 80, 64)
    together = features(tower, images)
    one_by_one = torch.cat([features(tower, images[i:i + 1]) for i in range(5)])
    backwards = features(tower, images[::-1]).flip(0)
    assert together.shape == (5, 12) and together.dtype == torch.float32 and together.std(0).min() > 0
    for other in (one_by_one, backwards):
        torch.testing.assert_close(other, together, rtol=1e-5, atol=1e-6)


def test_features_are_float32_and_of_eval_mode_whatever_is_switched_on_around_them(monkeypatch):
    tower, images = small(), photos(2, 80, 64)
    expected, seen = features(tower, images), []
    tower.module.register_forward_pre_hook(lambda module, inputs: seen.append(
        (inputs[0].dtype, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu"))))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    usual = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", torch.bfloat16):
            found = features(tower, images)
        assert torch.equal(found, expected) and not found.requires_grad
        assert seen == [(torch.float32, "highest", False, False)]
        with pytest.raises(ZeroDivisionError), full_float32(torch.device("cpu")):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(usual)


def test_inception_answers_features_and_logits():
    class Two(nn.Linear):
        def forward(self, pixels):
            return InceptionFeatures(super().forward(pixels.mean((2, 3))), pixels.amax((2, 3)))

    tower = OpenTower("inception", TOWERS["inception"], Two(3, 4), "random", 299)
    images = photos(2, 20, 30)
    assert torch.equal(features(tower, images), outputs(tower, images).pool)
    brightest = torch.from_numpy(images.max((1, 2))).float()                        # of the pictures as they are: not resized here
    torch.testing.assert_close(outputs(tower, images).logits, brightest)


def test_the_settings_that_a_number_depends_on_are_told():
    assert small("cmmd").settings == {"tower": "cmmd", "weights": "random", "resize": "crop_bicubic", "size": 32}
    assert small("dinov2").settings["size"] == 224


def test_without_weights_one_line_says_how_to_get_them(tmp_path, monkeypatch):
    for name, source, message in (("inception", None, "the tower inception needs weights: download https://github.com/mseitzer/pytorch-fid/"),
                                  ("inception", tmp_path / "no.pth", r"no.pth does not exist: .*To get them: download https://"),
                                  ("clip", tmp_path, "holds no weights .*To get them: name openai/clip-vit-base-patch32"),
                                  ("incption", None, "unknown tower 'incption': did you mean 'inception'")):
        with pytest.raises(ValueError, match=message) as error:
            open_tower(name, source)
        assert "\n" not in str(error.value)

    def offline(source, needed):
        raise ValueError(f"{source} is not a path here, is not in the cache")

    monkeypatch.setattr(hub, "locate", offline)
    with pytest.raises(ValueError, match="facebook/dinov2-large is not a path here.*To get them: name facebook/dinov2-large"):
        open_tower("dinov2")


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32)])
def test_arrays_that_are_no_pictures_are_refused(images):
    with pytest.raises(ValueError, match=r"pictures must be uint8 \[n, h, w, 3\], not"):
        features(small(), images)
