"""Every setting reaches what it is for, and nothing else: two runs of a few steps that differ in it alone differ in the aspects
that its row names, and in no other.

Tests that compare runs with themselves (resumed with whole, sharded with whole) do not see an error that is the same in both. Here
a setting that is not passed on, or reaches the wrong call, is seen. A new setting needs a row, or a reason why it cannot have one.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, thinned
from outcomes import Row, flags, outcome, several_shapes
from published import write_sdxl
from small_models import write_lpips

from tinyldm.config.fields import SETTINGS, make_config
from tinyldm.objectives import FIRST_STAGE_OBJECTIVES, OBJECTIVES
from tinyldm.planning.plan import make_plan
from tinyldm.planning.show import render

TINY = dict(resolution=8, autoencoder="kl", vae=dict(latent_channels=8, widths=(8, 8), groups=4, depth=1, middle_attention=False),
            vae_latents=dict(noise=0.0), vae_steps=2, vae_batch_size=2, vae_crop=4,
            network="dit", dit=dict(patch=2, width=8, layers=1, heads=1, mlp_width=8, time_dim=8),
            unet=dict(widths=(8, 16), depth=1, attention=(True, True), heads=(1, 1), groups=4),
            text=dict(width=8, layers=1, heads=1, mlp_width=8, context_length=16), batch_size=4, max_steps=3, warmup_steps=2,
            log_every=1, sample_every=0, sample_prompts="a wide picture", sample_steps=1, dtype="fp32", max_skip=0.2)
TABLE = dict(process="scaled_linear", prediction="v")
FIRST = dict(vae_weights="")                        # trains the autoencoder too, which the other runs are given
WITH_LPIPS = dict(vae_loss=dict(lpips=1.0), vae_lpips=["LPIPS"], resolution=16, vae_crop=16)
WITH_GAN = dict(vae_loss=dict(gan=1.0), vae_gan=dict(width=4, layers=1, norm="none", start=0.0, adaptive=False), vae_crop=8)
WITH_ADVERSARY = dict(objective="scm", objective_options=dict(gan=0.5, last=0.5), finetune="whole", model="MODEL", vae_weights="",
                      unet={}, dit={})

# Groups of aspects. AFTER is what follows once anything in the training is different.
AFTER = {"loss", "weights", "averages", "moments", "validation", "pictures"}
LATENTS = {"latents", "x0"} | AFTER
DRAWN = {"samples", "captions", "tokens", "x0"} | AFTER
ENCODED = {"encoded", "stored captions", "latents"} | DRAWN
OTHER_VAE = {"vae"} | LATENTS
NETWORK = {"initial", "defaults"} | AFTER
PROCESS = {"defaults"} | AFTER


def logit(times: list[torch.Tensor]) -> torch.Tensor:
    return torch.logit(torch.cat(times))


def fraction(rates: list[list[float]], other: list[list[float]], optimizer: int) -> list[float]:
    """Learning rates in every step, as fractions of those of another run."""
    return [one[optimizer] / two[optimizer] for one, two in zip(other, rates)]


def scaled(optimizer: int) -> Callable[[Any, Any], bool]:
    """Whether the learning rate of this optimizer is twice as high, and that of the other (AdamW is 0, Muon 1) the same."""
    return lambda a, b: fraction(a.rates, b.rates, optimizer) == [2] * 3 and fraction(a.rates, b.rates, 1 - optimizer) == [1] * 3


ROWS = {
    # run
    "seed": Row(1, {"initial", "eps", "t"} | DRAWN),
    "dtype": Row("bf16", {"precision"} | LATENTS, which_way=lambda a, b: {*b.precision} == {"bf16"}),
    "reduce_dtype": Row("bf16", {"sums"}, which_way=lambda a, b: (a.sums, b.sums) == ("fp32", "bf16")),
    "compile": Row(True, {"compiled"}, which_way=lambda a, b: b.compiled == ["AutoencoderKL.encode", "DiT"]),
    "compile_blocks": Row(True, {"compiled"}, dict(compile=True), lambda a, b: b.compiled == ["AutoencoderKL.encode", "blocks of DiT"]),
    "log_every": Row(2, {"log"}, which_way=lambda a, b: b.log == [("step", 2)]),
    "track": Row("tensorboard", {"tracked"}, which_way=lambda a, b: b.tracked == ["tensorboard"]),
    "save_every": Row(2, {"checkpoints"}, which_way=lambda a, b: b.checkpoints == ["step-000002", "step-000003"]),
    "keep_last": Row(1, {"checkpoints"}, dict(save_every=1), lambda a, b: b.checkpoints == ["step-000003"]),
    "keep_every": Row(1, {"checkpoints"}, dict(save_every=1, keep_last=1), lambda a, b: len(b.checkpoints) == 3),
    "val_every": Row(2, {"validation"}, which_way=lambda a, b: [row["step"] for row in b.validation] == [2, 3]),
    "val_samples": Row(1, DRAWN, which_way=lambda a, b: max(map(np.max, b.samples)) > max(map(np.max, a.samples))),
    "sample_every": Row(2, {"pictures"}, which_way=lambda a, b: [*b.pictures] == ["step-000002.png", "step-000003.png"]),
    "sample_prompts": Row("a|b", {"pictures"}),
    # data
    "data": Row(["OTHER"], {"defaults"} | LATENTS),
    "scenes": Row(16, {"initial", "vocabulary", "defaults"} | ENCODED, dict(data=["toyworld"], scenes=12)),
    "caption_key": Row(["short"], {"initial", "stored captions", "vocabulary", "captions", "tokens", "defaults"} | AFTER,
                       which_way=lambda a, b: b.stored_captions[0] == [(0, "scene"), (0, "number 0")]),
    "captions": Row(["a square|my square"], {"initial", "stored captions", "vocabulary", "captions", "tokens", "defaults"} | AFTER,
                    which_way=lambda a, b: b.stored_captions[0] == [(0, "a square"), (0, "my square")]),
    "resolution": Row(16, {"eps", "perturbation", "t", "defaults"} | LATENTS,
                      which_way=lambda a, b: b.latents[0].shape[-2:] == (8, 8)),
    "stages": Row({"8": 0.5, "16": 0.5}, {"eps", "perturbation", "t", "events", "micro_batches", "precision", "defaults",
                                               "stored pictures"} | ENCODED,
                  which_way=lambda a, b: b.events == [("stage", 3)]),
    "buckets": Row(3.0, {"eps", "perturbation", "precision"} | ENCODED),
    "flip": Row(True, {"encoded", "precision", "x0"} | AFTER, which_way=lambda a, b: b.encoded == 2 * a.encoded),
    "moments": Row(True, LATENTS, which_way=lambda a, b: b.latents[0].shape[1] == 2 == 2 * a.latents[0].shape[1]),
    "keep_pictures": Row(2, {"stored pictures"}, which_way=lambda a, b: (a.stored_pictures, b.stored_pictures) == ([0], [2])),
    "min_side": Row(10, {"vocabulary", "defaults"} | ENCODED, which_way=lambda a, b: len(b.latents) == len(a.latents) - 2),
    "max_aspect": Row(1.5, {"initial", "vocabulary", "defaults"} | ENCODED, which_way=lambda a, b: len(b.latents) == len(a.latents) - 6),
    "min_caption": Row(2, {"defaults"} | ENCODED, which_way=lambda a, b: len(b.latents) == len(a.latents) - 1),
    "max_caption": Row(99, {"initial", "vocabulary", "defaults"} | ENCODED, which_way=lambda a, b: len(b.latents) == len(a.latents) - 1),
    "max_skip": Row(0.01, {"error"}, which_way=lambda a, b: "1 of 23 samples" in b.error),
    "cache": Row(["LATENTS"], {"latents", "stored pictures", "stored captions", "encoded", "precision"}),
    "encode_batch_size": Row(20, {"encoded", "precision"}, which_way=lambda a, b: b.encoded == [20, 2], rounding=LATENTS),
    # the autoencoder
    "vae": Row(dict(latent_channels=6), {"vae_initial", "posterior", "vae_loss", "initial", "defaults", "eps", "perturbation", "t"} |
               OTHER_VAE, FIRST),
    "vae_weights": Row("VAE", OTHER_VAE),
    "vae_steps": Row(1, {"crops", "posterior", "limits", "log", "vae_loss", "vae_decays", "vae_optimizers", "vae_rates"} | OTHER_VAE, FIRST,
                     lambda a, b: len(b.vae_loss) == 1),
    "vae_pictures": Row(4, {"crops", "vae_loss"} | OTHER_VAE, FIRST),
    "vae_batch_size": Row(3, {"crops", "posterior", "vae_loss"} | OTHER_VAE, FIRST, lambda a, b: {len(crops) for crops in b.crops} == {3}),
    "vae_crop": Row(6, {"crops", "posterior", "vae_loss"} | OTHER_VAE, FIRST, lambda a, b: b.crops[0].shape[2:] == (6, 6)),
    "vae_lr": Row(0.006, {"vae_loss", "vae_rates"} | OTHER_VAE, FIRST, lambda a, b: fraction(a.vae_rates, b.vae_rates, 0) == [2, 2]),
    "vae_muon_lr": Row(0.003, {"vae_loss", "vae_rates"} | OTHER_VAE, FIRST, lambda a, b: fraction(a.vae_rates, b.vae_rates, 1) == [2, 2]),
    "vae_decay": Row(1.0, {"vae_rates"} | OTHER_VAE, FIRST, lambda a, b: b.vae_rates[1][0] < a.vae_rates[1][0]),
    "vae_optimizer": Row("adamw", {"vae_optimizers", "vae_rates", "vae_decays", "vae_loss"} | OTHER_VAE, FIRST,
                         lambda a, b: b.vae_optimizers == [["AdamW"]] * 2),
    "vae_ema": Row(0.5, {"ema"} | OTHER_VAE, FIRST, lambda a, b: b.ema[:2] == [0.5, 0.5]),
    "vae_val_every": Row(1, {"crops", "vae_loss"} | OTHER_VAE, FIRST, lambda a, b: [len(losses) for losses in b.vae_loss] == [2, 2] * 2),
    "vae_loss": Row(dict(kl=9.0), {"vae_loss"} | OTHER_VAE, FIRST, lambda a, b: bool((b.vae_loss[0] > a.vae_loss[0]).all())),
    "vae_lpips": Row(["OTHER_LPIPS"], {"vae_loss"} | OTHER_VAE, FIRST | WITH_LPIPS),
    "vae_gan": Row(dict(kind="non_saturating"), {"vae_loss"} | OTHER_VAE, FIRST | WITH_GAN),
    "vae_latents": Row(dict(noise=0.5), {"vae_loss"} | OTHER_VAE, FIRST),
    "vae_freeze": Row("encoder", {"vae_loss"} | OTHER_VAE, FIRST | dict(vae="", vae_init="VAE")),
    # text and network
    "text": Row(dict(layers=2), NETWORK),
    "text_encoder": Row("t5", {"captions", "tokens", "vocabulary"} | NETWORK),
    "text_weights": Row("MODEL", NETWORK),
    "text_join": Row("single", {"captions", "tokens"} | NETWORK, dict(text_weights="TWO"),
                     lambda a, b: a.tokens[0].shape[1] == 2 * b.tokens[0].shape[1]),
    "vocab_size": Row(520, {"captions", "tokens", "vocabulary"} | NETWORK),
    "network": Row("unet", NETWORK | {"rates"}),
    "unet": Row(dict(depth=2), NETWORK, dict(network="unet")),
    "dit": Row(dict(layers=2), NETWORK),
    "net": Row(dict(layers=2), NETWORK),
    "grad_checkpointing": Row(True, {"recomputed"}),
    # the objective
    "objective": Row("consistency", {"micro_batches"} | AFTER),         # neither is watched where it is not the diffusion loss
    "objective_options": Row(dict(stages=1), AFTER - {"loss"}, dict(objective="consistency")),
    **{f"objective_options {name}, of scm's adversary": Row({name: value}, AFTER - {"loss", "validation"}, WITH_ADVERSARY)
       for name, value in (("gan", 2.0), ("last", 1.0))},
    "process": Row("cosine", PROCESS, TABLE),
    "process_options": Row(dict(beta_end=0.02), PROCESS, TABLE),
    "shift": Row(3.0, PROCESS),
    "zero_terminal_snr": Row(True, PROCESS, TABLE),
    "prediction": Row("x0", PROCESS, TABLE),
    "learned_variance": Row(True, NETWORK, TABLE),
    "times": Row("uniform", {"t", "tokens"} | AFTER),
    "times_mean": Row(1.0, {"t"} | AFTER, which_way=lambda a, b: (logit(b.t) - logit(a.t)).allclose(torch.tensor(1.0), atol=1e-3)),
    "times_scale": Row(0.5, {"t"} | AFTER, which_way=lambda a, b: logit(b.t).allclose(0.5 * logit(a.t), atol=1e-3)),
    "stratified_times": Row(True, {"t", "tokens"} | AFTER, which_way=lambda a, b: all(
        (torch.special.ndtr(logit([t])) * 4).floor().tolist() == [0, 1, 2, 3] for t in b.t)),
    "loss": Row("l1", AFTER),
    "huber_c": Row(0.2, AFTER, dict(loss="huber")),
    "loss_weight": Row("p2", AFTER, TABLE),
    "min_snr_gamma": Row(0.5, AFTER, TABLE),
    "p2_gamma": Row(2.0, AFTER, TABLE | dict(loss_weight="p2")),
    "noise_offset": Row(0.5, {"eps", "t", "tokens"} | AFTER, which_way=lambda a, b: bool(
        (b.eps[0] - a.eps[0]).std((2, 3)).max() < 1e-6 < 0.2 < (b.eps[0] - a.eps[0]).std() < 1)),
    "input_perturbation": Row(0.5, {"perturbation", "t", "tokens"} | AFTER,
                              which_way=lambda a, b: a.perturbation[0].abs().max() == 0 and 0.4 < b.perturbation[0].std() < 0.6),
    "mask_padding": Row(True, PROCESS),
    "caption_dropout": Row(1.0, {"tokens"} | AFTER, which_way=lambda a, b: len(torch.cat(b.tokens).unique(dim=0)) == 1 < len(
        torch.cat(a.tokens).unique(dim=0))),
    # optimisation
    "max_steps": Row(2, {"checkpoints", "defaults", "log", "eps", "t", "perturbation", "micro_batches", "limits", "rates", "decays",
                         "optimizers", "ema"} | DRAWN, which_way=lambda a, b: b.checkpoints == ["step-000002"]),
    "batch_size": Row(5, {"eps", "t", "perturbation", "micro_batches"} | DRAWN, which_way=lambda a, b: b.micro_batches == [5, 5, 5]),
    "grad_accum": Row(2, {"micro_batches"}, which_way=lambda a, b: b.micro_batches == [2] * 6, rounding=AFTER),
    "optimizer": Row("adamw", {"optimizers", "rates", "decays"} | AFTER, which_way=lambda a, b: b.optimizers == [["AdamW"]] * 3),
    "lr": Row(0.004, {"rates"} | AFTER, which_way=scaled(0)),
    "muon_lr": Row(0.004, {"rates"} | AFTER, which_way=scaled(1)),
    "text_lr": Row(0.001, {"rates", "decays"} | AFTER, which_way=lambda a, b: b.rates == [
        [pytest.approx(adam), pytest.approx(adam / 2), pytest.approx(muon), pytest.approx(muon / 2)] for adam, muon in a.rates]),
    "weight_decay": Row(0.5, {"decays"} | AFTER, which_way=lambda a, b: b.decays == [[0.5, 0.5]] * 3),
    "warmup_steps": Row(3, {"rates"} | AFTER, which_way=lambda a, b: fraction(a.rates, b.rates, 0)[0] == pytest.approx(2 / 3)),
    "decay": Row(1.0, {"rates"} | AFTER, which_way=lambda a, b: b.rates[2][0] == pytest.approx(0.002 / 3)),
    "grad_clip": Row(0.01, {"limits"} | AFTER, which_way=lambda a, b: b.limits == [0.01] * 3),
    "ema_decay": Row(0.05, {"ema", "averages", "pictures", "validation"}, which_way=lambda a, b: b.ema == [0.05] * 3),
    "ema_widths": Row([0.1, 0.05], {"ema", "averages", "further averages", "pictures", "validation"},
                      which_way=lambda a, b: {name.partition("/")[0] for name in b.further_averages} == {"0.05"}),
    # drawing: the first two steps of dpmpp_2m, from pure noise on, and the last are those of ddim
    "sampler": Row("ddim", {"defaults", "pictures"}, dict(sample_steps=4, cfg=99.0)),
    "sample_steps": Row(2, {"defaults", "pictures"}, dict(cfg=99.0)),
    "cfg": Row(2.0, {"defaults", "pictures"}),
}
# What the same settings do to the first stage, and to drawn data.
ROWS |= {
    "seed (first stage)": Row(1, {"vae_initial", "crops", "posterior", "vae_loss", "initial", "eps", "t"} | OTHER_VAE | DRAWN, FIRST),
    "dtype (first stage)": Row("bf16", {"precision", "vae_loss"} | OTHER_VAE, FIRST),
    "optimizer (first stage)": Row("adamw", {"vae_optimizers", "vae_rates", "vae_decays", "vae_loss", "optimizers", "rates", "decays"} |
                                   OTHER_VAE, FIRST, lambda a, b: b.vae_optimizers == [["AdamW"]] * 2),
    "warmup_steps (first stage)": Row(8, {"vae_rates", "vae_loss", "rates"} | OTHER_VAE, FIRST,
                                      lambda a, b: b.vae_rates[0][0] == pytest.approx(0.003 / 8)),
    "grad_clip (first stage)": Row(0.01, {"limits", "vae_loss"} | OTHER_VAE, FIRST, lambda a, b: b.limits == [0.01] * 5),
    "weight_decay (first stage)": Row(0.5, {"decays"} | AFTER, FIRST, lambda a, b: b.vae_decays == [[0, 0]] * 2),
    "seed (of drawn data)": Row(1, {"initial", "eps", "t", "vocabulary", "defaults", "latents", "stored captions"} | DRAWN,
                                dict(data=["toyworld"], scenes=12)),
}
PLANNED = {             # settings of --dry-run: another value -> what is planned with it, as a multiple of what is planned without
    "pictures": (2000, lambda plan: sum(phase.encoding for phase in plan.phases), 2.0),
    "utilisation": (0.275, lambda plan: plan.phases[0].rate, 0.5),
    "gpu_tflops": (419.0, lambda plan: plan.phases[0].rate, 2.0),
    "gpu_gb": (64.0, lambda plan: float(re.search(r"memory, GB of (\d+)", render(plan))[1]), 2.0),
}
ELSEWHERE = {           # settings that no row can have: the reason, and the test that they have instead
    "preset": ("only the other settings follow from it", "test_a_preset_is_its_row_and_what_is_typed_wins"),
    "out": ("every run here has its own folder", "test_a_run_folder_is_not_overwritten"),
    "only": ("the second stage is left out", "test_the_result_is_a_folder_that_diffusers_opens_with_the_same_pictures"),
    "vae_preset": ("only the other settings follow from it", "test_a_vae_preset_lies_over_the_preset_and_under_what_is_typed"),
    "autoencoder": ("its fields are others", "test_the_result_is_a_folder_that_diffusers_opens_with_the_same_pictures"),
    "vae_init": ("it brings its own fields", "test_a_run_that_begins_with_the_weights_of_others_goes_on_without_them"),
    "early_stop": ("it is for --only vae", "test_early_stopping_ends_when_its_patience_does_with_the_weights_of_the_best_validation"),
    "resume": ("it continues another run", "test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit"),
    "device": ("there may be one alone", "test_mistakes_at_train_are_one_line_and_leave_no_run_behind"),
    "fsdp": ("it takes several processes", "test_a_sharded_network_trains_draws_and_saves_as_a_whole_one"),
    "deterministic": ("on CPUs it is always on", "test_training_on_a_cpu_is_deterministic_and_on_a_gpu_where_that_is_asked_for"),
    "budget": ("it depends on the clock", "test_an_end_by_the_clock_reaches_the_schedule"),
    "deadline": ("it depends on the clock", "test_an_end_by_the_clock_reaches_the_schedule"),
    "rollback": ("the loss must diverge first", "test_a_loss_that_has_diverged_rolls_back_and_skips_the_batches"),
    **{name: ("it is of --finetune, which needs a model", test) for test, names in {
        "test_each_kind_has_its_own_defaults_which_what_is_typed_replaces": "finetune instance",
        "test_the_model_is_read_as_the_settings_say": "model variant parts tokenizer without_t5",
        "test_an_adapter_is_made_as_the_settings_say": "rank alpha rank_stabilised targets conv_rank ranks lora_dropout train_text",
        "test_half_of_the_samples_are_of_the_class_and_count_as_prior_weight_says": "class class_pictures prior_weight",
        "test_a_new_word_begins_and_is_described_as_the_settings_say": "token initial vectors style"}.items() for name in names.split()},
    **dict.fromkeys(("eval_every", "eval_num", "eval_metric", "eval_weights"), (
        "they need weights, or toyworld", "test_fid_compares_with_the_run_s_own_held_out_pictures")),
}
ONE_ROW = {"vae_objective": FIRST_STAGE_OBJECTIVES}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function: settings, by their flat names, that differ from TINY's -> the outcome of a run with them. Equal runs run once."""
    base, memo = tmp_path_factory.mktemp("settings"), {}
    names = {"MINE": several_shapes(base / "mine", 0), "OTHER": several_shapes(base / "other", 90), "VAE": str(base / "0" / "vae"),
             "MINE_VAE": str(base / "1" / "vae"), "MODEL": str(base / "0" / "checkpoints" / "step-000001" / "model"),
             "LATENTS": str(base / "2" / "latents"), "TWO": str(base / "two"), "LPIPS": write_lpips(base / "one.safetensors", 1),
             "OTHER_LPIPS": write_lpips(base / "other.safetensors", 2)}
    write_sdxl(base / "two")                                    # with two text encoders

    def real(value):
        if isinstance(value, dict):
            return {key: real(each) for key, each in value.items()}
        return [*map(real, value)] if isinstance(value, list) else names.get(value, value) if isinstance(value, str) else value

    def run(**settings):
        settings = {name: real(value) for name, value in (TINY | dict(data=["MINE"], vae_weights="MINE_VAE") | settings).items()}
        words = flags({name: value for name, value in settings.items() if value not in ("", {})})
        if (key := " ".join(words)) not in memo:
            with pytest.MonkeyPatch.context() as patch:
                memo[key] = outcome(words, base / str(len(memo)), patch)
        return memo[key]

    run(seed=5, vae_weights="", max_steps=1), run(vae_weights="", max_steps=1), run()       # folders 0, 1 and 2
    return run


