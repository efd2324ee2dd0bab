"""Few-step objectives on data of which the curve is known: exact answers are their minimum, and nothing reaches what is not trained."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import PROMPT, randomise, small_text
from mixtures import Mixture

from tinyldm.config import make_config
from tinyldm.device import autocast
from tinyldm.diffusion.grids import Levels
from tinyldm.diffusion.prediction import to_output, to_target, to_x0
from tinyldm.diffusion.process import CLEAN, Level, make_process
from tinyldm.diffusion.samplers import ddim as ddim_sampler
from tinyldm.diffusion.samplers import euler, final
from tinyldm.diffusion.samplers import heun as heun_sampler
from tinyldm.diffusion.guidance import denoiser
from tinyldm.model import Model, told_too
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.objectives import OBJECTIVES, split
from tinyldm.objectives.consistency import PAIRS, Consistency
from tinyldm.objectives.denoising import DenoisingBatch, map_cond, process_options
from tinyldm.objectives.lcm import LCM
from tinyldm.objectives.progressive import two_steps
from tinyldm.objectives.scm import tangent
from tinyldm.objectives.teacher import TARGET, TEACHER, both, ddim, derivative, guess, heun, level_at, pseudo_huber
from tinyldm.pipeline import tell_elapsed
from tinyldm.random_streams import Stream, generator
from tinyldm.text.encoders import TextEncoder, TextEncoders

# Those with a teacher and one turn; the others have files of their own.
FEW = ("consistency", "lcm", "scm", "mean_flow", "progressive", "guided")
FLOW, CONTINUOUS = make_process("flow"), {name: make_process(name) for name in ("flow", "vp", "ve")}
KINDS = ("eps", "v", "flow")
MEAN, STD = 0.4, 0.5                # of Gaussian data, whose curves are closed formulas


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def along(x, now, nxt):
    """Where the curve of Gaussian data through x at the level `now` is at `nxt`: standard scores stay."""
    std = lambda at: (at.alpha**2 * STD**2 + at.sigma**2) ** 0.5
    return nxt.alpha * MEAN + (x - now.alpha * MEAN) * std(nxt) / std(now)


def exact_x0(x, at):
    """E[x0 | x] of Gaussian data."""
    return MEAN + at.alpha * STD**2 / (at.alpha**2 * STD**2 + at.sigma**2) * (x - at.alpha * MEAN)


def nonlinear(x, t, cond=None):
    """A network in x's dtype, smooth in x and t."""
    t = t.view(-1, 1, 1, 1) / 500
    return torch.tanh(x.flip(1) * t.cos() + 0.3 * t) + 0.5 * x * t.sin()


# ---------------------------------------------------------------- what they share


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process", ["scaled_linear", "flow", "vp", "ve"])
def test_every_guess_is_x_itself_at_the_end_of_the_curve(process, kind):
    at = level_at(make_process(process), torch.tensor([0.0, -0.1, 0.5], dtype=torch.float64))
    x = noise(3, 2, 2, 2)
    found = guess(nonlinear, kind, x, at, None)
    assert torch.equal(found[:2], x[:2]) and not torch.allclose(found[2], x[2])


@pytest.mark.parametrize("kind", [*KINDS, "x0"])
@pytest.mark.parametrize("process", ["scaled_linear", "flow", "ve"])
def test_x0_and_eps_of_an_answer_are_those_that_it_is_the_target_of(process, kind):
    at, x0, eps = make_process(process)(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)), noise(3, 2, 2, 2), noise(3, 2, 2, 2, seed=1)
    x, out = at.alpha * x0 + at.sigma * eps, to_target(kind, x0, eps, at)
    for found, wanted in zip(both(kind, x, out, at), (x0, eps)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)
    torch.testing.assert_close(both(kind, x, out, at)[0], to_x0(kind, x, out, at), rtol=0, atol=1e-9)


def test_steps_with_levels_of_their_own_are_those_of_the_samplers():
    t, s = torch.tensor([0.9, 0.6, 0.3]).double(), torch.tensor([0.7, 0.0, 0.1]).double()
    x, (now, nxt) = noise(3, 1, 1, 2), (level_at(CONTINUOUS["vp"], each) for each in (t, s))
    denoise = lambda x, at: exact_x0(x, at)
    for ours, sampler in ((heun, heun_sampler), (lambda denoise, x, now, nxt: ddim(x, denoise(x, now), now, nxt), ddim_sampler)):
        found = ours(denoise, x, now, nxt)
        for i in range(3):
            levels = [Level(*(float(value.flatten()[i]) for value in at)) for at in (now, nxt)]
            torch.testing.assert_close(found[i:i + 1], final(sampler(denoise, x[i:i + 1], levels)), rtol=1e-12, atol=1e-12)


