"""The table of metrics and evaluate.py: what is refused, what is shared, what is written."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import PROMPT, ROOT, load_script, randomise, small_text
from pretend_gpu import PretendGpu, on_gpu

from tinyldm.cli import Parser, add_drawing_flags, guard
from tinyldm.diffusion.process import make_process
from tinyldm.evaluation import base
from tinyldm.evaluation.base import Evaluation, Measurement
from tinyldm.evaluation.metrics import METRICS, Metric, metric_names
from tinyldm.evaluation.prompts import reconstruct
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model
from tinyldm.model import Model
from tinyldm.models.clip_text import CLIPText
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.pipeline import draw_settings
from tinyldm.training.run_folder import find_model
from tinyldm.vendor_loaders.scheduler import to_config

evaluate = load_script("evaluate")
CAPTIONS = ["a small green triangle", "a red square"]


def brightness(evaluation: Evaluation) -> Measurement:
    """Mean of all pixels, or of one channel."""
    channel = evaluation.options["channel"]
    drawn = evaluation.draw(CAPTIONS)
    mean = float((drawn.images if channel is None else drawn.images[..., channel]).mean())
    return Measurement([f"mean brightness {mean:.1f}"], evaluation.facts(drawn.seconds) | {"mean": mean})


def fail(evaluation):
    raise ValueError("the reference pictures are gone")


def crash(evaluation):
    raise ZeroDivisionError


CHANNEL = {"--channel": {"type": int, "metavar": "C", "help": "0 to 2"}}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setitem(METRICS, "brightness", Metric("mean of all pixels", brightness, flags=CHANNEL))
    monkeypatch.setitem(METRICS, "contrast", Metric("spread of all pixels", brightness, flags=CHANNEL))
    monkeypatch.setitem(METRICS, "failing", Metric("never measured", fail))
    monkeypatch.setitem(METRICS, "crashing", Metric("a bug", crash))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small saved model that was trained on photos."""
    tokenizer, text = small_text()
    net = UNet(UNetConfig(widths=(16, 32), depth=1, attention=(False, True), heads=(2, 2), context_dim=32, groups=8, sample_size=8))
    vae = AutoencoderKL(VAEConfig(widths=(8, 16), depth=1, groups=4, sample_size=16))
    path = tmp_path_factory.mktemp("evaluate") / "model"
    save_model(path, net=randomise(net, 1), vae=randomise(vae, 2), texts=[randomise(CLIPText(text), 3)], tokenizers=[tokenizer],
               scheduler=to_config("scaled_linear", {}, "v"), defaults={"steps": 2, "cfg": 1.0, "data": "photos/"})
    return path


def run(*words) -> int:
    """evaluate.py in this process -> its exit code."""
    try:
        evaluate.ARGS = evaluate.parse([*map(str, words), "--device", "cpu", "--dtype", "fp32"])
        guard(evaluate.main)
    except SystemExit as end:
        return end.code
    return 0


# ---------------------------------------------------------------- a metric from outside


def test_a_metric_from_outside_is_measured_and_its_record_written(folder, tmp_path, capsys):
    assert run(folder, "--metric", "brightness", "--seed", 5, "--out", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "brightness.json").read_text())
    assert (record["model"], record["seed"], record["steps"], record["no_ema"]) == (str(folder), 5, 2, False)
    assert 0 < record["mean"] < 255
    out = capsys.readouterr().out
    assert out == f"mean brightness {record['mean']:.1f}\n\n{tmp_path / 'out' / 'brightness.json'}\n"


