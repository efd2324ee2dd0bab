"""Objectives with a network that judges: distribution matching and self-corrected flow distillation on data of which score and curve are
known, and the adversary of continuous consistency."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import PROMPT, randomise, small_text
from mixtures import Mixture
from torch import nn

from tinyldm.config import make_config
from tinyldm.diffusion.prediction import to_output
from tinyldm.diffusion.process import Level, make_process
from tinyldm.diffusion.samplers import ddim, final
from tinyldm.model import Model
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.mmdit import MMDiT, MMDiTConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.objectives import OBJECTIVES, split, turns_at
from tinyldm.objectives.denoising import DenoisingBatch, process_options
from tinyldm.objectives.dmd import FAKE, FIRST, HEAD, LAST
from tinyldm.objectives.feature_head import features_of
from tinyldm.objectives.self_corrected import DISCRIMINATOR
from tinyldm.objectives.teacher import TARGET, TEACHER
from tinyldm.random_streams import Stream, generator
from tinyldm.text.encoders import TextEncoder, TextEncoders

mixture = lambda means, std, weights: Mixture(torch.tensor(means).double().view(-1, 1, 1, 2), torch.tensor([std] * len(means)).double(),
                                              torch.tensor(weights).double())
DATA, OTHER = mixture([[-1.2, -0.6], [1.0, 0.5]], 0.3, [0.6, 0.4]), mixture([[-0.5, 0.2], [0.6, -0.3]], 0.5, [0.3, 0.7])
ALL = dict(dmd=dict(gan=0.1, segment=0.5, align=0.9, steps=3), self_corrected=dict(gan=0.1, width=8), scm=dict(gan=0.5))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_line(t: float) -> Level:
    return Level(1000 * t, 1 - t, t)


class Exact(nn.Module):
    """A mixture's denoiser as a network that predicts the flow, where every sample has its own time. Its weight changes nothing."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture, self.weight = mixture, nn.Parameter(torch.zeros(()).double())

    def forward(self, x, t, cond=None):
        levels = [on_line(max(float(time) / 1000, 1e-6)) for time in t]
        return torch.cat([to_output("flow", one[None], self.mixture(one[None], at), at) for one, at in zip(x, levels)]) + 0 * self.weight


def log_density(mixture, x, at):
    variance = (at.alpha * mixture.std) ** 2 + at.sigma**2
    square = (x[:, None] - at.alpha * mixture.mean).square().sum((2, 3, 4))
    return (mixture.weight.log() - square / (2 * variance) - mixture.mean[0].numel() / 2 * variance.log()).logsumexp(1)


@pytest.fixture(scope="module")
def parts():
    tokenizer, config = small_text()
    return TextEncoders([TextEncoder(randomise(CLIPText(config)).requires_grad_(False), tokenizer)])


CAPTIONS = [PROMPT, "a small green triangle", "a red square", "", PROMPT, "blue"]
DIT = dict(width=32, layers=3, heads=2, mlp_width=32, context_dim=32, time_dim=16)


def make(text, name, nets=None, shape=(4, 8, 8), options=None, **settings):
    """(objective, its batch of six on the device): on a flow. nets: (student, teacher)."""
    config = make_config(**dict(objective=name, objective_options=ALL[name] if options is None else options, finetune="whole", model="m",
                                dtype="fp32", network="dit", dit=DIT) | settings)
    kind, process = OBJECTIVES[name], make_process(config.objective.process, **process_options(config.objective))
    kind.check(config)
    student, teacher = nets or (randomise(DiT(DiTConfig(**DIT)), 1), randomise(DiT(DiTConfig(**DIT)), 2))
    model = lambda net: Model(net, None, text, process, config.objective.prediction, {}, {"cfg": 3.0})
    objective = kind(config, model(student.requires_grad_(True)), ("net",), model(teacher))
    samples = SimpleNamespace(latents=noise(6, *shape, seed=9).float(), tokens=text.tokenize(CAPTIONS), weights=None)
    batch = objective.draw(samples, generator(Stream.NOISE, 0, 3), 6, slice(None))
    return objective, objective.to_device(batch, torch.device("cpu"))


def losses(objective, batch, turn=0, progress=0.6):
    return objective.losses(objective.turns[turn], {"net": objective.model.net, **objective.networks}, batch, progress)