def test_pseudo_huber_is_a_root_mean_square_for_large_errors_and_a_parabola_for_small_ones():
    error = torch.tensor([[3.0, 4.0], [3e-4, 4e-4], [0.0, 0.0]]).view(3, 1, 1, 2).requires_grad_()
    rms = error.detach().square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(pseudo_huber(error, 0.0).detach(), rms, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(pseudo_huber(error, 1.0)[1].item(), rms[1].item() ** 2 / 2, rtol=1e-1, atol=1e-7)
    pseudo_huber(error, 0.0).sum().backward()
    assert torch.equal(error.grad[2], torch.zeros(1, 1, 2)) and error.grad.isfinite().all()


@pytest.mark.parametrize("make", [
    lambda told: DiT(DiTConfig(width=32, layers=1, heads=2, mlp_width=32, context_dim=32, time_dim=16, told=told)),
    lambda told: UNet(UNetConfig(widths=(8, 16), depth=1, attention=(True, True), heads=(2, 2), context_dim=32, groups=4, told=told)).to(
        memory_format=torch.channels_last)], ids=["dit", "unet"])
def test_derivatives_pass_through_attention_and_norms_and_leave_no_gradients(make):
    net = randomise(make(("elapsed",)))
    x, t, v = noise(2, 4, 4, 4).float(), torch.tensor([300.0, 700.0]), noise(2, 4, 4, 4, seed=1).float()
    way, one, h = torch.tensor([0.1, 0.3]), torch.ones(2), 0.01
    call = lambda x, t, way: net(x, t, Cond(noise(2, 3, 32).float(), extra={"elapsed": way}))
    value, change = derivative(call, (x, t, way), (v, one, one / 1000))
    wanted = (call(x + h * v, t + h, way + h / 1000) - call(x - h * v, t - h, way - h / 1000)) / (2 * h)
    assert not change.requires_grad and torch.allclose(value, call(x, t, way), atol=1e-5)
    torch.testing.assert_close(change, wanted.detach(), rtol=2e-2, atol=2e-3 * change.abs().max().item())


def test_a_network_that_is_told_a_number_begins_as_it_was():
    net = randomise(DiT(DiTConfig(width=32, layers=1, heads=2, mlp_width=32, context_dim=32, time_dim=16)))
    x, t, told = noise(2, 4, 4, 4).float(), torch.tensor([300.0, 700.0]), told_too(net, ("elapsed",))
    context = noise(2, 3, 32).float()
    extra = {"elapsed": torch.tensor([0.1, 0.3])}
    assert told.config.told == ("elapsed",) and told_too(told, ("elapsed",)) is told
    assert torch.equal(told(x, t, Cond(context, extra=extra)), net(x, t, Cond(context)))
    torch.nn.init.normal_(told.time_in.told["elapsed"].weight)
    assert not torch.allclose(told(x, t, Cond(context, extra=extra)), net(x, t, Cond(context)))
    with pytest.raises(ValueError, match="told a number by the name elapsed, which is missing"):
        told(x, t, Cond(context))
    with pytest.raises(ValueError, match="cannot be told elapsed: use a network that can .unet, dit"):
        told_too(SimpleNamespace(config=SimpleNamespace()), ("elapsed",))


# ---------------------------------------------------------------- exact answers


@pytest.mark.parametrize("process", CONTINUOUS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tangent_is_that_of_finite_differences(process, kind):
    """g = cos(phi) df / dphi along the curve through x whose direction is that of x0, in float64."""
    curve, t, x = CONTINUOUS[process], torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), noise(3, 2, 2, 2)
    now, ends = curve(t), consistent(x, curve(t), noise(3, 2, 2, 2, seed=1))
    cosine = now.alpha / (now.alpha**2 + now.sigma**2).sqrt()
    found = tangent(nonlinear, curve, kind, x, t, None, ends)
    torch.testing.assert_close(found, cosine * directional(curve, kind, x, t, ends, 1e-4), rtol=1e-6, atol=1e-6)


def consistent(x, now, x0):
    """(x0, eps) that imply x."""
    return x0, (x - now.alpha * x0) / now.sigma


def directional(curve, kind, x, t, ends, h):
    """df / dphi along the curve with these ends, by central differences."""
    def at(d):
        level = curve(t + d)
        return guess(nonlinear, kind, level.alpha * ends[0] + level.sigma * ends[1], level, None), torch.atan2(level.sigma, level.alpha)

    (one, phi_one), (two, phi_two) = at(-h), at(h)
    return (two - one) / (phi_two - phi_one)


@pytest.mark.parametrize("process", CONTINUOUS)
def test_the_exact_consistency_function_has_no_tangent(process):
    """Of Gaussian data, with the exact direction; a tenth of the guess has one of that size."""
    curve, t, x = CONTINUOUS[process], torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), noise(3, 1, 1, 2)
    inverse = lambda t: Level(t, *curve(t / 1000)[1:])
    net = lambda x, t, cond: to_output("v", x * scale_of(inverse(t)), along(x * scale_of(inverse(t)), inverse(t), CLEAN), inverse(t))
    now = curve(t)
    ends = consistent(x, now, exact_x0(x, now))
    assert tangent(net, curve, "v", x, t, None, ends).abs().max() < 1e-9
    blurred = lambda x, t, cond: to_output("v", x * scale_of(inverse(t)), exact_x0(x * scale_of(inverse(t)), inverse(t)), inverse(t))
    assert tangent(blurred, curve, "v", x, t, None, ends).abs().max() > 0.01


