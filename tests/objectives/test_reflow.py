"""Reflow and Diff2Flow on data of which the curve is known: couplings, velocities and end points are the exact ones."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PROMPT, load_script, log_without_timing, pictures, randomise, small_text, train_here, weights
from mixtures import Mixture
from safetensors.torch import load_file
from small_models import drawn, unet_model
from torch import nn

from tinyldm.config import make_config
from tinyldm.data.loader import Batch
from tinyldm.diffusion.as_flow import as_flow, nearest
from tinyldm.diffusion.guidance import denoiser
from tinyldm.diffusion.noise import initial_noise, make_generators
from tinyldm.diffusion.prediction import to_output
from tinyldm.diffusion.process import AsFlow, Discrete, Level, make_process
from tinyldm.diffusion.samplers import euler, final
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_loaded
from tinyldm.model import Model, told_too
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.objectives import OBJECTIVES
from tinyldm.objectives.diff2flow import flow_model
from tinyldm.objectives.reflow import Reflow
from tinyldm.objectives.teacher import TEACHER, derivative
from tinyldm.text.encoders import TextEncoder, TextEncoders
from tinyldm.vendor_loaders.scheduler import to_config, why_not_public

FLOW, SCHEDULER = make_process("flow"), to_config("flow", {}, "flow", "ddim")
MODES = Mixture(torch.tensor([[-1.2, -0.6], [1.0, 0.5]], dtype=torch.float64).view(2, 1, 1, 2), torch.tensor([0.3, 0.3]).double(),
                torch.tensor([0.6, 0.4]).double())


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_line(t):
    return Level(1000 * t, 1 - t, t)


# ---------------------------------------------------------------- a flow made of another process


class Exact(nn.Module):
    """The mixture's denoiser as a network on any curve, which reads the level from the time that it is told."""

    def __init__(self, curve, kind):
        super().__init__()
        self.curve, self.kind, self.asked = curve, kind, []

    def forward(self, x, t, cond=None):
        self.asked.append(t)
        answers = []
        for one, time in zip(x, t.double()):
            if isinstance(self.curve, Discrete):            # between two entries: as far between them in sigma / (alpha + sigma)
                straight = self.curve.sigma / (self.curve.alpha + self.curve.sigma)
                i = min(int(time), len(straight) - 2)
                s = torch.lerp(straight[i], straight[i + 1], time - i)
                alpha, sigma = (value / math.hypot(1 - s, s) for value in (1 - s, s))
                level = Level(0.0, alpha.item(), sigma.item())
            else:
                level = Level(*(value.item() for value in self.curve((time / 1000).view(1))))
            one = one[None] * max(1.0, math.hypot(level.alpha, level.sigma) if level.alpha == 1 else 1.0)
            answers.append(to_output(self.kind, one, MODES(one, level), level))
        return torch.cat(answers)


CURVES = [("scaled_linear", {}), ("linear", {"zero_snr": True}), ("cosine", {}), ("vp", {}), ("ve", {}), ("edm", {})]


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("name, options", CURVES, ids=[f"{name}{len(options)}" for name, options in CURVES])
def test_the_velocity_of_a_diffusion_is_the_flows_in_closed_form(name, options, kind):
    if kind == "eps" and options:
        return                                              # at pure noise eps says nothing about x0
    process = AsFlow(of=name, options=options, prediction=kind)
    net = as_flow(Exact(process.curve, kind), process)
    t = torch.tensor([0.04, 0.2, 0.5, 0.7, 0.9]).double()
    x = (1 - t.view(-1, 1, 1, 1)) * MODES.sample(5) + t.view(-1, 1, 1, 1) * noise(5, 1, 1, 2)
    found = net(x, 1000 * t, None)
    wanted = torch.cat([(one[None] - MODES(one[None], on_line(float(time)))) / float(time) for one, time in zip(x, t)])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert as_flow(net, process) is net and torch.equal(net(x, 1000 * t, None), found)           # not changed twice


def test_the_flow_of_a_diffusion_ends_where_the_exact_curve_does_and_beyond_the_table_takes_the_ends_guess():
    process = AsFlow(of="scaled_linear", prediction="v")
    net = as_flow(Exact(process.curve, "v"), process)
    start, s = Level(900.0, 0.1, 0.9), 0.9                  # inside the table, whose last s is 0.936
    x = noise(6, 1, 1, 2)
    levels = [on_line(s * (1 - i / 200)) for i in range(201)]
    ends = final(euler(denoiser(net, None, "flow"), x, levels))
    torch.testing.assert_close(ends, MODES.carry(x, start, Level(0.0, 1.0, 0.0)), rtol=0, atol=0.01)
    last = Level(999.0, *(value[-1].item() for value in (process.curve.alpha, process.curve.sigma)))
    found = denoiser(net, None, "flow")(x, on_line(1.0))
    torch.testing.assert_close(found, MODES((last.alpha + last.sigma) * x, last), rtol=1e-6, atol=1e-6)
    assert net.asked[-1].eq(999).all()
    clean = net(x, torch.zeros(6), None)                    # at s = 0 the network is asked at its first entry
    assert clean.isfinite().all() and net.asked[-1].eq(0).all()


