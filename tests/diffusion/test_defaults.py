"""What is done where nothing is said: the documented default of every option of samplers, schedules, processes, guidance, losses and
times. Tests against published implementations pass their options explicitly, so a changed default would not be seen there."""

import inspect
import math

import pytest
import torch

from tinyldm.diffusion import guidance
from tinyldm.diffusion.grids import SCHEDULES, grid
from tinyldm.diffusion.loss import LOSSES, T_SAMPLERS, WEIGHTS, make_noise, make_weight, sample_losses, sample_t, uniform_weight
from tinyldm.diffusion.noise import make_generators, slerp
from tinyldm.diffusion.ode import invert
from tinyldm.diffusion.process import PROCESSES, Level, make_process
from tinyldm.diffusion.samplers import SAMPLERS, ddpm
from tinyldm.diffusion.step import straight

EXPECTED = {
    "sampler ddim": dict(eta=0.0),
    "sampler heun": dict(scale=straight, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0),
    "sampler lms": dict(scale=straight),
    "sampler pndm": dict(along="eps"),
    "sampler dpmpp_2m": dict(eta=0.0, lower_order_final=None, solver_type="midpoint"),
    "sampler dpmpp_2m_sde": dict(eta=1.0),
    "sampler dpmpp_sde": dict(eta=1.0, s_noise=1.0),
    "sampler unipc": dict(lower_order_final=True, solver_type="bh2", disable_corrector=()),
    "sampler adaptive": dict(rtol=0.01, atol=0.01),
    "sampler annealed_langevin": dict(corrections=10, size=0.2),
    "sampler predictor_corrector": dict(predictor=ddpm, corrections=1, snr=0.16),
    "invert": dict(repeats=3),
    "grid": dict(schedule="normal", strength=1.0, drop_last=False, set_alpha_to_one=True, alpha_floor=0.0),
    "schedule leading": dict(offset=0),
    "schedule skipping": dict(original=50),
    "schedule linspace": dict(rounding=round),
    "schedule linspace_unrounded": dict(rounding=float),
    "schedule karras": dict(rho=7.0, shape=1.0, sigma_min=None, sigma_max=None, ends=None, offset=0, rounded=False),
    "schedule exponential": dict(rho=math.inf, shape=1.0, sigma_min=None, sigma_max=None, ends=None, offset=0, rounded=False),
    "schedule log_snr": dict(rho=math.inf, shape=1.0, sigma_min=None, sigma_max=None, ends=None, offset=0, rounded=False),
    "schedule beta": dict(rho=1.0, shape=0.6, sigma_min=None, sigma_max=None, ends=None, offset=0, rounded=False),
    "schedule flow_match": dict(twice=True),
    "schedule flow_sigmas": dict(from_noise=False),
    "process scaled_linear": dict(beta_start=0.00085, beta_end=0.012, steps=1000, zero_snr=False),     # Stable Diffusion's
    "process linear": dict(beta_start=1e-4, beta_end=0.02, steps=1000, zero_snr=False),                 # DDPM's
    "process cosine": dict(offset=0.008, max_beta=0.999, steps=1000, zero_snr=False),
    "process betas": dict(betas=None, zero_snr=False),
    "process vp": dict(beta_min=0.1, beta_max=20.0),
    "process ve": dict(sigma_min=0.01, sigma_max=50.0),
    "process edm": dict(sigma_min=0.002, sigma_max=80.0),
    "process flow": dict(shift=1.0),
    "process dynamic_flow": dict(base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096, exponential=True),   # FLUX.1 dev's
    "process as_flow": dict(shift=1.0, of="scaled_linear", options=None, prediction="eps"),
    "cfg": dict(rescale=0.0, prediction="x0", mix=None),
    "dynamic_threshold": dict(quantile=0.995, bound=1.0),
    "classifier_guidance": dict(scale=1.0),
    "slerp": dict(dim=-1),
    "sample_losses": dict(weight=uniform_weight, loss="mse", huber_c=0.1, mixed=None),
    "make_noise": dict(offset=0.0, perturbation=0.0),
    "make_weight": dict(gamma=None, process=None),
    "weight min_snr": dict(g=5.0),
    "weight soft_min_snr": dict(g=5.0),
    "weight p2": dict(g=1.0),
    "weight edm": dict(g=1.0),
    "sample_t": dict(generator=None, mean=None, scale=None, process=None, stratified=False),
    "times uniform": dict(mean=0.0, scale=1.0),                 # which the kinds that have none ignore
    "times normal": dict(mean=0.5, scale=0.2),
    "times logit_normal": dict(mean=0.0, scale=1.0),
    "times mode": dict(mean=0.0, scale=1.29),
    "times cosmap": dict(mean=0.0, scale=1.0),
    "times u_shaped": dict(mean=0.0, scale=4.0),                # arXiv:2405.20320
    "times log_normal": dict(mean=-1.2, scale=1.2),
    "times ladder": dict(mean=0.0, scale=10.0),
}
TABLES = {"sampler": SAMPLERS, "schedule": SCHEDULES, "process": PROCESSES, "weight": WEIGHTS, "times": T_SAMPLERS}
FUNCTIONS = [invert, grid, guidance.cfg, guidance.dynamic_threshold, guidance.classifier_guidance, slerp, sample_losses, make_noise,
             make_weight, sample_t]


