"""Scheduler configs as data. That they draw what diffusers draws is tested in tests/diffusion/test_diffusers_parity.py."""

import json
from itertools import product

import pytest
import torch
from helpers import later, thinned

from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.prediction import PREDICTIONS
from tinyldm.diffusion.process import PROCESSES, Discrete, Level
from tinyldm.diffusion.samplers import SAMPLERS, ddim
from tinyldm.diffusion.step import signal
from tinyldm.vendor_loaders import scheduler
from tinyldm.vendor_loaders.scheduler import PUBLISHED, PUBLISHED_PROCESSES, Sampling, sampling, to_config, why_not_public
from tinyldm.vendor_loaders.scheduler_classes import FLOW_FIELDS, FLOWS, OWN_PROCESSES, REFUSAL_REASONS, USES_ROW_OF

diffusers = pytest.importorskip("diffusers")

SD15 = {"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None, "clip_sample": False}
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLOW = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "flow_shift": 3.0}
OWN = to_config("flow", {}, "v")

CONTINUOUS = ("vp", "ve", "edm")

# ---- the process and the prediction, written and read again

PAIRS = [(process, options, prediction, flow_match)
         for process, options in (("scaled_linear", {"beta_end": 0.011}), ("linear", {"steps": 500}), ("cosine", {}),
                                  ("betas", {"betas": [0.1, 0.2, 0.25, 0.3, 0.5, 0.9]}), ("vp", {"beta_max": 15.0}), ("ve", {}),
                                  ("edm", {}), ("betas", {"betas": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "zero_snr": True}),
                                  ("cosine", {"offset": 0.02}), ("linear", {"zero_snr": True}), ("flow", {}),
                                  ("flow", {"shift": 2.5}), ("dynamic_flow", {}),
                                  ("dynamic_flow", {"base_tokens": 64, "max_shift": 1.5, "exponential": False}))
         for prediction in ("eps", "x0", "v", "flow") for flow_match in (False, True)]


@pytest.mark.parametrize("process, options, prediction, flow_match", PAIRS)
def test_every_pair_of_process_and_prediction_survives_its_config(process, options, prediction, flow_match):
    config = json.loads(json.dumps(to_config(process, options, prediction, flow_match=flow_match)))
    trained = scheduler.read_process(config)
    assert trained.name == process and trained.prediction == prediction and options.items() <= trained.options.items()
    assert to_config(*trained, flow_match=flow_match) == config
    found = scheduler.from_config(config)
    assert found.prediction == prediction and isinstance(found.process, Discrete) == (process not in (*FLOWS, *CONTINUOUS))
    known = (process in FLOWS) == (prediction == "flow") and options != {"offset": 0.02} and process not in CONTINUOUS
    known = known and (flow_match or process != "dynamic_flow")
    assert (config["_class_name"] != "TinyLDMScheduler") == known == (why_not_public(process, options, prediction, flow_match) is None)


@pytest.mark.parametrize("process, options, prediction, flow_match, name", [
    pytest.param(*pair, name, marks=later(5, i, j)) for i, pair in enumerate(PAIRS) for j, name in enumerate(PUBLISHED)])
def test_every_sampler_has_a_config_of_the_same_curve_that_can_be_sampled(process, options, prediction, flow_match, name):
    config = json.loads(json.dumps(to_config(process, options, prediction, name, flow_match=flow_match)))
    usual = scheduler.read_process(to_config(process, options, prediction, flow_match=flow_match))
    assert scheduler.read_process(config) == usual
    found = sampling(config)
    levels = grid(scheduler.from_config(config).process, 5, found.schedule, **found.grid)
    assert len(levels) == 6 and levels[-1] == (0.0, 1.0, 0.0) and found.sampler in SAMPLERS
    if config["_class_name"] == PUBLISHED[name].name:
        assert found.sampler == name


@pytest.mark.parametrize("process, options", [("scaled_linear", {}), ("linear", {"steps": 500}), ("cosine", {}),
                                              ("scaled_linear", {"zero_snr": True}),
                                              ("betas", {"betas": [0.1, 0.2, 0.3, 0.4, 0.5, 0.9]}),
                                              ("betas", {"betas": [0.1, 0.2, 0.3, 0.4, 0.5, 0.9], "zero_snr": True})])