def exactly(text, name, student, **options):
    """An objective in float64, whose networks are exact ones and whose pictures have two numbers."""
    options = dict(scale=1.0) | options
    objective, batch = make(text, name, shape=(1, 1, 2), options=options)
    double = lambda value: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    batch = DenoisingBatch(*map(double, batch))._replace(own={name: double(value) for name, value in batch.own.items()})
    objective.model, objective.process = SimpleNamespace(net=student), lambda x0: make_process("flow")
    objective.networks[TEACHER] = Exact(DATA).requires_grad_(False)
    return objective, batch


def test_the_gradient_of_distribution_matching_is_the_difference_of_exact_scores(parts):
    objective, batch = exactly(parts, "dmd", Exact(OTHER), steps=1, every=1)
    objective.networks[FAKE] = Exact(OTHER)
    x = noise(6, 1, 1, 2, seed=4).requires_grad_()
    objective.generate = lambda net, batch, cond: (x, x.detach(), 0)
    losses(objective, batch).sum().backward()
    t = FIRST + (LAST - FIRST) * batch.t
    for i in range(6):
        at = on_line(float(t[i]))
        noisy = (at.alpha * x[i:i + 1] + at.sigma * batch.eps[i:i + 1]).detach().requires_grad_()
        score = [torch.autograd.grad(log_density(mixture, noisy, at).sum(), noisy)[0] for mixture in (OTHER, DATA)]
        away = (x[i:i + 1] - DATA(noisy, at)).abs().mean()
        wanted = at.sigma**2 / at.alpha * (score[0] - score[1]) / away / x[i].numel()
        torch.testing.assert_close(x.grad[i:i + 1], wanted.detach(), rtol=1e-9, atol=1e-9)
    objective.networks[FAKE] = Exact(DATA)                      # what is drawn is distributed as the data: nothing to learn
    assert losses(objective, batch).abs().max() < 1e-20


def test_a_generator_sees_what_its_own_steps_have_drawn_at_the_levels_at_which_it_draws(parts):
    objective, batch = make(parts, "dmd", options=dict(steps=3))
    seen, real = [], objective.f
    objective.f = lambda net, x, at, cond: seen.append((x, at, real(net, x, at, cond))) or seen[-1][2]
    own = {**batch.own, "step": torch.full((6,), 2)}
    x, start, k = objective.generate(objective.model.net, batch._replace(own=own), objective.cond(batch))
    assert k == 2 and [round(float(at.t[0])) for _, at, _ in seen] == [1000, 667, 333] and x is seen[2][2] and start is seen[2][0]
    for i in (0, 1):
        at = seen[i + 1][1]
        torch.testing.assert_close(seen[i + 1][0], at.alpha * seen[i][2] + at.sigma * batch.own["noise"][:, i + 1])
        assert not seen[i][2].requires_grad
    assert x.requires_grad and torch.allclose(seen[0][0], batch.own["noise"][:, 0], atol=1e-5)
    steps = {int(objective.further(torch.Generator().manual_seed(seed), torch.Size((4, 1, 1, 2)))["step"][0]) for seed in range(30)}
    assert steps == {0, 1, 2}


@pytest.mark.parametrize("name", ALL)
def test_each_turn_trains_its_networks_and_nothing_reaches_the_teacher(parts, name):
    objective, batch = make(parts, name)
    trained = {"dmd": [{"net"}, {FAKE, HEAD}], "self_corrected": [{"net"}, {DISCRIMINATOR}], "scm": [{"net"}, {HEAD}]}[name]
    assert [set(turn.trains) for turn in objective.turns] == trained
    modules = {"net": objective.model.net, **objective.networks}
    before = {part: copy.deepcopy(module.state_dict()) for part, module in modules.items()}
    for turn, parts_of_turn in enumerate(trained):
        for module in modules.values():
            module.zero_grad()
        found = losses(objective, batch, turn)
        assert found.shape == (6,) and found.dtype == torch.float32 and found.isfinite().all()
        found.sum().backward()
        for part in parts_of_turn:
            unused = {name for name, p in modules[part].named_parameters() if p.grad is None}
            assert not unused and all(p.grad.isfinite().all() for p in modules[part].parameters()), (part, unused)
        if turn:                                                # (a generator's adversarial loss passes through the others)
            assert all(p.grad is None for p in modules["net"].parameters())
        frozen = [p for part in {TEACHER, TARGET} & modules.keys() for p in modules[part].parameters()]
        assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)
    for part, state in before.items():
        assert all(torch.equal(value, state[key]) for key, value in modules[part].state_dict().items()), part
    assert set(objective.saved) == modules.keys() - {"net", TEACHER}


