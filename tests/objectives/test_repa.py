"""REPA: what the alignment is, whom its gradient reaches, and when it stops; and its teachers against transformers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import PROMPT, SMALL, log_without_timing, mistake, randomise, script, small_text, weights, whole_and_cut
from photos import photos
from safetensors.torch import save_file
from torch import nn

from tinyldm.config import change, make_config
from tinyldm.data.cache import Cache
from tinyldm.evaluation.recogniser import Recogniser
from tinyldm.model import Model, architecture, repeated_blocks
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.flux import Flux, FluxConfig
from tinyldm.models.layers import Cond, Tap
from tinyldm.models.mmdit import MMDiT, MMDiTConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vit import ViT, ViTConfig
from tinyldm.objectives import split
from tinyldm.objectives.denoising import Denoising, process_of
from tinyldm.objectives.repa import DISTANCES, PROJECTORS, REPA, as_map, chosen_block, width_of
from tinyldm.objectives.alignment_teachers import Teacher
from tinyldm.random_streams import Stream, generator
from tinyldm.text.encoders import TextEncoder, TextEncoders

CAPTIONS = [PROMPT, "a small green triangle", "a red square", ""]
PICTURES = torch.from_numpy(photos(4, 64, 64)).movedim(3, 1)            # uint8 [4, 3, 64, 64]
NETWORKS = {
    "dit": lambda: DiT(DiTConfig(width=32, layers=3, heads=2, mlp_width=64, context_dim=32, time_dim=16)),
    "unet": lambda: UNet(UNetConfig(widths=(16, 32), depth=1, attention=(True, True), heads=(2, 2), context_dim=32, groups=8)),
    "mmdit": lambda: MMDiT(MMDiTConfig(in_channels=4, out_channels=4, width=32, layers=3, heads=2, context_dim=32, pooled_dim=32,
                                       qk_norm=True, dual_layers=(0,), max_positions=8, sample_size=8)),
    "flux": lambda: Flux(FluxConfig(in_channels=4, out_channels=4, width=32, heads=2, double_layers=2, single_layers=2, context_dim=32,
                                    pooled_dim=32, rope_axes=(4, 6, 6))),
}
ROWS = {"dit": (4, 4), "mmdit": (4, 4), "flux": (4, 4)}                 # the tokens of latents of 8 x 8; U-Nets have several sizes


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The file of a recogniser with random weights."""
    net = randomise(Recogniser(4))
    file = tmp_path_factory.mktemp("teacher") / "recogniser.safetensors"
    save_file(net.state_dict(), file)
    return str(file)


@pytest.fixture(scope="module")
def text():
    tokenizer, config = small_text()
    return TextEncoders([TextEncoder(randomise(CLIPText(config)), tokenizer)])


def make(text, teacher, kind=REPA, network="dit", trained=("net",), **options):
    torch.manual_seed(0)
    options = dict(teacher="recogniser", weights=teacher, hidden=24) | options if kind is REPA else {}
    config = make_config(network=network, dtype="fp32", objective_options=options, keep_pictures=8)
    model = Model(randomise(NETWORKS[network]()).train(), None, text, process_of(config.objective), config.objective.prediction, {}, {})
    return kind(config, model, trained), model


def batch_of(objective, model):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    samples = SimpleNamespace(latents=latents, tokens=model.text.tokenize(CAPTIONS), weights=None, pictures=lambda: PICTURES)
    return objective.to_device(objective.draw(samples, generator(Stream.NOISE, 0, 3), 4, slice(0, 4)), torch.device("cpu"))


def losses(objective, model, batch=None, progress=0.0, net=None):
    networks = model.modules | dict(objective.networks) | ({} if net is None else {"net": net})
    return objective.losses(objective.turns[0], networks, batch or batch_of(objective, model), progress)


def gradients(objective, model, **more):
    """{name: gradient} of every parameter that the step could reach."""
    modules = {"net": model.net, "text": model.text.modules["text"]} | dict(objective.networks)
    for module in modules.values():
        module.zero_grad()
    losses(objective, model, **more).sum().backward()
    return {f"{part}.{name}": p.grad for part, module in modules.items() for name, p in module.named_parameters()}


# ---------------------------------------------------------------- the alignment


