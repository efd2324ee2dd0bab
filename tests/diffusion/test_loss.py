import math

import pytest
import torch

from tinyldm.diffusion.loss import T_SAMPLERS, WEIGHTS, diffusion_loss, make_weight, sample_losses, sample_t
from tinyldm.diffusion.prediction import PREDICTIONS
from tinyldm.diffusion.process import PROCESSES, Level, log_snr, make_process

B = 5
GENERATOR = torch.Generator().manual_seed(0)
X0, EPS = torch.randn(2, B, 3, 4, 4, generator=GENERATOR)
T = torch.tensor([0.0005, 0.0505, 0.2505, 0.5005, 0.9995])  # middles of bins: no index hangs on rounding
COND = torch.linspace(-1, 1, B)


def net(x, t, cond):
    return 0.3 * x + t.view(-1, 1, 1, 1) / 1000 + cond.view(-1, 1, 1, 1)


def by_hand(name, kind, weigh):
    """One sample at a time, in float64, from the formulas of the papers."""
    losses, weights = [], []
    for x0, eps, t, cond in zip(X0.double(), EPS.double(), T.tolist(), COND.double()):
        if name == "flow":
            alpha, sigma, told = 1 - t, t, 1000 * t
        else:
            told = math.floor(1000 * t)
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            alpha_bar = math.prod((1 - betas[: told + 1]).tolist())
            alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x_t = alpha * x0 + sigma * eps
        target = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[kind]
        losses.append(((0.3 * x_t + told / 1000 + cond - target) ** 2).mean().item())
        weights.append(weigh(alpha**2 / sigma**2))
    return torch.tensor(losses), torch.tensor(weights)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", ["scaled_linear", "flow"])
def test_the_loss_is_the_formula(name, kind):
    losses, _ = by_hand(name, kind, lambda snr: 1.0)
    process = make_process(name)
    found = sample_losses(net, X0, EPS, T, COND, process, prediction=kind)
    assert found.shape == (B,) and found.dtype == torch.float32
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
    total = diffusion_loss(net, X0, EPS, T, COND, process, prediction=kind, weight=make_weight("none", kind))
    torch.testing.assert_close(total, losses.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind, formula",
    [
        ("eps", lambda snr: min(snr, 5) / snr),
        ("v", lambda snr: min(snr, 5) / (snr + 1)),
        ("x0", lambda snr: min(snr, 5)),
    ],
)
def test_min_snr_is_the_formula_and_every_weight_meets_its_own_sample(kind, formula):
    losses, weights = by_hand("scaled_linear", kind, formula)
    assert len(set(weights.tolist())) >= 3
    weight = make_weight("min_snr", kind)
    found = diffusion_loss(net, X0, EPS, T, COND, make_process("scaled_linear"), prediction=kind, weight=weight)
    torch.testing.assert_close(found, (weights * losses).mean(), rtol=1e-4, atol=1e-6)


def test_min_snr_weighs_the_same_x0_error_alike_for_every_prediction():
    """The same wrong guess about x0, said as eps, v or x0, costs the same."""
    process = make_process("linear")
    level = process(T)
    guess = X0 + 0.1 * torch.randn(X0.shape, generator=GENERATOR)
    x_t = level.alpha * X0 + level.sigma * EPS
    eps = (x_t - level.alpha * guess) / level.sigma
    says = {"eps": eps, "x0": guess, "v": level.alpha * eps - level.sigma * guess}

    def cost(kind):
        weight = make_weight("min_snr", kind)
        return diffusion_loss(lambda *_: says[kind], X0, EPS, T, None, process, prediction=kind, weight=weight)

    costs = [cost(kind) for kind in says]
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(costs[1], costs[2], rtol=1e-3, atol=0)


