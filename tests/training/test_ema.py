"""The average of the weights: it moves, it is early useful, and applying it is undone; power functions equal their sum."""

import pytest
import torch
from torch import nn

from tinyldm.training.ema import EMA, PowerEMA, coefficients, reconstruct, to_gamma, to_sigma_rel


def test_the_average_follows_the_closed_form():
    module = nn.Linear(1, 1, bias=False)
    ema = EMA({"net": module}, decay=0.9)
    expected = module.weight.item()
    for n in range(1, 200):
        with torch.no_grad():
            module.weight.fill_(n)
        ema.update(n)
        decay = min(0.9, n / (n + 9))
        expected = decay * expected + (1 - decay) * n
    assert abs(ema.state_dict("net")["weight"].item() - expected) < 1e-3
    assert 180 < expected < 199


def test_early_averages_forget_the_initial_weights():
    module = nn.Linear(4, 4)
    ema = EMA({"net": module}, decay=0.9999)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    for n in range(1, 21):
        ema.update(n)
    share_left = ((module.weight - ema.state_dict("net")["weight"]) / (module.weight - start)).mean()
    assert [ema.decay_at(n) for n in (1, 9, 10 ** 6)] == [0.1, 0.5, 0.9999]
    assert share_left < 0.01                                   # a plain average at 0.9999 would keep 99.8 %


def test_applying_swaps_in_the_average_and_out_again():
    module = nn.Linear(3, 3)
    ema = EMA({"net": module}, decay=0.5)
    with torch.no_grad():
        module.weight.add_(1.0)
    raw, averaged = module.weight.detach().clone(), ema.state_dict("net")["weight"].clone()
    with ema.applied():
        assert torch.equal(module.weight, averaged)
    assert torch.equal(module.weight, raw) and torch.equal(ema.state_dict("net")["weight"], averaged)


def test_state_goes_out_and_in_by_part():
    modules = {"net": nn.Linear(2, 2), "text": nn.Linear(2, 2)}
    ema, other = EMA(modules, 0.9), EMA(modules, 0.9)
    with torch.no_grad():
        modules["net"].weight.add_(1.0)
    ema.update(5)
    for part in modules:
        other.load_state_dict(part, ema.state_dict(part))
    assert all(torch.equal(other.shadow[name], tensor) for name, tensor in ema.shadow.items())
    assert set(ema.state_dict("text")) == {"weight", "bias"}


# ---------------------------------------------------------------- power functions