def test_the_gradient_reaches_the_network_up_to_the_block_and_the_projector_and_nothing_else(text, teacher):
    (aligned, model), (plain, same) = make(text, teacher, block=2), make(text, teacher, Denoising)
    with_it, without = gradients(aligned, model), gradients(plain, same)
    changed = {name for name, gradient in with_it.items() if gradient is not None and not (
        name in without and without[name] is not None and torch.equal(gradient, without[name]))}
    names = {f"net.{name}" for name, _ in model.net.named_parameters()}
    behind = {name for name in names if name.startswith(("net.blocks.2.", "net.final_table", "net.patch_out."))}
    assert changed == names - behind | {f"projector.{name}" for name, _ in aligned.networks["projector"].named_parameters()}
    assert all(with_it[name] is None for name in with_it if name.startswith(("teacher.", "text.")))
    assert aligned.turns[0].trains == ("net", "projector") and aligned.saved == ("projector",)


def test_the_loss_is_the_diffusion_loss_plus_the_weighted_mean_distance_over_positions(text, teacher):
    for options in ({}, dict(distance="mse", weight=2.0), dict(projector="conv", spatial_norm=True)):
        (objective, model), (plain, _) = make(text, teacher, block=3, **options), make(text, teacher, Denoising)
        seen, batch = [], batch_of(objective, model)
        hook = model.net.blocks[2].register_forward_hook(lambda block, inputs, out: seen.append(out))
        found = losses(objective, model, batch)
        hook.remove()
        hidden = objective.networks["projector"](seen[0].mT.unflatten(2, (4, 4))).flatten(2)                    # [b, d, 16]
        patches = objective.networks["teacher"].net.patch_features(PICTURES / 127.5 - 1)                       # 8 x 8 of 8 px
        wanted = F.avg_pool2d(patches, 2).flatten(2)
        if options.get("spatial_norm"):
            wanted = (wanted - wanted.mean(2, keepdim=True)) / (wanted.std(2, keepdim=True) + 1e-6)
        if options.get("distance"):
            apart = ((hidden - wanted) ** 2).mean((1, 2))
        else:
            apart = (1 - (hidden * wanted).sum(1) / (hidden.norm(dim=1) * wanted.norm(dim=1))).mean(1)
        torch.testing.assert_close(found, losses(plain, model, batch) + options.get("weight", 0.5) * apart, rtol=1e-5, atol=1e-6)
        assert objective.log_row() == {"alignment": pytest.approx(apart.mean().item(), rel=1e-5)}


def test_it_stops_at_its_fraction_of_the_training_and_pictures_are_not_read_from_then_on(text, teacher):
    (objective, model), (plain, _) = make(text, teacher, stop=0.25), make(text, teacher, Denoising)
    batch, calls = batch_of(objective, model), []
    objective.networks["teacher"].register_forward_hook(lambda *_: calls.append(1))
    assert (losses(objective, model, batch, 0.2499) > losses(plain, model, batch)).all() and objective.settled == 0.25
    assert torch.equal(losses(objective, model, batch, 0.25), losses(plain, model, batch)) and calls == [1]
    assert objective.log_row() == {} and batch_of(objective, model).pictures is None
    assert all(gradient is None for name, gradient in gradients(objective, model, batch=batch, progress=0.9).items() if "projector" in name)


def test_validation_measures_the_diffusion_loss_alone(text, teacher):
    (objective, model), (plain, _) = make(text, teacher), make(text, teacher, Denoising)
    samples = SimpleNamespace(latents=torch.randn(4, 4, 8, 8), tokens=text.tokenize(CAPTIONS), weights=None)
    batch = objective.to_device(objective.validation_batch(samples, 0), torch.device("cpu"))
    assert torch.equal(losses(objective, model, batch), losses(plain, model, batch))