def defaults(function) -> dict:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty and each.name != "generators"}


def test_every_option_has_the_default_that_is_written_down_here():
    functions = {f"{kind} {name}": function for kind, table in TABLES.items() for name, function in table.items() if function}
    functions |= {function.__name__: function for function in FUNCTIONS}
    assert {name: found for name, function in functions.items() if (found := defaults(function))} == EXPECTED


def draw(sampler: str, schedule: str = "trailing", **options) -> torch.Tensor:
    """A sample of a denoiser that is not linear."""
    process = make_process("scaled_linear")
    denoise = lambda x, level: torch.tanh(level.alpha * x)
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).view(1, 1, 4, 4)
    *_, (x, _) = SAMPLERS[sampler](denoise, x, grid(process, 20, schedule), generators=make_generators([3]), **options)
    return x


@pytest.mark.parametrize("sampler, options, others", [
    ("ddim", dict(eta=0.0), dict(eta=0.5)), ("heun", dict(s_churn=0.0), dict(s_churn=10.0)), ("dpmpp_2m", dict(eta=0.0), dict(eta=0.5)),
    ("dpmpp_2m_sde", dict(eta=1.0), dict(eta=0.5)), ("dpmpp_sde", dict(eta=1.0), dict(eta=0.5)),
    ("dpmpp_sde", dict(s_noise=1.0), dict(s_noise=1.1)), ("pndm", dict(along="eps"), dict(along="v")),
    ("adaptive", dict(rtol=0.01, atol=0.01), dict(rtol=0.1, atol=0.1)),
    ("edm", dict(s_churn=40.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003), dict(s_noise=1.0))])
def test_what_a_sampler_does_by_default_is_what_it_does_with_that_default(sampler, options, others):
    assert torch.equal(draw(sampler), draw(sampler, **options)) and not torch.equal(draw(sampler), draw(sampler, **others))


def test_levels_of_default_grids_are_these():
    """By hand, from arXiv:2305.08891, Table 2, and arXiv:2206.00364, Eq. 5 with rho = 7."""
    table, flow = make_process("scaled_linear"), make_process("flow")
    assert [level.t for level in grid(table, 5)] == [999, 799, 599, 399, 199, 0] and grid(table, 5)[-1] == Level(0.0, 1.0, 0.0)
    assert [level.t for level in grid(table, 5, "leading")] == [800, 600, 400, 200, 0, 0]
    assert [level.sigma for level in grid(flow, 4)] == [1, 0.75, 0.5, 0.25, 0]
    ratios = [level.sigma / level.alpha for level in grid(table, 3, "karras")]
    high, low = 14.6146, 0.02917                                # the published ends of Stable Diffusion's table
    middle = ((high ** (1 / 7) + low ** (1 / 7)) / 2) ** 7
    assert ratios == pytest.approx([high, middle, low, 0], rel=1e-4)


def test_default_losses_weights_and_times_are_these():
    x0, eps = torch.full((2, 1, 2, 2), 0.5), torch.ones(2, 1, 2, 2)
    net = lambda x, t, cond: torch.zeros_like(x)
    t, flow = torch.tensor([0.25, 0.75]), make_process("flow")
    assert sample_losses(net, x0, eps, t, None, flow, prediction="flow").tolist() == [0.25, 0.25]       # (eps - x0)^2, mean
    assert LOSSES["huber"](torch.tensor(0.3), 0.1).item() == pytest.approx(0.2 * (0.1**0.5 - 0.1))
    level = Level(0.0, torch.tensor(0.96), torch.tensor(0.28))  # SNR = 11.755
    snr = (0.96 / 0.28) ** 2
    for name, weight in (("min_snr", 5.0), ("soft_min_snr", 1 / (1 / snr + 1 / 5)), ("edm", 1 + snr)):
        assert make_weight(name, "x0")(level).item() == pytest.approx(weight, rel=1e-5), name
    assert make_weight("p2", "eps")(level).item() == pytest.approx(1 / (1 + snr), rel=1e-5)
    for kind, median in dict(uniform=0.5, normal=0.5, logit_normal=0.5, cosmap=0.5, mode=0.5, u_shaped=0.5).items():
        assert sample_t(kind, 20_001, torch.Generator().manual_seed(0)).median().item() == pytest.approx(median, abs=0.01), kind
    edm = make_process("edm")
    sigma = edm(sample_t("log_normal", 20_001, torch.Generator().manual_seed(0), process=edm)).sigma.log()
    assert (sigma.mean().item(), sigma.std().item()) == pytest.approx((-1.2, 1.2), abs=0.03)
