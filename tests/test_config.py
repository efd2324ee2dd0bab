"""The command line: presets, typed overrides, and mistakes answered in one line with exit code 2."""

import json

import pytest
import torch

from tinyldm.config import (
    PRESETS,
    Config,
    check,
    flatten,
    make_config,
    pairs,
    parse,
    phases,
    preset_config,
)
from tinyldm.config.fields import SETTINGS
from tinyldm.config.presets import TINY_VAES, VAE_PRESETS
from tinyldm.device import pick_device, pick_dtype
from tinyldm.lookup import build_dataclass, nearest
from tinyldm.models.unet import UNetConfig
from tinyldm.training.preflight import check_settings


def parsed(*words) -> Config:
    return parse(list(words), "")[0]


def test_a_preset_is_its_row_and_what_is_typed_wins():
    config, own = parse(["--preset", "tiny", "--max-steps", "7", "--lr=0.5", "--unet", "depth=3"], "", {"--dry-run": dict(
        action="store_true")})
    assert (config.optimisation.max_steps, config.optimisation.lr, own.dry_run) == (7, 0.5, False)
    assert config.network.unet == PRESETS["tiny"]["unet"] | {"depth": 3} and PRESETS["tiny"]["unet"]["depth"] != 3
    assert config.run.out == "runs/tiny"


def test_dashes_and_underscores_are_the_same():
    assert parse(["--max_steps", "7"], "")[0] == parse(["--max-steps", "7"], "")[0]


def test_a_script_that_knows_some_fields_takes_their_flags_only(capsys):
    config, _ = parse(["--data", "a:0.7", "b:0.3", "--resolution", "32"], "", {}, ("data", "resolution", "preset"))
    assert (config.data.sources, config.data.resolution) == (["a:0.7", "b:0.3"], 32)
    with pytest.raises(SystemExit):
        parse(["--lr", "0.1"], "", {}, ("data",))


def test_every_field_is_a_flag():
    for name, value in (("seed", 3), ("caption_dropout", 0.25), ("sampler", "heun"), ("batch_size", 12)):
        assert flatten(parsed(f"--{name}", str(value)))[name] == value
    assert parsed("--compile").run.compile is True and parsed("--no-compile").run.compile is False


# Values where not every word will do, with what else they need.
SPECIAL = {"budget": ["3m"], "deadline": ["2999-01-31T18:00+00:00"], "only": ["vae"], "vae_preset": ["kl-f8"], "vae_optimizer": ["adamw"],
           "vae_freeze": ["encoder", "--vae-init", "folder"], "early_stop": ["3", "--only", "vae", "--vae-val-every", "9"],
           "finetune": ["lora"]}


def test_every_setting_s_flag_is_understood():
    plain = flatten(parsed())
    for name, setting in SETTINGS.items():
        if setting.type in (int, float, str, float | None) and name not in ("resume", "preset"):
            kind = {float | None: float}.get(setting.type, setting.type)
            words = SPECIAL.get(name, [str(plain[name] or 1)])
            assert flatten(parsed(check.flag(name), *words))[name] == kind(words[0]), name


