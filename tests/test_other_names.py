"""What users of other programs type is understood, or answered with our name; a run is named where it is resumed; settings come from a file."""

import json
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ENVIRONMENT, ROOT, load_script

from tinyldm import other_names
from tinyldm.cli import guard
from tinyldm.config import PRESETS, flatten, parse, preset_config
from tinyldm.config.fields import SETTINGS
from tinyldm.config.levels import with_levels
from tinyldm.config.presets import TINY_FLUX
from tinyldm.folders import hub
from tinyldm.model import network_config
from tinyldm.other_names import BOTH, DRAWING, TRAINING, Differs, Same
from tinyldm.version import version


def refused(words: list[str], read, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        read(words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    return error


def training(*words: str) -> dict:
    return flatten(parse(list(words), "")[0])


def train_flags(words: list[str]):
    return parse(words, "")


def sampling(*words: str):
    return load_script("sample").parse(["a fox", *words])


@pytest.mark.parametrize("theirs, ours", [
    ("--learning_rate 1e-3", "--lr 1e-3"), ("--learning-rate=1e-3", "--lr 1e-3"), ("--train_batch_size 8", "--batch-size 8"),
    ("--max_train_steps=9", "--max-steps 9"), ("--mixed_precision bf16", "--dtype bf16"), ("--mixed_precision no", "--dtype fp32"),
    ("--mixed_precision=no", "--dtype fp32"), ("--output_dir here", "--out here"), ("-o here", "--out here"),
    ("--resume_from_checkpoint latest", "--resume auto"), ("--report_to wandb", "--track wandb"), ("--max_grad_norm 2", "--grad-clip 2"),
    ("--gradient_accumulation_steps 2", "--grad-accum 2"), ("--gradient_checkpointing", "--grad-checkpointing"),
    ("--prediction_type v_prediction --process linear", "--prediction v --process linear"), ("--train_data_dir pics", "--data pics"),
    ("--finetune lora --network_dim 8 --instance_prompt x", "--finetune lora --rank 8 --instance x")])
def test_the_same_thing_is_understood_by_the_names_of_diffusers_and_sd_scripts(theirs, ours):
    assert training(*theirs.split()) == training(*ours.split())


@pytest.mark.parametrize("theirs, ours", [
    ("--num_images_per_prompt 3", "-n 3"), ("--cfg_scale 3", "--cfg 3"), ("--guidance_scale=3", "--cfg 3"), ("-o x", "--out x"),
    ("--image x.png --mask_image m.png", "--init-image x.png --mask m.png"), ("--denoising_strength 0.5 --image x", "--strength 0.5 --init-image x"),
    ("--num_inference_steps 7", "--steps 7"), ("--negative bad", "--negative-prompt bad"), ("-W 64 -H 32", "--width 64 --height 32")])
def test_the_same_thing_is_understood_by_the_names_of_programs_that_draw(theirs, ours):
    assert vars(sampling(*theirs.split())) == vars(sampling(*ours.split()))


@pytest.mark.parametrize("words, said", [
    ("--epochs 3", "--epochs is not known: training is counted in steps, --max-steps N"),
    ("--num_workers 2", "--num-workers is not needed"), ("--steps 3", "--max-steps are those of training, --sample-steps"),
    ("--train_batch_size 4 --grad-accum 2", "--train-batch-size counts the pictures of one micro-batch of one process: --batch-size"),
    ("--preset 5090_week --train_batch_size 64", "over 8 micro-batches"), ("--logging_dir x", "in the run's folder, --out")])
def test_another_thing_by_another_name_is_refused_with_ours(words, said, capsys):
    assert said in refused(words.split(), train_flags, capsys)


def test_a_batch_size_of_one_process_is_refused_where_there_are_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "over 1 micro-batches and 2 processes" in refused(["--train_batch_size", "4"], train_flags, capsys)
    assert training("--batch-size", "4")["batch_size"] == 4


@pytest.mark.parametrize("flag, hint", [("--lrr", "did you mean '--lr'? "), ("--max-stepz", "did you mean '--max-steps'? "),
                                        ("--outt", "did you mean '--out'? "), ("--foo", ""), ("--gpus", ""), ("--shuffle", "")])
def test_only_a_near_name_is_suggested(flag, hint, capsys):
    assert refused([flag, "1"], train_flags, capsys) == f"error: unknown argument '{flag}': {hint}--help lists all\n"


def test_captions_may_follow_prompt(capsys):
    parsed = load_script("sample").parse
    for words in (["--prompt", "a", "b", "--steps", "3"], ["--steps", "3", "--prompt", "a", "--prompt", "b"][:4] + ["b"], ["a", "--prompt", "b"]):
        assert parsed(words).prompt == ["a", "b"]


@pytest.mark.parametrize("name, words", [("sample", ["fox"]), ("evaluate", ["runs/x"])])
def test_steps_that_no_picture_needs_are_refused_at_once(name, words, capsys):
    for steps in (0, 100_000_000):
        said = refused([*words, "--steps", str(steps)], load_script(name).parse, capsys)
        assert f"--steps {steps} must lie between 1 and 10,000: 20 to 50 are usual" in said
    assert "--sample-steps 100000000 must lie" in refused(["--sample-steps", "100000000"], train_flags, capsys)
    assert "pictures of 100000 pixels on a side are too large: 16384 at most" in refused(["--resolution", "100000"], train_flags, capsys)


def test_every_row_leads_to_a_flag_and_no_row_hides_one(capsys):
    """Our flags are found by what a script says of one that it does not know."""
    help_of = lambda name: subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
                                          text=True).stdout
    known = {name: set(re.findall(r"(?<!\S)(--?[a-zA-Z][\w-]*)", re.sub(r"[,\[\]|]", " ", help_of(name)))) for name in ("train", "sample", "evaluate")}
    drawing = known["sample"] | known["evaluate"]
    for table, flags in ((TRAINING, known["train"]), (DRAWING, drawing), (BOTH, known["train"] | drawing)):
        for name, row in table.items():
            assert name not in flags or name in ("--guidance-scale", "--vae-weights"), name
            assert isinstance(row, Differs) and row.advice or row.ours in flags, name
            assert "_" not in name


def test_a_name_of_training_means_nothing_to_a_script_that_draws():
    assert other_names.ours("--train-batch-size", ["--batch-size", "--steps"]) is None
    assert other_names.ours("--train-batch-size", ["--batch-size", "--lr"]) == Same("--batch-size")
    assert other_names.ours("--image", ["--image", "--init-image"]) is None                 # a script's own flag comes first


# ---- --resume RUN, --config FILE


@pytest.fixture
def run(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text(json.dumps(training("--batch-size", "8", "--cfg", "2") | {"directory": str(tmp_path)}))
    return tmp_path / "here"


def test_a_run_to_resume_can_be_named_behind_resume(run, monkeypatch):
    found = training("--resume", str(run))
    assert (found["out"], found["resume"], found["batch_size"]) == (str(run), "auto", 8)
    assert training("--resume", str(run)) == training("--resume", "yes", "--out", str(run)) == training("--resume", f"{run}/")
    monkeypatch.chdir(run.parent)
    assert training("--resume", "here")["batch_size"] == 8


@pytest.mark.parametrize("words, said", [
    (["--resume", "RUN", "--out", "other"], "are two runs: leave one out"), (["--resume", "no/run"], "nothing to resume: no/run/config.json"),
    (["--resume", "RUN/checkpoints/step-000500"], "name the run, --resume "), (["--resume", "mabye"], "unknown --resume 'mabye'")])
def test_a_run_that_cannot_be_resumed_is_said(words, said, run, capsys):
    assert said in refused([word.replace("RUN", str(run)) for word in words], train_flags, capsys)


def test_settings_come_from_a_run_s_file_and_what_is_typed_wins(run):
    for path in (run, run / "config.json"):
        found = training("--config", str(path), "--cfg", "3")
        assert (found["batch_size"], found["cfg"], found["out"], found["resume"]) == (8, 3.0, "runs/tiny", "no")


def test_a_file_may_hold_some_settings_and_follows_a_preset(tmp_path):
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"max-steps": 5, "preset": "5090_week", "unet": {"widths": [64, 128]}}))
    found = training("--config", str(file))
    assert (found["max_steps"], found["budget"], found["batch_size"], found["out"]) == (5, "", 512, "runs/5090_week")


