import math

import pytest
import torch

from tinyldm.diffusion.loss import (
    LOSSES,
    T_SAMPLERS,
    WEIGHTS,
    diffusion_loss,
    make_noise,
    make_weight,
    sample_losses,
    sample_t,
    uniform_weight,
)
from tinyldm.diffusion.prediction import PREDICTIONS, to_target
from tinyldm.diffusion.process import PROCESSES, Level, input_scale, log_snr, make_process

B = 5
GENERATOR = torch.Generator().manual_seed(0)
X0, EPS = torch.randn(2, B, 3, 4, 4, generator=GENERATOR)
T = torch.tensor([0.0005, 0.0505, 0.2505, 0.5005, 0.9995])  # middles of bins, so that rounding changes no index
COND = torch.linspace(-1, 1, B)


def net(x, t, cond):
    return 0.3 * x + t.view(-1, 1, 1, 1) / 1000 + cond.view(-1, 1, 1, 1)


def by_hand(name, kind, weigh):
    """One sample at a time, in float64, from the formulas of the papers."""
    losses, weights = [], []
    for x0, eps, t, cond in zip(X0.double(), EPS.double(), T.tolist(), COND.double()):
        if name == "flow":
            alpha, sigma, time = 1 - t, t, 1000 * t
        else:
            time = math.floor(1000 * t)
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            alpha_bar = math.prod((1 - betas[: time + 1]).tolist())
            alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x_t = alpha * x0 + sigma * eps
        target = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[kind]
        losses.append(((0.3 * x_t + time / 1000 + cond - target) ** 2).mean().item())
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
    """The same wrong guess of x0 costs the same, whether the network predicts eps, v or x0."""
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
        assert make_weight("min_snr", kind)(ends).flatten().tolist() == pytest.approx(values, abs=1e-12)


def test_gamma_is_heard():
    level = make_process("linear")(T)
    assert make_weight("min_snr", "x0", gamma=1.0)(level).max().item() == pytest.approx(1)
    assert make_weight("min_snr", "x0", gamma=20.0)(level).max().item() == pytest.approx(20)
    assert log_snr(level).max() > math.log(20)


def test_min_snr_refuses_flow_with_the_reason():
    with pytest.raises(ValueError, match="use weight 'none' with times 'logit_normal'"):
        make_weight("min_snr", "flow")
    assert make_weight("none", "flow") is uniform_weight


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
        return to_target(kind, x0, (x * input_scale(now) - now.alpha * x0) / now.sigma, now)

    losses = sample_losses(exact, x0, EPS.double(), T.double(), None, process, prediction=kind)
    assert losses.max() < 1e-20


@pytest.mark.parametrize("kind", T_SAMPLERS)
def test_times_are_inside_reproducible_and_float32(kind):
    for stratified in (False, True):
        t, again = (sample_t(kind, 50_000, torch.Generator().manual_seed(3), process=make_process("edm"), stratified=stratified)
                    for _ in range(2))
        assert torch.equal(t, again) and t.shape == (50_000,) and t.dtype == torch.float32
        assert t.min() >= 0 and t.max() < 1


def test_uniform_times_are_uniform():
    t = sample_t("uniform", 100_000, torch.Generator().manual_seed(0))
    assert torch.histc(t, 20, 0, 1).sub(5000).abs().max() < 350  # five standard deviations


def test_logit_normal_times_have_that_mean_and_scale():
    t = sample_t("logit_normal", 100_000, torch.Generator().manual_seed(0), mean=0.5, scale=1.3).double()
    logit = torch.log(t / (1 - t))
    assert logit.mean().item() == pytest.approx(0.5, abs=0.02) and logit.std().item() == pytest.approx(1.3, rel=0.01)