def scale_of(at):
    return (at.alpha**2 + at.sigma**2).clamp(min=1).sqrt()


def test_one_step_with_the_target_comes_to_where_two_steps_of_the_teacher_come():
    mixture = Mixture(torch.tensor([[-1.5, 0.0], [1.0, 1.0]], dtype=torch.float64).view(2, 1, 1, 2), torch.tensor([0.2, 0.3]).double(),
                      torch.tensor([0.6, 0.4]).double())
    for process in (FLOW, CONTINUOUS["vp"]):
        for end in (0.0, 0.25):
            levels = [Level(*(float(value) for value in level_at(process, torch.tensor([t], dtype=torch.float64))))
                      for t in (0.9, (0.9 + end) / 2, end)]
            x = noise(5, 1, 1, 2)
            as_tensors = [Level(*(torch.tensor(value, dtype=torch.float64).view(1, 1, 1, 1) for value in level)) for level in levels]
            target = two_steps(lambda x, at: mixture(x, Level(*(float(value) for value in at))), x, *as_tensors)
            wanted = final(ddim_sampler(mixture, x, levels))
            one_step = final(ddim_sampler(lambda x, level: target, x, [levels[0], levels[2]]))
            torch.testing.assert_close(one_step, wanted, rtol=1e-10, atol=1e-10)


def test_the_mean_velocity_draws_gaussian_data_exactly_in_one_step_and_in_two():
    def mean_velocity(x, t, cond):
        t = (t.double() / 1000).view(-1, 1, 1, 1)
        r = t - cond.extra["elapsed"].double().view(-1, 1, 1, 1)
        return (x - along(x, Level(0, 1 - t, t), Level(0, 1 - r, r))) / (t - r)

    x, at = noise(4, 1, 1, 2), lambda t: Level(1000 * t, 1 - t, t)
    for times in ([1.0, 0.0], [1.0, 0.4, 0.0]):
        levels = Levels([at(t) for t in times], None)
        net = tell_elapsed(lambda x, t, cond: mean_velocity(x, t, cond), levels)
        drawn = final(euler(denoiser(net, Cond(torch.zeros(4, 1, 1)), "flow"), x, levels))
        torch.testing.assert_close(drawn, along(x, at(1.0), at(0.0)), rtol=1e-6, atol=1e-6)


