"""The flow whose shift depends on the number of tokens: by its formula, and against diffusers' FlowMatchEuler, called as pipelines do."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import combinations
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux import pipeline_flux
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3

from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.loss import make_weight, sample_losses, sample_t
from tinyldm.diffusion.process import PROCESSES, DynamicFlow, Flow, at_size, make_process
from tinyldm.diffusion.samplers import SAMPLERS, final
from tinyldm.model import Model
from tinyldm.models.flux import Flux, FluxConfig
from tinyldm.pipeline import draw_settings
from tinyldm.vendor_loaders.scheduler import from_config, read_process, sampling, to_config, why_not_public

# As FLUX.1 dev is published. The shift is without effect where shifting is dynamic.
DEV = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
       "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
SCHNELL = DEV | {"shift": 1.0, "use_dynamic_shifting": False}
OTHER = DEV | {"base_shift": 0.9, "max_shift": 1.6, "base_image_seq_len": 64, "max_image_seq_len": 1000, "time_shift_type": "linear"}
CONFIGS = {"dev": DEV, "schnell": SCHNELL, "linear": OTHER}
SIDES = [(16, 16), (256, 256), (512, 768), (1024, 1024), (2048, 1536)]       # of pictures; a token is 16 pixels wide


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize("tokens, mu", [(256, 0.5), (4096, 1.15), (2176, 0.825), (1024, 0.63), (64, 0.4675),
                                        (9216, 0.5 + 8960 * 0.65 / 3840)])
def test_mu_is_linear_in_the_tokens_also_beyond_its_ends_and_the_shift_is_its_exponential(tokens, mu):
    assert at_size(make_process("dynamic_flow"), tokens).shift == pytest.approx(math.exp(mu), rel=1e-12)
    assert at_size(make_process("dynamic_flow", exponential=False), tokens).shift == pytest.approx(mu, rel=1e-12)


def test_without_a_size_it_is_the_flow_of_the_base_size():
    process, t = make_process("dynamic_flow", base_tokens=64), torch.linspace(0, 1, 9)
    for found in (process(t), at_size(process)(t), at_size(process, 64)(t)):
        assert all(map(torch.equal, found, Flow(math.exp(0.5))(t)))
    assert grid(process, 5) == grid(Flow(math.exp(0.5)), 5) != grid(at_size(process, 1024), 5)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_size_changes_no_other_process(name):
    process = make_process(name)
    assert (at_size(process, 100) is process) == (name != "dynamic_flow")
    assert isinstance(at_size(process, 100), Flow) == name.endswith("flow")


@pytest.mark.parametrize("options, said", [
    (dict(base_tokens=0), "base_tokens 0 and max_tokens 4096"), (dict(base_tokens=4096), "must be positive and rising"),
    (dict(max_shift=1000.0), "between -10 and 10"), (dict(base_shift=math.nan), "between -10 and 10"),
    (dict(base_shift=-1.0, exponential=False), "flow shift -1.0 is not positive"), (dict(base_shfit=1.0), "did you mean 'base_shift'"),
    (dict(base_tokens="many"), "base_tokens")])
def test_impossible_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        make_process("dynamic_flow", **options)


def test_a_size_at_which_a_linear_shift_is_not_positive_is_refused():
    process = DynamicFlow(base_shift=0.1, max_shift=4.0, base_tokens=256, max_tokens=512, exponential=False)
    with pytest.raises(ValueError, match="flow shift -.* is not positive"):
        at_size(process, 16)


def test_training_times_are_those_of_kohya_s_flux_shift():
    """t = sigmoid(normal), then the shift for the picture's tokens: flux_train_utils.py of kohya-ss/sd-scripts."""
    tokens, mean, x0 = 1024, 0.63, torch.zeros(5000, 1, 1, 1)
    t = sample_t("logit_normal", len(x0), torch.Generator().manual_seed(0))
    told = []
    net = lambda x, t, cond: told.append(t) or x
    sample_losses(net, x0, x0, t, None, at_size(make_process("dynamic_flow"), tokens), prediction="flow")
    normal = torch.randn(len(x0), generator=torch.Generator().manual_seed(0)).double()
    expected = math.exp(mean) / (math.exp(mean) + (1 / normal.sigmoid() - 1))
    torch.testing.assert_close(told[0].double() / 1000, expected, rtol=1e-5, atol=0)


def test_weights_by_snr_are_refused_as_on_every_flow():
    with pytest.raises(ValueError, match="rectified flow chooses its levels by how often"):
        make_weight("min_snr", "v", None, make_process("dynamic_flow"))


# ---------------------------------------------------------------- diffusers