@pytest.mark.parametrize("name", thinned(3, ROWS))
def test_a_setting_changes_what_it_is_for_and_nothing_else(run, name):
    row, name = ROWS[name], name.partition(" ")[0]
    value = (TINY | dict(row.over)).get(name, {}) | row.value if isinstance(row.value, dict) else row.value
    row.check(run(**dict(row.over)), run(**{**dict(row.over), name: value}))


def test_a_setting_that_decides_which_samples_are_drawn_is_kept_by_a_resumed_run():
    """Otherwise samples of an epoch are seen twice or never, or held-out ones are trained on. How many batches are drawn may change."""
    deciding = {name.partition(" ")[0] for name, row in ROWS.items() if "samples" in row.differs}
    assert {name for name in deciding if not SETTINGS[name].kept} == {"max_steps"}
    assert {"batch_size", "val_samples", "seed", "scenes"} <= deciding


@pytest.mark.slow
def test_the_settings_of_the_plan_change_its_numbers():
    settings = TINY | dict(vae=dict(widths=(8, 16), depth=1, groups=4), pictures=1000, data=["elsewhere"])
    plan = make_plan(make_config(**settings))
    for name, (value, number, ratio) in PLANNED.items():
        assert number(make_plan(make_config(**settings | {name: value}))) / number(plan) == pytest.approx(ratio), name
    with pytest.raises(ValueError, match="the GPU has 1e-05 .--gpu-gb"):
        make_plan(make_config(**settings | dict(gpu_gb=1e-5)))


def test_every_setting_has_a_row_or_a_reason_and_a_test_elsewhere():
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert all(f"def {test}(" in tests for _, test in ELSEWHERE.values())
    groups = ([name for name in ROWS if " " not in name], PLANNED, ELSEWHERE, ONE_ROW)
    assert sorted(name for group in groups for name in group) == sorted(SETTINGS)
    for name, table in ONE_ROW.items():
        assert len(table) == 1, f"--{name} has a choice now: give it a row above"
    assert not OBJECTIVES["denoising"].options, "--objective-options has some now: give it a row above"