def test_pairs_of_times_come_closer_in_training_and_lie_on_their_grids():
    rho, option = torch.tensor([0.01, 0.3, 2.0, 40.0], dtype=torch.float64), Consistency.options
    for name in PAIRS:
        gaps = []
        for progress in (0.0, 0.5, 1.0):
            high, low = PAIRS[name](rho, progress, option)
            assert (low >= 0).all() and (low < high).all()
            gaps.append(high - low)
        assert (gaps[0] > gaps[1]).all() and (gaps[1] > gaps[2]).all()
    high, low = PAIRS["ect"](rho, 0.0, option)
    n = 1 + 8 / (1 + rho.exp())                                         # sigmoid(-rho)
    torch.testing.assert_close(low, (rho * (1 - n / 2)).clamp(min=0))
    high, low = PAIRS["ict"](rho, 0.0, option)                         # ten intervals of Karras' grid, 2e-3 to 80
    grid = (torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 11, dtype=torch.float64)) ** 7
    for i in range(4):
        k = int((grid <= rho[i]).sum()) - 1
        assert low[i].item() == pytest.approx(grid[k].item()) and high[i].item() == pytest.approx(grid[k + 1].item())
    assert PAIRS["ict"](rho, 1.0, option)[0].sub(PAIRS["ict"](rho, 1.0, option)[1])[2].item() == pytest.approx(
        7 * 2 ** (6 / 7) * (80 ** (1 / 7) - 0.002 ** (1 / 7)) / 1280, rel=0.01)


# ---------------------------------------------------------------- as objectives


CAPTIONS = [PROMPT, "a small green triangle", "a red square", "", PROMPT, "blue"]
OPTIONS = {"consistency": dict(distil=True, scale=3.0, ema=0.9)}


@pytest.fixture(scope="module")
def parts():
    tokenizer, config = small_text()
    text = TextEncoders([TextEncoder(randomise(CLIPText(config)).requires_grad_(False), tokenizer)])
    return DiTConfig(width=32, layers=1, heads=2, mlp_width=32, context_dim=32, time_dim=16), text


def make(parts, name, seed=0, **settings):
    """(objective, its batch of six on the device): on a flow."""
    kind = OBJECTIVES[name]
    config = make_config(**dict(objective=name, objective_options=OPTIONS.get(name, {}), finetune="whole", model="m", dtype="fp32",
                                network="dit", dit=vars(parts[0])) | settings)
    kind.check(config)
    process = make_process(config.objective.process, **process_options(config.objective))
    model = lambda net: Model(net, None, parts[1], process, config.objective.prediction, {}, {"cfg": 3.0})
    net = told_too(randomise(DiT(parts[0]), 1), kind.tells(config)).requires_grad_(True)
    teacher = [model(randomise(DiT(parts[0]), 2))] if kind.taught(config) else []
    objective = kind(config, model(net), ("net",), *teacher)
    samples = SimpleNamespace(latents=noise(6, 4, 4, 4, seed=9).float(), tokens=parts[1].tokenize(CAPTIONS), weights=None)
    batch = objective.draw(samples, generator(Stream.NOISE, seed, 3), 6, slice(None))
    return objective, objective.to_device(batch, torch.device("cpu"))


def losses(objective, batch, progress=0.6):
    return objective.losses(objective.turns[0], {"net": objective.model.net, **objective.networks}, batch, progress)