def test_eps_prediction_on_ve_at_times_of_a_ladder_is_ncsn():
    """arXiv:1907.05600, Eqs. 5 and 6, with lambda = sigma^2 and the score -eps / sigma: half of the sum over pixels, where ours is the mean."""
    times = sample_t("ladder", 1000, torch.Generator().manual_seed(0), scale=10).unique().double()
    sigmas = torch.logspace(-2, 0, 10, dtype=torch.float64)
    ve = make_process("ve", sigma_min=0.01, sigma_max=1.0)
    torch.testing.assert_close(ve(times).sigma.flatten(), sigmas, rtol=1e-6, atol=0)
    t = torch.linspace(0, 1, 10, dtype=torch.float64)
    x0, eps = (torch.randn(10, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2))
    scale = sigmas.view(-1, 1, 1, 1)
    score = lambda x, t: torch.tanh(x * 1.3) - t.view(-1, 1, 1, 1) / 500
    noisy = x0 + scale * eps
    theirs = sigmas**2 / 2 * (score(noisy, 1000 * t) + (noisy - x0) / scale**2).square().sum((1, 2, 3))
    net = lambda x, t, cond: -scale * score(x * input_scale(ve(t / 1000)), t)
    ours = sample_losses(net, x0, eps, t, None, ve, prediction="eps")
    torch.testing.assert_close(x0[0].numel() / 2 * ours, theirs, rtol=1e-12, atol=1e-12)


def test_unknown_names_name_the_nearest():
    with pytest.raises(ValueError, match="unknown loss weight 'minsnr': did you mean 'min_snr'"):
        make_weight("minsnr", "v")
    with pytest.raises(ValueError, match="did you mean 'logit_normal'"):
        sample_t("logitnormal", 4)
    with pytest.raises(ValueError, match="did you mean 'eps'"):
        make_weight("none", "epsilon")


# ---- weights: against the papers' formulas in float64, and diffusers' training code

PAPERS = {  # the quantity whose squared error is weighed, and its weight as a function of SNR
    "min_snr": ("x0", lambda snr: min(snr, 5)),  # arXiv:2303.09556, Section 3.4
    "soft_min_snr": ("x0", lambda snr: 5 * snr / (snr + 5)),  # arXiv:2401.11605
    "p2": ("eps", lambda snr: 1 / (1 + snr)),  # arXiv:2204.00227, with k = gamma = 1
    "edm": ("x0", lambda snr: (1 / snr + 1) / (1 / snr)),  # arXiv:2206.00364, Table 1: (sigma^2 + 1) / sigma^2
}
# SNR -> the squared error in this quantity, relative to the squared error in x0.
X0_ERROR = {"x0": lambda snr: 1.0, "eps": lambda snr: snr, "v": lambda snr: snr + 1}


@pytest.mark.parametrize("kind", X0_ERROR)
@pytest.mark.parametrize("name", PAPERS)
def test_weights_are_the_formulas_of_the_papers_in_every_prediction(name, kind):
    measured_in, formula = PAPERS[name]
    times = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.99 + 0.005
    for process in (make_process("scaled_linear"), make_process("cosine"), make_process("vp"), make_process("edm")):
        level = process(times)
        snr = ((level.alpha / level.sigma) ** 2).flatten()
        wanted = [formula(s) * X0_ERROR[measured_in](s) / X0_ERROR[kind](s) for s in snr.tolist()]
        found = make_weight(name, kind)(level).flatten()
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("curve", ["linear", "vp", "ve", "edm"])
def test_the_same_x0_error_costs_the_same_in_every_prediction(curve, name):
    process = make_process(curve)
    t = T.double()
    level = process(t)
    x0 = X0.double()
    x_t = level.alpha * x0 + level.sigma * EPS.double()
    guess = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    costs = []
    for kind in X0_ERROR:
        says = to_target(kind, guess, (x_t - level.alpha * guess) / level.sigma, level)
        costs.append(sample_losses(lambda *_: says, x0, EPS.double(), t, None, process, prediction=kind,
                                   weight=make_weight(name, kind)))
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-7, atol=0)
    torch.testing.assert_close(costs[0], costs[2], rtol=1e-7, atol=0)