def test_a_seed_that_torch_cannot_take_is_refused_before_the_model_is_loaded(folder, tmp_path, capsys, monkeypatch):
    assert evaluate.parse([str(folder), "--seed", str(2**62 - 1)]).seed == 2**62 - 1
    monkeypatch.setattr(evaluate, "load", lambda args: pytest.fail("the model was loaded"))
    assert run(folder, "--metric", "brightness", "--seed", 2**62, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == "error: --seed 4611686018427387904 must be below 2^62\n"


def test_a_flag_of_a_metric_reaches_it_and_two_metrics_may_share_it(folder, tmp_path):
    means = []
    for words in ([], ["--channel", "0"], ["--channel", "1"]):
        assert run(folder, "--metric", "brightness", "--out", tmp_path, *words) == 0
        means.append(json.loads((tmp_path / "brightness.json").read_text())["mean"])
    assert len(set(means)) == 3


def test_what_cannot_be_measured_for_this_model_is_refused_before_anything_is_drawn(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(base, "draw", None)
    assert run(folder, "--metric", "brightness,prompts", "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "photos/" in captured.err and "'prompts' reads toyworld's pictures only" in captured.err


@pytest.mark.parametrize("source, out", [("alice/foxes", "evaluation/alice--foxes"), ("alice/foxes@v2", "evaluation/alice--foxes@v2"),
                                         ("old/foxes.ckpt", "evaluation/foxes.ckpt"), ("run", "run/evaluation")])
def test_results_lie_beside_a_model_folder_and_never_where_a_hub_id_or_a_file_would_be_hidden(folder, tmp_path, monkeypatch, source, out):
    monkeypatch.chdir(tmp_path)
    for file in ("old/foxes.ckpt", "run/model_index.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    monkeypatch.setattr(evaluate, "load_model", lambda asked, *more, **options: load_model(folder))
    found = find_model(source)
    assert run(source, "--metric", "brightness") == 0
    assert (tmp_path / out / "brightness.json").exists() and find_model(source) == found


@pytest.mark.parametrize("bad, code", [("failing", 2), ("crashing", 1)])
def test_a_metric_that_fails_leaves_the_others_their_results(folder, tmp_path, capsys, bad, code):
    assert run(folder, "--metric", bad, "brightness", "--out", tmp_path) == code
    assert [file.name for file in tmp_path.iterdir()] == ["brightness.json"]
    captured = capsys.readouterr()
    assert "mean brightness" in captured.out
    assert captured.err.endswith(f"error: not measured, for the reasons above: {bad}\n")
    assert ("error: the reference pictures are gone" if code == 2 else "ZeroDivisionError") in captured.err


def test_metrics_that_ask_for_the_same_prompts_share_the_pictures(folder, tmp_path, monkeypatch):
    real, calls = base.draw, []
    monkeypatch.setattr(base, "draw", lambda *args: calls.append(args) or real(*args))
    assert run(folder, "--metric", "brightness,contrast", "--batch-size", 1, "--seed", 3, "--out", tmp_path) == 0
    assert [list(seeds) for _, _, seeds, _ in calls] == [[3], [4]]
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("brightness", "contrast"))
    assert first == second


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("words", [["x", "--metric", "prompts,brightness"], ["x", "--metric", "prompts", "brightness"],
                                   ["--metric", "prompts", "brightness", "x"], ["--metric", "prompts,brightness", "x"],
                                   ["x", "--metric", "prompts,brightness", "prompts"]])
def test_several_metrics_are_named_with_commas_or_spaces_before_or_after_the_run(words):
    args = evaluate.parse(words)
    assert (args.run, args.metric) == ("x", ["prompts", "brightness"])


def test_without_a_name_the_metric_is_prompts():
    assert evaluate.parse(["x"]).metric == ["prompts"] == evaluate.parse(["--metric", "prompts", "x"]).metric
    with pytest.raises(ValueError, match="no metric is named"):
        metric_names([","])


@pytest.mark.parametrize("words, message", [
    (["runs/x", "--metric", "promts"], "did you mean 'prompts'"),
    (["runs/x", "--metric", "prompts,brigthness"], "did you mean 'brightness'"),
    (["runs/x", "--count", "1"], "at least 2"), (["runs/x", "--batch-size", "0"], "at least 1"),
    (["runs/x", "--smapler", "ddim"], "did you mean '--sampler'"), (["runs/x", "--dtype", "fp23"], "did you mean 'fp32'"),
    ([], "RUN"), (["--metric", "prompts"], "RUN")])
def test_a_mistyped_command_line_is_one_line_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        evaluate.parse(words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and error.count("\n") == 1


def test_help_names_every_metric_and_does_not_wait_for_torch():
    code = ("import sys, runpy; sys.argv = ['evaluate.py', '--help']\n"
            "try: runpy.run_path('evaluate.py', run_name='__main__')\n"
            "except SystemExit: print('torch' in sys.modules)")
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "prompts: share of pictures" in told and told.endswith("False\n")


def test_the_drawing_flags_are_none_unless_typed_and_have_their_usual_names():
    parser = Parser()
    add_drawing_flags(parser)
    names = ("cfg", "true_cfg", "steps", "sampler", "schedule", "guidance", "guidance_interval", "autoguidance", "first_block_cache",
             "deep_cache")
    usual = dict.fromkeys(names) | {"guidance_rescale": 0.0}
    assert vars(parser.parse_args([])) == usual
    typed = parser.parse_args(["--guidance-scale", "3", "--num_inference_steps", "9", "--sampler", "heun", "--schedule", "karras"])
    assert vars(typed) == usual | dict(cfg=3.0, steps=9, sampler="heun", schedule="karras")


# ---------------------------------------------------------------- the model, and how to draw with it


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert run(tmp_path) == 2
    assert "neither a run, a model folder nor" in capsys.readouterr().err


def test_what_was_not_typed_comes_from_the_model(folder):
    evaluation = evaluate.load(evaluate.parse([str(folder), "--steps", "9", "--device", "cpu"]))
    assert (evaluation.settings.cfg, evaluation.settings.steps, evaluation.count) == (1.0, 9, 500)
    assert evaluation.out == folder / "evaluation"
    for typed in (["--sampler", "huen"], ["--schedule", "karas"]):
        with pytest.raises(ValueError, match="did you mean"):
            evaluate.load(evaluate.parse([str(folder), *typed]))


@pytest.mark.parametrize("how", ["auto", "parts", "blocks"])
def test_with_offload_the_weights_wait_in_the_hosts_memory_and_everything_measured_is_the_same(folder, how):
    found = []
    with PretendGpu():
        for words in ([], ["--offload", how]):
            evaluation = evaluate.load(evaluate.parse([str(folder), "--device", "cuda", "--dtype", "fp32", *words]))
            assert {on_gpu(p) for module in evaluation.model.modules.values() for p in module.parameters()} == {not words}
            pictures = evaluation.draw([PROMPT, "a small green triangle"]).images
            found.append((pictures, reconstruct(evaluation.model, pictures, evaluation.device, 2)))
    assert all(np.array_equal(*pair) for pair in zip(*found)) and found[0][0].std() > 10


def test_a_picture_depends_on_its_place_in_the_list_not_on_the_batch(tmp_path, monkeypatch):
    model = Model(UNet(UNetConfig(widths=(8,), attention=(False,), heads=(1,), groups=4)), None, None, make_process("flow"), "flow", to_config("flow", {}, "flow"), {"steps": 2})
    monkeypatch.setattr(base, "draw", lambda model, prompts, seeds, how: np.array(seeds, np.uint8)[:, None, None, None])
    for batch_size in (2, 5):
        evaluation = Evaluation(model, "x", draw_settings(model), torch.device("cpu"), tmp_path, seed=7, batch_size=batch_size)
        assert evaluation.draw(list("abcde")).images.flatten().tolist() == [7, 8, 9, 10, 11]
