"""The examples of docs/extending.md, added from outside, go the whole road without a line changed in tinyldm/."""

import json
import re
import signal
import subprocess
import sys
import time
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import ENVIRONMENT, ROOT, SMALL, load_script, log_without_timing, mistake, train_here, weights
from PIL import Image

from tinyldm import export
from tinyldm.config import parse
from tinyldm.diffusion.process import PROCESSES
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.evaluation.metrics import METRICS
from tinyldm.folders.load import load_model
from tinyldm.model import NETWORKS, TEXT_ENCODERS, muon_matrices, repeated_blocks
from tinyldm.objectives import OBJECTIVES
from tinyldm.text.encoders import JOINS
from tinyldm.training import checkpoint
from tinyldm.training.log import read

TABLES = (NETWORKS, TEXT_ENCODERS, JOINS, PROCESSES, SAMPLERS, OBJECTIVES, METRICS)
OWN = ("--network convnet --net width=16 --text-encoder bag --text width=16 --process arc --prediction v --sampler twice "
       "--objective with_probe --grad-accum 2 --dtype fp32 --log-every 2").split()
WORDS = [*SMALL[:SMALL.index("--unet")], *OWN]                 # without SMALL's own network and text encoder, which are its last words


@pytest.fixture(scope="module", autouse=True)
def extension():
    """All code blocks of the page, run as one module; afterwards the tables are as they were."""
    before = [dict(table) for table in TABLES]
    module = ModuleType("extension")
    sys.modules["extension"] = module
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL):
        exec(compile(block, "docs/extending.md", "exec"), vars(module))
    yield module
    del sys.modules["extension"]
    for table, rows in zip(TABLES, before):
        table.clear()
        table.update(rows)


@pytest.fixture(scope="module")
def train():
    return load_script("train")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train):
    """One run left alone, and one that was stopped in its middle and resumed, from the same VAE."""
    base = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        train_here(train, ["--out", str(base / "whole"), *WORDS], patch)
        again = ["--out", str(base / "halves"), *WORDS]
        train_here(train, again, patch, stop_after=3)
        train_here(train, ["--out", str(base / "halves"), "--resume", "auto"], patch)
    return base


def test_additions_are_planned(train, capsys):
    train.CONFIG, train.ARGS = parse([*WORDS, "--dry-run"], "", train.FLAGS)
    train.main()
    plan = capsys.readouterr().out
    assert re.search(r"convnet +\d", plan) and re.search(r"16 px", plan)


def test_a_run_of_additions_learns_and_a_stopped_one_ends_the_same(runs):
    whole, halves = weights(runs / "whole" / "checkpoints" / "step-000006"), weights(runs / "halves" / "checkpoints" / "step-000006")
    assert whole.keys() == halves.keys() and all((whole[name] == halves[name]).all() for name in whole)
    assert log_without_timing(runs / "whole") == log_without_timing(runs / "halves")
    first = weights(runs / "whole" / "checkpoints" / "step-000002")
    for part in ("transformer", "text_encoder"):
        moved = [name for name in whole if f"model/{part}/" in name and not (whole[name] == first[name]).all()]
        assert moved, part


def test_a_second_turn_has_parameters_optimizer_and_loss_of_its_own(runs):
    folder = runs / "whole" / "checkpoints"
    early, late = weights(folder / "step-000002"), weights(folder / "step-000006")
    probe = [name for name in late if name.startswith("objective.safetensors:probe.")]
    assert len(probe) == 4 and any((early[name] != late[name]).any() for name in probe)
    assert any(name.startswith("optimizer.safetensors:probe.") for name in late)
    rows = [row for row in read(runs / "whole" / "log.jsonl") if row["stage"] == "step" and "loss" in row]
    assert all(row["loss_probe"] > 0 and row["loss_probe"] != row["loss"] for row in rows)
    assert checkpoint.read_state(folder / "step-000006")["meters"]["probe"]["skipped"] == 0


