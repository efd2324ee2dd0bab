import math

import pytest
import torch

from tinyldm.diffusion.process import CLEAN, PROCESSES, Level, find_t, input_scale, log_snr, make_process

TIMES = torch.linspace(0, 1, 1001, dtype=torch.float64)


@pytest.mark.parametrize(
    "name, schedule, ends",
    [
        ("scaled_linear", "scaled_linear", (0.00085, 0.012)),
        ("linear", "linear", (1e-4, 0.02)),
        ("cosine", "squaredcos_cap_v2", (1e-4, 0.02)),
    ],
)
def test_tables_are_the_published_ones(name, schedule, ends):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(beta_schedule=schedule, beta_start=ends[0], beta_end=ends[1]).alphas_cumprod
    torch.testing.assert_close((make_process(name).alpha ** 2).float(), theirs, rtol=3e-5, atol=1e-10)


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
def test_zero_snr_ends_at_pure_noise_starts_where_it_started_and_is_the_published_rescaling(name):
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    plain, table = make_process(name), make_process(name, zero_snr=True)
    assert (table.alpha[-1], table.sigma[-1]) == (0, 1)
    assert table.alpha[0].item() == pytest.approx(plain.alpha[0].item(), rel=1e-12)
    alpha_bar = plain.alpha**2
    betas = 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    theirs = (1 - module.rescale_zero_terminal_snr(betas)).cumprod(0)  # in float64, as ours
    torch.testing.assert_close(table.alpha**2, theirs, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_rises_and_signal_falls_along_every_process(name):
    level = make_process(name)(TIMES)
    assert level.alpha.shape == level.sigma.shape == (1001, 1, 1, 1) and level.t.shape == (1001,)
    assert (level.alpha.diff(dim=0) <= 0).all() and (level.sigma.diff(dim=0) >= 0).all()
    assert (level.t.diff() >= 0).all() and level.t[0] == 0


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine", "betas", "vp"])
def test_tables_and_vp_preserve_variance(name):
    level = make_process(name)(TIMES)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones_like(level.alpha), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_times_pick_every_index_equally(dtype):
    process = make_process("scaled_linear")
    even = torch.arange(100_000, dtype=dtype) / 100_000 + 5e-6
    counts = torch.bincount(process(even).t.long(), minlength=1000)
    assert counts.min() >= 99 and counts.max() <= 101  # 100 each, up to float32 rounding at the borders


def test_the_middle_of_each_bin_is_its_index_and_one_is_the_last():
    process = make_process("linear")
    times = torch.cat([(torch.arange(1000) + 0.5) / 1000, torch.tensor([1.0, 1 - 2**-24])])
    level = process(times)
    assert level.t.tolist() == [*range(1000), 999, 999]
    assert torch.equal(level.alpha[:1000].flatten(), process.alpha.float())


def test_levels_follow_the_dtype_of_t():
    for name in PROCESSES:
        for dtype in (torch.float32, torch.float64):
            assert {value.dtype for value in make_process(name)(torch.tensor([0.3], dtype=dtype))} == {dtype}


def test_flow_is_the_straight_line_and_tells_the_network_1000_t():
    level = make_process("flow")(torch.tensor([0.0, 0.25, 1.0]))
    assert level.t.tolist() == [0, 250, 1000]
    assert level.alpha.flatten().tolist() == [1, 0.75, 0] and level.sigma.flatten().tolist() == [0, 0.25, 1]


def test_shift_multiplies_the_noise_to_signal_ratio_and_keeps_the_ends():
    plain, shifted = make_process("flow")(TIMES), make_process("flow", shift=3.0)(TIMES)
    inner = slice(1, -1)
    ratio = (shifted.sigma / shifted.alpha)[inner] / (plain.sigma / plain.alpha)[inner]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0), rtol=1e-10, atol=0)
    assert (shifted.sigma[0], shifted.sigma[-1], shifted.t[-1]) == (0, 1, 1000)


