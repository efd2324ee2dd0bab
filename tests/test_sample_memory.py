"""sample.py's flags for large models: what drawing takes, and weights that wait in the host's memory."""

import numpy as np
import pytest
from helpers import PROMPT, load_script, mistake, script
from PIL import Image
from small_models import unet_model

from tinyldm.folders.save import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, model = tmp_path_factory.mktemp("sample") / "model", unet_model()
    save_model(path, net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults=model.defaults)
    return path


def test_a_dry_run_says_what_drawing_takes_and_draws_nothing(folder, tmp_path, capsys):
    sample = load_script("sample")
    words = [PROMPT, "a boat", "--model", folder, "--dry-run", "--device", "cpu", "--batch-size", 2, "-n", 3, "--out", tmp_path / "out"]
    sample.ARGS = sample.parse([*map(str, words)])
    capsys.readouterr()
    sample.main()
    said = capsys.readouterr()
    assert said.err == "" and not (tmp_path / "out").exists()
    assert "activations (estimate): 2 x 16x16, cfg 3; 3 captions" in said.out
    assert "network calls per picture: 6 (3 steps of ddim, cfg 3)" in said.out


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param([], marks=pytest.mark.slow), pytest.param(["parts"], marks=pytest.mark.slow),
                                 ["blocks"]])
def test_on_a_cpu_offload_draws_the_same(folder, tmp_path, how):
    for name, words in (("plain.png", []), ("moved.png", ["--offload", *how])):
        done = script("sample.py", PROMPT, "--model", folder, "--device", "cpu", "--out", tmp_path / name, *words)
        assert done.returncode == 0, done.stderr
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "moved.png")))


@pytest.mark.parametrize("words, message", [(["--offload", "block"], "--offload block: use auto, parts or blocks"),
                                            (["--offload", "blocks", "--compile"], "use --offload parts")])
def test_ways_that_cannot_be_are_refused(words, message, capsys):
    assert message in mistake("sample", [PROMPT, *words], capsys)
