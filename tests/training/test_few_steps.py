"""--objective with a --teacher, down the whole road: a model of few steps is trained, resumed, saved and drawn with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_script, log_without_timing, pictures, train_here, weights
from safetensors.torch import load_file, save_file
from small_models import drawn, unet_model

from tinyldm.config import flatten, make_config, parse
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model
from tinyldm.training.finetune import complete
from tinyldm.training.run_folder import forget_drawn, next_command, write_settings
from tinyldm.vendor_loaders.scheduler import to_config

SHORT = ("--batch-size 4 --max-steps 4 --save-every 2 --sample-every 2 --log-every 1 --keep-last 9 --dtype fp32 --lr 0.01 "
         "--caption-dropout 0.5").split()
LORA = ["--finetune", "lora", "--rank", "2"]
RUNS = {                # one with a target, one with a teacher that changes, one told a number; the others are slow proofs
    "consistency": ["--objective-options", "distil=true", "scale=2.0", "ema=0.5"],
    "progressive": ["--objective-options", "rounds=4,2"],
    "mean_flow": [], "lcm": [], "scm": [], "guided": [],
    "scm with an adversary": ["--objective-options", "gan=0.5"],
    "dmd": ["--objective-options", "gan=0.1", "every=2", "align=0.9", "segment=0.5"],
    "self_corrected": ["--objective-options", "gan=0.1", "width=8"],
    "lcm with an adapter": LORA,
}
FURTHER = {             # networks that a checkpoint holds beside the model; those that are no target or teacher have an optimizer
    "consistency": {"target"}, "lcm": {"target"}, "progressive": {"teacher"}, "scm with an adversary": {"head"}, "dmd": {"fake", "head"},
    "self_corrected": {"target", "discriminator"},
}
FAST = ("progressive",)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A small flow model that says it was trained on toyworld."""
    folder, model = tmp_path_factory.mktemp("teacher") / "model", unet_model()
    save_model(folder, net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
               scheduler=to_config("flow", {}, "flow", "ddim"), defaults=model.defaults | {"data": ["toyworld"]})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "mine", 4, (16, 16))


@pytest.fixture
def train(teacher, data, tmp_path, monkeypatch):
    script = load_script("train")

    def train(kind: str, name: str = "run", *more: str, stop_after: int | None = None) -> Path:
        words = ["--objective", kind.split()[0], "--teacher", str(teacher), "--data", str(data), "--out", str(tmp_path / name), *SHORT,
                 *RUNS[kind], *more]
        train_here(script, words, monkeypatch, stop_after)
        return tmp_path / name
    return train


def last(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in FAST)) for kind in RUNS])
def test_n_steps_and_n_more_are_two_n_steps_to_the_last_bit_with_all_further_networks(train, kind):
    whole = train(kind)
    run = train(kind, "parts", stop_after=2)
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-000002"]
    train(kind, "parts", "--resume", "yes")
    found = weights(whole / "checkpoints")
    other = weights(run / "checkpoints")
    assert found.keys() == other.keys() and all((found[name] == other[name]).all() for name in found)
    assert log_without_timing(whole) == log_without_timing(run)
    of_objective = {name.split(":")[1].split(".")[0] for name in found if "objective.safetensors" in name}
    assert of_objective == FURTHER.get(kind, set())
    moments = {name.split(":")[1].split(".")[0] for name in found if "optimizer.safetensors" in name}
    assert moments == {"net"} | (FURTHER.get(kind, set()) - {"target", "teacher"})
    for name in ("before.png", "step-000004.png"):
        assert (whole / "samples" / name).read_bytes() == (run / "samples" / name).read_bytes()


def test_the_command_after_an_adapter_of_few_steps_says_how_it_is_drawn_with():
    """Its model's sampler and guidance would draw something else."""
    settings = dict(finetune="lora", rank=4, model="m", out="r", sampler="lcm", sample_steps=4, cfg=1.0)
    assert next_command(make_config(objective="lcm", **settings)).endswith("--model m --lora r --sampler lcm --steps 4 --cfg 1")
    assert next_command(make_config(**settings)).endswith("--model m --lora r")


