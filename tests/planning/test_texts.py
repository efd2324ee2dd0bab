"""Plans of runs with several pretrained text encoders: their sizes are those of the folder, or of the published ones."""

import pytest
from published import t5_text, write_flux, write_sd3, write_sdxl
from safetensors.torch import save_file

from tinyldm.config import make_config, preset_config
from tinyldm.folders.texts import load_texts
from tinyldm.planning.flops import forwards, meta_networks, size, useful_flops
from tinyldm.planning.plan import make_plan
from tinyldm.planning.show import render
from tinyldm.planning.texts import assumed, caption_tokens, encoders, join_of, meta_text, token_counts

WRITE = {"sdxl": write_sdxl, "sd3": write_sd3, "flux": write_flux}
# transformers' CLIP ViT-L/14, OpenCLIP's bigG and T5 XXL 1.1, without and with projections.
COUNTS = {"single": 123_060_480, "sdxl": 123_060_480 + 694_659_840, "sd3": 123_650_304 + 694_659_840 + 4_762_310_656,
          "flux": 123_060_480 + 4_762_310_656}


@pytest.fixture(scope="module", params=WRITE)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "model"
    WRITE[request.param](path)
    return request.param, path


def test_a_folder_s_text_encoders_are_planned_as_they_are_loaded(folder):
    join, path = folder
    network = {"sdxl": "unet", "sd3": "mmdit", "flux": "flux"}[join]
    config = preset_config("tiny", text_weights=str(path), network=network)
    texts = load_texts(path, "", lambda rule: token_counts(config, rule))
    text = meta_text(config)
    assert join_of(config) == texts.join == join
    assert [type(module) for module in encoders(text)] == [type(module) for module in texts.modules.values()]
    assert size(text) == size(*texts.modules.values())
    assert caption_tokens(text) == texts.tokenize(["a red fox"]).shape[1]
    only = config.__class__(**{**vars(config), "text": make_config(text_weights=str(path), text_join="single").text})
    assert join_of(only) == "single" and size(meta_text(only)) == size(texts.modules["text"])


def test_a_text_encoder_in_a_file_is_planned_as_it_is(tmp_path):
    module = t5_text(48, 1)
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name != "encoder.embed_tokens.weight"}
    save_file(tensors, file := tmp_path / "t5.safetensors")
    assert size(meta_text(preset_config("tiny", text_weights=str(file)))) == size(module)


@pytest.mark.parametrize("join", COUNTS)
def test_published_text_encoders_are_assumed_where_there_is_no_folder(join):
    config = preset_config("tiny", text_weights="someone/a-model", text_join="" if join == "single" else join)
    assert size(meta_text(config)) == COUNTS[join]


def test_a_path_that_is_not_there_is_refused_as_in_training(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        meta_text(preset_config("tiny", text_weights=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("network, net, join", [
    ("unet", {}, "single"), ("unet", {"pooled_dim": 1280}, "sdxl"), ("mmdit", {}, "sd3"), ("flux", {}, "flux"), ("dit", {}, "single")])
def test_of_a_hub_id_the_usual_rule_for_the_network_is_assumed_and_said(network, net, join):
    config = make_config(network=network, net=net, text_weights="someone/a-model")
    assert join_of(config) == join and size(meta_text(config)) == COUNTS[join]
    assert assumed(config) == f"the text encoder is not here: published ones are assumed, joined by --text-join {join}"
    typed = make_config(network=network, net=net, text_weights="someone/a-model", text_join="flux")
    assert join_of(typed) == "flux" and "--text-join flux" in assumed(typed)


def said(config):
    return [line for line in render(make_plan(config, must_fit=False)).splitlines() if "assumed" in line]


def test_the_plan_says_what_it_assumes():
    week = preset_config("5090_week", dit=dict(width=64, layers=1, heads=1), stages={})
    assert said(week) == ["  (the text encoder is not here: published ones are assumed, joined by --text-join single)",
                          "  (the VAE is not here: one like Stable Diffusion 1's is assumed)"]


def test_the_plan_says_nothing_of_a_folder(folder):
    here = preset_config("tiny", text_weights=str(folder[1]), text_join="single")
    assert said(here) == [] and assumed(here) == assumed(preset_config("tiny")) == ""


@pytest.mark.parametrize("network, options, tokens", [
    ("mmdit", {}, 77 + 77 + 256), ("flux", {"guidance": True}, 77 + 512), ("flux", {}, 77 + 256)])
def test_captions_have_the_published_number_of_tokens(network, options, tokens):
    config = make_config(network=network, net=options, text_weights="someone/a-model", text_join="flux" if network == "flux" else "sd3")
    assert caption_tokens(meta_text(config)) == tokens


def test_a_plan_counts_all_text_encoders(tmp_path):
    write_sdxl(tmp_path / "model")
    unet = dict(widths=[16, 32], attention=[False, True], heads=[1, 2], groups=4, pooled_dim=128)
    config = preset_config("tiny", text_weights=str(tmp_path / "model"), unet=unet)
    networks = meta_networks(config)
    plan = make_plan(config)
    phase = plan.phases[-1]
    assert phase.frozen == 4 * (size(networks.text) + size(networks.vae)) and useful_flops(config) == phase.useful
    assert networks.net.config.context_dim == 64 + 128
    alone = meta_networks(preset_config("tiny", text_weights=str(tmp_path / "model"), text_join="single"))
    one, two = (forwards(found, 64, join=join)["text"]() for found, join in ((alone, "single"), (networks, "sdxl")))
    assert [tuple(out.hidden.shape) for out in (*one, *two)] == [(1, 16, 64), (1, 16, 64), (1, 16, 128)]