def test_micro_batches_have_the_losses_of_the_whole_batch(text, teacher):
    objective, model = make(text, teacher)
    batch = batch_of(objective, model)
    found = torch.cat([losses(objective, model, micro) for micro in split(batch, 3)])
    torch.testing.assert_close(found, losses(objective, model, batch), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the block


@pytest.mark.parametrize("network", NETWORKS)
def test_every_block_of_every_network_can_be_aligned(text, teacher, network):
    """The map that is taken is the features of the picture, as wide as the projector, and depends on the picture at its own position."""
    net = randomise(NETWORKS[network]())
    cond = Cond(torch.randn(2, 5, 32), None, torch.randn(2, 32))
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    for block in repeated_blocks(net):
        net.tap = tap = Tap(block)
        net(x, torch.tensor([10.0, 900.0]), cond)
        out = as_map(tap.take(), net, x)
        assert out.shape[1] == width_of(net, block) and tap.output is None
        assert out.shape[2:] == ROWS.get(network, out.shape[2:]) and out.shape[2] in (4, 8)
    objective, model = make(text, teacher, network=network, block=1)
    assert losses(objective, model).isfinite().all() and model.net.tap is None


def test_tokens_of_the_caption_are_not_aligned():
    """Flux's single blocks answer with the caption's tokens in front of the picture's."""
    net = NETWORKS["flux"]()
    out = torch.arange(5 + 16.0)[None, :, None].expand(1, -1, 3)
    assert as_map(out, net, torch.zeros(1, 4, 8, 8))[0, 0].tolist() == (5 + torch.arange(16.0)).view(4, 4).tolist()
    assert architecture(net).divisor(net.config) == 2


@pytest.mark.parametrize("network", NETWORKS)
def test_gradient_checkpointing_changes_no_gradient(text, teacher, network):
    objective, model = make(text, teacher, network=network)
    plain = gradients(objective, model)
    model.net.grad_checkpointing = True
    again = gradients(objective, model)
    assert all(gradient is again[name] is None or torch.allclose(gradient, again[name], rtol=1e-5, atol=1e-7)
               for name, gradient in plain.items())


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_gradients_and_one_more_graph_once_the_alignment_stops(text, teacher):
    objective, model = make(text, teacher, stop=0.5)
    batch, made = batch_of(objective, model), []
    torch.compiler.reset()
    net = torch.compile(model.net, dynamic=False, fullgraph=True, backend=lambda graph, inputs: made.append(1) or graph.forward)
    for progress, graphs in ((0.0, 1), (0.1, 1), (0.5, 2), (0.6, 2)):
        plain = gradients(objective, model, batch=batch, progress=progress)
        again = gradients(objective, model, batch=batch, progress=progress, net=net)
        assert all(gradient is again[name] is None or torch.equal(gradient, again[name]) for name, gradient in plain.items())
        assert len(made) == graphs
    torch.compiler.reset()


def test_the_usual_block_is_the_eighth_of_28(text, teacher):
    objective, model = make(text, teacher)
    assert objective.tap.block is model.net.blocks[0]           # of 3
    with torch.device("meta"):
        deep = DiT(DiTConfig(width=8, layers=28, heads=2, mlp_width=8, context_dim=4, time_dim=4))
    assert chosen_block(deep, 0) is deep.blocks[7] and chosen_block(deep, 28) is deep.blocks[27]


# ---------------------------------------------------------------- teachers


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)], ids=["as trained", "resampled positions"])
def test_dinov2_s_features_of_patches_equal_transformers(tmp_path, registers, grid):
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    kind = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    theirs = randomise(kind(kind.config_class(**sizes)))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "embedding" in name and "patch" not in name or "token" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    theirs.save_pretrained(tmp_path)
    teacher = Teacher("dinov2", str(tmp_path))
    if not registers:                   # Meta's code moves the positions by 0.1 patches, transformers leaves that out
        object.__setattr__(teacher.net.config, "position_offset", 0.0)
    pictures = PICTURES[:2]
    resized = F.interpolate(pictures.float() / 255, tuple(14 * side for side in grid), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = theirs((resized - mean) / std).last_hidden_state[:, 1 + registers:].mT.unflatten(2, grid)
    found = teacher(pictures, grid)
    assert found.shape == expected.shape == (2, 64, *grid) and (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_grid_coarser_than_the_picture_gets_the_mean_of_the_patches_in_each_position(teacher):
    net = Teacher("recogniser", teacher)
    fine = net(PICTURES, (8, 8))
    assert net.width == 16 and fine.shape == (4, 16, 8, 8)
    torch.testing.assert_close(net(PICTURES, (4, 4)), fine.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5)))
    torch.testing.assert_close(fine, net.net.patch_features(PICTURES / 127.5 - 1), rtol=1e-4, atol=1e-5)


