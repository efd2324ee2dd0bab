import json
from dataclasses import replace

import diffusers
import pytest
import torch
from helpers import combinations, randomise
from torch import nn

from tinyldm.folders.rename import export_renamed, load_renamed, published_names
from tinyldm.models.taesd import TAESD, TAESDConfig
from tinyldm.vendor_loaders.taesd import CLASS, ORIGINAL_RULES, OWN_CLASS, RULES, from_config, infer, to_config

SMALL = TAESDConfig(width=16)
PLAIN = {"taesd": SMALL, "taef1": replace(SMALL, latent_channels=16),
         "two levels": TAESDConfig(latent_channels=5, width=8, blocks=(2, 1), scaling_factor=1.3, shift_factor=0.2)}
TAEF2 = TAESDConfig(latent_channels=32, normed_middle=True)
CONFIGS = PLAIN | {"taef2": replace(TAEF2, width=16), "another size": replace(SMALL, sample_size=1024)}
FULL = {"taesd": TAESDConfig(), "taef1": TAESDConfig(latent_channels=16), "taef2": TAEF2}


def run(out, x):
    """The output and the gradient of a random projection of it."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), x)]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def on_meta(make, *args):
    with torch.device("meta"):
        return make(*args)


@pytest.mark.parametrize("name, size", combinations(3, PLAIN, [(8, 24), (40, 56), (32, 64)]))
def test_exported_weights_give_diffusers_the_same_latents_pictures_and_gradients(name, size):
    config = PLAIN[name]
    ours = randomise(TAESD(config))
    theirs = diffusers.AutoencoderTiny.from_config(to_config(config)).eval()
    theirs.load_state_dict(export_renamed(ours.state_dict(), RULES))
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, *size, requires_grad=True)
    posterior = ours.encode(pixels)
    assert_close(run(posterior.mean, pixels), run(theirs.encode(pixels).latents, pixels))
    z = torch.randn(posterior.mean.shape, requires_grad=True)
    assert_close(run(ours.decode(z), z), run(theirs.decode(z).sample, z))


@pytest.mark.parametrize("config", [FULL["taesd"], FULL["taef1"], *PLAIN.values()])
def test_names_and_shapes_are_exactly_those_of_diffusers(config):
    ours = on_meta(TAESD, config).state_dict()
    theirs = on_meta(diffusers.AutoencoderTiny.from_config, to_config(config)).state_dict()
    names = published_names(ours, RULES)
    assert {names[key]: shape for key, shape in shapes(ours).items()} == shapes(theirs)


class Original(nn.Module):
    """The published block, for an independent network out of nn.Sequential's own indices."""

    def __init__(self, width, normed=False):
        super().__init__()
        conv = lambda: nn.Conv2d(width, width, 3, padding=1)
        self.conv = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
        if normed:
            self.pool = nn.Sequential(nn.Conv2d(width, 4 * width, 1, bias=False), nn.GroupNorm(4, 4 * width), nn.ReLU(),
                                      nn.Conv2d(4 * width, width, 1, bias=False))

    def forward(self, x):
        x = x + self.pool(x) if hasattr(self, "pool") else x
        return (self.conv(x) + x).relu()


def original(channels, width, normed):
    """Encoder and decoder as the published source lists them, layer by layer."""
    down = lambda: nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)
    up = lambda: [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    three = lambda normed=False: [Original(width, normed) for _ in range(3)]
    encoder = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), Original(width), down(), *three(), down(), *three(),
                            down(), *three(normed), nn.Conv2d(width, channels, 3, padding=1))
    clamp = nn.Identity()                       # no weights; the test's latents go through it by hand
    decoder = nn.Sequential(clamp, nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), *three(normed), *up(), *three(),
                            *up(), *three(), *up(), Original(width), nn.Conv2d(width, 3, 3, padding=1))
    return randomise(encoder, 3), randomise(decoder, 4)


@pytest.mark.parametrize("channels, normed", [(4, False), (16, False), (32, True)])
@torch.no_grad()
def test_the_original_pair_of_files_gives_the_original_s_latents_and_pictures(channels, normed):
    encoder, decoder = original(channels, 16, normed)
    tensors = {f"{part}.{name}": tensor for part, network in (("encoder", encoder), ("decoder", decoder))
               for name, tensor in network.state_dict().items()}
    config = infer(shapes(tensors))
    assert config == replace(SMALL, latent_channels=channels, normed_middle=normed)
    ours = on_meta(TAESD, config)
    load_renamed(ours, tensors, ORIGINAL_RULES)
    torch.manual_seed(1)
    pixels, z = torch.rand(2, 3, 24, 40), 2 * torch.randn(2, channels, 3, 5)
    posterior = ours.encode(2 * pixels - 1)
    assert_close([posterior.mean, ours.decode(z)], [encoder(pixels), 2 * decoder(3 * torch.tanh(z / 3)) - 1])


@pytest.mark.parametrize("rules", [RULES, ORIGINAL_RULES], ids=["diffusers", "original"])
@pytest.mark.parametrize("config", FULL.values(), ids=FULL)
def test_the_config_is_read_off_the_shapes_of_either_layout(config, rules):
    ours = on_meta(TAESD, config).state_dict()
    names = published_names(ours, rules)
    assert infer({names[key]: shape for key, shape in shapes(ours).items()}) == config


def test_shapes_of_another_network_are_refused():
    own = shapes(on_meta(TAESD, SMALL).state_dict())
    lacking = {name: shape for name, shape in own.items() if not name.startswith("decoder.8")}
    for wrong in (own | {"encoder.2.bias": (16,)}, own | {"decoder.3.skip.weight": (16, 32, 1, 1)}, lacking,
                  {"1.weight": (64, 4, 3, 3)}):
        with pytest.raises(ValueError, match="TAESD family|join the encoder's"):
            infer(wrong)


@pytest.mark.parametrize("config", [*FULL.values(), *CONFIGS.values()])
def test_a_config_survives_json_and_diffusers_where_it_can_express_it(config):
    written = json.loads(json.dumps(to_config(config)))
    assert from_config(written) == config
    assert written["_class_name"] == (OWN_CLASS if config.normed_middle else CLASS)
    if not config.normed_middle:
        completed = on_meta(diffusers.AutoencoderTiny.from_config, written).config
        assert from_config(json.loads(json.dumps(dict(completed)))) == config
    assert from_config({"_class_name": CLASS}) == TAESDConfig()


@pytest.mark.parametrize("field, value", [
    ("act_fn", "silu"), ("in_channels", 4), ("upsample_fn", "bilinear"), ("upsampling_scaling_factor", 4),
    ("num_decoder_blocks", [3, 3, 3, 3]), ("decoder_block_out_channels", [32, 16, 16, 16]), ("normed_middle", True),
    ("encoder_block_out_channels", [16, 16, 16]), ("a_field_of_the_future", 3), ("_class_name", "AutoencoderKL"),
])
def test_what_the_network_cannot_be_is_refused_by_name(field, value):
    with pytest.raises(ValueError) as error:
        from_config(to_config(SMALL) | {field: value})
    assert (OWN_CLASS if field == "normed_middle" else value if field == "_class_name" else field) in str(error.value)
