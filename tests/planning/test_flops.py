import pytest
import torch
import torch.nn.functional as F
from helpers import small_text, thinned
from torch import nn

from tinyldm.config import PRESETS, parse, preset_config
from tinyldm.model import Model
from tinyldm.planning.flops import MetaNetworks, count_flops, forwards, meta_networks, peak_flops, useful_flops
from tinyldm.planning.memory import empty
from tinyldm.planning.plan import make_plan
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.training.preflight import check_run


def config(preset="5090_week", **changes):
    return preset_config(preset, **changes)


def model_of(networks):
    """A model with these networks."""
    tokenizer = small_text()[0]
    tokenizer.context_length = networks.text.config.context_length
    return Model(networks.net, networks.vae, TextEncoders([TextEncoder(networks.text, tokenizer)]), None, "flow", {}, {})


def test_attention_is_counted(monkeypatch):
    call = forwards(meta_networks(config(dit=dict(layers=3))), 256)["net"]
    whole = count_flops(call)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *args, **kwargs: q)
    assert whole - count_flops(call) == 3 * 4 * 1024 * 256 * (256 + 77)    # q k^T and p v, over image and text


def test_a_linear_layer_has_two_flops_per_weight_and_row():
    layer = nn.Linear(30, 50, device="meta")
    assert count_flops(lambda: layer(empty(7, 30))) == 2 * 7 * 30 * 50


def test_a_network_that_is_told_sizes_and_pooled_text_is_counted_with_them():
    """By preset `tiny`: pooled text of width 128 and 6 x 256 sinusoids go through layers of widths 256 and 256."""
    unet = dict(PRESETS["tiny"]["unet"])
    told, plain = (useful_flops(config("tiny", unet=settings)) for settings in (unet | {"pooled_dim": 128}, unet))
    assert told - plain == 3 * 2 * ((128 + 6 * 256) * 256 + 256 * 256)


@pytest.mark.parametrize("preset", ["tiny", pytest.param("5090_week", marks=pytest.mark.slow)])
def test_useful_flops_are_those_of_the_plan(preset):
    plan = make_plan(config(preset, stages={}))
    phase = plan.phases[-1]
    assert useful_flops(phase.config) == phase.useful == useful_flops(phase.config, model_of(plan.networks))


def test_useful_flops_follow_the_networks_they_are_given():
    settings, real = config("tiny"), MetaNetworks(*(module.to_empty(device="cpu") for module in meta_networks(config("tiny"))))
    deeper = meta_networks(config("tiny", text={**PRESETS["tiny"]["text"], "layers": 4}))
    assert useful_flops(settings, model_of(real)) == useful_flops(settings)
    assert useful_flops(settings, model_of(deeper)) > useful_flops(settings)


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA GeForce RTX 5090", 209.5), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
    ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA GeForce RTX 5090 D", 50),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 50),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 50), ("NVIDIA A10", 50), ("NVIDIA L40", 50), ("NVIDIA GeForce RTX 3090 Ti", 50)])
def test_a_gpu_s_peak_is_that_of_its_name_and_of_others_the_flag_s(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(config(gpu_tflops=50.0).plan, torch.device("cuda", 0)) == peak * 1e12
    assert peak_flops(config().plan, torch.device("cpu")) is None


@pytest.mark.parametrize("words, said", thinned(2, [
    ("--resolution 136", "side of 136 pixels are larger than this mmdit takes: set --net max_positions=17 or more, or lower --resolution"),
    ("--stages 64=1 136=1", "side of 136 pixels are larger .* set --net max_positions=17 or more, or lower --stages"),
    ("--stages 136=1 64=1", "side of 136 pixels .* or lower --stages"),
    ("--resolution 128 --buckets 2", "side of 184 pixels .* set --net max_positions=23 or more, or lower --buckets")]))
def test_pictures_larger_than_a_table_of_positions_are_refused_before_anything_is_encoded(words, said):
    """Preset tiny_mmdit has 16 x 16 positions of 8 pixels. Of buckets of about 16 x 16, the one nearest to 2 : 1 is 11 x 23."""
    parsed = lambda words: parse(f"--preset tiny_mmdit --scenes 8 {words}".split(), "")[0]
    with pytest.raises(ValueError, match=said) as error:
        check_run(parsed(words))
    assert "\n" not in str(error.value)
    check_run(parsed(f"{words} --net patch=1 width=160 layers=5 heads=4 max_positions=23"))
    check_run(parsed(""))
