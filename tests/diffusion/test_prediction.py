import pytest
import torch

from tinyldm.diffusion.prediction import PREDICTIONS, to_target, to_x0
from tinyldm.diffusion.process import PROCESSES, Level, input_scale, make_process


def draw(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, n, 2, 3, 3, generator=generator, dtype=dtype)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", PROCESSES)
def test_x0_comes_back_from_every_target_at_every_level(name, kind):
    times = torch.linspace(0, 1, 201, dtype=torch.float64)  # both ends of flow included
    if name.endswith("flow") and kind == "eps":
        times = times[:-1]  # alpha = 0 is refused, see below
    level = make_process(name)(times)
    x0, eps = draw(len(times))
    x = level.alpha * x0 + level.sigma * eps
    found = to_x0(kind, x, to_target(kind, x0, eps, level), level)
    torch.testing.assert_close(found, x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name, options", [(name, {}) for name in PROCESSES] + [
    ("cosine", {"zero_snr": True}), ("flow", {"shift": 5.0})])
def test_x0_comes_back_at_random_levels_and_at_both_ends_and_nothing_is_changed(name, options, kind):
    generator = torch.Generator().manual_seed(2)
    times = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(500, generator=generator)]).double()
    level = make_process(name, **options)(times)
    if kind == "eps":
        level = Level(*(value[level.alpha.flatten() > 0] for value in level))
    x0, eps = (3 * value for value in draw(len(level.t)))
    x = level.alpha * x0 + level.sigma * eps
    target = to_target(kind, x0, eps, level)
    before = [value.clone() for value in (x0, eps, x, target, *level)]
    found = to_x0(kind, x, target, level)
    assert all(torch.equal(a, b) for a, b in zip(before, (x0, eps, x, target, *level)))
    torch.testing.assert_close(found, x0, rtol=1e-9, atol=1e-9)
    single = Level(*(value.float() for value in level))
    assert to_x0(kind, x.float(), target.float(), single).isfinite().all()
    assert to_target(kind, x0.float(), eps.float(), single).isfinite().all()


def test_v_on_ve_is_edms_preconditioning_at_unit_data_variance_to_the_last_digits():
    """D(x) = c_skip x + c_out F(c_in x) of arXiv:2206.00364, Eq. 7 and Table 1 with sigma_data = 1: F = -v, c_in = 1 / scale.
    And the weight c_out^-2 on the error of D is 1 on the error of v."""
    level = make_process("edm")(torch.linspace(0, 1, 400, dtype=torch.float64))
    sigma, (x0, eps) = level.sigma, draw(400)
    x = x0 + sigma * eps
    c_skip, c_out, c_in = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt(), 1 / (sigma**2 + 1).sqrt()

    def v(scaled):  # any network
        return torch.tanh(2 * scaled) - 0.3 * scaled

    torch.testing.assert_close(x / input_scale(level), c_in * x, rtol=1e-14, atol=0)
    theirs = c_skip * x + c_out * -v(c_in * x)
    torch.testing.assert_close(to_x0("v", x, v(x / input_scale(level)), level), theirs, rtol=1e-12, atol=1e-12)
    effective = (x0 - c_skip * x) / c_out  # Eq. 8: the target of F
    torch.testing.assert_close(to_target("v", x0, eps, level), -effective, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_channels_beyond_xs_are_the_variances_and_say_nothing_about_x0(kind):
    x, out = draw(3)
    level = Level(0.0, 0.6, 0.8)
    assert torch.equal(to_x0(kind, x, torch.cat([out, 7 + 0 * out], 1), level), to_x0(kind, x, out, level))


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_one_curve_is_not_assumed_any_alpha_and_sigma_will_do(kind):
    x0, eps = draw(4)
    for alpha, sigma in [(1.0, 80.0), (0.3, 0.3), (2.0, 0.1), (1.0, 0.0)]:  # variance exploding among them
        level = Level(0.0, alpha, sigma)
        found = to_x0(kind, alpha * x0 + sigma * eps, to_target(kind, x0, eps, level), level)
        torch.testing.assert_close(found, x0, rtol=1e-10, atol=1e-10)


def test_targets_are_the_published_ones():
    x0, eps = draw(3)
    level = Level(0.0, 0.6, 0.8)
    assert torch.equal(to_target("eps", x0, eps, level), eps)
    assert torch.equal(to_target("x0", x0, eps, level), x0)
    assert torch.equal(to_target("v", x0, eps, level), 0.6 * eps - 0.8 * x0)
    assert torch.equal(to_target("flow", x0, eps, level), eps - x0)


@pytest.mark.parametrize("kind", ["x0", "v", "flow"])
def test_pure_noise_is_finite_in_float32(kind):
    x, out = draw(2, torch.float32)
    for level in (Level(1000.0, 0.0, 1.0), make_process("flow")(torch.ones(2))):
        assert to_x0(kind, x, out, level).isfinite().all()


def test_eps_at_pure_noise_is_refused_with_the_remedy():
    x, out = draw(2)
    for level in (Level(1000.0, 0.0, 1.0), make_process("flow")(torch.tensor([0.5, 1.0]))):
        with pytest.raises(ValueError, match="train with prediction 'v'"):
            to_x0("eps", x, out, level)


def test_unknown_predictions_name_the_nearest():
    x, out = draw(2)
    with pytest.raises(ValueError, match="did you mean 'eps'"):
        to_x0("epsilon", x, out, Level(0.0, 0.5, 0.5))
    with pytest.raises(ValueError, match="did you mean 'flow'"):
        to_target("floww", x, out, Level(0.0, 0.5, 0.5))
