"""--autoguidance: which models can stand in the worse one's place, and what they are drawn with."""

import pytest
import torch
from helpers import mistake, randomise, thinned
from small_models import drawn, unet_model
from test_sample import make

from tinyldm.folders.save import save_model
from tinyldm.models.unet import UNet
from tinyldm.training.learned import load_worse


def save(model, folder):
    save_model(folder, net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults=model.defaults)
    return str(folder)


def test_a_worse_model_is_loaded_in_the_precision_of_the_other_and_shares_its_other_parts(tmp_path):
    model = unet_model()
    model.net.to(torch.bfloat16)
    worse = load_worse(save(unet_model(), tmp_path / "worse"), model)
    assert next(worse.net.parameters()).dtype == torch.bfloat16 and worse.vae is model.vae and worse.text is model.text
    assert load_worse(None, model) is None


def test_a_model_beside_itself_draws_its_unguided_picture_at_any_scale_and_another_one_does_not(tmp_path):
    model, other = unet_model(), unet_model()
    randomise(other.net, 9)
    plain, itself = drawn(model, cfg=1.0), drawn(model, cfg=4.0, worse=unet_model())
    assert abs(plain.astype(int) - itself).max() <= 1
    assert abs(plain.astype(int) - drawn(model, cfg=4.0, worse=load_worse(save(other, tmp_path / "other"), model))).mean() > 1


@pytest.mark.parametrize("other, what", thinned(2, [
    (lambda: make("flow", "flow"), "its noise process"), (lambda: make("v", "cosine"), "its noise process")]))
def test_a_model_of_another_process_is_refused(other, what, tmp_path):
    with pytest.raises(ValueError, match=f"differs from the model in {what}: name an earlier checkpoint"):
        load_worse(save(other(), tmp_path / "other"), make())


def test_a_network_for_other_text_features_is_refused(tmp_path):
    model, other = make(), make()
    config = {**vars(model.net.config), "context_dim": 40}
    model.net = UNet(type(model.net.config)(**config))
    with pytest.raises(ValueError, match="differs from the model in context_dim"):
        load_worse(save(other, tmp_path / "other"), model)


@pytest.mark.parametrize("script, words", [
    ("sample", ["a fox", "--autoguidance", "m", "--offload", "parts"]), ("sample", ["a fox", "--autoguidance", "m", "--dry-run"]),
    ("sample", ["a fox", "--autoguidance", "m", "--negative-prompt", "grey"]),
    ("evaluate", ["m", "--autoguidance", "m", "--offload", "parts"])])
def test_what_has_no_part_in_the_second_model_is_refused_beside_it(script, words, capsys):
    assert "--autoguidance steers away from a second model" in mistake(script, words, capsys)