def test_gammas_are_heard_in_every_weight_and_p2s_is_an_exponent():
    level = make_process("scaled_linear")(T.double())
    snr = (level.alpha / level.sigma) ** 2
    torch.testing.assert_close(make_weight("p2", "eps", 0.5)(level), (1 + snr) ** -0.5)
    torch.testing.assert_close(make_weight("soft_min_snr", "x0", 4.0)(level), 4 * snr / (snr + 4))
    torch.testing.assert_close(make_weight("min_snr", "v", 7.0)(level), snr.clamp(max=7) / (snr + 1))


@pytest.mark.parametrize("prediction, divide", [("epsilon", lambda snr: snr), ("v_prediction", lambda snr: snr + 1)])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_min_snr_is_that_of_diffusers_training_scripts_on_random_inputs(prediction, divide, zero_snr):
    """examples/text_to_image: compute_snr, then min(snr, gamma) / snr or / (snr + 1)."""
    diffusers, utils = pytest.importorskip("diffusers"), pytest.importorskip("diffusers.training_utils")
    if zero_snr and prediction == "epsilon":
        pytest.skip("0 / 0 there, 1 here; and such a pair is refused")
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                        rescale_betas_zero_snr=zero_snr)
    index = torch.randint(0, 999, (64,), generator=torch.Generator().manual_seed(0))
    x0, eps, out = torch.randn(3, 64, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    target = eps if prediction == "epsilon" else scheduler.get_velocity(x0, eps, index)
    snr = utils.compute_snr(scheduler, index)
    weights = torch.stack([snr, 5 * torch.ones_like(snr)], 1).min(1)[0] / divide(snr)
    theirs = ((out - target).square().mean((1, 2, 3)) * weights).mean()
    kind = {"epsilon": "eps", "v_prediction": "v"}[prediction]
    seen = []

    def says(x, t, cond):
        seen.append((x, t))
        return out

    ours = diffusion_loss(says, x0, eps, (index + 0.5) / 1000, None, make_process("scaled_linear", zero_snr=zero_snr),
                          prediction=kind, weight=make_weight("min_snr", kind))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(seen[0][0], scheduler.add_noise(x0, eps, index), rtol=1e-4, atol=2e-6)
    assert torch.equal(seen[0][1], index.float())


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "none"])
def test_weights_are_finite_at_both_ends_of_the_curve_or_refused(name):
    for curve, options in [("cosine", {}), ("linear", {"zero_snr": True}), ("vp", {}), ("edm", {}), ("ve", {})]:
        process = make_process(curve, **options)
        for kind in X0_ERROR:
            try:
                weight = make_weight(name, kind, process=process)
            except ValueError as error:
                assert name == "edm" and "predict 'v'" in str(error) and kind != "v"
                continue
            for dtype in (torch.float32, torch.float64):
                found = weight(process(torch.linspace(0, 1, 50, dtype=dtype)))
                assert found.isfinite().all() and found.min() >= 0 and found.max() < 1e6
    assert make_weight("edm", "x0", process=make_process("edm"))  # the paper's own


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "none"])
def test_snr_weights_are_refused_on_flow_with_the_reason(name):
    with pytest.raises(ValueError, match="use weight 'none' with times 'logit_normal'"):
        make_weight(name, "flow")
    with pytest.raises(ValueError, match="rectified flow chooses its levels"):
        make_weight(name, "v", process=make_process("flow"))


def test_weights_without_a_bound_are_refused_with_the_reason():
    for curve, kind in [("cosine", "eps"), ("vp", "x0")]:
        with pytest.raises(ValueError, match=f"edm gives an error in {kind} the weight .* predict 'v'"):
            make_weight("edm", kind, process=make_process(curve))


# ---- losses and noise