def test_the_fake_network_learns_in_every_step_and_the_generator_in_every_fifth(parts):
    objective, _ = make(parts, "dmd", options={})
    assert [[turn.name for turn in turns_at(objective, step)] for step in range(6)] == [
        ["generator", "fake"], *[["fake"]] * 4, ["generator", "fake"]]
    assert HEAD not in objective.networks


def test_the_fake_network_comes_closer_to_the_generator_after_the_generators_steps(parts):
    objective, _ = make(parts, "dmd", options=dict(align=0.9, every=2))
    fake, net = next(objective.networks[FAKE].parameters()), next(objective.model.net.parameters())
    with torch.no_grad():
        before = net.clone()
        net.add_(1.0)
    objective.after_step(2)                                     # the generator took part in the step before, the first
    assert torch.equal(fake, before)
    objective.after_step(3)
    torch.testing.assert_close(fake, before + 0.1)


@pytest.mark.parametrize("name", ALL)
def test_losses_are_those_of_micro_batches_and_of_any_number_of_processes(parts, name):
    objective, batch = make(parts, name)
    for turn in (0, 1):
        whole = losses(objective, batch, turn).detach()
        cut = torch.cat([losses(objective, part, turn).detach() for part in split(batch, 4)])
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)
        latents, tokens = noise(6, 4, 8, 8, seed=9).float()[2:5], parts.tokenize(CAPTIONS)[2:5]
        some = SimpleNamespace(latents=latents, tokens=tokens, weights=None)
        part = objective.to_device(objective.draw(some, generator(Stream.NOISE, 0, 3), 6, slice(2, 5)), torch.device("cpu"))
        torch.testing.assert_close(losses(objective, part, turn).detach(), whole[2:5], rtol=1e-4, atol=1e-5)