def test_log_snr_of_floats_is_that_of_tensors_and_infinite_at_the_ends():
    level = make_process("linear")(torch.tensor([0.1, 0.7], dtype=torch.float64))
    floats = [log_snr(Level(0.0, a, s)) for a, s in zip(level.alpha.flatten().tolist(), level.sigma.flatten().tolist())]
    assert log_snr(level).flatten().tolist() == pytest.approx(floats, rel=1e-12)
    assert floats[0] == pytest.approx(math.log(level.alpha[0].item() ** 2 / level.sigma[0].item() ** 2))
    assert (log_snr(Level(0.0, 1.0, 0.0)), log_snr(Level(1000.0, 0.0, 1.0))) == (math.inf, -math.inf)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_list_of_betas_is_the_table_that_diffusers_makes_of_trained_betas(zero_snr):
    diffusers = pytest.importorskip("diffusers")
    betas = (torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.2 + 1e-3).sort()[0].tolist()
    theirs = diffusers.DDIMScheduler(num_train_timesteps=50, trained_betas=betas, rescale_betas_zero_snr=zero_snr)
    ours = make_process("betas", betas=betas, zero_snr=zero_snr)
    torch.testing.assert_close((ours.alpha**2).float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)
    usual = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()
    assert torch.equal(make_process("betas", betas=usual).alpha, make_process("linear").alpha)
    assert torch.equal(make_process("betas").alpha, make_process("linear").alpha)


@pytest.mark.parametrize("betas", [[], [0.1], [0.1, 0.0], [0.1, 1.1], [-0.1, 0.2], [0.1, math.nan]])
def test_betas_that_are_no_table_are_refused(betas):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        make_process("betas", betas=betas)


def test_vp_is_the_integral_of_its_betas_and_the_limit_of_ddpms_table():
    level = make_process("vp")(TIMES)
    fine = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    integral = torch.cumulative_trapezoid(0.1 + fine * 19.9, fine)[999::1000]  # of beta(t), at t = 0.001, 0.002, ...
    torch.testing.assert_close(level.alpha.flatten()[1:], (-integral / 2).exp(), rtol=1e-9, atol=0)  # Eq. 29
    torch.testing.assert_close(level.sigma.flatten()[1:], (1 - (-integral).exp()).sqrt(), rtol=1e-9, atol=0)  # Eq. 33
    many = [make_process("linear", beta_start=0.1 / n, beta_end=20 / n, steps=n).alpha[-1] for n in (1000, 10_000)]
    away = [abs(alpha / level.alpha.flatten()[-1] - 1).item() for alpha in many]
    assert 8 < away[0] / away[1] < 12 and away[1] < 0.01  # of first order in 1 / n
    assert (level.alpha[0], level.sigma[0]) == (1, 0)