@pytest.mark.parametrize("name", FEW)
def test_gradients_reach_the_student_and_neither_teacher_nor_target(parts, name):
    objective, batch = make(parts, name)
    assert {TEACHER} <= objective.networks.keys()
    before = {part: [p.clone() for p in net.parameters()] for part, net in objective.networks.items()}
    found = losses(objective, batch)
    assert found.shape == (6,) and found.dtype == torch.float32 and found.isfinite().all() and (found >= 0).all()
    found.sum().backward()
    for part, net in objective.networks.items():
        assert all(p.grad is None and not p.requires_grad for p in net.parameters()), part
        if name != "progressive":                               # there the student has just become the teacher
            assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before[part])), part
    grads = {name: p.grad for name, p in objective.model.net.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert all(p.grad is None for p in parts[1].modules["text"].parameters())


@pytest.mark.parametrize("name, options", [*((name, OPTIONS.get(name, {})) for name in FEW), ("consistency", {}),
                                           ("mean_flow", dict(distil=False, scale=2.0)), ("scm", dict(distil=False))])
def test_one_call_of_the_student_has_gradients_also_where_it_is_its_own_target(parts, name, options):
    objective, batch = make(parts, name, objective_options=options)
    seen = []
    for part, net in {"net": objective.model.net, **objective.networks}.items():
        net.register_forward_hook(lambda module, inputs, output, part=part: seen.append((part, output.requires_grad)))
    losses(objective, batch)
    assert seen.count(("net", True)) == 1 and len(seen) > 1
    assert {part for part, gradients in seen if gradients} == {"net"}


@pytest.mark.parametrize("name", FEW)
def test_losses_in_bfloat16_are_close_to_those_in_float32(parts, name):
    """Also where the condition is bfloat16: derivatives are computed in float32 all the same."""
    objective, batch = make(parts, name)
    half = lambda cond: map_cond(cond, lambda value: value.bfloat16() if value.is_floating_point() else value)
    with autocast(torch.device("cpu"), "bf16"):
        found = losses(objective, batch._replace(cond=half(batch.cond), empty=half(batch.empty)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, losses(objective, batch), rtol=0.2, atol=0.02)


@pytest.mark.parametrize("name", FEW)
def test_losses_are_those_of_micro_batches_and_of_any_number_of_processes(parts, name):
    objective, batch = make(parts, name)
    whole = losses(objective, batch)
    torch.testing.assert_close(torch.cat([losses(objective, part) for part in split(batch, 4)]), whole, rtol=1e-4, atol=1e-5)
    samples = SimpleNamespace(latents=noise(6, 4, 4, 4, seed=9).float(), tokens=parts[1].tokenize(CAPTIONS), weights=None)
    some = SimpleNamespace(latents=samples.latents[2:5], tokens=samples.tokens[2:5], weights=None)
    part = objective.to_device(objective.draw(some, generator(Stream.NOISE, 0, 3), 6, slice(2, 5)), torch.device("cpu"))
    torch.testing.assert_close(losses(objective, part), whole[2:5], rtol=1e-4, atol=1e-5)


def test_targets_move_towards_the_student_by_their_decay_and_adapters_have_none(parts):
    for name, decay in (("consistency", 0.9), ("lcm", 0.95)):
        objective, _ = make(parts, name)
        target, student = (next(net.parameters()) for net in (objective.networks[TARGET], objective.model.net))
        assert objective.saved == (TARGET,) and torch.equal(target, student)
        with torch.no_grad():
            before = student.clone()
            student.add_(1.0)
        objective.after_step(1)
        torch.testing.assert_close(target, before + (1 - decay))
    assert TARGET not in make(parts, "lcm", finetune="lora", rank=4)[0].networks


@pytest.mark.parametrize("process, prediction", [("scaled_linear", "v"), ("flow", "flow")])
def test_lcm_steps_between_neighbours_of_fifty_levels_and_is_told_its_guidance(parts, process, prediction):
    objective, batch = make(parts, "lcm", process=process, prediction=prediction, objective_options=dict(scale=2.0, scale_to=6.0))
    seen = []
    real, objective.f = objective.f, lambda net, x, at, cond: seen.append((net, at.t.clone(), at.sigma.flatten())) or real(net, x, at, cond)
    losses(objective, batch._replace(t=torch.tensor([0.0, 0.019, 0.02, 0.5, 0.97, 0.99999])))
    (_, twice, _), (_, lower, sigma), (_, upper, _) = seen                  # teacher (both captions), target, student
    wanted = torch.tensor([1, 1, 2, 26, 49, 50]) * 20.0
    if process == "scaled_linear":                                          # diffusers: arange(1, 51) * 20 - 1
        assert upper.tolist() == (wanted - 1).tolist() and lower[2:].tolist() == (wanted - 21)[2:].tolist()
    else:
        torch.testing.assert_close(upper, wanted, rtol=1e-5, atol=0)
    assert torch.equal(twice, torch.cat([upper, upper])) and sigma[:2].tolist() == [0, 0] and (sigma[2:] > 0).all()
    scale = objective.scale(batch)
    assert (2 <= scale).all() and (scale <= 6).all() and scale.std() > 0.3


def test_the_teacher_guides_each_sample_by_its_own_scale(parts):
    objective, batch = make(parts, "lcm")
    at = objective.level(batch.t, batch.x0)
    teach = lambda scale: objective.teach(batch.x0, at, batch, scale)
    plain, zero, scale = teach(1.0), teach(torch.zeros(6, 1, 1, 1)), torch.arange(6.0).view(6, 1, 1, 1)
    torch.testing.assert_close(teach(scale), zero + scale * (plain - zero), rtol=1e-4, atol=1e-5)
    assert torch.allclose(zero[3], plain[3], atol=1e-6) and not torch.allclose(zero[0], plain[0], atol=1e-3)   # its caption is empty


def test_a_student_becomes_the_teacher_of_the_next_round_once(parts):
    objective, batch = make(parts, "progressive")
    teacher, student = objective.networks[TEACHER], objective.model.net
    same = lambda: all(torch.equal(a, b) for a, b in zip(teacher.net.parameters(), student.parameters()))
    losses(objective, batch, 0.24)
    assert not same() and int(teacher.round) == 0
    losses(objective, batch, 0.26)
    assert same() and int(teacher.round) == 1
    with torch.no_grad():
        next(student.parameters()).add_(1)
    losses(objective, batch, 0.49)
    assert not same() and "round" in teacher.state_dict()
    assert objective.scale(0) == 3.0 and objective.scale(1) == 1.0          # later teachers are guided already


@pytest.mark.parametrize("distil, options", [("consistency", dict(distil=True, schedule="ict")), ("mean_flow", {})])
def test_exact_answers_of_gaussian_data_are_the_minimum(parts, distil, options):
    """The loss of the exact function is a thousandth of that of a network that answers with E[x0 | x] or the velocity."""
    objective, batch = make(parts, distil, objective_options=options | (dict(scale=1.0)))
    at = lambda t: Level(t, 1 - t.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1))
    answer = lambda x, now, x0: to_output("flow", x, x0, now)

    def exact(x, t, cond):
        now, way = at(t / 1000), cond.extra.get("elapsed")
        if way is None:
            return answer(x, now._replace(sigma=now.sigma.clamp(min=1e-9)), along(x, now, CLEAN))
        return torch.where((way > 0).view(-1, 1, 1, 1), (x - along(x, now, at(t / 1000 - way))) / way.clamp(min=1e-9).view(-1, 1, 1, 1),
                           answer(x, now, exact_x0(x, now)))

    blurred = lambda x, t, cond: answer(x, at(t / 1000)._replace(sigma=at(t / 1000).sigma.clamp(min=1e-9)), exact_x0(x, at(t / 1000)))
    double = lambda value: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    batch = DenoisingBatch(*map(double, batch))._replace(t=torch.tensor([0.1, 0.3, 0.5, 0.6, 0.8, 0.9]).double())
    found = []
    for net in (exact, blurred):
        objective.networks = {TEACHER: blurred}
        object.__setattr__(objective, "model", SimpleNamespace(**vars(objective.model)))
        objective.model.net = net
        objective.process = lambda x0: FLOW
        found.append(objective.losses(objective.turns[0], {"net": net}, batch, 1.0).mean().item())
    assert found[0] < found[1] / 1000, found


@pytest.mark.parametrize("words, said", [
    (dict(objective="consistency", prediction="x0", process="cosine"), "does not become the picture itself"),
    (dict(objective="lcm", finetune="", model=""), "learns from a model that exists: --teacher"),
    (dict(objective="scm", process="cosine", prediction="v"), "differentiates by time, which a table of levels has not"),
    (dict(objective="mean_flow", process="vp", prediction="v"), "is for the straight line"),
    (dict(objective="progressive", process="linear", prediction="eps"), "begins at pure noise"),
    (dict(objective="progressive", objective_options=dict(rounds=(8, 2))), "half of the one before"),
    (dict(objective="progressive", finetune="lora", rank=4), "makes teachers of students, which an adapter is not"),
    (dict(objective="guided", finetune="lora", rank=4), "for which an adapter has no weights"),
    (dict(objective="guided", objective_options=dict(scale=0.5)), "above 1"),
    (dict(objective="consistency", objective_options=dict(q=1.0)), "use q above 1"),
    (dict(objective="consistency", objective_options=dict(schedule="etc")), "did you mean 'ect'"),
    (dict(objective="lcm", finetune="lora", rank=4, train_text=True), "leave out --train-text"),
    (dict(objective="lcm", fsdp=True), "leave out --fsdp"),
    (dict(objective="scm", finetune="lora", rank=4), "add --dtype fp32"),
    (dict(objective="mean_flow", finetune="", model="", objective_options=dict(distil=False, scale=2.0)), "or name pretrained text encoders"),
])
def test_what_cannot_work_is_refused_with_the_fix(words, said):
    config = make_config(**dict(finetune="whole", model="m") | words)
    with pytest.raises(ValueError, match=said):
        OBJECTIVES[config.objective.name].check(config)
    assert math.isfinite(config.optimisation.lr) and LCM.taught(make_config(objective="lcm"))
