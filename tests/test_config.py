"""The command line: presets, typed overrides, and mistakes answered in one line with exit code 2."""

import json

import pytest

from tinyldm.config import PRESETS, Config, build, pairs, parse
from tinyldm.models.unet import UNetConfig


def test_a_preset_is_its_row_and_what_is_typed_wins():
    config, own = parse(["--preset", "tiny", "--max-steps", "7", "--lr=0.5", "--unet", "depth=3"], "", {"--dry-run": dict(
        action="store_true")})
    assert (config.max_steps, config.lr, own.dry_run) == (7, 0.5, False)
    assert config.unet == PRESETS["tiny"]["unet"] | {"depth": 3} and PRESETS["tiny"]["unet"]["depth"] != 3
    assert config.out == "runs/tiny"


def test_dashes_and_underscores_are_the_same():
    assert parse(["--max_steps", "7"], "")[0] == parse(["--max-steps", "7"], "")[0]


def test_a_script_that_knows_some_fields_takes_their_flags_only(capsys):
    config, _ = parse(["--data", "a:0.7", "b:0.3", "--resolution", "32"], "", {}, ("data", "resolution", "preset"))
    assert (config.data, config.resolution) == (["a:0.7", "b:0.3"], 32)
    with pytest.raises(SystemExit):
        parse(["--lr", "0.1"], "", {}, ("data",))


def test_every_field_is_a_flag():
    for name, value in (("seed", 3), ("caption_dropout", 0.25), ("sampler", "heun"), ("batch_size", 12)):
        assert getattr(parse([f"--{name}", str(value)], "")[0], name) == value
    assert parse(["--compile"], "")[0].compile is True and parse(["--no-compile"], "")[0].compile is False


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
    (["--noise-offset=-1"], "must be at least 0"),
    (["--huber-c", "0"], "must be a positive number"),
    (["--network", "unett"], "did you mean 'unet'"),
    (["--caption-key", "dense:much"], "takes KEY or KEY:WEIGHT"),
    (["--caption-key", "dense:0"], "must be a positive number"),
    (["--caption-key", "dense:1", "dense:2"], "name every key once"),
    (["--caption-key", "dense:1", "short"], "give each a weight or none"),
    (["--buckets", "0.5"], "1 or more"),
    (["--max-skip", "1.5"], "between 0 and 1"),
    (["--cache", "somewhere"], "name that with --vae-weights"),
    (["--mask-padding"], "is for --network dit"),
    (["--unet", "widths"], "KEY=VALUE"),
    (["--out", "nowhere", "--resume", "auto"], "nothing to resume"),
])
def test_mistakes_are_one_line_with_the_fix_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(argv, "")
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count("\n") == 1


def test_times_have_their_kinds_own_mean_and_scale_unless_typed():
    assert (parse([], "")[0].times_mean, parse([], "")[0].times_scale) == (None, None)
    config = parse(["--times-mean=-0.5", "--times-scale", "2", "--process-options", "betas=0.1,0.2", "zero_snr=true"], "")[0]
    assert (config.times_mean, config.times_scale, config.process_options) == (-0.5, 2.0, {"betas": (0.1, 0.2), "zero_snr": True})


def test_a_resumed_run_starts_from_its_own_config(tmp_path):
    config = Config(**(PRESETS["tiny"] | {"out": str(tmp_path), "max_steps": 77, "lr": 0.25}))
    (tmp_path / "config.json").write_text(json.dumps(vars(config)))
    resumed, _ = parse(["--out", str(tmp_path), "--resume", "auto", "--lr", "0.5"], "")
    assert (resumed.max_steps, resumed.lr, resumed.resume) == (77, 0.5, "auto")
    assert build(UNetConfig, resumed.unet, "--unet") == build(UNetConfig, config.unet, "--unet")


def test_network_fields_are_typed_and_checked():
    assert pairs("unet", ["widths=32,64", "linear_projection=true", "depth=2"]) == {
        "widths": (32, 64), "linear_projection": True, "depth": 2}
    with pytest.raises(ValueError, match="did you mean 'widths'"):
        build(UNetConfig, {"widhts": (1,)}, "--unet")