def test_the_curve_of_the_exported_scheduler_is_the_curve_that_was_trained(process, options):
    config = to_config(process, options, "v")
    theirs = getattr(diffusers, config["_class_name"]).from_config(config).alphas_cumprod
    ours = scheduler.from_config(config).process
    assert torch.allclose(ours.alpha.square().float(), theirs, rtol=1e-4, atol=1e-8) and len(ours) == len(theirs)


def test_published_scheduler_configs_are_read():
    usual = {"beta_start": 0.00085, "beta_end": 0.012, "steps": 1000}
    assert scheduler.read_process(SD15) == ("scaled_linear", usual, "eps")
    sd2 = SD15 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    assert scheduler.read_process(sd2) == ("scaled_linear", usual, "v")
    zero = sd2 | {"rescale_betas_zero_snr": True}
    assert scheduler.read_process(zero) == ("scaled_linear", usual | {"zero_snr": True}, "v")
    assert scheduler.read_process(SD3) == ("flow", {"shift": 3.0}, "flow")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_silent_config_means_the_defaults_of_its_class(name):
    kind = getattr(diffusers, PUBLISHED[name].name)
    silent, whole = {"_class_name": kind.__name__}, json.loads(kind().to_json_string())
    assert scheduler.read_process(silent) == scheduler.read_process(whole)
    fields = PUBLISHED[name].picture_fields | PUBLISHED[name].solver_fields
    assert set(fields) | {"timestep_spacing", "steps_offset"} | set(PUBLISHED[name].sigma_ends) <= set(whole)
    assert ("rescale_betas_zero_snr" in whole) == PUBLISHED[name].zero_snr
    assert ("use_karras_sigmas" in whole) == bool(PUBLISHED[name].karras)
    refused = {field: whole[field] for field, values in fields.items() if whole[field] not in values}
    assert refused == dict(PUBLISHED[name].unstated)
    for field, value in refused.items():
        for config in (silent, whole):
            with pytest.raises(ValueError, match=f"{field}={value}"):
                sampling(config)
    stated = {field: fields[field][0] for field in refused}
    assert sampling(silent | stated) == sampling(whole | stated)
    assert sampling(silent, name).sampler == name               # by name it never clips, and starts without Runge and Kutta


def test_every_field_that_is_refused_has_a_reason():
    fields = set(FLOW_FIELDS).union(*(row.picture_fields.keys() | row.solver_fields.keys() for row in PUBLISHED.values()))
    assert fields <= set(REFUSAL_REASONS)


DPMPP, UNIPC = ({"_class_name": PUBLISHED[name].name} for name in ("dpmpp_2m", "unipc"))