@pytest.mark.parametrize("argv, words", [
    (["--preset", "tinny"], "did you mean 'tiny'"),
    (["--max-stepz", "3"], "did you mean '--max-steps'"),
    (["--max-steps", "many"], "invalid int value"),
    (["--max-steps", "0"], "by --max-steps or by time"),
    (["--batch-size", "2", "--grad-accum", "3"], "cannot be divided into"),
    (["--caption-dropout", "1.5"], "between 0 and 1"),
    (["--loss-weight", "p2", "--min-snr-gamma", "5"], "leave one out"),
    (["--times", "mode", "--times-scale", "2"], "between -1 and 1.75"),
    (["--times-scale=-1"], "be a positive number"),
    (["--times", "ladder", "--times-scale", "1"], "2 or more levels for ladder"),
    (["--noise-offset=-1"], "must be at least 0"),
    (["--seed", str(2**64 - 1)], "--seed 18446744073709551615 must be below 2^62"),
    (["--cfg", "nan"], "--cfg nan must be a finite number"),
    (["--times-mean", "inf"], "--times-mean inf must be a finite number"),
    (["--huber-c", "0"], "must be a positive number"),
    (["--caption-key", "dense:much"], "takes KEY or KEY:WEIGHT"),
    (["--caption-key", "dense:0"], "must be a positive number"),
    (["--caption-key", "dense:1", "dense:2"], "name every key once"),
    (["--caption-key", "dense:1", "short"], "give each a weight or none"),
    (["--buckets", "0.5"], "1 or more"),
    (["--max-skip", "1.5"], "between 0 and 1"),
    (["--cache", "somewhere"], "name that with --vae-weights"),
    (["--unet", "widths"], "KEY=VALUE"),
    (["--out", "nowhere", "--resume", "yes"], "nothing to resume"),
    (["--resume", "maybe"], "unknown --resume 'maybe'"),
    (["--device", "cuda:first"], "as in cuda:1"),
    (["--device", "tpu"], "unknown --device 'tpu'"),
    (["--dtype", "fp16"], "known: auto, bf16, bfloat16, fp32, float32"),
    (["--optimizer", "AdamV"], "unknown --optimizer 'adamv': did you mean 'adamw'"),
])
def test_mistakes_are_one_line_with_the_fix_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(argv, "")
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count("\n") == 1


@pytest.mark.parametrize("words, said", [
    (["--network", "unett"], "did you mean 'unet'"),
    (["--mask-padding"], "is for --network dit"),
    (["--objective", "denoizing"], "unknown objective 'denoizing': did you mean 'denoising'"),
    (["--text-encoder", "clyp"], "unknown text encoder 'clyp': did you mean 'clip'"),
    (["--text-join", "singel"], "did you mean 'single'"),
])
def test_names_are_looked_up_where_the_tables_are(words, said):
    with pytest.raises(ValueError, match=said):
        check_settings(parsed(*words))
    check_settings(parsed())


def test_times_have_their_kinds_own_mean_and_scale_unless_typed():
    assert (parsed().objective.times_mean, parsed().objective.times_scale) == (None, None)
    config = parsed("--times-mean=-0.5", "--times-scale", "2", "--process-options", "betas=0.1,0.2", "zero_snr=true").objective
    assert (config.times_mean, config.times_scale, config.process_options) == (-0.5, 2.0, {"betas": (0.1, 0.2), "zero_snr": True})


def test_a_resumed_run_starts_from_its_own_config(tmp_path):
    config = preset_config("tiny", out=str(tmp_path), max_steps=77, lr=0.25)
    (tmp_path / "config.json").write_text(json.dumps(flatten(config)))
    resumed = parsed("--out", str(tmp_path), "--resume", "auto", "--lr", "0.5")
    assert (resumed.optimisation.max_steps, resumed.optimisation.lr, resumed.run.resume) == (77, 0.5, "auto")
    unet = [build_dataclass(UNetConfig, each.network.settings, "--unet") for each in (resumed, config)]
    assert unet[0] == unet[1]


@pytest.mark.parametrize("words, value", [
    ("--dtype bfloat16", "bf16"), ("--dtype float32", "fp32"), ("--dtype BF16", "bf16"), ("--dtype auto", "auto"),
    ("--device GPU", "cuda"), ("--device cuda:1", "cuda:1"), ("--device gpu:0", "cuda:0"), ("--device CPU", "cpu"),
    ("--optimizer AdamW", "adamw"), ("--optimizer Muon", "muon")])
def test_the_names_that_people_type_become_the_library_s_own(words, value):
    flag, typed = words.split()
    assert flatten(parsed(flag, typed))[flag[2:]] == flatten(make_config(**{flag[2:]: typed}))[flag[2:]] == value


@pytest.mark.parametrize("typed, dtype", [
    ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16), ("float16", torch.float16), ("half", torch.float16),
    ("fp32", torch.float32), ("float32", torch.float32), ("Float32", torch.float32), ("auto", torch.float32)])
def test_the_names_of_precisions_are_understood_for_drawing_too(typed, dtype):
    assert pick_dtype(typed, torch.device("cpu")) is dtype


def test_a_device_s_other_name_is_the_same_device():
    assert pick_device("CPU") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: .* no such device|--device cuda"):
        pick_device("gpu:99" if torch.cuda.is_available() else "gpu")