def test_ve_is_the_published_one_and_edm_tells_log_sigma():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    theirs.set_sigmas(1001, sigma_min=0.01, sigma_max=50.0, sampling_eps=1e-5)
    level = make_process("ve")(TIMES)
    torch.testing.assert_close(level.sigma.flatten().float(), theirs.discrete_sigmas, rtol=1e-4, atol=0)
    assert (level.alpha == 1).all()
    level = make_process("edm")(TIMES)
    assert level.sigma.flatten()[[0, -1]].tolist() == pytest.approx([0.002, 80])
    c_noise = level.sigma.flatten().log() / 4  # arXiv:2206.00364, Table 1
    time = (c_noise - c_noise[0]) / (c_noise[-1] - c_noise[0]) * 1000
    torch.testing.assert_close(level.t, time, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_sees_unit_scale_and_tables_and_flow_to_the_last_bit_unscaled(name, dtype):
    level = make_process(name)(torch.linspace(0, 1, 100_001, dtype=dtype))
    scale = input_scale(level)
    assert scale.dtype == dtype and scale.shape == level.alpha.shape
    if name in ("ve", "edm"):
        torch.testing.assert_close(scale, (1 + level.sigma**2).sqrt(), rtol=1e-6, atol=0)
    else:
        assert (scale == 1).all()
    alphas, sigmas = (value.flatten()[::997].tolist() for value in (level.alpha, level.sigma))
    floats = [input_scale(Level(0.0, a, s)) for a, s in zip(alphas, sigmas)]
    assert floats == pytest.approx(scale.flatten()[::997].tolist(), rel=1e-6)
    # 7e-4 squared is below 1e-6, so it counts as rounding.
    assert input_scale(Level(0.0, 1.0, 7e-4)) == 1 == input_scale(Level(0.0, *torch.tensor([1.0, 7e-4]).double()))
    assert input_scale(CLEAN) == 1 and all(isinstance(value, float) for value in floats)


@pytest.mark.parametrize("name, options", [(name, {}) for name in PROCESSES] + [
    ("flow", {"shift": 3.0}), ("linear", {"zero_snr": True})])
def test_find_t_inverts_every_process(name, options):
    process = make_process(name, **options)
    t = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.998 + 0.001
    level = process(t)
    ratio = (level.sigma / level.alpha).flatten()
    found = find_t(process, ratio * (1 - 1e-12))
    level = process(found)
    torch.testing.assert_close((level.sigma / level.alpha).flatten(), ratio, rtol=1e-6, atol=0)
    if not hasattr(process, "alpha"):
        torch.testing.assert_close(found, t, rtol=1e-7, atol=1e-9)
    ends = [process(end) for end in (find_t(process, torch.tensor([0.0, math.inf])), torch.tensor([0.0, 1.0]).double())]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*ends))


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0)])
def test_ve_refuses_ends_without_a_logarithm(low, high):
    with pytest.raises(ValueError, match="positive and rising"):
        make_process("ve", sigma_min=low, sigma_max=high)


def test_unknown_names_and_options_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'scaled_linear'"):
        make_process("scaled-linear")
    with pytest.raises(ValueError, match="unknown flow option 'shft': did you mean 'shift'"):
        make_process("flow", shft=3)
    with pytest.raises(ValueError, match="not positive"):
        make_process("flow", shift=0.0)


@pytest.mark.parametrize("name, options, said", [
    ("linear", {"steps": 1}, "a table of 1 steps: use 2 to 100000"), ("cosine", {"steps": 0}, "a table of 0 steps"),
    ("linear", {"steps": 1.5}, "linear option steps=1.5 must be a whole number"), ("linear", {"beta_start": -1}, "between 0 and 1"),
    ("scaled_linear", {"beta_end": 2}, "between 0 and 1"), ("cosine", {"max_beta": 2}, "max_beta 2"),
    ("betas", {"betas": ("a", "b")}, "betas option betas=.* must be a number, or several"),
    ("betas", {"betas": 0.1}, "two or more numbers"),
    ("betas", {"zero_snr": "maybe"}, "zero_snr=maybe must be true or false"),
    ("vp", {"beta_min": "x"}, "vp option beta_min=x must be a number"),
    ("vp", {"beta_min": 3.0, "beta_max": 1.0}, "positive and rising"),
    ("edm", {"sigma_min": "x"}, "edm option sigma_min=x must be a number")])
def test_options_of_which_no_process_can_be_made_are_refused(name, options, said):
    with pytest.raises(ValueError, match=said):
        make_process(name, **options)


def test_options_of_an_added_process_are_compared_with_its_defaults_and_unknown_hints_are_not(monkeypatch):
    def curve(speed=1, shape: "Nothing" = "round", limit=None):     # noqa: F821
        return speed, shape, limit

    monkeypatch.setitem(PROCESSES, "curve", curve)
    assert make_process("curve", speed=0.5, shape=3, limit="any") == (0.5, 3, "any")
    with pytest.raises(ValueError, match="curve option speed=fast must be a number"):
        make_process("curve", speed="fast")