def test_losses_are_the_formulas_and_huber_lies_between():
    error = torch.linspace(-3, 3, 601, dtype=torch.float64)
    assert torch.equal(LOSSES["mse"](error, 0.1), error**2) and torch.equal(LOSSES["l1"](error, 0.1), error.abs())
    for c in (0.01, 0.1, 1.0):
        torch.testing.assert_close(LOSSES["huber"](error, c), 2 * c * ((error**2 + c**2).sqrt() - c), rtol=1e-9, atol=1e-14)
    small, large = torch.tensor([1e-6], dtype=torch.float64), torch.tensor([1e6], dtype=torch.float64)
    torch.testing.assert_close(LOSSES["huber"](small, 0.1), small**2, rtol=1e-9, atol=0)
    torch.testing.assert_close(LOSSES["huber"](large, 0.1), 0.2 * large, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss, theirs", [
    ("mse", torch.nn.functional.mse_loss), ("l1", torch.nn.functional.l1_loss),
    ("huber", lambda a, b: (2 * 0.1 * (((a - b) ** 2 + 0.1**2).sqrt() - 0.1)).mean())])  # diffusers' --loss_type huber
def test_losses_are_those_of_published_trainers(loss, theirs):
    process = make_process("linear")
    now = process(T)
    out = net(now.alpha * X0 + now.sigma * EPS, now.t, COND)
    found = diffusion_loss(net, X0, EPS, T, COND, process, prediction="eps", weight=uniform_weight, loss=loss)
    torch.testing.assert_close(found, theirs(out, EPS), rtol=1e-5, atol=0)


def test_unknown_losses_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'huber'"):
        sample_losses(net, X0, EPS, T, COND, make_process("linear"), prediction="eps", loss="hubber")


def test_offset_noise_and_perturbation_are_those_of_diffusers_training_scripts():
    """examples/text_to_image: noise += offset * randn(b, c, 1, 1); new_noise = noise + perturbation * randn_like(noise)."""
    ours = make_noise((5, 3, 4, 4), torch.Generator().manual_seed(0), offset=0.1, perturbation=0.2)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 3, 4, 4, generator=generator)
    noise = noise + 0.1 * torch.randn((5, 3, 1, 1), generator=generator)
    assert torch.equal(ours.eps, noise)
    assert torch.equal(ours.mixed, noise + 0.2 * torch.randn(5, 3, 4, 4, generator=generator))
    plain, generator = make_noise((5, 3, 4, 4), torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0)
    assert torch.equal(plain.eps, torch.randn(5, 3, 4, 4, generator=generator)) and plain.mixed is plain.eps


def test_offset_noise_has_its_variance_in_the_mean_of_a_channel():
    eps = make_noise((4000, 2, 8, 8), torch.Generator().manual_seed(0), offset=0.3).eps
    assert eps.mean((2, 3)).var().item() == pytest.approx(1 / 64 + 0.3**2, rel=0.05)
    assert eps.var().item() == pytest.approx(1 + 0.3**2, rel=0.01)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_perturbed_input_keeps_the_target_of_the_original_noise(kind):
    """arXiv:2301.11706, Alg. 1: || eps - net(alpha x0 + sigma (eps + gamma xi), t) ||^2."""
    noise = make_noise(X0.shape, torch.Generator().manual_seed(4), perturbation=0.3)
    process = make_process("scaled_linear")
    now = process(T)
    error = net(now.alpha * X0 + now.sigma * noise.mixed, now.t, COND) - to_target(kind, X0, noise.eps, now)
    wanted = error.square().mean((1, 2, 3))
    found = sample_losses(net, X0, noise.eps, T, COND, process, prediction=kind, mixed=noise.mixed)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert not torch.allclose(found, sample_losses(net, X0, noise.eps, T, COND, process, prediction=kind), rtol=1e-2)


# ---- learned variance


