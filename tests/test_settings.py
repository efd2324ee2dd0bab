"""The fields of a config: what each says of itself, which a resumed run keeps, and the names that older runs had."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import get_type_hints

import pytest

from tinyldm.config import (
    PATHS,
    PRESETS,
    Config,
    DataConfig,
    change,
    check,
    fields,
    flatten,
    make_config,
    parse,
    preset_config,
)
from tinyldm.config.fields import OTHER_NAMES, SETTINGS, fixed, free


def parsed(*words) -> Config:
    return parse(list(words), "")[0]


def all_fields():
    """(group, field) of every setting."""
    return [(group, each) for group, kind in get_type_hints(Config).items() for each in dataclasses.fields(kind)]


def test_every_setting_says_whether_a_resumed_run_keeps_it_and_what_it_is():
    assert len(all_fields()) == len(SETTINGS) > 90
    for group, each in all_fields():
        assert each.metadata.keys() >= {"kept", "help", "flag", "also", "clears"}, f"{group}.{each.name}: use fixed() or free()"
        assert isinstance(each.metadata["kept"], bool) and len(each.metadata["help"]) > 5


def test_a_setting_with_neither_fixed_nor_free_fails(monkeypatch):
    @dataclass(frozen=True)
    class Group(DataConfig):
        undecided: int = field(default=3)

    monkeypatch.setitem(fields.Config.__annotations__, "data", Group)
    with pytest.raises(KeyError):
        fields._settings()


def test_what_a_resumed_run_keeps_and_what_it_may_change():
    kept = """seed data scenes caption_key resolution stages buckets flip moments min_side max_aspect min_caption max_caption cache
        only vae_preset autoencoder vae_init vae_optimizer vae_ema vae vae_weights vae_loss vae_lpips vae_gan vae_latents vae_freeze
        text text_weights vocab_size network unet dit process process_options shift zero_terminal_snr prediction
        learned_variance mask_padding optimizer ema_widths preset batch_size val_samples""".split()
    may_change = """out resume device dtype compile compile_blocks max_skip encode_batch_size vae_steps vae_pictures vae_batch_size vae_crop vae_lr
        vae_muon_lr vae_val_every early_stop
        times times_mean times_scale stratified_times loss huber_c loss_weight min_snr_gamma p2_gamma noise_offset
        input_perturbation caption_dropout max_steps budget deadline grad_accum lr muon_lr text_lr weight_decay warmup_steps decay
        grad_clip ema_decay rollback grad_checkpointing fsdp deterministic log_every track save_every keep_last keep_every val_every
        sample_every sample_prompts sampler sample_steps cfg pictures utilisation gpu_gb gpu_tflops""".split()
    assert all(SETTINGS[name].kept for name in kept) and not any(SETTINGS[name].kept for name in may_change)


def test_a_resumed_run_that_is_asked_for_another_batch_size_is_told_what_it_may_change(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(flatten(preset_config("tiny", batch_size=12, val_samples=8))))
    resume = ["--out", str(tmp_path), "--resume", "auto"]
    assert parsed(*resume, "--batch-size", "12", "--val-samples", "8", "--grad-accum", "3").optimisation.grad_accum == 3
    for words, said in (
            (["--batch-size", "6"], "a run keeps its --batch-size (12): leave it out to resume (--grad-accum makes micro-batches, and so "
                                    "the memory, smaller), or start another run with --out"),
            (["--val-samples", "9"], "a run keeps its --val-samples (8): leave it out to resume, or start another run with --out")):
        with pytest.raises(SystemExit):
            parsed(*resume, *words)
        assert said in capsys.readouterr().err


def test_fixed_and_free_are_the_two_ways_to_make_a_setting():
    kept, changed = fixed([1], "one", flag="own"), free(2, "two", also=("zwei",), clears={"own": 0})
    assert kept.metadata == {"help": "one", "kept": True, "flag": "own", "also": (), "clears": {}} and kept.default_factory() == [1]
    assert changed.metadata["kept"] is False and changed.metadata["clears"] == {"own": 0} and changed.default == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_go_flat_and_back(preset):
    config = preset_config(preset, lr=0.5, out="somewhere")
    flat = flatten(config)
    assert list(flat) == list(SETTINGS) and make_config(**flat) == config
    assert make_config(**json.loads(json.dumps(flat))).data == config.data     # as config.json has it
    other = change(config, lr=0.25, resolution=32, sample_steps=3)
    assert (other.optimisation.lr, other.data.resolution, other.drawing.steps) == (0.25, 32, 3)
    assert {name for name, value in flatten(other).items() if value != flat[name]} <= {"lr", "resolution", "sample_steps"}
    assert flatten(config) == flat                                              # which did not change


def test_defaults_are_not_shared():
    one = make_config()
    one.data.sources.append("more"), one.network.unet.update(depth=3)
    assert make_config().data.sources == ["toyworld"] and make_config().network.unet == {}


def test_a_name_that_no_setting_has_is_refused():
    for wrong in (lambda: make_config(learning_rate=1), lambda: change(make_config(), rate=1), lambda: preset_config("tiny", steps=1)):
        with pytest.raises(ValueError, match="there is no setting '(learning_rate|rate|steps)'"):
            wrong()
    with pytest.raises(ValueError, match="unknown preset 'tinny': did you mean 'tiny'"):
        preset_config("tinny")


def test_the_names_that_are_checked_are_settings():
    named = {*check.AT_LEAST, *check.POSITIVE, *check.FRACTIONS, *fields.SPELLINGS, *PATHS, "vae_steps"}
    named |= {other for setting in SETTINGS.values() for other in setting.clears}
    assert named <= SETTINGS.keys() and not OTHER_NAMES.keys() & SETTINGS.keys()
    assert all(name in SETTINGS for row in PRESETS.values() for name in row)


def test_numbers_that_are_checked_are_refused_where_they_are_wrong():
    """Every bound of the tables, by way of the command line's check."""
    for name, smallest in check.AT_LEAST.items():
        with pytest.raises(ValueError, match=f"{check.flag(name)} {smallest - 1} must be at least {smallest}"):
            check.check(preset_config("tiny", **{name: smallest - 1}))
    for name in check.POSITIVE:
        with pytest.raises(ValueError, match=f"{check.flag(name)} 0 must be a positive number"):
            check.check(preset_config("tiny", **{name: 0}))
    for name in check.FRACTIONS:
        with pytest.raises(ValueError, match=f"{check.flag(name)} -1 must lie between 0 and 1"):
            check.check(preset_config("tiny", **{name: -1}))
    for name in ("device", "dtype", "optimizer"):
        with pytest.raises(ValueError, match=f"unknown --{name} 'x'"):
            preset_config("tiny", **{name: "x"})


