"""The autoencoder against diffusers' AutoencoderKL, live: float32 rounding, 1e-5 relative."""

import json
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from helpers import combinations, randomise, thinned
from parity import assert_close, assert_survives_json_and_diffusers, error, projected
from safetensors.torch import load_file, save_file

from tinyldm.folders.load import load_vae
from tinyldm.folders.rename import export_renamed, published_names
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.vendor_loaders import vae
from tinyldm.vendor_loaders.vae import VAE_RULES, from_config, to_config

# The published autoencoders, narrow: levels, depth, channels, convolutions and scales are theirs.
SD = VAEConfig(widths=(16, 32, 48, 48), groups=8, sample_size=32)
SD3 = replace(SD, latent_channels=16, quant_convs=False, scaling_factor=1.5305, shift_factor=0.0609)
PUBLISHED = {"sd": SD, "sdxl": replace(SD, scaling_factor=0.13025), "sd 3": SD3,
             "flux.1": replace(SD3, scaling_factor=0.3611, shift_factor=0.1159)}
SMALL = replace(SD, widths=(16, 32, 32), depth=1)
BARE = replace(SMALL, latent_channels=6, middle_attention=False, quant_convs=False)
CONFIGS = PUBLISHED | {"without attention and quant convs": BARE, "quant convs only": replace(SMALL, middle_attention=False),
                       "one level": replace(SMALL, widths=(16,))}
FULL = VAEConfig()

# Their pipelines in diffusers, each with its own copy of the formula for latents.
PIPELINES = {"sd": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLInpaintPipeline",
             "sd 3": "StableDiffusion3InpaintPipeline", "flux.1": "FluxInpaintPipeline"}

OLD = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", "act_fn": "silu",
       "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
       "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
       "sample_size": 256, "up_block_types": ["UpDecoderBlock2D"] * 4}


def pair(config):
    """Our autoencoder and diffusers', with the same weights."""
    ours = randomise(AutoencoderKL(config))
    theirs = diffusers.AutoencoderKL.from_config(to_config(config)).eval()
    theirs.load_state_dict(export_renamed(ours.state_dict(), VAE_RULES))
    return ours, theirs


def pictures(b, *size):
    return torch.randn(b, 3, *size, generator=torch.Generator().manual_seed(1))