def test_of_several_gpus_the_typed_one_is_taken_or_by_torchrun_s_processes_one_each(monkeypatch):
    for function, answer in dict(is_available=True, device_count=2, get_arch_list=[], get_device_capability=(9, 0)).items():
        monkeypatch.setattr(torch.cuda, function, lambda device=None, answer=answer: answer)
    assert pick_device("cuda") == pick_device("auto") == torch.device("cuda", 0) and pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("gpu") == pick_device("auto") == torch.device("cuda", 1) and pick_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="--device cuda:2: .* no such device"):
        pick_device("cuda:2")


@pytest.mark.parametrize("typed, meant", [("DDIM", "ddim"), ("Dpmpp 2M", "dpmpp_2m"), ("Logit-Normal", "logit_normal")])
def test_the_nearest_name_is_found_in_any_case(typed, meant):
    assert nearest(typed, ["ddim", "ddpm", "dpmpp_2m", "logit_normal", "normal"]) == f"did you mean '{meant}'? "


def test_network_fields_are_typed_and_checked():
    assert pairs("unet", ["widths=32,64", "linear_projection=true", "depth=2"]) == {
        "widths": (32, 64), "linear_projection": True, "depth": 2}
    with pytest.raises(ValueError, match="did you mean 'widths'"):
        build_dataclass(UNetConfig, {"widhts": (1,)}, "--unet")


# ---------------------------------------------------------------- phases and ends


def test_every_phase_has_its_size_its_shift_and_as_many_pixels_per_micro_batch():
    small, large = phases(parsed("--preset", "5090_week"))
    assert (small.data.resolution, large.data.resolution) == (256, 512) and (small.objective.shift, large.objective.shift) == (1, 2)
    assert (small.optimisation.grad_accum, large.optimisation.grad_accum) == (8, 32) and not small.data.phases and not large.data.phases
    alone = parsed("--resolution", "32")
    assert phases(alone) == [alone]
    capped = phases(parsed("--stages", "16=0.5", "64=0.5", "--batch-size", "4"))
    assert capped[1].optimisation.grad_accum == 4               # micro-batches of one picture


def test_every_phase_has_its_own_cache():
    config = parsed("--stages", "16=0.5", "64=0.5", "--cache", "a", "b", "--vae-weights", "x")
    assert [phase.data.cache for phase in phases(config)] == [["a"], ["b"]]
    assert [phase.data.cache for phase in phases(parsed("--stages", "16=0.5", "64=0.5"))] == [[], []]


def test_what_is_typed_leaves_out_what_the_preset_says_otherwise(tmp_path):
    week = parsed("--preset", "5090_week", "--max-steps", "10")
    assert (week.optimisation.max_steps, week.optimisation.budget) == (10, "") and week.data.phases
    assert not parsed("--preset", "5090_week", "--resolution", "256").data.phases
    assert parsed("--preset", "5090_week", "--stages", "128=1").data.phases == {"128": 1}
    tiny = parsed("--budget", "20m").optimisation
    assert (tiny.max_steps, tiny.budget) == (0, "20m")
    (tmp_path / "config.json").write_text(json.dumps(flatten(week)))
    again = parsed("--out", str(tmp_path), "--resume", "auto", "--resolution", "256")
    assert again.data.phases == week.data.phases


@pytest.mark.parametrize("words, said", [
    ("--max-steps 5 --budget 3m", "give one of the two"), ("--budget week", "--budget: 'week' is not a span of time"),
    ("--deadline soon", "--deadline: 'soon' is not a date"), ("--stages 256", "KEY=VALUE"), ("--stages 256=0", "--stages 256=0"),
    ("--stages big=1", "--stages big=1"), ("--vae-weights x --stages 16=1 32=1 --cache a", "name one for each")])
def test_ends_and_phases_that_make_no_sense_are_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(*words.split())
    assert end.value.code == 2 and said in capsys.readouterr().err


# ---------------------------------------------------------------- an autoencoder alone


