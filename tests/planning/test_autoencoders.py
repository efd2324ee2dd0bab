"""Plans of runs with the autoencoder of others: it is counted as its folder or file says, and what is assumed is said."""

import json

import pytest
from helpers import load_script
from safetensors.torch import save_file
from small_models import small_vae

from tinyldm.config import flatten, make_config, parse, preset_config
from tinyldm.folders.load import load_vae
from tinyldm.folders.save import save_part
from tinyldm.models.taesd import TAESD, TAESDConfig
from tinyldm.planning.flops import assumed_vae, meta_autoencoder, meta_networks, size
from tinyldm.planning.plan import make_plan

HUB = "someone/a-vae"
ALONE = dict(only="vae", resolution=16, vae_crop=16, vae_steps=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a finished autoencoder of a class, a size and a number of channels that are not Stable Diffusion's."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    for part in ("vae", "checkpoints/step-000002/model/vae"):
        save_part(folder / part, TAESD(TAESDConfig(latent_channels=6, width=8, blocks=(1, 1))))
    (folder / "log.jsonl").write_text("")
    return folder


@pytest.mark.parametrize("flag", ["vae_weights", "vae_init"])
@pytest.mark.parametrize("where", ["", "vae", "checkpoints/step-000002/model"])
def test_an_autoencoder_here_is_planned_as_it_is_loaded(run, where, flag):
    config = preset_config("tiny", **{flag: str(run / where)})
    networks, loaded = meta_networks(config), load_vae(run / "vae")
    assert networks.vae.config == loaded.config and size(networks.vae) == size(loaded) and assumed_vae(config) == ""
    assert networks.net.config.in_channels == 6 and {p.device.type for p in networks.vae.parameters()} == {"meta"}
    assert all(p.requires_grad for p in networks.vae.parameters())              # as one that is trained further


def test_so_is_one_in_a_file_with_its_config_beside_it(tmp_path):
    vae = small_vae(4)
    save_part(tmp_path / "vae", vae)
    file = next((tmp_path / "vae").glob("*.safetensors"))
    assert size(meta_autoencoder(preset_config("tiny", vae_weights=str(file)))) == size(vae)


def test_its_config_is_enough(run, tmp_path):
    (tmp_path / "config.json").write_text((run / "vae" / "config.json").read_text())
    assert meta_autoencoder(preset_config("tiny", vae_init=str(tmp_path))).config == load_vae(run / "vae").config


@pytest.mark.parametrize("flag", ["vae_weights", "vae_init"])
@pytest.mark.parametrize("path, said", [("runs/nothing", "runs/nothing does not exist"), ("./a/b/c", "there is no folder a/b here"),
                                        ("unfinished", "has no finished autoencoder yet"), ("odd.safetensors", "odd.safetensors")])
def test_what_training_would_refuse_is_refused(path, said, flag, tmp_path, monkeypatch):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "log.jsonl").write_text("")
    save_file({}, tmp_path / "odd.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        make_plan(preset_config("tiny", **{flag: path}))


def test_of_one_on_the_hub_the_plan_says_what_it_assumes(run):
    """That the printed plan has this line is in test_texts.py."""
    assert assumed_vae(preset_config("tiny", vae_weights=HUB)) == "the VAE is not here: one like Stable Diffusion 1's is assumed"
    assert meta_autoencoder(preset_config("tiny", vae_init=HUB)).config.latent_channels == 4
    assert assumed_vae(preset_config("tiny")) == ""


def test_a_resumed_run_is_planned_with_what_it_has_itself(run, tmp_path):
    config = preset_config("tiny", vae_init=HUB, out=str(tmp_path), resume="auto")
    assert assumed_vae(config)
    (tmp_path / "checkpoints" / "vae-000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "vae-000003" / "vae").symlink_to(run / "vae")
    assert meta_autoencoder(config).config.latent_channels == 6 and assumed_vae(config) == ""
    save_part(tmp_path / "vae", TAESD(TAESDConfig(latent_channels=5, width=8, blocks=(1, 1))))
    assert meta_autoencoder(config).config.latent_channels == 5


def test_its_relative_paths_are_found_from_wherever_it_is_resumed(run, tmp_path, monkeypatch):
    settings = flatten(make_config(**ALONE, vae_init="mine/vae")) | {"directory": str(run.parent)}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    train = load_script("train")
    train.CONFIG, train.ARGS = parse(["--resume", str(tmp_path), "--dry-run"], "", train.FLAGS)
    planned = []
    monkeypatch.setattr(train, "print_plan", planned.append)
    train.main()
    assert meta_autoencoder(planned[0]).config.latent_channels == 6
