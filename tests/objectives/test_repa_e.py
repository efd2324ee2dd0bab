"""REPA-E: the autoencoder is trained through the alignment and its own losses, and stays an AutoencoderKL of standardised latents."""

import copy
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from helpers import PROMPT, SMALL, log_without_timing, mistake, randomise, script, small_text, weights, whole_and_cut
from photos import photos
from safetensors.torch import save_file

from tinyldm.config import make_config
from tinyldm.evaluation.recogniser import Recogniser
from tinyldm.model import Model
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.taesd import TAESDConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.objectives import split
from tinyldm.objectives.denoising import process_of
from tinyldm.objectives.repa_e import REPAE, check_foldable
from tinyldm.random_streams import Stream, generator
from tinyldm.text.encoders import TextEncoder, TextEncoders

CAPTIONS = [PROMPT, "a small green triangle", "a red square", ""]
PICTURES = torch.from_numpy(photos(4, 16, 16)).movedim(3, 1)            # uint8 [4, 3, 16, 16], latents of 8 x 8
VAE = VAEConfig(widths=(8, 16), depth=1, groups=4, middle_attention=False, scaling_factor=0.5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    file = tmp_path_factory.mktemp("teacher") / "recogniser.safetensors"
    save_file(randomise(Recogniser(4)).state_dict(), file)
    return str(file)


def make(teacher, vae_loss=None, **options):
    torch.manual_seed(0)
    tokenizer, text = small_text()
    config = make_config(network="dit", dtype="fp32", keep_pictures=2, vae_loss=vae_loss or dict(kl=0.0), vae_crop=0, resolution=16,
                         objective_options=dict(teacher="recogniser", weights=teacher, hidden=8) | options)
    net = randomise(DiT(DiTConfig(width=32, layers=3, heads=2, mlp_width=64, context_dim=32, time_dim=16))).train()
    texts = TextEncoders([TextEncoder(randomise(CLIPText(text)), tokenizer)])
    model = Model(net, randomise(AutoencoderKL(VAE)), texts, process_of(config.objective), config.objective.prediction, {}, {})
    return REPAE(config, model, ("net", "vae")), model


def samples_of(model):
    return SimpleNamespace(latents=torch.zeros(4, 4, 8, 8), tokens=model.text.tokenize(CAPTIONS), weights=None, pictures=lambda: PICTURES)


def batch_of(objective, model):
    return objective.to_device(objective.draw(samples_of(model), generator(Stream.NOISE, 0, 3), 4, slice(0, 4)), torch.device("cpu"))


def gradients(objective, model, turn, progress=0.0, batch=None):
    modules = {"net": model.net, "vae": model.vae, "text": model.text.modules["text"]} | dict(objective.networks)
    for module in modules.values():
        module.zero_grad()
    losses = objective.losses(objective.turns[turn], model.modules | dict(objective.networks), batch or batch_of(objective, model), progress)
    losses.sum().backward()
    return {f"{part}.{name}": p.grad for part, module in modules.items() for name, p in module.named_parameters()}


def test_no_gradient_of_the_network_s_turn_reaches_the_autoencoder(teacher):
    objective, model = make(teacher)
    found = gradients(objective, model, 0)
    assert objective.turns[0].trains == ("net", "projector") and objective.turns[1].trains == ("vae",)
    reached = {name.partition(".")[0] for name, gradient in found.items() if gradient is not None}
    assert reached == {"net", "projector"} and all(found[name] is not None for name in found if name.startswith(("net.", "projector.")))


def test_the_autoencoder_gets_the_gradients_of_the_distance_and_of_its_own_losses_and_none_of_the_diffusion_loss(teacher):
    """Tensor by tensor: its turn minus its own losses is vae_weight times the gradient of the distance alone, of the encoder only."""
    (objective, model), (over, same) = make(teacher, vae_weight=3.0), make(teacher, stop=0.0)
    batch = batch_of(objective, model)
    whole, own = gradients(objective, model, 1, batch=batch), gradients(over, same, 1, batch=batch)
    model.vae.zero_grad()
    x0 = objective.encode_pictures(model.vae, PICTURES / 127.5 - 1, batch)
    diffusion, apart = objective.both(objective.turns[1], model.modules | dict(objective.networks), batch._replace(x0=x0), 0.0)
    names = [name for name, _ in model.vae.named_parameters()]
    alone = torch.autograd.grad(3.0 * apart.sum(), [*model.vae.parameters()], retain_graph=True, allow_unused=True)
    other = torch.autograd.grad(diffusion.sum(), [*model.vae.parameters()], allow_unused=True)
    for name, wanted, unwanted in zip(names, alone, other):
        found = whole[f"vae.{name}"] - own[f"vae.{name}"]
        assert (wanted is None) == (unwanted is None) == name.startswith(("decoder.", "post_quant_conv.")), name
        scale = whole[f"vae.{name}"].abs().max() + own[f"vae.{name}"].abs().max()
        assert (found - (0 if wanted is None else wanted)).abs().max() <= 2e-5 * scale, name
        assert wanted is None or (found - wanted - unwanted).abs().max() > 1e-3 * unwanted.abs().max() > 0, name


def test_a_discriminator_has_the_third_turn(teacher):
    objective, model = make(teacher, dict(kl=0.0, gan=0.5))
    assert [turn.name for turn in objective.turns] == ["denoising", "autoencoder", "discriminator"]
    assert objective.saved == ("projector", "discriminator")


def test_latents_are_normalised_as_by_a_batch_norm_s_running_statistics(teacher):
    """Beside torch's own over several steps on other pictures; the discrepancy is its unbiased variance, which is undone."""
    objective, model = make(teacher)
    first, norm = copy.deepcopy(model.vae), torch.nn.BatchNorm2d(4, affine=False, eps=0.0)
    for seed in range(4):
        pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        batch = batch_of(objective, model)._replace(pictures=((pixels.clamp(-1, 1) + 1) * 127.5).to(torch.uint8))
        exact = batch.pictures / 127.5 - 1
        with torch.no_grad():
            raw = first.to_latents(first.encode(exact).sample(batch.autoencoder["noise"]))
            torch.testing.assert_close(objective.encode_pictures(model.vae, exact, batch), norm.eval()(raw), rtol=1e-4, atol=1e-5)
            for micro in split(batch, 3):
                objective.losses(objective.turns[0], model.modules | dict(objective.networks), micro, 0.0)
            objective.after_step(seed + 1)
            norm.running_mean.lerp_(raw.mean((0, 2, 3)), 0.1)
            norm.running_var.lerp_(raw.var((0, 2, 3), correction=0), 0.1)
    assert (norm.running_var - 1).abs().max() > 0.1                         # there was something to normalise


def test_folding_statistics_leaves_reconstructions_as_they_are():
    vae = randomise(AutoencoderKL(VAE))
    pixels, eps = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        before = vae.encode(pixels)
        pictures = vae.decode(before.sample(eps))
        mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([0.5, 2.0, 1.0, 3.0])
        vae.fold(mean, std)
        after = vae.encode(pixels)
        torch.testing.assert_close(after.sample(eps), (before.sample(eps) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vae.decode(after.sample(eps)), pictures, rtol=1e-4, atol=1e-4)


def test_validation_encodes_the_pictures_and_measures_the_diffusion_loss(teacher):
    objective, model = make(teacher)
    batch = objective.to_device(objective.validation_batch(samples_of(model), 0), torch.device("cpu"))
    networks = model.modules | dict(objective.networks)
    with torch.no_grad():
        found = objective.losses(objective.turns[0], networks, batch, 0.0)
        x0 = model.vae.to_latents(model.vae.encode(PICTURES / 127.5 - 1).mean)
        expected = super(type(objective), objective).losses(objective.turns[0], networks, batch._replace(x0=x0, pictures=None), 0.0)
    torch.testing.assert_close(found, expected)


def test_other_autoencoders_and_pictures_of_other_sizes_are_refused(teacher):
    for config in (TAESDConfig(), VAEConfig(quant_convs=False), VAEConfig(shift_factor=0.1)):
        with pytest.raises(ValueError, match="1 x 1 convolutions"):
            check_foldable(config)
    check_foldable(VAEConfig())
    objective, model = make(teacher)
    objective.first.downscale = 4
    with pytest.raises(ValueError, match="make it again with --keep-pictures 4"):
        batch_of(objective, model)


def test_an_attempt_that_ran_out_of_memory_does_not_count_in_the_statistics(teacher):
    """Where half a turn was done, and all of it is done again in smaller micro-batches."""
    found = []
    for half_done in (False, True):
        objective, model = make(teacher)
        batch, networks, turn = batch_of(objective, model), model.modules | dict(objective.networks), objective.turns[0]
        if half_done:
            objective.collect(turn, networks, split(batch, 2))
            objective.losses(turn, networks, split(batch, 2)[0], 0.0)
            objective.start_over()
        for each in objective.turns:
            objective.collect(each, networks, split(batch, 4))
            for micro in split(batch, 4):
                objective.losses(each, networks, micro, 0.0)
        objective.after_step(1)
        found.append(model.vae.quant_conv.weight.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("words, expected", [
    ("--keep-pictures 4", "use --keep-pictures 2"), ("--autoencoder taesd --vae latent_channels=8 width=8 blocks=0,1", "use --autoencoder kl")])
def test_mistakes_are_refused_before_anything_is_trained(words, expected, teacher, tmp_path, capsys):
    small = [*SMALL[:SMALL.index("--autoencoder")], *SMALL[SMALL.index("--unet"):]] if "taesd" in words else SMALL
    words = ["--out", tmp_path / "run", *small, "--objective", "repa_e", "--objective-options", "teacher=recogniser", f"weights={teacher}",
             "--keep-pictures", 2, *words.split()]
    assert expected in mistake("train", words, capsys) and not (tmp_path / "run").exists()


WORDS = [*SMALL, "--objective", "repa_e", "--keep-pictures", "2", "--dtype", "fp32", "--log-every", "2", "--val-every", "2",
         "--val-samples", "2", "--vae-loss", "kl=0.01", "gan=0.1", "--vae-gan", "width=4", "layers=1", "norm=none", "start=0"]


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_left_alone_and_its_autoencoder_opens_in_diffusers(tmp_path, teacher, monkeypatch):
    words = [*WORDS, "--objective-options", "teacher=recogniser", f"weights={teacher}", "hidden=8"]
    whole, cut = whole_and_cut(tmp_path, words, monkeypatch)
    one, two = (weights(run / "checkpoints" / "step-000006") for run in (whole, cut))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert log_without_timing(whole) == log_without_timing(cut)
    early, names = weights(cut / "checkpoints" / "step-000002"), [name for name in one if name.startswith("model/vae/")]
    assert len({name.partition(":")[0] for name in names}) == 2 and all((one[name] != early[name]).any() for name in names)
    done = script("-m", "tinyldm.export", cut, tmp_path / "public")
    assert done.returncode == 0, done.stderr
    opened = diffusers.AutoencoderKL.from_pretrained(tmp_path / "public" / "vae")
    averaged = one["model/vae/diffusion_pytorch_model.safetensors:quant_conv.weight"]
    assert np.array_equal(opened.quant_conv.weight.detach().numpy(), averaged)