@pytest.mark.parametrize("name", ["scaled_linear", "vp", "edm"])
def test_the_level_that_the_network_is_told_has_a_derivative_by_time(name):
    curve, s, h = make_process(name), torch.tensor([0.2, 0.55, 0.9]).double(), 1e-6
    for i in range(3):
        value = lambda s: nearest(curve, s)[1][i].flatten()
        found = derivative(value, (s,), (torch.ones_like(s),))[1]
        torch.testing.assert_close(found, (value(s + h) - value(s - h)) / (2 * h), rtol=1e-4, atol=1e-5)
    level = nearest(curve, s)[1]
    torch.testing.assert_close((level.sigma / level.alpha).flatten(), s / (1 - s), rtol=1e-9, atol=0)


def test_a_model_becomes_a_flow_is_saved_as_one_and_draws_the_same_after(tmp_path):
    model = unet_model()                                    # v on Stable Diffusion's table
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    flow = flow_model(model)
    assert flow.prediction == "flow" and isinstance(flow.process, AsFlow) and flow_model(flow) is flow
    assert flow.net.state_dict().keys() == before.keys() and all(torch.equal(before[k], v) for k, v in flow.net.state_dict().items())
    x, t = noise(2, 4, 8, 8).float(), torch.tensor([300.0, 900.0])
    answer = lambda net, **told: net(x, t, Cond(noise(2, 3, 32).float(), extra=told))
    for other in (copy.deepcopy(flow.net), told_too(flow.net, ("elapsed",))):               # a target; a student of mean flow
        told = {"elapsed": torch.zeros(2)} if other.config.told else {}
        torch.testing.assert_close(answer(other, **told), answer(flow.net))
    save_loaded(tmp_path / "flow", flow)
    again = load_model(tmp_path / "flow")
    assert (again.process.of, again.process.prediction, again.prediction) == ("scaled_linear", "v", "flow")
    assert again.defaults["sampler"] == "euler" and np.array_equal(drawn(flow), drawn(again))
    assert not np.array_equal(drawn(flow), drawn(unet_model()))
    assert "the continuous process 'as_flow'" in why_not_public("as_flow", {}, "flow")
    with pytest.raises(ValueError, match="of=flow is the line"):
        make_process("as_flow", of="flow")


# ---------------------------------------------------------------- pairs


@pytest.fixture(scope="module")
def parts():
    tokenizer, config = small_text()
    text = TextEncoders([TextEncoder(randomise(CLIPText(config)).requires_grad_(False), tokenizer)])
    return DiTConfig(in_channels=1, out_channels=1, patch=1, width=32, layers=1, heads=2, mlp_width=32, context_dim=32, time_dim=16), text


def make(parts, **options) -> Reflow:
    net = lambda seed: randomise(DiT(parts[0]), seed)
    config = make_config(objective="reflow", objective_options=options, finetune="whole", model="m", dtype="fp32", network="dit",
                         batch_size=4, dit=vars(parts[0]))
    Reflow.check(config)
    model = lambda net: Model(net, None, parts[1], FLOW, "flow", SCHEDULER, {"cfg": 1.0, "sampler": "euler", "steps": 30})
    return Reflow(config, model(net(1).requires_grad_(True)), ("net",), model(net(2)))


def prepare(objective, folder, rank=0, size=1, stop=None):
    """Draw pairs as process `rank` of `size` does; stop: a signal comes before this file."""
    captions = [PROMPT, "blue", "a red square", ""]

    def batch(position):
        shape = torch.zeros(4, 1, 1, 2)
        return Batch(np.arange(4), shape, objective.model.text.tokenize(captions[position % 4:] + captions[:position % 4]))

    def check():
        if stop is not None and (folder / f"pairs-{objective.side}" / f"{stop:06d}.safetensors").exists():
            raise KeyboardInterrupt

    folder.mkdir(exist_ok=True)
    world = SimpleNamespace(rank=rank, size=size, barrier=lambda: None)
    objective.prepare(SimpleNamespace(folder=folder, world=world, device=torch.device("cpu"), check=check), lambda: batch)


def exact(objective):
    """The same, whose teacher is the mixture's exact flow."""
    objective.networks[TEACHER] = lambda x, t, cond: to_output("flow", x, MODES(x.double(), on_line(float(t[0]) / 1000)).float(),
                                                              on_line(float(t[0]) / 1000))
    return objective