def test_a_turn_of_every_second_step_leaves_its_network_alone_in_the_others(tmp_path, train, monkeypatch, runs):
    out = ["--out", str(tmp_path / "run"), *WORDS, "--vae-weights", str(runs / "whole" / "vae"), "--save-every", "1", "--sample-every", "0"]
    train_here(train, out, monkeypatch)
    steps = [weights(tmp_path / "run" / "checkpoints" / f"step-{step:06d}") for step in (1, 2, 3)]
    probe = [name for name in steps[0] if name.startswith("objective.safetensors")]
    same = [all((a[name] == b[name]).all() for name in probe) for a, b in zip(steps, steps[1:])]
    assert same == [True, False]                                # step 2 has no turn for it, step 3 has


def test_a_loss_of_a_second_turn_that_is_not_finite_costs_that_update_alone(tmp_path, train, monkeypatch, runs, extension):
    real, calls = extension.WithProbe.losses, []

    def losses(self, turn, networks, batch, progress):
        calls.append(turn.name)
        bad = turn.name == "probe" and calls.count("probe") in (3, 4)
        return real(self, turn, networks, batch, progress) * (float("nan") if bad else 1)

    monkeypatch.setattr(extension.WithProbe, "losses", losses)
    words = [*WORDS, "--vae-weights", str(runs / "whole" / "vae"), "--save-every", "1", "--sample-every", "0", "--val-every", "0"]
    train_here(train, ["--out", str(tmp_path / "run"), *words], monkeypatch)
    events = [(row["event"], row["step"]) for row in read(tmp_path / "run" / "log.jsonl") if "event" in row]
    assert events == [("skipped", 3)] and calls.count("probe") == 6          # of both micro-batches of steps 1, 3 and 5
    states = [weights(tmp_path / "run" / "checkpoints" / f"step-{step:06d}") for step in (2, 3, 5)]
    probe = [name for name in states[0] if name.startswith("objective.safetensors")]
    same = [all((a[name] == b[name]).all() for name in probe) for a, b in zip(states, states[1:])]
    assert same == [True, False]                                # left out in step 3, taken again in step 5
    net = [name for name in states[0] if "model/transformer" in name]
    assert any((states[0][name] != states[1][name]).any() for name in net)


def test_a_model_of_additions_opens_as_what_it_is(runs, extension):
    model = load_model(runs / "whole" / "checkpoints" / "step-000006" / "model")
    assert type(model.net) is extension.ConvNet and type(model.text.modules["text"]) is extension.Bag
    assert type(model.process) is extension.Arc and model.prediction == "v" and model.defaults["sampler"] == "twice"
    assert [type(block) for block in repeated_blocks(model.net)] == [extension.ConvBlock] * 2
    assert muon_matrices({"net": model.net}) == {f"net.blocks.{i}.conv_{end}.weight" for i in range(2) for end in ("in", "out")}


def test_a_buffer_of_an_added_network_is_saved_beside_the_averages_and_comes_back(tmp_path, train, monkeypatch, runs, extension):
    real = extension.ConvNet.__init__

    def init(self, config):
        real(self, config)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x, t, cond, original=extension.ConvNet.forward):
        self.calls += self.training
        return original(self, x, t, cond)

    monkeypatch.setattr(extension.ConvNet, "__init__", init), monkeypatch.setattr(extension.ConvNet, "forward", forward)
    words = [*WORDS, "--vae-weights", str(runs / "whole" / "vae"), "--sample-every", "0", "--val-every", "0", "--val-samples", "0"]
    train_here(train, ["--out", str(tmp_path / "run"), *words], monkeypatch, stop_after=2)
    train_here(train, ["--out", str(tmp_path / "run"), "--resume", "auto"], monkeypatch)
    model = load_model(tmp_path / "run" / "checkpoints" / "step-000006" / "model")
    assert model.net.calls.item() == 12                         # two micro-batches in each of six steps, two of them before


def test_blocks_of_an_added_network_are_checkpointed_without_a_change_of_the_result(extension):
    torch.manual_seed(0)
    net, gradients = extension.ConvNet(extension.ConvNetConfig(context_dim=8, width=8)), []
    cond = extension.Cond(torch.randn(2, 3, 8))
    for net.grad_checkpointing in (False, True):
        net.zero_grad()
        net(torch.ones(2, 4, 8, 8), torch.ones(2), cond).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_additions_draw_and_are_measured(runs, tmp_path, capsys):
    sample = load_script("sample")
    sample.ARGS = sample.parse(["a red fox", "--model", str(runs / "whole"), "--steps", "3", "--out", str(tmp_path / "fox.png")])
    sample.main()
    assert Image.open(tmp_path / "fox.png").size == (16, 16) and "Sampler: twice" in Image.open(tmp_path / "fox.png").text["parameters"]
    evaluate = load_script("evaluate")
    evaluate.ARGS = evaluate.parse([str(runs / "whole"), "--metric", "brightness", "--count", "2", "--steps", "2", "--out", str(tmp_path)])
    evaluate.main()
    assert 0 < json.loads((tmp_path / "brightness.json").read_text())["brightness"] < 255
    assert "mean brightness" in capsys.readouterr().out