@pytest.mark.parametrize("content, said", [("{", "Expecting"), ("[]", "it holds no {...}"), ('{"stepz": 1}', "unknown setting in"),
                                           ('{"max_steps": "x"}', "--max-steps=x must be a whole number"), ('{"unet": 3}', "--unet=3 must be a table"),
                                           (None, "No such file")])
def test_a_file_that_holds_no_settings_is_one_line(content, said, tmp_path, capsys):
    if content is not None:
        (tmp_path / "f.json").write_text(content)
    assert said in refused(["--config", str(tmp_path / "f.json")], train_flags, capsys)


# ---- what follows from other settings


TINY = PRESETS["tiny"]["unet"]


@pytest.mark.parametrize("typed, before, heads, attention", [
    (dict(widths=(64, 128, 256)), TINY, (2, 4, 8), (True, True, True)),
    (dict(widths=96), TINY, (3,), (True,)),
    (dict(widths=[40, 128]), TINY, (1, 4), (True, True)),
    (dict(widths=(64, 128, 256), heads=(1, 1, 1)), TINY, (1, 1, 1), (True, True, True)),
    (dict(widths=(128, 256)), {}, (2, 4), (True, True)),
    (dict(widths=(8, 16, 32)), dict(widths=(8, 16), heads=(1, 2), attention=(False, True)), (1, 2, 4), (False, True, True))])