@pytest.mark.parametrize("config, sampler, options", [
    (DPMPP | {"lower_order_final": False}, "dpmpp_2m", {"lower_order_final": False}),
    (DPMPP | {"lower_order_final": False, "euler_at_final": True}, "dpmpp_2m", {"lower_order_final": True}),
    (DPMPP | {"lower_order_final": True, "solver_type": "logrho"}, "dpmpp_2m", {}),
    (DPMPP | {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, "dpmpp_2m_sde", {"solver_type": "heun"}),
    (DPMPP | {"solver_order": 1, "lower_order_final": False}, "ddim", {}),
    (DPMPP | {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, "ddpm", {}),
    (UNIPC | {"solver_type": "midpoint", "lower_order_final": True, "disable_corrector": []}, "unipc", {}),
    (UNIPC | {"solver_type": "bh1", "disable_corrector": [0]}, "unipc", {"solver_type": "bh1", "disable_corrector": [0]}),
    (UNIPC | {"lower_order_final": False}, "unipc", {"lower_order_final": False}),
])
def test_the_variant_of_a_solver_is_that_of_the_config_s_own_class_and_of_no_sampler_asked_for_by_name(config, sampler, options):
    flow = config | {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for which in (SD15 | config, flow):
        found = sampling(which)
        assert (found.sampler, found.options) == (sampler, options)
        assert sampling(which, "dpmpp_2m").options == sampling(which, "unipc").options == {}


@pytest.mark.parametrize("change", [{"trained_betas": [0.1, 0.2]}, {"beta_schedule": "sigmoid"},
                                    {"prediction_type": "flow_prediction"}, {"use_flow_sigmas": True},
                                    {"use_dynamic_shifting": True}])
def test_a_curve_that_cannot_be_expressed_is_refused_by_name(change):
    config = to_config("linear", {}, "eps") | change
    with pytest.raises(ValueError) as error:
        scheduler.from_config(config)
    assert any(str(word) in str(error.value) for item in change.items() for word in item)


def test_a_published_list_of_betas_is_read_and_one_of_another_length_refused():
    betas = (torch.linspace(0.01, 0.1, 1000, dtype=torch.float64)).tolist()
    config = json.loads(diffusers.DDIMScheduler(trained_betas=betas, prediction_type="v_prediction").to_json_string())
    name, options, prediction = scheduler.read_process(config)
    assert (name, prediction) == ("betas", "v") and options == {"betas": pytest.approx(betas)}
    assert len(scheduler.from_config(config).process) == 1000 and sampling(SD15 | {"trained_betas": betas}, "euler")
    with pytest.raises(ValueError, match="2 trained_betas for 1000 num_train_timesteps"):
        scheduler.read_process(config | {"trained_betas": [0.1, 0.2]})


@pytest.mark.parametrize("process", CONTINUOUS)
def test_continuous_processes_are_tinyldms_own_and_ve_starts_from_its_sigma(process):
    config = json.loads(json.dumps(to_config(process, {}, "v", "euler")))
    assert config["_class_name"] == "TinyLDMScheduler" and "continuous process" in why_not_public(process, {}, "v")
    found = sampling(config, "euler")
    assert found.start_at_sigma == (process != "vp") and found.schedule == {"edm": "karras"}.get(process, "normal")
    levels = grid(scheduler.from_config(config).process, 4, found.schedule, **found.grid)
    assert levels[0].sigma == pytest.approx({"vp": 1, "ve": 50, "edm": 80}[process], rel=1e-4)


def test_networks_that_learn_their_variance_are_tinyldms_own():
    config = to_config("linear", {}, "v", "ddim", learned_variance=True)
    assert config["_class_name"] == "TinyLDMScheduler"
    usual = {"beta_start": 1e-4, "beta_end": 0.02, "steps": 1000, "zero_snr": False}
    assert scheduler.read_process(config) == ("linear", usual, "v")


def test_why_a_pair_is_not_public_says_what_would_be():
    assert why_not_public("scaled_linear", {}, "v") is None and why_not_public("flow", {"shift": 3.0}, "flow") is None
    assert "train with prediction 'flow'" in why_not_public("flow", {}, "v")
    assert "'v' or 'eps'" in why_not_public("linear", {}, "flow")
    assert "the usual max_beta" in why_not_public("cosine", {"max_beta": 0.99}, "v")
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        why_not_public("cosin", {}, "v")


# ---- how to sample

READ = [
    (SD15, (), Sampling("pndm", {}, "leading", {"offset": 1, "set_alpha_to_one": False}, False)),
    (SD15, ("ddim",), Sampling("ddim", {}, "leading", {"offset": 1, "set_alpha_to_one": False}, False)),
    (SD15, ("DPM++ 2M",), Sampling("dpmpp_2m", {}, "linspace", {"drop_last": True}, False)),
    (SD15, ("dpmpp_2m", "karras"), Sampling("dpmpp_2m", {}, "karras", {"rounded": True}, False)),
    (SD15, ("Euler a",), Sampling("euler_a", {}, "linspace_unrounded", {}, True)),
    (SD15, ("euler", "normal"), Sampling("euler", {}, "linspace_unrounded", {}, True)),
    (SD15, ("euler", "leading"), Sampling("euler", {}, "leading", {"offset": 1}, False)),
    (SD15, ("heun", "karras"), Sampling("heun", {"scale": signal}, "karras", {"ends": "linspace_unrounded"}, True)),
    (SD15 | {"prediction_type": "v_prediction"}, ("PLMS", "trailing"),
     Sampling("pndm", {"along": "v"}, "trailing", {"set_alpha_to_one": False}, False)),
    (SD15 | {"use_karras_sigmas": True}, ("unipc",), Sampling("unipc", {}, "karras", {"rounded": True}, False)),
    (SD15 | {"rescale_betas_zero_snr": True}, ("euler", "trailing"),
     Sampling("euler", {}, "trailing", {"alpha_floor": 2**-12}, True)),
    (SD15 | {"rescale_betas_zero_snr": True}, ("heun", "trailing"), Sampling("heun", {}, "trailing", {}, True)),
    (SD3, (), Sampling("euler", {}, "flow_match", {}, False)),
    (SD3, ("heun",), Sampling("heun", {}, "flow_match", {}, False)),
    (SD3, ("dpmpp_2m", "trailing"), Sampling("dpmpp_2m", {}, "trailing", {}, False)),
    (FLOW, (), Sampling("dpmpp_2m", {}, "flow_sigmas", {}, False)),
    (FLOW | {"solver_order": 1}, (), Sampling("ddim", {}, "flow_sigmas", {}, False)),
    (FLOW | {"solver_order": 1}, ("dpmpp_2m",), Sampling("dpmpp_2m", {}, "flow_sigmas", {}, False)),
    (FLOW, ("lms",), Sampling("lms", {}, "flow_sigmas", {}, False)),
    (OWN, (), Sampling("dpmpp_2m", {}, "normal", {}, False)),
    (OWN, ("heun", "trailing"), Sampling("heun", {}, "trailing", {}, False)),
]


@pytest.mark.parametrize("config, names, expected", READ)
def test_configs_say_how_to_sample(config, names, expected):
    before = json.dumps(config)
    assert sampling(config, *names) == expected and json.dumps(config) == before


REFUSED = [
    ("DDIMScheduler", {"clip_sample": True}), ("DDPMScheduler", {"variance_type": "fixed_large"}),
    ("DDIMScheduler", {"thresholding": True}), ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}), ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver"}), ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}), ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}),
    ("UniPCMultistepScheduler", {"predict_x0": False}), ("PNDMScheduler", {"skip_prk_steps": False}),
    ("HeunDiscreteScheduler", {"timestep_spacing": "sideways"}),
]


@pytest.mark.parametrize("kind, change", REFUSED)
def test_a_way_to_sample_that_cannot_be_expressed_is_refused_by_name_and_another_sampler_is_not(kind, change):
    config = SD15 | {"_class_name": kind} | change
    with pytest.raises(ValueError, match="|".join(change)):
        sampling(config)
    if "timestep_spacing" not in change:
        assert sampling(config, "euler_a").sampler == "euler_a"  # which has none of these fields


def test_flows_refuse_what_bends_their_times():
    for config in (SD3, FLOW):
        for change in ({"use_karras_sigmas": True}, {"shift_terminal": 0.1}, {"num_train_timesteps": 500}):
            with pytest.raises(ValueError, match=next(iter(change))):
                sampling(config | change)


def test_a_scheduler_without_a_counterpart_asks_for_a_sampler():
    config = SD15 | {"_class_name": "KDPM2DiscreteScheduler"}
    with pytest.raises(ValueError, match="KDPM2DiscreteScheduler has no counterpart here: name a sampler"):
        sampling(config)
    assert sampling(config, "heun").sampler == "heun"
    with pytest.raises(ValueError, match="did you mean 'heun'"):
        sampling(config, "hein")
    with pytest.raises(ValueError, match="did you mean 'karras'"):
        sampling(config, "heun", "keras")


def test_exported_configs_keep_what_stable_diffusion_pipeline_insists_on():
    for name in PUBLISHED:
        for process, prediction in (("scaled_linear", "v"), ("flow", "flow")):
            config = to_config(process, {}, prediction, name)
            assert config["steps_offset"] == 1
            kind = getattr(diffusers, config["_class_name"])
            assert set(config) - {"_class_name"} <= set(kind().config), "a field that its class does not have"
    assert to_config("flow", {}, "flow", "euler")["solver_order"] == 1
    assert to_config("flow", {}, "flow", "heun")["solver_order"] == 2
    assert to_config("flow", {}, "flow", "heun", flow_match=True)["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    fallbacks = {"heun": "DPMSolverMultistepScheduler", "lms": "DPMSolverMultistepScheduler", "pndm": "DDIMScheduler"}
    for name, kind in fallbacks.items():
        assert to_config("linear", {"zero_snr": True}, "v", name)["_class_name"] == kind


# ---- the tables are complete, and what is registered from outside works


def test_every_sampler_and_process_of_the_library_is_in_the_scheduler_tables():
    """After adding a sampler or a process, say here how diffusers has it: the defaults below are for what others register."""
    assert sorted(SAMPLERS) == sorted([*PUBLISHED, *USES_ROW_OF]), "add the sampler to PUBLISHED or to USES_ROW_OF"
    assert sorted(PROCESSES) == sorted([*PUBLISHED_PROCESSES, *OWN_PROCESSES]), "add the process to one of these tables"
    assert set(PREDICTIONS) == set(scheduler.PREDICTION_TYPES)
    assert set(USES_ROW_OF.values()) | {row.fallback for row in PUBLISHED.values()} - {""} <= set(PUBLISHED)


def check_export(process, prediction, sampler, flow_match, learned_variance):
    """The config of this combination, through JSON, says how to sample on a grid that grid() accepts, or gives the reason."""
    config = json.loads(json.dumps(to_config(process, {}, prediction, sampler, flow_match=flow_match,
                                             learned_variance=learned_variance)))
    reason = why_not_public(process, {}, prediction, flow_match)
    assert (config["_class_name"] == "TinyLDMScheduler") == (reason is not None or learned_variance)
    assert scheduler.read_process(config)[::2] == (process, prediction) or process == "betas"
    for chosen in (None, sampler):
        found = sampling(config, chosen)
        assert found.sampler == chosen or chosen is None and found.sampler in SAMPLERS
        levels = grid(scheduler.from_config(config).process, 4, found.schedule, **found.grid)
        assert len(levels) == 5 and levels[-1].sigma == 0


@pytest.mark.parametrize("sampler", thinned(4, SAMPLERS))
def test_every_sampler_on_every_process_and_prediction_has_a_config(sampler):
    for number, (process, prediction) in enumerate(product(PROCESSES, PREDICTIONS)):
        check_export(process, prediction, sampler, flow_match=bool(number % 2), learned_variance=number % 7 == 3)


@pytest.fixture
def registered(monkeypatch):
    """A sampler, a process and a prediction, each of them added to its table and to nothing else."""
    def quarter(t):
        return Level(1000 * t, torch.cos(t * torch.pi / 2).view(-1, 1, 1, 1), torch.sin(t * torch.pi / 2).view(-1, 1, 1, 1))

    monkeypatch.setitem(SAMPLERS, "newsampler", ddim)
    monkeypatch.setitem(PROCESSES, "newprocess", lambda power=1.0, table=torch.ones(2), **others: quarter)
    monkeypatch.setitem(PREDICTIONS, "newprediction", PREDICTIONS["v"])


@pytest.mark.parametrize("process, prediction", [*product(PROCESSES, ("v", "flow", "newprediction")), ("newprocess", "v"),
                                                 ("newprocess", "newprediction")])
def test_a_sampler_a_process_and_a_prediction_registered_from_outside_are_written_and_read(registered, process, prediction):
    for sampler, flow_match in product(("newsampler", "heun"), (False, True)):
        check_export(process, prediction, sampler, flow_match, learned_variance=False)


def test_a_process_registered_from_outside_is_recorded_by_name_and_its_reason_is_a_sentence(registered):
    assert to_config("newprocess", {}, "v", "heun") == {"_class_name": "TinyLDMScheduler", "process": "newprocess",
                                                        "options": {"power": 1.0}, "prediction": "v"}
    assert why_not_public("newprocess", {}, "v").startswith("diffusers has no scheduler for the process 'newprocess': train with")
    assert "'newprediction': train with eps" in why_not_public("linear", {}, "newprediction")
    assert sampling(to_config("newprocess", {}, "v")).start_at_sigma       # right on any curve, variance-exploding or not
    with pytest.raises(ValueError, match="did you mean 'power'"):
        to_config("newprocess", {"powr": 2.0}, "v")


def test_a_sampler_registered_from_outside_draws_on_the_grid_of_the_config(registered):
    assert to_config("linear", {}, "v", "newsampler") == to_config("linear", {}, "v", "ddim")
    assert to_config("flow", {}, "flow", "newsampler") == to_config("flow", {}, "flow", "dpmpp_2m")
    assert sampling(SD15, "newsampler") == sampling(SD15)._replace(sampler="newsampler")
    euler = SD15 | {"_class_name": "EulerDiscreteScheduler"}
    assert sampling(euler, "newsampler", "karras") == sampling(euler, "euler", "karras")._replace(sampler="newsampler")
    assert sampling(SD3, "newsampler") == Sampling("newsampler", {}, "flow_match", {}, False)
    heun = SD15 | {"_class_name": "HeunDiscreteScheduler", "prediction_type": "v_prediction"}
    assert sampling(heun, "newsampler").options == {} and sampling(heun, "newsampler").schedule == "linspace_unrounded"
    assert sampling(SD15 | {"_class_name": "KDPM2DiscreteScheduler"}, "newsampler").schedule == "leading"