def bound_by_hand(betas, index, x0, x_t, guess, fraction):
    """One sample in float64 from Gaussians: Bayes' rule for the posterior, torch.distributions for the divergence."""
    from torch.distributions import Normal, kl_divergence

    def posterior(clean, i):  # N(x_{t-1}; sqrt(a') x0, 1 - a') N(x_t; sqrt(1 - beta) x_{t-1}, beta), precisions add up
        before = math.prod((1 - betas[:i]).tolist())
        beta = betas[i].item()
        precision = 1 / (1 - before) + (1 - beta) / beta
        mean = (math.sqrt(before) / (1 - before) * clean + math.sqrt(1 - beta) / beta * x_t) / precision
        return mean, 1 / precision

    log_beta = math.log(betas[index])
    log_small = math.log(posterior(x0, max(index, 1))[1])  # at the first index that of the second, as in the published code
    std = (fraction * log_beta + (1 - fraction) * log_small).mul(0.5).exp()
    if index == 0:  # the mean is x0 itself: p(x0 | x_1), a density where the paper has 256 bins
        nats = -Normal(guess, std).log_prob(x0)
    else:
        (mean, variance), (guessed, _) = posterior(x0, index), posterior(guess, index)
        nats = kl_divergence(Normal(mean, math.sqrt(variance)), Normal(guessed, std))
    return nats.mean().item() / math.log(2)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("curve", ["linear", "scaled_linear", "cosine", "zero"])