def test_pairs_are_the_exact_coupling_and_a_batch_is_made_of_them(parts, tmp_path):
    objective = exact(make(parts, pairs=8, steps=100))
    prepare(objective, tmp_path)
    eps = initial_noise((1, 1, 2), make_generators(range(8)))
    wanted = MODES.carry(eps.double(), on_line(1.0), Level(0.0, 1.0, 0.0))
    stored = objective.pairs.read(range(8))
    found = stored["x0"].double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.03)                   # 100 Euler steps; the error halves with twice as many
    samples = Batch(np.arange(4), torch.zeros(4, 1, 1, 2), objective.model.text.tokenize(["blue"] * 4))
    batch = objective.draw(samples, torch.Generator().manual_seed(0), 4, slice(None))
    numbers = [next(i for i in range(8) if torch.equal(eps[i], one)) for one in batch.eps]
    assert torch.equal(batch.x0, stored["x0"][numbers]) and torch.equal(batch.tokens, stored["tokens"][numbers])
    some = samples._replace(latents=samples.latents[1:3], tokens=samples.tokens[1:3])
    part = objective.draw(some, torch.Generator().manual_seed(0), 4, slice(1, 3))
    assert torch.equal(part.x0, batch.x0[1:3]) and torch.equal(part.eps, batch.eps[1:3]) and torch.equal(part.t, batch.t[1:3])


def test_pairs_that_are_drawn_in_parts_or_by_several_processes_are_those_drawn_at_once(parts, tmp_path):
    files = lambda name: {file.name: file.read_bytes() for file in (tmp_path / name).rglob("*.safetensors")}
    prepare(make(parts, pairs=11, steps=3, scale=2.0), tmp_path / "once")
    with pytest.raises(KeyboardInterrupt):
        prepare(make(parts, pairs=11, steps=3, scale=2.0), tmp_path / "parts", stop=0)
    assert files("parts").keys() == {"000000.safetensors"}
    prepare(make(parts, pairs=11, steps=3, scale=2.0), tmp_path / "parts")
    for rank in (0, 1):                                     # in one folder, they look for missing files before any is drawn
        prepare(make(parts, pairs=11, steps=3, scale=2.0), tmp_path / f"rank{rank}", rank, 2)
    assert len(files("once")) == 3 and files("once") == files("parts") == files("rank0") | files("rank1")
    assert [*sorted(files("rank0"))] == ["000000.safetensors", "000002.safetensors"]
    prepare(make(parts, pairs=11, steps=3), tmp_path / "unguided")
    assert files("unguided").keys() == files("once").keys() and files("unguided") != files("once")


def test_the_loss_is_that_of_flows_on_pairs_and_only_the_student_learns(parts, tmp_path):
    for distil in (False, True):
        objective = make(parts, pairs=4, steps=2, distil=distil)
        prepare(objective, tmp_path / str(distil))
        samples = Batch(np.arange(4), torch.zeros(4, 1, 1, 2), objective.model.text.tokenize(["blue"] * 4))
        batch = objective.to_device(objective.draw(samples, torch.Generator().manual_seed(0), 4, slice(None)), torch.device("cpu"))
        assert batch.t.eq(1).all() if distil else batch.t.max() < 1
        losses = objective.losses(objective.turns[0], {"net": objective.model.net}, batch, 0.0)
        t = batch.t.view(-1, 1, 1, 1)
        answer = objective.model.net((1 - t) * batch.x0 + t * batch.eps, 1000 * batch.t, batch.cond)
        torch.testing.assert_close(losses, (answer - (batch.eps - batch.x0)).square().mean((1, 2, 3)))
        losses.sum().backward()
        assert all(p.grad is not None for p in objective.model.net.parameters())
        assert all(p.grad is None and not p.requires_grad for p in objective.networks[TEACHER].parameters())


def test_reflow_and_diff2flow_say_what_they_need():
    for words, said in [(dict(objective="reflow", process="cosine", prediction="v"), "make it one with --objective diff2flow"),
                        (dict(objective="reflow", objective_options=dict(pairs=0)), "at least one pair"),
                        (dict(objective="reflow", finetune="", model=""), "--teacher"),
                        (dict(objective="diff2flow", finetune="lora", rank=4), "adapters can be trained beside the flow")]:
        config = make_config(**dict(finetune="whole", model="m") | words)
        with pytest.raises(ValueError, match=said):
            OBJECTIVES[config.objective.name].check(config)


# ---------------------------------------------------------------- slow proofs


def field(width=64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))


def velocity(net):
    return lambda x, t: net(torch.cat([x, t], 1))