OLD = dict(preset="tiny", out="runs/old", resume="no", data="toyworld more", scenes=64, cache="", mfu=0.4, max_steps=77, lr=0.25, stages={},
           network="dit", dit={"width": 64, "layers": 2}, vae={"widths": [8, 16]}, vae_steps=10, times_mean=None, compile=None,
           ema_widths=[], gpu_gb=32.0, of_yesterday=3)


def test_the_config_json_of_older_runs_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD | {"cache": "somewhere", "vae_weights": "there"}))
    config = parsed("--out", str(tmp_path), "--resume", "auto")
    assert config.data.sources == ["toyworld", "more"] and config.data.cache == ["somewhere"] and config.plan.utilisation == 0.4
    assert (config.optimisation.max_steps, config.network.name, config.network.settings) == (77, "dit", {"width": 64, "layers": 2})
    assert config.autoencoder.fields == {"widths": [8, 16]} and config.autoencoder.decay == 0.6      # which was always that
    assert config.objective.name == "denoising" and config.text.encoder == "clip"
    (tmp_path / "config.json").write_text(json.dumps(OLD))
    assert parsed("--out", str(tmp_path), "--resume", "auto").data.cache == []
    saved = flatten(make_config(**{name: value for name, value in OLD.items() if name != "of_yesterday"}))
    assert "mfu" not in saved and saved["utilisation"] == 0.4 and saved["data"] == ["toyworld", "more"]


@pytest.mark.parametrize("words", [["--data", "toyworld", "more"], ["--text-encoder", "clip"], ["--objective", "denoising"],
                                   ["--dit", "width=64"], ["--network", "dit"], ["--stages", "16=1"]])
def test_an_older_run_may_be_told_again_what_it_keeps(tmp_path, words, capsys):
    saved = OLD | {"stages": {"16": 1}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    plain, repeated = (parsed("--out", str(tmp_path), "--resume", "auto", *more) for more in ([], words))
    assert plain == repeated
    other = {"--stages": ["16=1", "32=1"], "--dit": ["width=32"]}.get(words[0], ["another"])
    with pytest.raises(SystemExit):
        parsed("--out", str(tmp_path), "--resume", "auto", words[0], *other)
    assert f"a run keeps its {words[0]}" in capsys.readouterr().err


def test_older_names_of_flags_are_understood():
    assert parsed("--mfu", "0.3").plan.utilisation == parsed("--utilisation", "0.3").plan.utilisation == 0.3
    one, two = parsed("--phases", "16=0.5", "32=0.5"), parsed("--stages", "16=0.5", "32=0.5")
    assert one == two and one.data.phases == {"16": 0.5, "32": 0.5} and one.data.resolution == 16
    assert make_config(phases={"16": 1.0}) == make_config(stages={"16": 1.0}) and flatten(one)["stages"] == {"16": 0.5, "32": 0.5}


def test_fields_of_any_network_are_given_by_one_flag():
    config = parsed("--network", "dit", "--dit", "width=32", "layers=2", "--net", "layers=3")
    assert config.network.settings == PRESETS["tiny_dit"]["dit"] | {"width": 32, "layers": 3}
    assert parsed("--net", "depth=5").network.settings == PRESETS["tiny"]["unet"] | {"depth": 5}