def test_the_hybrid_loss_is_simple_plus_a_thousandth_of_the_variational_bound(curve, kind):
    if curve == "zero" and kind == "eps":
        return
    process = make_process("linear", zero_snr=True) if curve == "zero" else make_process(curve)
    alpha_bar = process.alpha**2
    betas = 1 - alpha_bar / torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    index = torch.tensor([0, 1, 2, 300, 998 if curve == "zero" else 999])
    t = (index.double() + 0.5) / 1000
    x0, eps, generator = X0.double(), EPS.double(), torch.Generator().manual_seed(5)
    variance = torch.randn(X0.shape, dtype=torch.float64, generator=generator)
    now = process(t)
    x_t = now.alpha * x0 + now.sigma * eps
    target = to_target(kind, x0, eps, now)
    out = target + 0.01 * torch.sin(torch.arange(x0.numel())).view_as(x0)
    found = sample_losses(lambda *_: torch.cat([out, variance], 1), x0, eps, t, None, process, prediction=kind)
    guess = PREDICTIONS[kind].x0(x_t, out, now)
    bound = [bound_by_hand(betas, i, *rest) for i, *rest in zip(index.tolist(), x0, x_t, guess, (variance + 1) / 2)]
    wanted = (out - target).square().mean((1, 2, 3)) + 0.001 * 1000 * torch.tensor(bound)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_the_learned_variance_is_diffusers_learned_range():
    """The bound is smallest at the right variance. With a wrong mean that is a known variance, and DDPMScheduler, given the
    raw output at which the bound is smallest, returns the same one."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    process, index = make_process("linear"), 400
    now = process(torch.tensor([0.4005], dtype=torch.float64))
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    out = zero + 1.3  # eps is 0, so the mean is wrong by a known amount
    raw = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=100, tolerance_grad=1e-14, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        net, t = lambda *_: torch.cat([out, raw.view(1, 1, 1, 1)], 1), torch.tensor([0.4005]).double()
        loss = 1e6 * diffusion_loss(net, zero, zero, t, None, process, prediction="eps", weight=uniform_weight)
        loss.backward()  # 1e6, because LBFGS does not move where gradients are tiny
        return loss

    optimizer.step(closure)
    alpha_bar, before = (process.alpha[index] ** 2).item(), (process.alpha[index - 1] ** 2).item()
    beta = 1 - alpha_bar / before
    small = (1 - before) / (1 - alpha_bar) * beta
    off = math.sqrt(before) * beta / (1 - alpha_bar) * now.sigma.item() / now.alpha.item() * 1.3  # the error of the mean (Eq. 11)
    best = math.log(small + off**2)
    assert scheduler._get_variance(index, predicted_variance=raw.detach()).item() == pytest.approx(best, rel=1e-4)


def test_the_bound_trains_the_variance_and_never_the_mean():
    out, variance = (torch.zeros_like(X0).requires_grad_() for _ in range(2))
    loss = lambda net: diffusion_loss(net, X0, EPS, T, None, make_process("cosine"), prediction="v", weight=uniform_weight)
    with_bound = torch.autograd.grad(loss(lambda *_: torch.cat([out, variance], 1)), (out, variance))
    alone = torch.autograd.grad(loss(lambda *_: out), out)
    torch.testing.assert_close(with_bound[0], alone[0], rtol=1e-6, atol=0)
    assert with_bound[1].abs().sum() > 0


@pytest.mark.parametrize("curve, options", [
    ("linear", {}), ("scaled_linear", {}), ("cosine", {}), ("betas", {}), ("cosine", {"zero_snr": True})])
def test_the_bound_is_finite_in_float32_at_every_index(curve, options):
    process = make_process(curve, **options)
    x0, eps, variance = torch.randn(3, 1000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    t = (torch.arange(1000) + 0.5) / 1000
    out = torch.cat([torch.zeros_like(x0), variance.clamp(-1, 1)], 1).requires_grad_()
    losses = sample_losses(lambda *_: out, x0, eps, t, None, process, prediction="v")
    losses.mean().backward()
    assert losses.isfinite().all() and out.grad.isfinite().all()


@pytest.mark.parametrize("curve", ["flow", "vp", "ve", "edm"])
def test_learned_variance_is_refused_where_there_is_no_table(curve):
    with pytest.raises(ValueError, match="use scaled_linear, linear, cosine or betas"):
        sample_losses(lambda *_: torch.cat([X0, X0], 1), X0, EPS, T, None, make_process(curve), prediction="v")


# ---- the whole


@pytest.mark.parametrize("curve, kind, options", [
    ("cosine", "v", {"loss": "huber"}), ("linear", "eps", {"loss": "l1", "weight": make_weight("p2", "eps")}),
    ("edm", "v", {"weight": make_weight("edm", "v")}), ("flow", "flow", {}), ("betas", "x0", {"learned": True}),
    ("scaled_linear", "v", {"learned": True, "weight": make_weight("soft_min_snr", "v")})])
def test_a_batch_costs_the_mean_of_its_slices_and_nothing_is_changed(curve, kind, options):
    learned, process = options.pop("learned", False), make_process(curve)
    answer = (lambda x, t, cond: torch.cat([net(x, t, cond), torch.tanh(x)], 1)) if learned else net
    noise = make_noise(X0.shape, torch.Generator().manual_seed(0), 0.1, 0.1)
    inputs = (X0, noise.eps, T, COND)
    before = [value.clone() for value in (*inputs, noise.mixed)]
    whole = diffusion_loss(answer, *inputs, process, prediction=kind, mixed=noise.mixed, **options)
    parts = [diffusion_loss(answer, *(value[i : i + 1] for value in inputs), process, prediction=kind,
                            mixed=noise.mixed[i : i + 1], **options) for i in range(B)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, noise.mixed)))
    assert whole.dtype == torch.float32 and whole.isfinite()


# ---- times: against their exact distributions

N = 20_000


def exact_cdfs():
    import numpy as np
    from scipy import integrate, optimize, stats

    def mode(s):  # arXiv:2403.03206, Eq. 20: t = 1 - u - s (cos^2(pi u / 2) - 1 + u), falling in u
        f = lambda u: 1 - u - s * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
        return np.vectorize(lambda x: 1 - optimize.brentq(lambda u: f(u) - x, 0, 1))

    density = lambda x: 2 / (math.pi - 2 * math.pi * x + 2 * math.pi * x * x)  # Eq. 21 and the line after it
    edm, vp = make_process("edm"), make_process("vp")

    def ratio(process, t):
        level = process(torch.as_tensor(t, dtype=torch.float64))
        return (level.sigma / level.alpha).flatten().numpy()

    return [
        ("uniform", {}, lambda t: t),
        ("normal", {}, stats.truncnorm(-2.5, 2.5, 0.5, 0.2).cdf),
        ("normal", {"mean": 0.7, "scale": 0.5}, stats.truncnorm(-1.4, 0.6, 0.7, 0.5).cdf),
        ("logit_normal", {"mean": 0.5, "scale": 1.3}, lambda t: stats.norm.cdf((np.log(t / (1 - t)) - 0.5) / 1.3)),
        ("mode", {}, mode(1.29)),
        ("mode", {"scale": -0.7}, mode(-0.7)),
        ("cosmap", {}, np.vectorize(lambda x: integrate.quad(density, 0, x)[0])),
        ("u_shaped", {}, lambda t: (np.sinh(4 * t - 2) + np.sinh(2)) / (2 * np.sinh(2))),        # the integral of exp(4 t) + exp(4 (1 - t))
        ("log_normal", {"process": edm}, lambda t: stats.norm.cdf((np.log(ratio(edm, t)) + 1.2) / 1.2)),
        ("log_normal", {"process": vp, "mean": 0.0, "scale": 1.0}, lambda t: stats.norm.cdf(np.log(ratio(vp, t)))),
    ]


@pytest.mark.parametrize("case", range(10))
def test_times_have_the_distribution_they_are_named_for(case):
    """Kolmogorov-Smirnov at n = 20000: at 1.95 / sqrt(n) = 0.0138 chance fails once in a thousand; the seed is fixed."""
    from scipy import stats

    kind, options, cdf = exact_cdfs()[case]
    t = sample_t(kind, N, torch.Generator().manual_seed(case), **options).double()
    assert stats.kstest(t.numpy(), cdf).statistic < 1.95 / math.sqrt(N)
    t = sample_t(kind, 512, torch.Generator().manual_seed(case), **options, stratified=True).double()
    place = torch.as_tensor(cdf(t.numpy())) * 512
    assert ((place - torch.arange(512) - 0.5).abs() < 0.5 + 0.01).all()  # one in every 512th, in order


def test_sd3s_times_are_those_of_diffusers():
    from scipy import stats

    utils = pytest.importorskip("diffusers.training_utils")
    theirs = utils.compute_density_for_timestep_sampling("logit_normal", 64, 0.3, 1.2, generator=torch.Generator().manual_seed(0))
    ours = sample_t("logit_normal", 64, torch.Generator().manual_seed(0), 0.3, 1.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    theirs = utils.compute_density_for_timestep_sampling("mode", N, mode_scale=1.29, generator=torch.Generator().manual_seed(0))
    ours = sample_t("mode", N, torch.Generator().manual_seed(1))
    assert stats.ks_2samp(ours.numpy(), theirs.numpy()).statistic < 1.95 * math.sqrt(2 / N)


def test_times_drawn_so_far_stay_what_they_were():
    """Committed results depend on these numbers."""
    t = sample_t("logit_normal", 8, torch.Generator().manual_seed(3), 0.0, 1.0)
    assert torch.equal(t, torch.sigmoid(torch.randn(8, generator=torch.Generator().manual_seed(3))))
    t = sample_t("uniform", 8, torch.Generator().manual_seed(3))
    assert torch.equal(t, torch.rand(8, generator=torch.Generator().manual_seed(3)))


def test_stratified_times_vary_less():
    def std_of_means(stratified):
        batches = [sample_t("logit_normal", 32, torch.Generator().manual_seed(i), stratified=stratified) for i in range(200)]
        return torch.stack([t.mean() for t in batches]).std().item()

    assert std_of_means(True) < std_of_means(False) / 8