def fit(net, pairs, steps=1500, seed=0):
    """The flow loss of a small network on pairs (eps, x0) [n, 2]."""
    random, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        i, t = torch.randint(len(pairs[0]), (512,), generator=random), torch.rand(512, 1, generator=random)
        eps, x0 = pairs[0][i], pairs[1][i]
        loss = (velocity(net)((1 - t) * x0 + t * eps, t) - (eps - x0)).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    return net


@torch.no_grad()
def carried(u, eps, steps=64):
    """(where Euler's method leads, the straightness integral of arXiv:2209.03003, Eq. 7)."""
    x, slopes = eps, []
    for i in range(steps):
        slopes.append(u(x, torch.full((len(x), 1), 1 - i / steps)))
        x = x - slopes[-1] / steps
    return x, torch.stack([(slope - (eps - x)).square().sum(1).mean() for slope in slopes]).mean().item()


@pytest.mark.slow
def test_reflow_straightens_curves_and_one_step_comes_closer_to_many():
    """The exact flow of the mixture is the teacher; a small network learns its pairs."""
    u = lambda x, t: ((x - MODES(x.double().view(-1, 1, 1, 2), on_line(float(t[0]))).view(-1, 2).float()) / t)
    eps = noise(8192, 2, seed=5).float()
    x0, bent = carried(u, eps)
    wanted = MODES.carry(eps.double().view(-1, 1, 1, 2), on_line(1.0), Level(0.0, 1.0, 0.0)).view(-1, 2).float()
    assert (x0 - wanted).square().mean() < 1e-3                             # the coupling is the exact one
    student = velocity(fit(field(), (eps, x0)))
    test = noise(2000, 2, seed=6).float()
    ends, straight = carried(student, test)
    exact_ends = MODES.carry(test.double().view(-1, 1, 1, 2), on_line(1.0), Level(0.0, 1.0, 0.0)).view(-1, 2).float()
    error = lambda x: (x - exact_ends).square().mean().item()
    one, teachers = error(carried(student, test, 1)[0]), error(carried(u, test, 1)[0])
    print(f"straightness {bent:.4f} -> {straight:.4f}, one step {teachers:.4f} -> {one:.4f}, 64 steps {error(ends):.4f}")
    assert straight < bent / 5 and one < teachers / 5 and error(ends) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reflow", "diff2flow", "self_corrected", "dmd"])
def test_n_steps_and_n_more_are_two_n_steps_with_pairs_and_all_further_networks(kind, tmp_path, monkeypatch):
    model = unet_model()
    if kind != "diff2flow":
        model = Model(model.net, model.vae, model.text, FLOW, "flow", SCHEDULER, model.defaults)
    save_loaded(tmp_path / "teacher", Model(model.net, model.vae, model.text, model.process, model.prediction, model.scheduler,
                                            model.defaults | {"sampler": "ddim"}))
    data, script = pictures(tmp_path / "mine", 4, (16, 16)), load_script("train")
    options = {"reflow": ["pairs=10", "steps=2"], "dmd": ["every=2", "steps=2", "gan=0.01", "align=0.9", "segment=0.5"],
               "self_corrected": ["gan=0.1", "width=16"], "diff2flow": []}[kind]

    def train(name, *more, stop_after=None):
        words = ["--objective", kind, "--teacher", str(tmp_path / "teacher"), "--data", str(data), "--out", str(tmp_path / name),
                 *"--batch-size 4 --max-steps 4 --save-every 2 --sample-every 2 --log-every 1 --keep-last 9 --dtype fp32 --lr 0.01".split(),
                 *(["--objective-options", *options] if options else []), *more]
        train_here(script, words, monkeypatch, stop_after)
        return tmp_path / name

    whole, run = train("whole"), train("parts", stop_after=2)
    drawn_before = {file: file.stat().st_mtime_ns for file in run.glob("pairs-*/*")}
    train("parts", "--resume", "yes")
    found, other = (weights(folder / "checkpoints") for folder in (whole, run))
    assert found.keys() == other.keys() and all((found[name] == other[name]).all() for name in found)
    assert log_without_timing(whole) == log_without_timing(run)
    assert drawn_before == {file: file.stat().st_mtime_ns for file in run.glob("pairs-*/*")} and len(drawn_before) == 3 * (kind == "reflow")
    last = max((whole / "checkpoints").iterdir())
    if kind in ("dmd", "self_corrected"):
        names = {name.split(".")[0] for name in load_file(last / "objective.safetensors")}
        assert names == {"dmd": {"fake", "head"}, "self_corrected": {"target", "discriminator"}}[kind]
    trained = load_model(last / "model")
    assert trained.prediction == "flow" and isinstance(trained.process, AsFlow) == (kind == "diff2flow")
    assert drawn(trained).shape == (2, 16, 16, 3)