def test_any_vit_of_the_library_can_teach_and_none_is_trained(tmp_path):
    config = transformers.CLIPVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=32,
                                           patch_size=8)
    randomise(transformers.CLIPVisionModelWithProjection(config)).save_pretrained(tmp_path)
    teacher = Teacher("clip", str(tmp_path))
    assert teacher(PICTURES, (8, 8)).shape == (4, 64, 8, 8) and not any(p.requires_grad for p in teacher.parameters())
    assert isinstance(teacher.net, ViT) and isinstance(teacher.net.config, ViTConfig)


def test_the_projectors_are_the_papers_three_layers_and_one_convolution():
    layers = [*PROJECTORS["mlp"](6, 10, 4)]
    assert [type(layer).__name__ for layer in layers] == ["Conv2d", "SiLU", "Conv2d", "SiLU", "Conv2d"]
    assert [layers[i].weight.shape for i in (0, 2, 4)] == [(10, 6, 1, 1), (10, 10, 1, 1), (4, 10, 1, 1)]
    assert isinstance(PROJECTORS["conv"](6, 10, 4), nn.Conv2d) and PROJECTORS["conv"](6, 10, 4).weight.shape == (4, 6, 3, 3)
    assert {*DISTANCES} == {"cosine", "mse"}


# ---------------------------------------------------------------- mistakes, and a whole run


@pytest.mark.parametrize("words, expected", [
    ("teacher=dinov3", "did you mean 'dinov2'"), ("stop=1.5", "stop=1.5 must lie between 0 and 1"), ("weight=0", "must be positive"),
    ("block=99", "block=99: the network has blocks 1 to"), ("distance=cos", "did you mean 'cosine'"),
    ("projector=mpl", "did you mean 'mlp'"),
    ("weights=nowhere/at/all.safetensors", "nowhere/at/all.safetensors does not exist"),
    ("teacher=recogniser", "the teacher recogniser needs")])
def test_mistakes_are_refused_before_anything_is_trained(words, expected, tmp_path, capsys):
    words = ["--out", tmp_path / "run", *SMALL, "--objective", "repa", "--keep-pictures", 2, "--objective-options", words]
    assert expected in mistake("train", words, capsys) and not (tmp_path / "run").exists()


def test_without_pictures_one_line_says_how_to_keep_them(tmp_path):
    config = make_config(objective="repa")
    with pytest.raises(ValueError, match="add --keep-pictures 8"):
        REPA.check_parts(config, None)
    with pytest.raises(ValueError, match="latents has no pictures: make it again with --keep-pictures 8"):
        REPA.check_parts(change(config, cache=["latents"]), None)


WORDS = [*SMALL, "--objective", "repa", "--keep-pictures", "2", "--flip", "--dtype", "fp32", "--log-every", "2", "--sample-every", "0"]


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_left_alone_with_its_projector_and_exports_without_it(tmp_path, teacher, monkeypatch):
    words = [*WORDS, "--objective-options", "teacher=recogniser", f"weights={teacher}", "hidden=8", "stop=0.7"]
    whole, cut = whole_and_cut(tmp_path, words, monkeypatch)
    one, two = (weights(run / "checkpoints" / "step-000006") for run in (whole, cut))
    projector = [name for name in one if name.startswith("objective.safetensors:projector.")]
    assert len(projector) == 6 and one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    early = weights(whole / "checkpoints" / "step-000002")
    assert all((one[name] != early[name]).any() for name in projector)
    assert log_without_timing(tmp_path / "whole") == log_without_timing(cut)
    rows = [row.get("alignment") for row in log_without_timing(cut) if row["stage"] == "step" and "loss" in row]
    assert rows[0] > 0 and rows[-1] is None
    assert Cache(cut / "latents").read_pictures(np.arange(2)).shape == (2, 16, 16, 3)
    done = script("-m", "tinyldm.export", cut, tmp_path / "public")
    assert done.returncode == 0, done.stderr
    assert not [name for name in weights(tmp_path / "public") if "projector" in name]
