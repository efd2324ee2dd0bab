import json
from dataclasses import replace

import diffusers
import pytest
import torch

from helpers import randomise
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.vendor_loaders.rename import export_renamed, load_renamed, published_names
from tinyldm.vendor_loaders.vae import OLD_NAMES, VAE_RULES, from_config, modernise, to_config

SMALL = VAEConfig(widths=(16, 32, 32), depth=1, groups=8, sample_size=32)
BARE = replace(SMALL, latent_channels=6, depth=2, middle_attention=False, quant_convs=False, scaling_factor=1.5305,
               shift_factor=0.0609)
CONFIGS = {"sd": SMALL, "without attention and quant convs": BARE, "attention only": replace(SMALL, quant_convs=False),
           "quant convs only": replace(SMALL, middle_attention=False), "one level": replace(SMALL, widths=(16,))}
FULL = VAEConfig()


def run(out, x):
    """The output and the gradient of a random projection of it."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), x)]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("size", [(20, 36), (4, 52)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_exported_weights_give_diffusers_the_same_moments_pictures_and_gradients(config, size):
    ours = randomise(AutoencoderKL(config))
    theirs = diffusers.AutoencoderKL.from_config(to_config(config)).eval()
    theirs.load_state_dict(export_renamed(ours.state_dict(), VAE_RULES))
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, *size, requires_grad=True)
    posterior, expected = ours.encode(pixels), theirs.encode(pixels).latent_dist
    assert_close(run(posterior.mean, pixels), run(expected.mean, pixels))
    assert_close(run(ours.encode(pixels).logvar, pixels), run(theirs.encode(pixels).latent_dist.logvar, pixels))
    z = torch.randn(posterior.mean.shape, requires_grad=True)
    assert_close(run(ours.decode(z), z), run(theirs.decode(z).sample, z))


def test_the_posterior_samples_and_its_kl_are_those_of_diffusers():
    ours = randomise(AutoencoderKL(SMALL))
    theirs = diffusers.AutoencoderKL.from_config(to_config(SMALL)).eval()
    theirs.load_state_dict(export_renamed(ours.state_dict(), VAE_RULES))
    with torch.no_grad():
        pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        posterior, expected = ours.encode(pixels), theirs.encode(pixels).latent_dist
        eps = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
        assert_close([posterior.sample(eps), posterior.kl()],
                     [expected.sample(torch.Generator().manual_seed(5)), expected.kl()])


@pytest.mark.parametrize("config", [FULL, *CONFIGS.values()])
def test_names_and_shapes_are_exactly_those_of_diffusers(config):
    with torch.device("meta"):
        ours = AutoencoderKL(config).state_dict()
        theirs = diffusers.AutoencoderKL.from_config(to_config(config)).state_dict()
    names = published_names(ours, VAE_RULES)
    assert {names[key]: tensor.shape for key, tensor in ours.items()} == {k: v.shape for k, v in theirs.items()}
    if config == FULL:
        assert len(names) == 248


def test_every_normalisation_has_the_eps_that_diffusers_gives_it():
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(SMALL), diffusers.AutoencoderKL.from_config(to_config(SMALL))
    eps = lambda net: {f"{name}.weight": m.eps for name, m in net.named_modules() if hasattr(m, "eps")}
    names = published_names(ours.state_dict(), VAE_RULES)
    assert {names[key]: value for key, value in eps(ours).items()} == eps(theirs)


def test_files_with_the_old_names_of_the_middle_attention_load():
    ours = randomise(AutoencoderKL(SMALL))
    tensors = export_renamed(ours.state_dict(), VAE_RULES)
    old = {}
    for name, tensor in tensors.items():
        for before, now in OLD_NAMES.items():
            name = name.replace(f".{now}.", f".{before}.")
        old[name] = tensor
    assert len(old.keys() - tensors.keys()) == 16
    loaded = AutoencoderKL(SMALL)
    load_renamed(loaded, modernise(old), VAE_RULES)
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("config", [FULL, *CONFIGS.values()])
def test_a_config_survives_json_and_diffusers(config):
    written = json.loads(json.dumps(to_config(config)))
    assert from_config(written) == config
    with torch.device("meta"):
        completed = diffusers.AutoencoderKL.from_config(written).config
    assert from_config(json.loads(json.dumps(dict(completed)))) == config


def test_a_config_without_scaling_factor_means_0_18215():
    old = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", "act_fn": "silu",
           "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
           "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
           "sample_size": 256, "up_block_types": ["UpDecoderBlock2D"] * 4}
    assert from_config(old) == FULL and FULL.scaling_factor == 0.18215


@pytest.mark.parametrize("field, value", [
    ("act_fn", "gelu"), ("in_channels", 4), ("latents_mean", [0.1, 0.2]), ("use_quant_conv", False),
    ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
    ("up_block_types", ["AttnUpDecoderBlock2D"] * 3), ("a_field_of_the_future", 3), ("_class_name", "VQModel"),
])
def test_what_the_network_cannot_be_is_refused_by_name(field, value):
    with pytest.raises(ValueError) as error:
        from_config(to_config(SMALL) | {field: value})
    assert (value if field == "_class_name" else field) in str(error.value) and "\n" not in str(error.value)