def test_segment_guidance_is_the_distance_of_the_direct_way_to_that_by_way_of_the_teacher(parts):
    objective, batch = exactly(parts, "dmd", Exact(OTHER), steps=2, segment=1.0)
    start, k = noise(6, 1, 1, 2, seed=8), 0
    x = objective.f(Exact(OTHER), start, objective.at(k, batch), None)
    found = objective.segment_losses(Exact(OTHER), x, start, k, batch, None)
    for i in range(6):
        now, middle, end = (on_line(value) for value in (1 - 2**-20, 1 - float(batch.own["between"][i]) / 2, 0.5 * (1 - 2**-20)))
        direct = final(ddim(OTHER, start[i:i + 1], [now, end]))
        halfway = final(ddim(DATA, start[i:i + 1], [now, middle]))
        error = (direct - final(ddim(OTHER, halfway, [middle, end]))).square().mean()
        assert found[i].item() == pytest.approx((error + 0.001**2).sqrt().item() - 0.001, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("net, x, pooled", [
    (DiT(DiTConfig(**DIT)), (2, 4, 4, 4), None),
    (UNet(UNetConfig(widths=(8, 16), depth=1, attention=(True, True), heads=(2, 2), context_dim=32, groups=4)), (2, 4, 4, 4), None),
    (MMDiT(MMDiTConfig(in_channels=16, width=32, layers=4, heads=2, context_dim=32, pooled_dim=32, max_positions=12, sample_size=8)),
     (2, 16, 4, 4), 32)], ids=["dit", "unet", "mmdit"])
def test_the_features_of_a_network_are_those_of_its_middle_for_every_position(net, x, pooled):
    net = randomise(net)
    at, cond = Level(torch.tensor([300.0, 800.0]), *torch.tensor([[0.7, 0.2], [0.3, 0.8]]).view(2, 2, 1, 1, 1)), Cond(
        noise(2, 3, 32).float(), pooled=None if pooled is None else noise(2, pooled).float())
    picture = noise(*x).float().requires_grad_()
    features = features_of(net, picture, at, cond)
    assert features.dim() == 3 and features.shape[0] == 2 and features.shape[2] in (16, 32)
    features.sum().backward()
    assert picture.grad.abs().max() > 0 and not any(block._forward_hooks for block in net.modules())


def test_self_corrected_terms_are_zero_for_the_exact_consistency_function_of_straight_curves(parts):
    """Data that are one point: every curve is straight, and f is that point everywhere."""
    point = mixture([[0.3, -0.7]], 1e-6, [1.0])
    objective, batch = exactly(parts, "self_corrected", Exact(point), truncate=0.0)
    objective.networks = {TEACHER: Exact(point)}
    assert losses(objective, batch).abs().max() < 1e-9
    objective.option = {**objective.option, "truncate": 1.0}                # then the target is the data of the batch
    distance = (batch.x0 - point.mean).square().add(0.01**2).sqrt().sub(0.01).mean((1, 2, 3))
    torch.testing.assert_close(losses(objective, batch), distance, rtol=1e-3, atol=1e-6)


def test_the_adversary_of_scm_has_the_hinge_loss_of_what_the_teacher_sees(parts):
    """With a head that is known, and a student whose guesses are all from the noisiest level."""
    class Known(nn.Module):
        def forward(self, features):
            return 3 * features[:, :, 0].mean(1) + 0.5

    objective, batch = make(parts, "scm", options=dict(gan=0.5, last=1.0))
    plain, _ = make(parts, "scm", options={})
    objective.networks[HEAD] = Known()
    net, teacher = objective.model.net, objective.networks[TEACHER]

    def logits(x0):
        found = []
        for i, t in enumerate(batch.own["judged_t"].tolist()):
            one = lambda value: value[i:i + 1]
            noisy = (1 - t) * one(x0) + t * one(batch.own["judged_eps"])
            at = Level(torch.tensor([1000 * t]), *(torch.full((1, 1, 1, 1), value) for value in (1 - t, t)))
            cond = Cond(one(batch.cond.context), None, None)
            found.append(Known()(features_of(teacher, noisy, at, cond)))
        return torch.cat(found)

    guessed = batch.eps - net(batch.eps, torch.full((6,), 1000.0), batch.cond)                  # x0 = x - t u, at t = 1
    real, fake = logits(batch.x0), logits(guessed)
    assert ((real > 1).any() or (fake < -1).any()) and ((real < 1).any() or (fake > -1).any())  # both sides of the hinge
    wanted = (1 - real).clamp(min=0) / 2 + (1 + fake).clamp(min=0) / 2
    torch.testing.assert_close(losses(objective, batch, turn=1), wanted.detach(), rtol=1e-3, atol=1e-4)
    before = losses(plain, batch)
    torch.testing.assert_close(losses(objective, batch) - before, -0.5 * fake, rtol=1e-3, atol=1e-3)
    assert plain.networks.keys() == {TEACHER} and len(plain.turns) == 1 and batch.own is not None


def test_the_adversary_of_scm_judges_at_log_normal_levels_and_guesses_from_noise_as_often_as_it_is_told(parts):
    objective, batch = make(parts, "scm", options=dict(gan=0.5, last=0.25))
    own = objective.further(torch.Generator().manual_seed(0), torch.Size((20_000, 4, 1, 2)))
    ratio = (own["judged_t"].double() / (1 - own["judged_t"].double())).log()
    assert ratio.mean().item() == pytest.approx(-0.6, abs=0.03) and ratio.std().item() == pytest.approx(1.0, abs=0.03)
    seen, real = [], objective.f
    objective.f = lambda net, x, at, cond: seen.append(at.t) or real(net, x, at, cond)
    batch = batch._replace(own={**batch.own, "last": torch.tensor([0.0, 0.24, 0.26, 0.5, 0.9, 0.1])})
    objective.guessed({"net": objective.model.net}, batch, objective.cond(batch))
    noisiest = (seen[0] - 1000).abs() < 1e-2
    assert noisiest.tolist() == [True, True, False, False, False, True]
    torch.testing.assert_close(seen[0][~noisiest], 1000 * batch.t[~noisiest])


@pytest.mark.parametrize("words, said", [
    (dict(objective="scm", objective_options=dict(gan=0.5, distil=False)), "judges by the features of a teacher"),
    (dict(objective="scm", objective_options=dict(gan=-0.5)), "gan of at least 0"),
    (dict(objective="dmd", finetune="lora", rank=4), "trains a second whole network"),
    (dict(objective="dmd", objective_options=dict(align=1.5)), "0 <= align <= 1"),
    (dict(objective="self_corrected", process="cosine", prediction="v"), "make it one with --objective diff2flow"),
    (dict(objective="self_corrected", objective_options=dict(window=0.0)), "use 0 < window <= 1"),
])
def test_what_cannot_work_is_refused_with_the_fix(words, said):
    config = make_config(**dict(finetune="whole", model="m") | words)
    with pytest.raises(ValueError, match=said):
        OBJECTIVES[config.objective.name].check(config)