def test_a_vae_preset_lies_over_the_preset_and_under_what_is_typed():
    config = parsed("--preset", "5090_week", "--only", "vae", "--vae-preset", "cifar10", "--vae", "depth=2", "--vae-lr", "0.1")
    row = VAE_PRESETS["cifar10"]
    own = config.autoencoder
    assert own.fields == row["vae"] | {"depth": 2} and (own.lr, own.steps) == (0.1, row["vae_steps"])
    assert (config.data.resolution, config.data.phases, config.autoencoder.weights) == (32, {}, "")         # the preset has --stages
    assert config.run.val_samples == row["val_samples"] and parsed().run.val_samples != row["val_samples"]
    taesd = parsed("--vae-preset", "cifar10", "--autoencoder", "taesd", "--vae", "width=8")
    assert taesd.autoencoder.fields == {"width": 8}


@pytest.mark.parametrize("preset", ["tiny", "tiny_dit"])
def test_an_autoencoder_of_another_kind_than_the_preset_s_is_as_small(preset, tmp_path):
    other = parsed("--preset", preset, "--autoencoder", "kl", "--vae", "depth=2")
    assert other.autoencoder.fields == TINY_VAES["kl"] | {"depth": 2}
    (tmp_path / "kl.json").write_text('{"autoencoder": "kl"}')
    assert parsed("--preset", preset, "--config", str(tmp_path / "kl.json")).autoencoder.fields == TINY_VAES["kl"]
    assert parsed("--preset", preset, "--autoencoder", "taesd").autoencoder.fields == parsed("--preset", preset).autoencoder.fields != {}
    assert parsed("--preset", "5090_week", "--autoencoder", "taesd").autoencoder.fields == {}       # the published one's size


def test_published_vae_presets_have_the_published_shapes_and_loss():
    f4, f8, f16 = (parsed("--only", "vae", "--vae-preset", name).autoencoder for name in ("kl-f4", "kl-f8", "kl-f16"))
    assert [len(own.fields["widths"]) - 1 for own in (f4, f8, f16)] == [2, 3, 4]
    assert f8.loss == {"l1": 1, "mse": 0, "kl": 1e-6, "lpips": 1, "gan": 0.5} and f8.lr == pytest.approx(4.5e-6 * f8.batch_size)


def test_a_run_folder_remembers_what_its_vae_preset_gave(tmp_path, monkeypatch):
    config = parsed("--out", str(tmp_path), "--only", "vae", "--vae-preset", "cifar10", "--vae-lr", "0.1")
    (tmp_path / "config.json").write_text(json.dumps(flatten(config)))
    monkeypatch.setitem(VAE_PRESETS, "cifar10", VAE_PRESETS["cifar10"] | {"vae_steps": 7, "vae_lr": 7.0})
    again = flatten(parsed("--out", str(tmp_path), "--resume", "yes"))
    assert json.loads(json.dumps(again)) == json.loads((tmp_path / "config.json").read_text()) | {"resume": again["resume"]}


@pytest.mark.parametrize("words, said", [
    ("--only unet", "unknown --only 'unet'"), ("--only vae --vae-weights V", "train on from it with --vae-init"),
    ("--vae-weights V --vae-init V", "train on from it with --vae-init"), ("--vae-init V --vae width=8", "leave out --vae"),
    ("--vae-freeze encoder", "name it with --vae-init"), ("--early-stop 3", "is for --only vae"),
    ("--only vae --early-stop 3", "add --vae-val-every 100"), ("--only vae --fsdp", "leave it out"),
    ("--only vae --vae-steps 0", "--vae-steps 0 must be at least 1"), ("--vae-preset kl-f9", "did you mean 'kl-f8'"),
    ("--only vae --max-steps 9", "use --vae-steps"), ("--only vae --learning-rate 0.1", "use --vae-lr"),
    ("--only vae --rollback", "does not train: leave it out"), ("--cfg 5000", "is not a guidance scale"), ("--mfu 55", "between 0 and 1"),
    ("--vae-ema 1.5", "--vae-ema 1.5 must lie between 0 and 1")])
def test_settings_of_the_first_stage_that_cannot_work_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        parsed(*words.split())
    assert said in capsys.readouterr().err


def test_with_a_budget_an_autoencoder_alone_needs_no_number_of_steps():
    assert parsed("--only", "vae", "--budget", "1h", "--vae-steps", "0").autoencoder.steps == 0