def noise(shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_outputs(ours, theirs):
    pixels = pictures(2, 24, 40)
    posterior, expected = ours.encode(pixels), theirs.encode(pixels).latent_dist
    assert_close([*posterior, ours.decode(posterior.mean)],
                 [expected.mean, expected.logvar, theirs.decode(expected.mean).sample])


@pytest.mark.parametrize("name, size", combinations(2, CONFIGS, [(40, 72), (8, 104)]))
def test_exported_weights_give_diffusers_the_same_moments_pictures_and_gradients(name, size):
    ours, theirs = pair(CONFIGS[name])
    pixels = pictures(2, *size).requires_grad_()
    posterior, expected = ours.encode(pixels), theirs.encode(pixels).latent_dist
    assert_close(projected(posterior.mean, pixels), projected(expected.mean, pixels))
    assert_close(projected(ours.encode(pixels).logvar, pixels), projected(theirs.encode(pixels).latent_dist.logvar, pixels))
    z = noise(posterior.mean.shape).requires_grad_()
    assert_close(projected(ours.decode(z), z), projected(theirs.decode(z).sample, z))


@pytest.mark.parametrize("config", thinned(2, PUBLISHED.values()), ids=PUBLISHED)
def test_every_weight_gets_the_gradient_that_diffusers_gives_it(config):
    ours, theirs = pair(config)
    pixels = pictures(1, 24, 40)
    for out in (ours.decode(ours.encode(pixels).mean), theirs.decode(theirs.encode(pixels).latent_dist.mean).sample):
        (out * noise(out.shape)).sum().backward()
    names = published_names(ours.state_dict(), VAE_RULES)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    found = {names[name]: p.grad for name, p in ours.named_parameters()}
    assert_close(*zip(*((found[name], expected[name]) for name in found if "to_k.bias" not in name), strict=True))
    assert len(found) == len(expected)      # softmax does not see the bias of k: its gradient is rounding


def test_the_log_variance_is_clamped_where_diffusers_clamps_it():
    ours, theirs = pair(SD)
    pixels = 300 * pictures(1, 16, 24)
    for net in (ours, theirs):
        with torch.no_grad():
            net.encoder.conv_out.weight *= 100
    logvar = ours.encode(pixels).logvar
    assert logvar.min() == -30 and logvar.max() == 20
    assert_close([logvar], [theirs.encode(pixels).latent_dist.logvar])


@torch.no_grad()
def test_the_posterior_samples_and_its_kl_are_those_of_diffusers():
    ours, theirs = pair(SD)
    pixels = pictures(3, 16, 16)
    posterior, expected = ours.encode(pixels), theirs.encode(pixels).latent_dist
    assert_close([posterior.sample(noise(posterior.mean.shape)), posterior.kl()],
                 [expected.sample(torch.Generator().manual_seed(5)), expected.kl()])


@torch.no_grad()
@pytest.mark.parametrize("name", PUBLISHED)
def test_latents_are_those_that_diffusers_pipelines_make_of_pictures(name):
    ours, theirs = pair(PUBLISHED[name])
    pixels = pictures(1, 24, 40)
    pipeline = SimpleNamespace(vae=theirs)
    expected = getattr(diffusers, PIPELINES[name])._encode_vae_image(pipeline, pixels, torch.Generator().manual_seed(5))
    posterior = ours.encode(pixels)
    z = posterior.sample(noise(posterior.mean.shape))
    latents = ours.to_latents(z)
    assert_close([latents], [expected])
    config = theirs.config
    assert_close([ours.from_latents(latents)], [latents / config.scaling_factor + (config.shift_factor or 0.0)])
    assert_close([ours.from_latents(latents)], [z])


@torch.no_grad()
@pytest.mark.parametrize("config", thinned(2, PUBLISHED.values()), ids=PUBLISHED)
def test_in_bf16_we_are_no_further_from_float32_than_diffusers(config):
    exact, theirs = pair(config)
    ours = randomise(AutoencoderKL(config)).bfloat16()
    theirs.bfloat16()
    pixels = pictures(2, 40, 72)
    z = noise((4, config.latent_channels, 5, 9))
    want = [*exact.encode(pixels), exact.decode(z)]
    posterior = theirs.encode(pixels.bfloat16()).latent_dist
    for a, b, exactly in zip([*ours.encode(pixels.bfloat16()), ours.decode(z.bfloat16())],
                             [posterior.mean, posterior.logvar, theirs.decode(z.bfloat16()).sample], want, strict=True):
        assert 1e-4 < error(a, exactly) < 1.1 * error(b, exactly) and error(b, exactly) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("config", thinned(2, PUBLISHED.values()), ids=PUBLISHED)
def test_a_folder_that_diffusers_saved_loads_as_the_same_autoencoder(tmp_path, config):
    theirs = randomise(diffusers.AutoencoderKL.from_config(to_config(config)))
    theirs.save_pretrained(tmp_path)
    ours = load_vae(tmp_path)
    assert ours.config == config
    assert_same_outputs(ours, theirs)


@torch.no_grad()
def test_a_folder_of_2022_loads_as_what_diffusers_reads_from_it(tmp_path):
    """With the old names of the middle attention, and a config.json that lacks the fields of today."""
    theirs = randomise(diffusers.AutoencoderKL.from_config(to_config(SD)))
    theirs.save_pretrained(tmp_path)
    tensors, old = load_file(tmp_path / "diffusion_pytorch_model.safetensors"), {}
    for name, tensor in tensors.items():
        for before, now in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
            name = name.replace(f".{now}.", f".{before}.")
        old[name] = tensor
    assert len(old.keys() - tensors.keys()) == 16
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    fields = {name: config[name] for name in OLD if name != "_diffusers_version"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = load_vae(tmp_path)
    assert ours.config == SD
    assert_same_outputs(ours, diffusers.AutoencoderKL.from_pretrained(tmp_path).eval())
    assert_same_outputs(ours, theirs)


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


@pytest.mark.parametrize("config", [FULL, *CONFIGS.values()])
def test_a_config_survives_json_and_diffusers(config):
    assert_survives_json_and_diffusers(config, vae, diffusers.AutoencoderKL)


def test_a_config_without_scaling_factor_means_0_18215():
    assert from_config(OLD) == FULL and FULL.scaling_factor == 0.18215


def test_a_config_that_the_flax_branch_of_a_repository_holds_is_read():
    flax = OLD | {"_class_name": "FlaxAutoencoderKL", "_name_or_path": "hf-models/stable-diffusion-v2-768x768/vae"}
    assert from_config(flax) == FULL


def test_the_autoencoder_of_sdxl_is_read_with_its_factor_and_its_variant_for_float16_is_the_same_network():
    xl = to_config(FULL) | {"scaling_factor": 0.13025, "sample_size": 1024, "latents_mean": None, "latents_std": None}
    assert from_config(xl) == replace(FULL, scaling_factor=0.13025, sample_size=1024)
    assert from_config(xl | {"force_upcast": False}) == from_config(xl)


def test_latents_that_are_standardised_per_channel_are_refused_with_the_reason():
    """diffusers' StableDiffusionXLPipeline decodes latents * latents_std / scaling_factor + latents_mean."""
    playground = {"scaling_factor": 0.5, "latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}
    with pytest.raises(ValueError, match="latents_mean=.*per channel, as Playground 2.5's"):
        from_config(to_config(FULL) | playground)


@pytest.mark.parametrize("field, value", [
    ("act_fn", "gelu"), ("in_channels", 4), ("latents_mean", [0.1, 0.2]), ("use_quant_conv", False),
    ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
    ("up_block_types", ["AttnUpDecoderBlock2D"] * 3), ("a_field_of_the_future", 3), ("_class_name", "VQModel"),
    ("_class_name", "FlaxVQModel"),
])
def test_what_the_network_cannot_be_is_refused_by_name(field, value):
    with pytest.raises(ValueError) as error:
        from_config(to_config(SMALL) | {field: value})
    assert (value if field == "_class_name" else field) in str(error.value) and "\n" not in str(error.value)