def theirs(config, steps, height, width, pipeline):
    """The scheduler after what FluxPipeline or StableDiffusion3Pipeline do before their loop."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    tokens = (height // 16) * (width // 16)
    mu = pipeline.calculate_shift(tokens, *(scheduler.config[field] for field in ("base_image_seq_len", "max_image_seq_len", "base_shift",
                                                                                 "max_shift")))
    sigmas = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if pipeline is pipeline_flux else {}
    pipeline.retrieve_timesteps(scheduler, steps, "cpu", **sigmas, mu=mu)
    return scheduler, tokens


@pytest.mark.parametrize("pipeline", [pipeline_flux, pipeline_stable_diffusion_3], ids=["FluxPipeline", "StableDiffusion3Pipeline"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("height, width", SIDES)
def test_times_and_sigmas_are_those_of_diffusers(name, height, width, pipeline):
    config = CONFIGS[name]
    found = sampling(config, schedule="trailing" if pipeline is pipeline_flux else None)
    for steps in (1, 2, 4, 28, 50):
        scheduler, tokens = theirs(config, steps, height, width, pipeline)
        levels = grid(at_size(from_config(config).process, tokens), steps, found.schedule, **found.grid)
        sigmas = torch.tensor([level.sigma for level in levels])
        torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(torch.tensor([level.t for level in levels[:-1]]), scheduler.timesteps, rtol=2e-6, atol=1e-4)
        assert found.sampler == "euler" and not found.start_at_sigma


@pytest.mark.parametrize("pipeline", [pipeline_flux, pipeline_stable_diffusion_3], ids=["FluxPipeline", "StableDiffusion3Pipeline"])
def test_a_trajectory_is_that_of_diffusers(pipeline):
    scheduler, tokens = theirs(DEV, 9, 512, 768, pipeline)
    velocity = lambda x, t: torch.tanh(1.3 * x + t / 700)
    x = start = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t), t, x, return_dict=False)[0]
    found = sampling(DEV, schedule="trailing" if pipeline is pipeline_flux else None)
    levels = grid(at_size(from_config(DEV).process, tokens), 9, found.schedule, **found.grid)
    denoise = lambda x, level: x - level.sigma * velocity(x, level.t)
    torch.testing.assert_close(final(SAMPLERS[found.sampler](denoise, start, levels)), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler, schedule", combinations(2, [name for name in SAMPLERS if name != "lcm"], [None, "trailing"]))
def test_every_sampler_draws_on_both_grids(sampler, schedule):
    """On SD3's grid and FLUX's, data of N(0.5, 0.2^2), whose denoiser is exact: 200 steps of any sampler end at it, but for the
    bias of first order. (lcm is for consistency functions.)"""
    def denoise(x, level):
        variance = (level.alpha * 0.2) ** 2 + level.sigma**2
        return 0.5 + level.alpha * 0.04 / variance * (x - level.alpha * 0.5)

    found = sampling(DEV, sampler, schedule)
    levels = grid(at_size(from_config(DEV).process, 1024), 200, found.schedule, **found.grid)
    x = torch.randn(1, 1, 60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = final(SAMPLERS[sampler](denoise, x, levels, generators=[torch.Generator().manual_seed(1)], **found.options))
    assert (drawn.mean().item(), drawn.std().item()) == pytest.approx((0.5, 0.2), abs=0.02)


# ---------------------------------------------------------------- configs


def test_the_config_of_flux_dev_is_read_and_written_again():
    trained = read_process(DEV)
    assert trained == ("dynamic_flow", dict(base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096, exponential=True), "flow")
    assert from_config(OTHER).process == DynamicFlow(0.9, 1.6, 64, 1000, exponential=False)
    assert read_process(SCHNELL) == ("flow", {"shift": 1.0}, "flow")
    for config in (DEV, OTHER):
        written = json.loads(json.dumps(to_config(*read_process(config), flow_match=True)))
        assert read_process(written) == read_process(config) and sampling(written) == sampling(config)
        completed = FlowMatchEulerDiscreteScheduler.from_config(written).config
        assert {field: completed[field] for field in config if field not in ("_class_name", "shift")} == {
            field: value for field, value in config.items() if field not in ("_class_name", "shift")}


def test_a_field_that_the_config_lacks_has_the_default_of_its_class():
    assert read_process({"_class_name": DEV["_class_name"], "use_dynamic_shifting": True}) == read_process(DEV)
    completed = dict(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)
    assert read_process(completed | {"_class_name": DEV["_class_name"]}) == read_process(DEV)


@pytest.mark.parametrize("change, said", [
    ({"time_shift_type": "cubic"}, "time_shift_type"), ({"shift_terminal": 0.1}, "shift_terminal=0.1"),
    ({"base_shift": None}, "base_shift"),
    ({"use_beta_sigmas": True}, "use_beta_sigmas=True"), ({"invert_sigmas": True}, "invert_sigmas=True")])
def test_what_bends_the_times_otherwise_is_refused_by_name(change, said):
    with pytest.raises(ValueError, match=said):
        from_config(DEV | change)
        sampling(DEV | change)


def test_a_pipeline_s_own_times_do_not_hide_what_the_config_bends():
    net = Flux(FluxConfig(width=12, heads=1, double_layers=1, single_layers=1, context_dim=4, pooled_dim=4, rope_axes=(4, 4, 4)))
    model = Model(net, None, None, from_config(DEV).process, "flow", DEV, {"schedule": "trailing"})
    assert draw_settings(model).schedule == "trailing" and draw_settings(model, schedule="karras").schedule == "karras"
    with pytest.raises(ValueError, match="use_beta_sigmas=True: there is no such schedule here"):
        draw_settings(replace(model, scheduler=DEV | {"use_beta_sigmas": True}))


def test_pipelines_that_do_not_tell_the_size_get_no_such_scheduler():
    assert why_not_public("dynamic_flow", {}, "flow", flow_match=True) is None
    assert "does not tell its scheduler the size" in why_not_public("dynamic_flow", {}, "flow")
    own = to_config("dynamic_flow", {"base_tokens": 64}, "flow")
    assert own["_class_name"] == "TinyLDMScheduler" and from_config(own).process == DynamicFlow(base_tokens=64)