def test_min_snr_is_finite_at_both_ends_of_the_curve():
    ends = Level(torch.zeros(2), *torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(2, 2, 1, 1, 1))  # pure noise, clean data
    wanted = {"eps": [1, 0], "v": [0, 0], "x0": [0, 5]}
    for kind, values in wanted.items():
        assert make_weight("min_snr", kind)(ends).flatten().tolist() == values


def test_gamma_is_heard():
    level = make_process("linear")(T)
    assert make_weight("min_snr", "x0", gamma=1.0)(level).max() == 1
    assert make_weight("min_snr", "x0", gamma=20.0)(level).max() == 20
    assert log_snr(level).max() > math.log(20)


def test_min_snr_refuses_flow_with_the_reason():
    with pytest.raises(ValueError, match="use weight 'none' with times 'logit_normal'"):
        make_weight("min_snr", "flow")
    assert make_weight("none", "flow") is WEIGHTS["none"]


def test_micro_batches_add_up_to_the_batch():
    process = make_process("cosine")
    whole = sample_losses(net, X0, EPS, T, COND, process, prediction="v")
    cuts = (slice(0, 2), slice(2, 5))
    parts = [sample_losses(net, X0[s], EPS[s], T[s], COND[s], process, prediction="v") for s in cuts]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=0)


def test_a_half_precision_network_has_a_float32_loss():
    def half(x, t, cond):
        return net(x, t, cond).bfloat16()

    process = make_process("scaled_linear")
    found = sample_losses(half, X0, EPS, T, COND, process, prediction="eps")
    now = process(T)
    out = half(now.alpha * X0 + now.sigma * EPS, now.t, COND).float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (out - EPS).square().mean((1, 2, 3)), rtol=1e-6, atol=0)


def test_gradients_reach_the_network_only():
    scale = torch.ones(1, requires_grad=True)
    weight = make_weight("min_snr", "v")
    loss = diffusion_loss(
        lambda x, t, cond: scale * x, X0, EPS, T, None, make_process("linear"), prediction="v", weight=weight
    )
    loss.backward()
    assert loss.shape == () and scale.grad.abs() > 0


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", PROCESSES)
def test_a_network_that_knows_the_image_has_no_loss(name, kind):
    process, x0 = make_process(name), X0.double()
    now = process(T.double())

    def exact(x, t, cond):
        return PREDICTIONS[kind].target(x0, (x - now.alpha * x0) / now.sigma, now)

    losses = sample_losses(exact, x0, EPS.double(), T.double(), None, process, prediction=kind)
    assert losses.max() < 1e-20


@pytest.mark.parametrize("kind", T_SAMPLERS)
def test_times_are_inside_reproducible_and_float32(kind):
    t = sample_t(kind, 50_000, torch.Generator().manual_seed(3))
    again = sample_t(kind, 50_000, torch.Generator().manual_seed(3))
    assert torch.equal(t, again) and t.shape == (50_000,) and t.dtype == torch.float32
    assert t.min() >= 0 and t.max() < 1


def test_uniform_times_are_uniform():
    t = sample_t("uniform", 100_000, torch.Generator().manual_seed(0))
    assert torch.histc(t, 20, 0, 1).sub(5000).abs().max() < 350  # five standard deviations


def test_logit_normal_times_have_that_mean_and_scale():
    t = sample_t("logit_normal", 100_000, torch.Generator().manual_seed(0), mean=0.5, scale=1.3).double()
    logit = torch.log(t / (1 - t))
    assert logit.mean().item() == pytest.approx(0.5, abs=0.02) and logit.std().item() == pytest.approx(1.3, rel=0.01)


def test_unknown_names_name_the_nearest():
    with pytest.raises(ValueError, match="unknown loss weight 'minsnr': did you mean 'min_snr'"):
        make_weight("minsnr", "v")
    with pytest.raises(ValueError, match="did you mean 'logit_normal'"):
        sample_t("logitnormal", 4)
    with pytest.raises(ValueError, match="did you mean 'eps'"):
        make_weight("none", "epsilon")
