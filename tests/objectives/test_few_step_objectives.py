"""Few-step objectives as the trainer calls them: their losses, and what gradients, targets and micro-batches do to networks."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gaussian_curves import along, exact_x0, noise
from helpers import PROMPT, randomise, small_text

from tinyldm.config import make_config
from tinyldm.device import autocast
from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.prediction import to_output
from tinyldm.diffusion.process import CLEAN, Level, make_process
from tinyldm.model import Model, told_too
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.objectives import OBJECTIVES, split
from tinyldm.objectives.denoising import DenoisingBatch, map_cond, process_options
from tinyldm.objectives.lcm import LCM
from tinyldm.objectives.teacher import TARGET, TEACHER
from tinyldm.random_streams import Stream, generator
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.vendor_loaders.scheduler import from_config, sampling

# Those with a teacher and one turn; the others have files of their own.
FEW = ("consistency", "lcm", "scm", "mean_flow", "progressive", "guided")
FLOW = make_process("flow")
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


@pytest.mark.parametrize("name, options, times", [
    ("progressive", dict(rounds=(4, 2)), [999, 499]), ("progressive", dict(rounds=(1,)), [999]),
    ("dmd", {}, [999, 749, 499, 249]), ("lcm", dict(levels=10), [999, 799, 499, 299]), ("lcm", {}, [999, 759, 499, 259])])
def test_a_student_of_a_published_table_is_drawn_at_times_that_it_learns(parts, name, options, times):
    """Stable Diffusion 2.1's config, whose own grid is another one."""
    published = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
                 "prediction_type": "v_prediction", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    process, prediction = from_config(published)
    config = make_config(objective=name, objective_options=options, finetune="whole", model="m")
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
    model = OBJECTIVES[name].begins_as(Model(DiT(parts[0]), vae, parts[1], process, prediction, published, {}), config)
    chosen = sampling(model.scheduler, OBJECTIVES[name].usual(config)["sampler"], None)
    levels = grid(model.process, len(times), chosen.schedule, **chosen.grid)
    assert [level.t for level in levels[:-1]] == times and levels[-1].sigma == 0
    assert from_config(model.scheduler)[1] == "v"


def test_a_teacher_that_is_told_its_scale_answers_in_one_call(parts):
    objective, batch = make(parts, "lcm")
    teacher = told_too(objective.networks[TEACHER], ("guidance",))
    torch.nn.init.normal_(teacher.time_in.told["guidance"].weight)
    told = LCM(make_config(objective="lcm", finetune="whole", model="m", network="dit", dit=vars(parts[0]), dtype="fp32"),
               objective.model, ("net",), replace(objective.model, net=teacher))
    asked = []
    teacher.register_forward_pre_hook(lambda module, inputs: asked.append((len(inputs[0]), inputs[2].extra["guidance"])))
    at, x = told.level(batch.t, batch.x0), batch.x0
    answers = [told.teach(x, at, batch, scale) for scale in (torch.full((6, 1, 1, 1), 3.0), 3.0, 5.0)]
    assert torch.equal(answers[0], answers[1]) and not torch.allclose(answers[1], answers[2])
    assert [(count, scale.tolist()) for count, scale in asked] == [(6, [3.0] * 6)] * 2 + [(6, [5.0] * 6)]


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
    seen, objective.scale = [], lambda current: seen.append(current) or 1.0
    losses(objective, batch, 0.05)                                          # the run was made longer
    assert seen and set(seen) == {1}


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
