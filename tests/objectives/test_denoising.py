"""The diffusion loss as an objective: what is drawn depends on the global batch alone, and the loss is that of the formula."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import PROMPT, randomise, small_text

from tinyldm.config import make_config
from tinyldm.diffusion.loss import make_noise, sample_t
from tinyldm.diffusion.process import make_process
from tinyldm.model import NETWORKS, Model
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.objectives import OBJECTIVES, map_tensors, split, turns_at
from tinyldm.objectives.base import Objective, Turn
from tinyldm.objectives.denoising import Denoising, process_options
from tinyldm.random_streams import Stream, generator
from tinyldm.text.encoders import TextEncoder, TextEncoders

BATCH, CPU = 7, torch.device("cpu")
CAPTIONS = [PROMPT, "a small green triangle", "a red square", "", PROMPT, "blue", "a circle"]


@pytest.fixture(scope="module")
def parts():
    """A small network and its text encoder."""
    tokenizer, config = small_text()
    net = randomise(DiT(DiTConfig(width=32, layers=1, heads=2, mlp_width=32, context_dim=32, time_dim=16)))
    return net, TextEncoders([TextEncoder(randomise(CLIPText(config)), tokenizer)])


def make(parts, trained=("net", "text"), **settings) -> tuple[Denoising, Model]:
    config = make_config(**settings)
    process = make_process(config.objective.process, **process_options(config.objective))
    model = Model(parts[0], None, parts[1], process, config.objective.prediction, {}, {})
    return Denoising(config, model, trained), model


def samples_of(parts, part=slice(None)):
    latents = torch.randn(BATCH, 4, 4, 4, generator=torch.Generator().manual_seed(9))
    return SimpleNamespace(latents=latents[part], tokens=parts[1].tokenize(CAPTIONS)[part], weights=None)


def drawn(parts, objective, seed=0, position=3, part=slice(None)):
    return objective.draw(samples_of(parts, part), generator(Stream.NOISE, seed, position), BATCH, part)


def same(one, two) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, two, strict=True))


SETTINGS = [{}, dict(noise_offset=0.1, input_perturbation=0.2, stratified_times=True, caption_dropout=0.5),
            dict(process="cosine", prediction="v", times="uniform", caption_dropout=0.5)]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_drawn_is_a_function_of_seed_and_position(parts, settings):
    objective, _ = make(parts, **settings)
    one, again = drawn(parts, objective), drawn(parts, make(parts, **settings)[0])
    assert same(one, again) and one.x0 is not one.eps
    for other in (drawn(parts, objective, seed=1), drawn(parts, objective, position=4)):
        assert not torch.equal(one.eps, other.eps) and not torch.equal(one.t, other.t) and not torch.equal(one.noise, other.noise)


@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_parts_of_several_processes_together_are_what_one_process_draws(parts, settings, processes):
    objective, _ = make(parts, **settings)
    whole, edges = drawn(parts, objective), [BATCH * i // processes for i in range(processes + 1)]
    several = [drawn(parts, objective, part=slice(begin, end)) for begin, end in zip(edges, edges[1:])]
    assert same(whole, [None if fields[0] is None else torch.cat(fields) for fields in zip(*several)])


def test_noise_times_and_dropped_captions_are_drawn_in_this_order_from_one_stream(parts):
    objective, model = make(parts, noise_offset=0.1, input_perturbation=0.2, caption_dropout=0.5, times_mean=0.3)
    batch, random = drawn(parts, objective), generator(Stream.NOISE, 0, 3)
    noise = make_noise((BATCH, 4, 4, 4), random, 0.1, 0.2)
    t = sample_t("logit_normal", BATCH, random, 0.3, None, model.process, False)
    dropped = torch.rand(BATCH, generator=random) < 0.5
    assert torch.equal(batch.eps, noise.eps) and torch.equal(batch.mixed, noise.mixed) and torch.equal(batch.t, t)
    assert 0 < dropped.sum() < BATCH and torch.equal(batch.x0, samples_of(parts).latents)
    changed = (batch.tokens != samples_of(parts).tokens).any(1)
    assert torch.equal(changed, dropped & torch.tensor([caption != "" for caption in CAPTIONS]))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_dropped_captions_become_the_encoded_empty_string(parts, share):
    objective, _ = make(parts, caption_dropout=share)
    empty, tokens = parts[1].tokenize([""])[0], samples_of(parts).tokens
    assert not (empty == 0).all()                              # it has a start and an end
    dropped = 0
    for position in range(60):
        rows = drawn(parts, objective, position=position).tokens
        gone = (rows == empty).all(1)
        assert torch.equal(rows[~gone], tokens[~gone])
        dropped += int(gone[torch.tensor([caption != "" for caption in CAPTIONS])].sum())
    assert dropped / 360 == pytest.approx(share, abs=0.08) and (dropped in (0, 360)) == (share in (0, 1))


def test_a_batch_goes_to_the_device_but_for_the_token_ids_and_its_noise_once_where_nothing_perturbs_it(parts):
    for settings, mixed in (({}, None), (dict(input_perturbation=0.2), "meta")):
        objective, _ = make(parts, **settings)
        batch = objective.to_device(drawn(parts, objective), torch.device("meta"))
        assert (batch.mixed is None if mixed is None else batch.mixed.device.type == mixed) and batch.cond is None
        assert [tensor.device.type for tensor in (*batch[:3], batch.tokens, batch.noise)] == ["meta"] * 3 + ["cpu", "meta"]


def test_frozen_text_encoders_encode_a_batch_once_and_its_micro_batches_get_their_parts(parts, monkeypatch):
    """Whatever the micro-batches, the losses are those of encoding each by itself, up to rounding."""
    objective, model = make(parts, trained=("net",), network="dit", mask_padding=True, dtype="fp32")
    trained, _ = make(parts, network="dit", mask_padding=True)
    module, seen = parts[1].modules["text"], []
    hook = module.register_forward_pre_hook(lambda module, inputs: seen.append((len(inputs[0]), torch.is_grad_enabled())))
    batch = objective.to_device(drawn(parts, objective), CPU)
    assert seen == [(len(set(CAPTIONS)), False)]                # equal captions once
    micro = split(batch, 3)
    assert [len(part.cond.context) for part in micro] == [len(part.cond.mask) for part in micro] == [3, 2, 2]
    losses = torch.cat([objective.losses(objective.turns[0], {"net": model.net}, part, 0.0) for part in micro])
    assert len(seen) == 1
    apart = [trained.losses(trained.turns[0], {"net": model.net}, part, 0.0) for part in split(drawn(parts, trained), 3)]
    hook.remove()
    assert len(seen) == 4
    torch.testing.assert_close(losses, torch.cat(apart))


# ---------------------------------------------------------------- the loss


@torch.no_grad()
def test_the_loss_of_flow_is_that_of_the_formula(parts):
    objective, model = make(parts)
    batch = drawn(parts, objective)
    losses = objective.losses(objective.turns[0], {"net": model.net}, batch, 0.0)
    t = batch.t[:, None, None, None]
    cond = model.text.encode_ids(batch.tokens, CPU)
    answer = model.net((1 - t) * batch.x0 + t * batch.eps, 1000 * batch.t, cond)
    assert losses.shape == (BATCH,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses, (answer - (batch.eps - batch.x0)).square().mean((1, 2, 3)))


@torch.no_grad()
def test_a_perturbation_is_in_the_input_and_not_in_the_target_and_an_offset_is_in_both(parts):
    objective, model = make(parts, input_perturbation=0.5, noise_offset=0.5)
    batch = drawn(parts, objective)
    losses = objective.losses(objective.turns[0], {"net": model.net}, batch, 0.0)
    t, random = batch.t[:, None, None, None], generator(Stream.NOISE, 0, 3)
    noise, offset, more = (torch.randn(BATCH, 4, *sides, generator=random) for sides in ((4, 4), (1, 1), (4, 4)))
    eps = noise + 0.5 * offset
    answer = model.net((1 - t) * batch.x0 + t * (eps + 0.5 * more), 1000 * batch.t, model.text.encode_ids(batch.tokens, CPU))
    torch.testing.assert_close(losses, (answer - (eps - batch.x0)).square().mean((1, 2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, dict(network="dit", mask_padding=True), dict(loss="huber", times="uniform", noise_offset=0.1)])
def test_the_losses_of_micro_batches_are_those_of_the_batch(parts, settings):
    objective, model = make(parts, **settings)
    batch = drawn(parts, objective)
    turn, networks = objective.turns[0], {"net": model.net}
    whole = objective.losses(turn, networks, batch, 0.0)
    micro = split(batch, 3)
    assert [len(part.t) for part in micro] == [3, 2, 2] and all(type(part) is type(batch) for part in micro)
    torch.testing.assert_close(torch.cat([objective.losses(turn, networks, part, 0.0) for part in micro]), whole)


@torch.no_grad()
def test_padding_is_masked_where_that_is_asked_for(parts):
    seen = []

    def net(x, t, cond):
        seen.append(cond)
        return torch.zeros_like(x)

    for masked in (False, True):
        objective, _ = make(parts, mask_padding=masked)
        objective.losses(objective.turns[0], {"net": net}, drawn(parts, objective), 0.0)
    assert seen[0].mask is None and seen[1].mask.shape == seen[1].context.shape[:2] and not seen[1].mask.all()


def test_gradients_reach_the_network_that_is_handed_in_and_the_text_encoder(parts):
    objective, model = make(parts)
    assert objective.turns == (Turn("denoising", ("net", "text")),) and not objective.networks
    calls = []

    def compiled(*inputs):
        calls.append(inputs)
        return model.net(*inputs)

    objective.losses(objective.turns[0], {"net": compiled}, drawn(parts, objective), 0.0).sum().backward()
    assert len(calls) == 1                                     # the compiled handle is called, not the model's own
    for module in (model.net, model.text.modules["text"]):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        module.zero_grad(set_to_none=True)


def test_a_phase_has_its_own_process(parts):
    objective, model = make(parts)
    before = drawn(parts, objective)
    config = make_config(shift=3.0, caption_dropout=1.0)
    later = Model(model.net, None, model.text, make_process("flow", shift=3.0), "flow", {}, {})
    objective.begin_phase(config, later)
    losses = [each.losses(each.turns[0], {"net": lambda x, t, cond: x}, before, 0.0) for each in (objective, make(parts)[0])]
    assert not torch.allclose(*losses) and (drawn(parts, objective).tokens == parts[1].tokenize([""])).all()


def test_validation_has_times_all_over_and_whole_captions(parts):
    objective, _ = make(parts, caption_dropout=1.0, noise_offset=0.5, input_perturbation=0.5)
    samples = samples_of(parts)
    one, again, other = (objective.validation_batch(samples, seed) for seed in (3, 3, 4))
    assert same(one, again) and not torch.equal(one.eps, other.eps)
    assert torch.equal(one.tokens, samples.tokens) and one.mixed is one.cond is None and torch.equal(one.x0, samples.latents)
    assert sorted(one.t.tolist()) == pytest.approx([(i + 0.5) / BATCH for i in range(BATCH)])
    assert not torch.equal(one.t, other.t) and torch.equal(one.t.sort().values, other.t.sort().values)     # which sample has which


# ---------------------------------------------------------------- what a network is told besides captions


TOLD = torch.arange(6.0 * BATCH).reshape(BATCH, 6)


@pytest.fixture
def told(monkeypatch):
    """The DiT, as if it were told sizes and a guidance scale."""
    monkeypatch.setitem(NETWORKS, "dit", NETWORKS["dit"]._replace(extras=lambda config: ("sizes", "guidance")))


def with_sizes(parts, part=slice(None)):
    samples = samples_of(parts, part)
    samples.sizes = TOLD[part]
    return samples


@pytest.mark.parametrize("trained", [("net",), ("net", "text")])
def test_a_network_is_told_the_sizes_of_its_own_pictures_and_no_guidance_whatever_is_dropped(parts, told, trained):
    objective, model = make(parts, trained, network="dit", caption_dropout=1.0)
    seen = []

    def net(x, t, cond):
        seen.append(cond.extra)
        return x

    part = slice(2, 7)
    batch = objective.draw(with_sizes(parts, part), generator(Stream.NOISE, 0, 3), BATCH, part)
    assert (batch.tokens == parts[1].tokenize([""])).all()
    for micro in split(objective.to_device(batch, CPU), 2):
        objective.losses(objective.turns[0], {"net": net}, micro, 0.0)
    assert torch.equal(torch.cat([extra["sizes"] for extra in seen]), TOLD[2:]) and [len(extra["sizes"]) for extra in seen] == [3, 2]
    assert torch.equal(torch.cat([extra["guidance"] for extra in seen]), torch.ones(5))
    held_out = objective.validation_batch(with_sizes(parts), 0)
    moved = map_tensors(held_out, lambda tensor: tensor.to("meta"))
    assert torch.equal(held_out.extra["sizes"], TOLD) and moved.extra["sizes"].is_meta and moved.x0.is_meta


def test_a_network_that_asks_for_nothing_is_told_nothing(parts):
    objective, seen = make(parts)[0], []
    batch = objective.draw(with_sizes(parts), generator(Stream.NOISE, 0, 3), BATCH, slice(None))
    objective.losses(objective.turns[0], {"net": lambda x, t, cond: seen.append(cond.extra) or x}, batch, 0.0)
    assert batch.extra is None and seen == [{}]


def test_a_condition_that_training_does_not_have_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(NETWORKS, "dit", NETWORKS["dit"]._replace(extras=lambda config: ("camera",)))
    with pytest.raises(ValueError, match="unknown condition that training can tell a dit 'camera': known: sizes, guidance"):
        Denoising.check(make_config(network="dit"))


# ---------------------------------------------------------------- a shift that depends on the size of pictures


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (32, 64)])
def test_the_shift_is_that_of_the_pictures_of_the_batch(parts, height, width):
    """FLUX.1 dev: mu is 0.5 for 256 tokens and 1.15 for 4096, the shift is exp(mu); a DiT's token is 2 x 2 latents."""
    objective, _ = make(parts, process="dynamic_flow")
    seen, x0 = [], torch.zeros(BATCH, 4, height, width)
    samples = SimpleNamespace(latents=x0, tokens=samples_of(parts).tokens, weights=None)
    batch = objective.draw(samples, generator(Stream.NOISE, 0, 3), BATCH, slice(None))
    objective.losses(objective.turns[0], {"net": lambda x, t, cond: seen.append(t) or x}, batch, 0.0)
    shift = math.exp(0.5 + (1.15 - 0.5) * (height * width / 4 - 256) / (4096 - 256))
    torch.testing.assert_close(seen[0], 1000 * shift * batch.t / (1 + (shift - 1) * batch.t))


# ---------------------------------------------------------------- objectives in general


def test_turns_are_taken_every_so_many_steps():
    objective = Objective()
    objective.turns = (Turn("student", ("net",), every=5), Turn("critic", ("critic",)))
    assert [[turn.name for turn in turns_at(objective, step)] for step in (0, 1, 4, 5)] == [
        ["student", "critic"], ["critic"], ["critic"], ["student", "critic"]]


def test_a_turn_takes_part_from_its_fraction_of_the_training_on():
    objective = Objective()
    objective.turns = (Turn("autoencoder", ("vae",)), Turn("discriminator", ("discriminator",), start=0.5))
    assert [len(turns_at(objective, 3, progress)) for progress in (0.0, 0.49, 0.5, 1.0)] == [1, 1, 2, 2]


def test_an_objective_that_lacks_a_method_is_named():
    assert OBJECTIVES["denoising"] is Denoising
    for call in (lambda: Objective().draw(None, None, 1, slice(0, 1)), lambda: Objective().losses(None, {}, None, 0.0)):
        with pytest.raises(TypeError, match="Objective does not say .*: give it a method"):
            call()