def test_an_added_network_is_exported_for_tinyldm_and_opens_again(runs, tmp_path):
    export.ARGS = export.parse([str(runs / "whole"), str(tmp_path / "model")])
    export.main()
    one, two = load_model(runs / "whole"  / "checkpoints" / "step-000006" / "model"), load_model(tmp_path / "model")
    for part, module in one.modules.items():
        other = two.modules[part].state_dict()
        assert all(torch.equal(tensor, other[name]) for name, tensor in module.state_dict().items()), part
    assert "No stock pipeline" in (tmp_path / "model" / "README.md").read_text()


def test_a_published_network_on_an_added_process_is_refused_for_export_with_the_reason(tmp_path, train, monkeypatch, runs):
    words = [*SMALL, "--vae-weights", str(runs / "whole" / "vae"), "--process", "arc", "--prediction", "v", "--max-steps", "1"]
    train_here(train, ["--out", str(tmp_path / "run"), *words], monkeypatch)
    export.ARGS = export.parse([str(tmp_path / "run"), str(tmp_path / "model")])
    with pytest.raises(ValueError, match="cannot be exported: .*arc"):
        export.main()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("words, reason", [
    (["--network", "convnett"], "did you mean 'convnet'"),
    (["--objective", "with_prob"], "did you mean 'with_probe'"),
    (["--text-encoder", "bags"], "did you mean 'bag'"),
    (["--sampler", "twize"], "did you mean 'twice'"),
    (["--process", "arcs"], "did you mean 'arc'"),
    (["--network", "convnet", "--net", "widht=3"], "did you mean 'width'"),
    (["--network", "convnet", "--mask-padding"], "attend to the padding"),
    (["--objective-options", "speed=2"], "unknown denoising option 'speed'"),
    (["--process", "arc", "--process-options", "speed=2"], "unknown arc option 'speed'"),
])
def test_what_cannot_work_is_refused_before_anything_is_written(words, reason, tmp_path, capsys):
    assert reason in mistake("train", ["--out", tmp_path / "run", *SMALL, *words], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_of_additions_survives_a_kill_as_its_users_start_it(tmp_path, runs):
    """As the page says: the module is imported, then the script runs. kill -9 in the middle, then resumed."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    (tmp_path / "additions.py").write_text("\n".join(blocks))
    start = [sys.executable, "-c", 'import additions, runpy, sys; sys.argv[0] = "train.py"; runpy.run_path("train.py", run_name="__main__")']
    options = dict(cwd=ROOT, env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for resume in ([*WORDS, "--vae-weights", str(runs / "whole" / "vae")], ["--resume", "auto"]):
        job = subprocess.Popen([*start, "--out", str(tmp_path / "run"), *resume], **options)
        while resume[0] != "--resume" and job.poll() is None and not (tmp_path / "run" / "checkpoints" / "step-000002").exists():
            time.sleep(0.005)
        if resume[0] != "--resume":
            job.kill()
        error = job.communicate()[1]
        assert job.returncode == (0 if resume[0] == "--resume" else -signal.SIGKILL), error
    whole, killed = (weights(folder / "checkpoints" / "step-000006") for folder in (runs / "whole", tmp_path / "run"))
    assert all((whole[name] == killed[name]).all() for name in whole)


def test_additions_leave_nothing_behind_in_a_plain_run(train, tmp_path, monkeypatch):
    train_here(train, ["--out", str(tmp_path / "run"), *SMALL, "--max-steps", "1"], monkeypatch)
    files = {file.name for file in (tmp_path / "run" / "checkpoints" / "step-000001").iterdir()}
    assert files == {"model", "optimizer.safetensors", "state.json"}
    assert np.isfinite(read(tmp_path / "run" / "log.jsonl")[-1]["val_raw"])