def trajectories(steps: int) -> dict[str, torch.Tensor]:
    """name -> [steps] in float64: polynomials and random walks, away from 0 as weights are."""
    x = torch.linspace(0, 1, steps, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    walks = torch.randn(2, steps, generator=rng, dtype=torch.float64).cumsum(1) / steps ** 0.5
    return {"line": 2 * x - 1, "cubic": 4 * x ** 3 - 3 * x + 0.5, "walk": walks[0], "high walk": walks[1] + 5,
            "still": torch.full_like(x, 3.0)}


def direct(values: torch.Tensor, gamma: float, step: int) -> float:
    """The weighted mean itself, of the weights up to this step."""
    edges = (torch.arange(step + 1, dtype=torch.float64) / step) ** (gamma + 1)
    return ((edges[1:] - edges[:-1]) * values[:step]).sum().item()


def follow(steps: int, every: int = 0, widths=(0.05, 0.10)):
    """A PowerEMA led along the trajectories, and its snapshots as reconstruct takes them."""
    values = trajectories(steps)
    module = nn.ParameterDict({name: nn.Parameter(torch.full((1,), 100.0)) for name in values})
    ema, snapshots = PowerEMA({"net": module}, widths), []
    for n in range(1, steps + 1):
        for name, value in values.items():
            module[name].data.fill_(value[n - 1])
        ema.update(n)
        if every and n % every == 0:
            snapshots += [(n, width, tensors) for width, tensors in ema.snapshot().items()]
    return values, module, ema, snapshots


@pytest.fixture(scope="module")
def followed():
    return follow(1600, every=100)


def worst(result: dict, values: dict, sigma_rel: float, step: int) -> float:
    """Largest error, in units of a trajectory's spread (all of them about 1)."""
    return max(abs(result[f"net.{name}"].item() - direct(value, to_gamma(sigma_rel), step)) for name, value in values.items())


def test_widths_and_exponents_are_inverse_to_each_other():
    for sigma_rel in (0.001, 0.01, 0.05, 0.10, 0.2, 0.288):
        assert to_sigma_rel(to_gamma(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)
    for gamma in (0.01, 1.0, 6.94, 16.97, 300.0):
        assert to_gamma(to_sigma_rel(gamma)) == pytest.approx(gamma, rel=1e-9)
    assert to_gamma(0.05) == pytest.approx(16.97, abs=0.01) and to_gamma(0.10) == pytest.approx(6.94, abs=0.01)


def test_a_width_is_the_standard_deviation_of_the_weighting():
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for sigma_rel in (0.05, 0.25):
        weights = x ** to_gamma(sigma_rel)
        weights /= weights.sum()
        mean = (weights * x).sum()
        assert ((weights * (x - mean) ** 2).sum() ** 0.5).item() == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("wrong", [0.0, -0.1, 0.29, float("nan")])
def test_widths_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="between 0 and 0.288"):
        PowerEMA({"net": nn.Linear(1, 1)}, (wrong,))


def test_power_averages_equal_the_weighted_sum(followed):
    values, _, ema, _ = followed
    for which, sigma_rel in enumerate(ema.sigma_rels):
        averages = {f"net.{name}": tensor for name, tensor in ema.state_dict("net", which).items()}
        assert worst(averages, values, sigma_rel, 1600) < 5e-6                 # of weights up to 6, in float32


def test_the_first_update_forgets_the_initial_weights():
    module = nn.Linear(2, 2)
    ema = PowerEMA({"net": module})
    with torch.no_grad():
        module.weight.add_(1.0)
    ema.update(1)
    assert all(torch.equal(ema.state_dict("net", which)["weight"], module.weight) for which in (0, 1))


def test_the_wider_average_lags_further_behind(followed):
    _, _, ema, _ = followed
    assert ema.state_dict("net", 1)["line"] < ema.state_dict("net", 0)["line"] < 1


def test_power_averages_go_out_in_and_on_by_width_and_part():
    modules = {"net": nn.Linear(2, 2), "text": nn.Linear(2, 2)}
    ema, other = PowerEMA(modules), PowerEMA(modules)
    for n in range(1, 9):
        with torch.no_grad():
            modules["net"].weight.add_(1.0)
        ema.update(n)
        if n == 4:
            for part in modules:
                for which in (0, 1):
                    other.load_state_dict(part, ema.state_dict(part, which), which)
        elif n > 4:
            other.update(n)
    for which in (0, 1):
        for part in modules:
            again = other.state_dict(part, which)
            assert all(torch.equal(tensor, again[name]) for name, tensor in ema.state_dict(part, which).items())
    assert set(ema.state_dict("text", 1)) == {"weight", "bias"}
    assert not torch.equal(ema.state_dict("net", 0)["weight"], ema.state_dict("net", 1)["weight"])


def test_each_width_is_applied_and_undone():
    module = nn.Linear(3, 3)
    ema = PowerEMA({"net": module})
    for n in range(1, 4):
        with torch.no_grad():
            module.weight.add_(1.0)
        ema.update(n)
    raw = module.weight.detach().clone()
    for which in (0, 1):
        averaged = ema.state_dict("net", which)["weight"].clone()
        with ema.applied(which):
            assert torch.equal(module.weight, averaged) and not torch.equal(module.weight, raw)
        assert torch.equal(module.weight, raw)


def test_snapshots_are_copies_of_every_width():
    module = nn.Linear(2, 2)
    ema = PowerEMA({"net": module}, (0.05, 0.2))
    ema.update(1)
    whole, half = ema.snapshot(), ema.snapshot(torch.float16)
    with torch.no_grad():
        module.weight.add_(1.0)
    before = ema.state_dict("net")["weight"].clone()
    ema.update(2)
    assert set(whole) == {0.05, 0.2} and set(whole[0.05]) == {"net.weight", "net.bias"}
    assert torch.equal(whole[0.05]["net.weight"], before) and half[0.2]["net.weight"].dtype == torch.float16


# ---------------------------------------------------------------- after the fact


def test_a_stored_width_at_a_stored_step_comes_back(followed):
    values, _, ema, snapshots = followed
    for step, width in ((1600, 0.05), (1600, 0.10), (800, 0.05)):
        stored = next(tensors for at, sigma_rel, tensors in snapshots if (at, sigma_rel) == (step, width))
        result = reconstruct(snapshots, width, step)
        assert max((result[name] - tensor).abs().item() for name, tensor in stored.items()) < 2e-6
        assert all(result[name].dtype == torch.float32 for name in result)


# Snapshots every 100 of 1600 steps. Narrower than those kept, between their steps, or so wide that the steps before the
# first of them count, an average is less well known.
@pytest.mark.parametrize("sigma_rel, step, error", [
    (0.06, 1600, 3e-4), (0.075, 1600, 3e-4), (0.15, 1600, 3e-4), (0.075, 1200, 5e-4), (0.2, 1600, 5e-3), (0.03, 1600, 5e-3),
    (0.10, 1250, 1e-2), (0.25, 1600, 3e-2)])
def test_other_widths_come_close_to_the_direct_average(followed, sigma_rel, step, error):
    values, _, _, snapshots = followed
    assert worst(reconstruct(snapshots, sigma_rel, step), values, sigma_rel, step) < error


def test_weights_that_stayed_put_come_out_as_they_are(followed):
    _, _, _, snapshots = followed
    for sigma_rel in (0.02, 0.075, 0.28):
        assert reconstruct(snapshots[-6:], sigma_rel, 1600)["net.still"].item() == 3.0


def test_coefficients_minimise_the_distance_of_the_weightings():
    snapshots, gammas = [(400, 0.05), (400, 0.1), (800, 0.05), (800, 0.1)], [to_gamma(s) for s in (0.05, 0.1, 0.05, 0.1)]
    x = (torch.arange(80_000, dtype=torch.float64) + 0.5) / 100
    density = torch.stack([(g + 1) * x ** g / at ** (g + 1) * (x < at) for (at, _), g in zip(snapshots, gammas)])
    goal = (to_gamma(0.07) + 1) * x ** to_gamma(0.07) / 800 ** (to_gamma(0.07) + 1)
    best = torch.from_numpy(coefficients(snapshots, 0.07, 800))
    assert best.sum().item() == pytest.approx(1, abs=1e-9)
    pushes = torch.tensor([[0, 0, 0, 0], [1, -1, 0, 0], [-1, 1, 0, 0], [0, 1, -1, 0], [0, -1, 1, 0], [0, 0, 1, -1],
                           [0, 0, -1, 1]])
    distances = [(((best + 1e-3 * push) @ density - goal) ** 2).sum().item() for push in pushes]
    assert distances[0] == min(distances)


def test_a_snapshot_given_twice_does_no_harm(followed):
    values, _, _, snapshots = followed
    assert worst(reconstruct(snapshots + snapshots[-5:], 0.075, 1600), values, 0.075, 1600) < 1e-3


def test_a_week_of_snapshots_is_solved_without_overflow():
    shares = coefficients([(n * 2000, width) for n in range(1, 111) for width in (0.01, 0.10)], 0.05, 220_000)
    assert abs(shares.sum() - 1) < 1e-8 and abs(shares).sum() < 20


def test_nothing_unlike_and_too_early_is_refused():
    one = {"net.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="no snapshots"):
        reconstruct([], 0.1, 5)
    with pytest.raises(ValueError, match="step 2.*other tensors"):
        reconstruct([(1, 0.1, one), (2, 0.1, {"net.bias": torch.zeros(1)})], 0.1, 2)
    with pytest.raises(ValueError, match="begin at step 1"):
        reconstruct([(1, 0.1, one)], 0.1, 0)