def test_the_levels_of_a_u_net_follow_from_its_widths(typed, before, heads, attention):
    found = before | with_levels(typed, before)
    assert (found["heads"], found["attention"]) == (heads, attention)
    assert network_config("unet", found | {"groups": 8}).heads == heads


def test_what_is_typed_of_a_u_net_without_new_widths_is_left_alone():
    for typed in (dict(depth=3), dict(widths="x"), dict(widths=(64, 128), depth=3), dict(widths=(0, 8))):
        assert with_levels(typed, TINY) == typed
    assert training("--unet", "widths=64,128,256")["unet"]["heads"] == training("--net", "widths=64,128,256")["net"]["heads"] == (2, 4, 8)


@pytest.mark.parametrize("words, row", [(["--network", "dit"], PRESETS["tiny_dit"]), (["--network", "mmdit"], PRESETS["tiny_mmdit"]),
                                        (["--preset", "tiny_mmdit", "--network", "unet"], PRESETS["tiny"]), (["--network", "flux"], TINY_FLUX),
                                        (["--preset", "5090_week", "--network", "unet"], PRESETS["5090_week_unet"])])
def test_another_network_on_a_preset_has_a_size_that_fits_it(words, row):
    found = training(*words)
    assert {name: found[name] for name in row} == row and found["out"] == f"runs/{found['preset']}"
    assert preset_config("tiny").network.settings == TINY


# ---- ends


def test_ctrl_c_ends_a_script_with_130_and_after_its_clearing_up(capsys):
    def main():
        try:
            raise KeyboardInterrupt
        finally:
            print("cleared up")

    with pytest.raises(SystemExit) as end:
        guard(main)
    out, err = capsys.readouterr()
    assert end.value.code == 130 and out == "cleared up\n" and err == "\nstopped\n"


def test_ctrl_c_while_torch_is_loaded_is_no_traceback():
    code = "import os, signal\nfrom tinyldm.cli import begin\nbegin()\nos.kill(os.getpid(), signal.SIGINT)\nprint('not reached')"
    usual = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)                    # the tests themselves may be running under nohup
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, preexec_fn=usual)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    ignored = code.replace("begin()", "signal.signal(signal.SIGINT, signal.SIG_IGN)\nbegin()", 1)
    assert subprocess.run([sys.executable, "-c", ignored], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True).stdout == "not reached\n"


@pytest.mark.parametrize("script", ["train", "sample", "evaluate", "prepare", "tinyldm/export", "tinyldm/reconstruct", "tinyldm/adapters/__main__"])
def test_every_script_lets_ctrl_c_end_it_before_it_loads_torch(script):
    content = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    assert content.index("    begin()") < content.index("\nif __name__ == \"__main__\":\n    outlive_terminal()" if "    outlive_terminal()\n    guard" in content else "guard(main)")


def test_of_several_processes_one_prints_a_mistake_and_tells_torchrun(tmp_path, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("tinyldm.cli.time", SimpleNamespace(sleep=waited.append, time=lambda: 7))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    before = signal.getsignal(signal.SIGTERM)
    for rank, expected in (("0", []), ("1", [10.0])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert "unknown argument '--foo'" in refused(["--foo"], train_flags, capsys) and waited == expected
    signal.signal(signal.SIGTERM, before)
    assert json.loads((tmp_path / "error.json").read_text()) == {
        "message": "error: unknown argument '--foo': --help lists all", "timestamp": 7}


# ---- what is missing, and versions


def test_a_missing_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not hub.is_hub_id("runs/tiny") and hub.is_hub_id("models/tiny") and hub.is_hub_id("runs/tiny@main")
    assert "there is no folder runs here" in str(hub.missing("runs/tiny"))
    (tmp_path / "models" / "tiny2").mkdir(parents=True)
    assert not hub.is_hub_id("models/tiny") and hub.is_hub_id("models/tiny@main") and hub.is_hub_id("openai/clip")
    assert "did you mean 'models/tiny2'? " in str(hub.missing("models/tiny")) and "models/tiny@main" in str(hub.missing("models/tiny"))


def test_every_script_says_its_version():
    assert re.fullmatch(r"0\.1\.0( \([0-9a-f]{10}\+?\))?", version())
    for words in (["train.py"], ["-m", "tinyldm.adapters"]):
        done = subprocess.run([sys.executable, *words, "--version"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"tinyldm {version()}\n")


def test_a_vocabulary_too_small_for_any_text_is_refused_before_the_work():
    from tinyldm.training.preflight import check_settings
    for kind, least in (("clip", 514), ("t5", None)):
        with pytest.raises(ValueError, match=f"vocab_size 10 is below the {least or ''}"):
            check_settings(parse(["--vocab-size", "10", "--text-encoder", kind], "")[0])


def test_every_setting_has_a_name_that_no_other_program_gives_to_another_thing():
    ours = {"--" + name.replace("_", "-") for name in SETTINGS}
    assert not ours & (TRAINING.keys() | BOTH.keys())