def test_the_model_says_how_it_is_drawn_with_and_is_another_than_its_teacher(train, teacher):
    run = train("consistency")
    model, before = load_model(last(run) / "model"), load_model(teacher)
    assert {name: model.defaults[name] for name in ("sampler", "steps", "cfg")} == dict(sampler="lcm", steps=2, cfg=1.0)
    changed = [not torch.equal(a, b) for a, b in zip(model.net.parameters(), before.net.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert all(torch.equal(a, b) for a, b in zip(model.vae.parameters(), before.vae.parameters(), strict=True))
    assert drawn(model).shape == drawn(model, steps=1).shape == (2, 16, 16, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind, name", [("mean_flow", "elapsed"), ("guided", "guidance")])
def test_a_network_that_is_told_a_number_is_saved_with_it_and_draws_by_it(train, kind, name):
    model = load_model(last(train(kind)) / "model")
    assert model.net.config.told == (name,) and model.net.time_embedding.told[name].weight.abs().max() > 0
    one, two = (drawn(model, **changed).astype(int) for changed in ((dict(told=1.0), dict(told=9.0)) if kind == "guided" else
                                                                     (dict(steps=1), dict(steps=2))))
    assert np.abs(one - two).max() > 0


@pytest.mark.parametrize("words, expected", [
    (["--network", "dit"], "--network is decided by the model"), (["--net", "told=guidance"], "--net is decided"),
    (["--process", "scaled_linear"], "--process is decided"), (["--shift", "3"], "--shift is decided"),
    (["--vae-weights", "elsewhere"], "--vae-weights is decided"), (["--mask-padding"], "--mask-padding is decided"),
    (["--loss", "l1"], "--loss is a setting of the diffusion loss"),
    (["--input-perturbation", "0.1"], "--input-perturbation is a setting of the diffusion"),
    (["--objective-options", "scale_to=0.5"], "scale_to=0.5: use more than the smallest scale, 3"),
    (["--finetune", "lora", "--rank", "2", "--lora-dropout", "0.1"], "which --lora-dropout would make different")])
def test_what_would_have_no_effect_on_a_student_is_refused(train, words, expected):
    with pytest.raises(ValueError, match=expected):
        train("lcm", "run", *words)


def test_what_a_run_with_other_settings_has_drawn_is_not_taken_for_this_one_s(tmp_path):
    """Pairs depend on teacher, scale, steps and batch size; pictures of the class on its name."""
    def begun(**settings):
        config = make_config(objective="reflow", out=str(tmp_path), **settings)
        forget_drawn(config)
        write_settings(config)
        return sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.name != "config.json")

    for folder, names in (("pairs-64", ["000000.safetensors"]), ("class", ["000000.png", "mine.png"])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    assert begun(batch_size=4) == begun(batch_size=4) == ["000000.png", "000000.safetensors", "mine.png"]      # was no run before
    assert begun(batch_size=8) == ["mine.png"]


def test_a_run_does_not_go_on_with_another_teacher(train, teacher, tmp_path):
    copy = shutil.copytree(teacher, tmp_path / "copy")
    train("consistency", "run", "--teacher", str(copy), stop_after=2)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.001 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="other weights than at step 2"):
        train("consistency", "run", "--teacher", str(copy), "--resume", "yes")


def test_an_objective_with_a_teacher_takes_all_else_from_it(teacher, capsys):
    words = ["--objective", "lcm", "--teacher", str(teacher), "--out", "nowhere"]
    found = flatten(complete(parse(words, "")[0]))
    wanted = dict(finetune="whole", data=["toyworld"], resolution=16, process="flow", prediction="flow", times="uniform", sampler="lcm",
                  sample_steps=4, cfg=1.0, model=str(teacher))
    assert {name: found[name] for name in wanted} == wanted
    typed = flatten(complete(parse([*words, "--times", "logit_normal", "--sampler", "euler", "--sample-steps", "3", "--cfg", "2"], "")[0]))
    assert [typed[name] for name in ("times", "sampler", "sample_steps", "cfg", "times_mean")] == ["logit_normal", "euler", 3, 2.0, None]
    times = flatten(complete(parse(["--objective", "scm", *words[2:]], "")[0]))
    assert [times[name] for name in ("times", "times_mean", "times_scale")] == ["log_normal", -1.0, 1.4]
    assert "the weights themselves in net" in capsys.readouterr().out


def test_a_teacher_that_does_not_say_its_data_needs_some(teacher, tmp_path):
    silent = shutil.copytree(teacher, tmp_path / "silent")
    file = silent / "tinyldm.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "data"}))
    with pytest.raises(ValueError, match="--finetune whole needs pictures: --data FOLDER"):
        complete(parse(["--objective", "lcm", "--teacher", str(silent), "--out", "nowhere"], "")[0])
    assert make_config(teacher="m").finetune.model == "m"
