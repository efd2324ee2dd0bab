"""A model that exists is trained further: what is trained and what is not, what a run takes from the model and leaves behind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_script, log_without_timing, mistake, pictures, randomise, thinned, train_here, weights
from PIL import Image
from pretend_gpu import PretendGpu
from safetensors.torch import load_file, save_file
from small_models import drawn, unet_model

from tinyldm.adapters.embedding import apply_embeddings
from tinyldm.adapters.files import read_adapter
from tinyldm.adapters.lora import LoRAConfig
from tinyldm.config import flatten, make_config, parse
from tinyldm.data.loader import Batch
from tinyldm.data.prepare import find_shards, prepare
from tinyldm.data.readers import captions
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model, save_part
from tinyldm.objectives.denoising import Denoising
from tinyldm.offload import Offloaded, Whole
from tinyldm.planning import base as planning_base
from tinyldm.planning.base import load_base, tune
from tinyldm.training import class_pictures, second_stage
from tinyldm.training.finetune import complete, fingerprint
from tinyldm.training.preflight import check_run
from tinyldm.training.run_folder import find_beside, find_model

LORA = ["--finetune", "lora", "--rank", "2", "--lr", "0.05"]
WITH_TEXT = [*LORA, "--train-text", "--targets", "attention", "mlp", "conv", "--lora-dropout", "0.5"]
INVERSION = ["--finetune", "textual_inversion", "--token", "<me>", "--initial", "square", "--vectors", "2", "--lr", "0.5",
             "--grad-accum", "2"]
DREAMBOOTH = ["--finetune", "dreambooth", "--instance", "a sks square", "--class", "a square", "--class-pictures", "5", "--lr", "0.01"]
KINDS = {"lora": LORA, "lora with text": WITH_TEXT, "inversion": INVERSION, "dreambooth": DREAMBOOTH,
         "dreambooth with text": [*DREAMBOOTH, "--train-text"], "dreambooth with an adapter": [*DREAMBOOTH, "--rank", "2"]}
SHORT = ["--batch-size", "4", "--max-steps", "4", "--save-every", "2", "--sample-every", "2", "--sample-steps", "2", "--log-every", "1",
         "--keep-last", "9", "--dtype", "fp32"]
SIDE = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model in the shape of Stable Diffusion 1 that predicts v."""
    folder, model = tmp_path_factory.mktemp("base") / "model", unet_model()
    save_model(folder, net=model.net, vae=model.vae, texts=[*model.text.modules.values()], tokenizers=model.text.tokenizers,
               scheduler=model.scheduler, defaults=model.defaults)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "mine", 3, (SIDE, SIDE))


@pytest.fixture
def train(base, data, tmp_path, monkeypatch):
    """A function: the words of a kind, and of a folder's name -> the folder of a run with them."""
    script = load_script("train")

    def train(kind: str, name: str = "run", *more: str, stop_after: int | None = None) -> Path:
        words = [*KINDS[kind], "--model", str(base), "--data", str(data), "--out", str(tmp_path / name), *SHORT, *more]
        train_here(script, words, monkeypatch, stop_after)
        return tmp_path / name
    return train


def last(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def tensors(model) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": tensor.clone() for part, module in model.modules.items() for name, tensor in module.state_dict().items()}


def differing(one: dict, two: dict) -> set[str]:
    assert one.keys() == two.keys()
    return {name for name in one if not torch.equal(torch.as_tensor(one[name]), torch.as_tensor(two[name]))}


def test_the_pictures_of_a_cache_are_enough(base, data):
    """And in a model that says on which data it was trained, they come before those."""
    config, _ = parse([*LORA, "--model", str(base), "--cache", "somewhere"], "")
    done = complete(config)
    assert (done.data.sources, done.data.cache) == ([], ["somewhere"])
    assert complete(parse([*LORA, "--model", str(base), "--data", str(data)], "")[0]).data.sources == [str(data)]


def test_a_cache_of_another_autoencoder_or_size_or_with_other_pictures_is_refused(base, data, tmp_path):
    """The latents of one autoencoder mean nothing to the network of another."""
    model = load_model(base)
    config = parse([*LORA, "--model", str(base), "--data", f"{data}:2", "--resolution", str(SIDE)], "")[0]
    prepare(complete(config), tmp_path / "cache", model.vae, torch.device("cpu"))
    words = [*LORA, "--model", str(base), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    checked = lambda *more: check_run(parse([*words, *more], "")[0])
    assert checked().data.sources == [f"{data}:2"]
    with pytest.raises(ValueError, match="--flip True: the pictures in .* were encoded with False"):
        checked("--flip")
    with pytest.raises(ValueError, match="resolution 16 in the cache, 24 in this run"):
        checked("--resolution", "24")
    with pytest.raises(ValueError, match="has no pictures: make it again with --keep-pictures"):
        checked("--objective", "repa")
    save_part(base.parent / "other" / "vae", randomise(model.vae, 5))
    for part in base.iterdir():
        if part.name != "vae":
            (base.parent / "other" / part.name).symlink_to(part)
    with pytest.raises(ValueError, match="were made with other settings .vae"):
        checked("--model", str(base.parent / "other"))


@pytest.mark.parametrize("words, said", [
    ("--finetune whole --rank 8", "--rank is a setting of adapters"), ("--objective lcm --rank 8", "--rank is a setting of adapters"),
    ("--finetune dreambooth --instance a --alpha 2", "--alpha is a setting of adapters"),
    ("--finetune lora --vectors 2", "--vectors is for --finetune textual_inversion"),
    ("--finetune dreambooth --instance a --prior-weight 0.5", "--prior-weight is a setting of pictures of a class")])
def test_settings_of_another_kind_of_training_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        parse([*words.split(), "--model", "m", "--data", "d"], "")
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize("kind", thinned(2, ["lora", "lora with text", "inversion", "dreambooth with an adapter"]))
def test_gradients_reach_what_is_trained_beside_a_model_and_nothing_else(train, base, kind, monkeypatch):
    """All of the model is the same after training to the last bit, and all that is trained has changed."""
    models = []
    real = second_stage.open_base
    monkeypatch.setattr(second_stage, "open_base", lambda *arguments: models.append(real(*arguments)) or models[-1])
    run = train(kind)
    assert not differing(tensors(models[-1]), tensors(load_model(base)))
    assert not any(p.requires_grad or p.grad is not None for part in models[-1].modules.values() for p in part.parameters())
    before, after = (load_file(run / "checkpoints" / f"step-00000{step}" / "trained.safetensors") for step in (2, 4))
    assert {name.split("/")[1] for name in after} == {"inversion": {"text"}, "lora with text": {"net", "text"}}.get(kind, {"net"})
    assert differing(before, after) == after.keys() and all(tensor.abs().max() > 0 for tensor in after.values())


@pytest.mark.parametrize("kind, trained", [
    pytest.param("dreambooth", {"net"}, marks=pytest.mark.slow), ("dreambooth with text", {"net", "text"})])
def test_dreambooth_without_a_rank_trains_whole_parts_and_no_others(train, base, kind, trained):
    found = tensors(load_model(last(train(kind)) / "model"))
    changed = differing(found, tensors(load_model(base)))
    assert {name.split(".")[0] for name in changed} == trained
    assert len(changed) > 0.9 * sum(name.startswith("net.") for name in found)      # tokens that no caption has do not change


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "lora")) for kind in KINDS])
def test_n_steps_and_n_more_are_two_n_steps_to_the_last_bit(train, kind):
    whole = train(kind)
    run = train(kind, "parts", stop_after=2)
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-000002"]
    train(kind, "parts", "--resume", "yes")
    assert not differing(weights(whole / "checkpoints"), weights(run / "checkpoints"))
    assert log_without_timing(whole) == log_without_timing(run)
    for name in ("before.png", "step-000002.png", "step-000004.png"):
        assert (whole / "samples" / name).read_bytes() == (run / "samples" / name).read_bytes()


@pytest.mark.slow
def test_a_run_that_is_not_begun_again_goes_on_without_the_model_where_it_holds_one_of_its_own(train, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    train("dreambooth", "run", "--model", str(copy), stop_after=2)
    shutil.rmtree(copy)
    assert last(train("dreambooth", "run", "--model", str(copy), "--resume", "yes")).name == "step-000004"


def test_a_run_beside_a_model_does_not_go_on_beside_another(train, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    train("lora", "run", "--model", str(copy), stop_after=2)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.001 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="other weights than at step 2: restore the model"):
        train("lora", "run", "--model", str(copy), "--resume", "yes")


def test_a_run_may_go_on_on_a_device_that_has_the_model_in_another_precision(base):
    half = load_model(base, "cpu", torch.bfloat16)
    assert fingerprint(half) == fingerprint(load_model(base)) != fingerprint(unet_model_with_other_weights())


def unet_model_with_other_weights():
    model = unet_model()
    with torch.no_grad():
        model.net.conv_out.weight.mul_(1.01)
    return model


# ---------------------------------------------------------------- what a run leaves behind


def test_a_checkpoint_of_an_adapter_holds_nothing_of_the_model(train, base):
    run = train("lora with text")
    files = {file.name for file in last(run).rglob("*")}
    assert files == {"adapter.safetensors", "trained.safetensors", "optimizer.safetensors", "state.json"}
    assert not (run / "vae").exists() and not (run / "text").exists()
    numbers = sum(tensor.numel() for tensor in load_file(last(run) / "adapter.safetensors").values())
    assert sum(tensor.numel() for tensor in load_file(last(run) / "trained.safetensors").values()) == 2 * numbers
    with pytest.raises(ValueError, match=f"holds an adapter, not a model.*--model {base} --lora {run}"):
        find_model(str(run))


def test_the_published_file_of_an_adapter_is_its_average_and_changes_what_is_drawn(train, base):
    run = train("lora")
    model = load_model(base)
    changes = read_adapter(last(run), model).changes()["net"]
    stored = load_file(last(run) / "trained.safetensors")
    name = next(iter(changes))
    wanted = {end: stored[f"averaged/net/branches.{name.removesuffix('.weight').replace('.', '/')}.{end}"] for end in ("down", "up")}
    assert torch.allclose(changes[name].delta(), wanted["up"].flatten(1) @ wanted["down"].flatten(1), atol=1e-6)
    before = drawn(model)
    with torch.no_grad():
        for name, change in changes.items():
            model.net.get_parameter(name).add_(change.delta().view_as(model.net.get_parameter(name)))
    assert np.abs(drawn(model).astype(int) - before).max() > 0


def test_the_published_file_of_a_token_changes_what_its_word_draws(train, base):
    model = load_model(base)
    with pytest.raises(ValueError, match="holds the vectors of a token, not a model"):
        find_model(str(run := train("inversion")))
    file = find_beside(run)
    assert apply_embeddings(model, [file]) == ["<me>"]
    encoder, tokenizer = model.text.encoders[0]
    stored = load_file(last(run) / "trained.safetensors")["averaged/text/vectors"]
    assert torch.equal(encoder.token_embedding.weight[tokenizer.ids_of("<me>")], stored)


@pytest.mark.slow
def test_the_grid_before_is_drawn_by_the_model_as_it_was(train, base):
    """With an adapter the first grid differs from it, and without training it is the same."""
    run = train("lora", "run", "--sample-prompts", "a square|a triangle")
    still = train("lora", "still", "--sample-prompts", "a square|a triangle", "--lr", "1e-30")
    before, after = (np.asarray(Image.open(run / "samples" / f"{name}.png")) for name in ("before", "step-000004"))
    assert before.shape == after.shape and not np.array_equal(before, after)
    assert np.array_equal(before, np.asarray(Image.open(still / "samples" / "step-000004.png")))


# ---------------------------------------------------------------- what a run takes from the model


def completed(base: Path, data: Path, *words: str) -> dict:
    return flatten(complete(parse([*words, "--model", str(base), "--data", str(data)], "")[0]))


def test_network_process_prediction_and_size_are_those_of_the_model(base, data):
    found = completed(base, data, "--finetune", "lora")
    assert (found["network"], found["process"], found["prediction"], found["times"]) == ("unet", "scaled_linear", "v", "uniform")
    assert found["net"]["widths"] == (16, 32) and found["process_options"]["beta_start"] == 0.00085
    assert (found["resolution"], found["sample_steps"], found["cfg"]) == (SIDE, 3, 3.0)
    assert completed(base, data, "--finetune", "lora", "--resolution", "32", "--cfg", "2")["resolution"] == 32
    with pytest.raises(ValueError, match="the model predicts v; leave it out"):
        completed(base, data, "--finetune", "lora", "--prediction", "eps")


@pytest.mark.parametrize("words, wanted", [
    (["--finetune", "lora"], {"rank": 16, "lr": 1e-4, "max_steps": 1000, "batch_size": 1, "captions": []}),
    (["--finetune", "lora", "--instance", "a sks|my sks"], {"captions": ["a sks|my sks"]}),
    (["--finetune", "dreambooth", "--instance", "a sks"], {"rank": 0, "lr": 5e-6, "max_steps": 400, "captions": ["a sks"]}),
    (DREAMBOOTH[:6] + ["--train-text"], {"lr": 2e-6, "max_steps": 800, "batch_size": 2}),
    (["--finetune", "dreambooth", "--instance", "a sks", "--rank", "4"], {"lr": 1e-4, "rank": 4}),
    (["--finetune", "textual_inversion", "--token", "<me>"], {"lr": 2e-3, "max_steps": 3000, "batch_size": 4, "grad_accum": 4}),
])
def test_each_kind_has_its_own_defaults_which_what_is_typed_replaces(base, data, words, wanted, capsys):
    found = completed(base, data, *words)
    assert {name: found[name] for name in wanted} == wanted
    assert f"learning rate {found['lr']:g}, {found['max_steps']:,} steps of {found['batch_size']} picture" in capsys.readouterr().out
    assert completed(base, data, *words, "--lr", "3")["lr"] == 3


def test_the_class_is_drawn_before_the_grids_show_its_prompt(base, data):
    found = completed(base, data, *DREAMBOOTH)
    assert "a sks square" in found["sample_prompts"].split("|") and "a square" in found["sample_prompts"].split("|")


def test_the_model_is_read_as_the_settings_say(monkeypatch):
    seen = {}
    monkeypatch.setattr(planning_base, "load_model", lambda *arguments, **options: seen.update(options, source=arguments[0]))
    words = ["--model", "m", "--variant", "fp16", "--tokenizer", "a", "b", "--parts", "c", "--without-t5", "--finetune", "lora"]
    load_base(parse(words, "")[0])
    assert seen == dict(source="m", variant="fp16", tokenizer=["a", "b"], parts=["c"], without={"text_encoder_3"})


def test_an_adapter_is_made_as_the_settings_say(base):
    words = ["--rank", "3", "--alpha", "6", "--rank-stabilised", "--targets", "attention", "conv", "--conv-rank", "2", "--ranks", "up=1",
             "--lora-dropout", "0.25", "--finetune", "lora", "--train-text"]
    model, adapters = tune(parse(words, "")[0], load_model(base))
    assert adapters["net"].config == LoRAConfig(3, 6.0, ("attention", "conv", "text"), 2, True, 0.25, {"up": 1}) == adapters["text"].config
    branches = adapters["net"].branches
    assert {branch.down.shape[0] for name, branch in branches.items() if name.startswith("up/")} == {1}
    assert {branch.down.shape[0] for name, branch in branches.items() if name.startswith("down/")} == {2, 3}


def test_a_new_word_begins_and_is_described_as_the_settings_say(base, data):
    words = ["--finetune", "textual_inversion", "--token", "<me>", "--initial", "square", "--vectors", "2"]
    model, new = tune(parse(words, "")[0], load_model(base))
    encoder, tokenizer = load_model(base).text.encoders[0]
    assert torch.equal(new["text"].vectors, encoder.token_embedding.weight[tokenizer.ids_of("square") * 2])
    captions = [completed(base, data, *words, *more)["captions"] for more in ([], ["--style"], ["--instance", "my <me>"])]
    assert all("<me>" in each for typed in captions for each in typed[0].split("|"))
    assert ["in the style of" in typed[0] for typed in captions] == [False, True, False] and captions[2] == ["my <me>"]


def test_features_that_are_remembered_are_those_of_the_text_encoder(base, data):
    """As on a GPU, where the text encoders are there only to encode the captions once."""
    words = [*LORA, "--model", str(base), "--data", str(data), "--dtype", "fp32"]
    model, config = load_model(base), complete(parse(words, "")[0])
    device, tokens = torch.device("cpu"), model.text.tokenize(["a square", "a triangle", "a square", ""])
    wanted = Denoising(config, model, ("net",)).encode(tokens, device)
    waiting = Offloaded(device, {"text": Whole(model.text.modules["text"], device)})
    objective = Denoising(config, replace(model, placement=waiting), ("net",))
    objective.remember(model.text.tokenize(["", "a triangle", "a square"]), device)
    model.text.encode_ids = None                            # it is not asked again
    found = objective.encode(tokens, device)
    assert torch.allclose(found.context, wanted.context, atol=1e-6) and torch.allclose(found.pooled, wanted.pooled, atol=1e-6)


@pytest.mark.parametrize("kind", thinned(5, ["lora", "inversion", "dreambooth with an adapter", "lora with text", "dreambooth with text"]))
def test_on_a_gpu_all_parts_are_where_they_compute(train, kind, monkeypatch):
    """A pretended one refuses what a real one would. Without text encoders to train, these and the autoencoder wait in the host's
    memory."""
    models = []
    real = second_stage.open_base
    monkeypatch.setattr(second_stage, "open_base", lambda *arguments: models.append(real(*arguments)) or models[-1])
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)      # nothing is compiled, and loading the compiler takes seconds
    with PretendGpu() as gpu:
        run = train(kind, "run", "--no-compile", "--dtype", "bf16")
        places = {part: next(module.parameters()).device.type for part, module in models[-1].modules.items()}
        dtypes = {next(module.parameters()).dtype for module in (models[-1].net, *models[-1].text.modules.values())}
    assert not gpu.mixed and last(run).name == "step-000004"
    waiting = "cpu" if kind in ("lora", "dreambooth with an adapter") else "cuda"
    assert places == {"net": "cuda", "vae": waiting, "text": waiting}
    assert dtypes == {torch.float32 if kind == "dreambooth with text" else torch.bfloat16}
    assert {path.name for path in (run / "samples").iterdir()} >= {"before.png", "step-000004.png"}


# ---------------------------------------------------------------- pictures of the class


@pytest.mark.slow
def test_pictures_of_the_class_that_are_there_are_not_drawn_again(train, monkeypatch):
    """Those that are missing are the same as in a run that was not interrupted, and of each picture half of the samples come."""
    counted = []
    real = class_pictures.draw
    monkeypatch.setattr(class_pictures, "draw", lambda model, prompts, seeds, *rest, **more: counted.extend(seeds) or real(
        model, prompts, seeds, *rest, **more))
    whole = train("dreambooth")
    assert counted == [0, 1, 2, 3, 4] and len([*(whole / "class").iterdir()]) == 5
    again = train("dreambooth", "again", stop_after=1)
    for number in (1, 3):
        (again / "class" / f"{number:06d}.png").unlink()
    counted.clear()
    train("dreambooth", "again", "--resume", "yes")
    assert counted == [1, 3]
    for file in (whole / "class").iterdir():
        shown = [np.asarray(Image.open(run / "class" / file.name)).astype(int) for run in (whole, again)]
        assert np.abs(shown[0] - shown[1]).max() <= 1           # one 8-bit step: other numbers of pictures are drawn at once


def test_half_of_the_samples_are_of_the_class_and_count_as_prior_weight_says(train, monkeypatch):
    seen = []
    real = second_stage.Loader.batch
    monkeypatch.setattr(second_stage.Loader, "batch", lambda self, step: seen.append(real(self, step)) or seen[-1])
    run = train("dreambooth", "run", "--prior-weight", "0.25")
    index = json.loads((run / "latents" / "index.json").read_text())
    assert [sum(group["count"] for shard in source["shards"] for group in shard["groups"]) for source in index["sources"]] == [3, 5]
    for batch in seen:
        assert batch.weights.tolist() == [0.25 if sample >= 3 else 1.0 for sample in batch.samples]
        assert sorted(batch.weights.tolist()) == [0.25, 0.25, 1, 1]


def test_the_weight_of_a_sample_is_a_factor_of_its_loss(base, data):
    model, config = load_model(base), complete(parse([*LORA, "--model", str(base), "--data", str(data)], "")[0])
    objective = Denoising(config, model, ("net",))
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    def losses(weights):
        samples = Batch(np.arange(3), latents, model.text.tokenize(["a", "b", "c"]), None, weights)
        batch = objective.draw(samples, torch.Generator().manual_seed(1), 3, slice(0, 3))
        return objective.losses(objective.turns[0], model.modules, objective.to_device(batch, torch.device("cpu")), 0.0)

    plain = losses(None)
    assert torch.equal(losses(torch.tensor([1.0, 0.5, 0.0])), plain * torch.tensor([1.0, 0.5, 0.0]))


def test_pictures_with_other_captions_are_other_data(data):
    def shard(**settings):
        return find_shards(make_config(data=[str(data)], **settings).data, 0)[0][1][0]

    plain, one, other = shard(), shard(captions=["a dog|my dog"]), shard(captions=["a cat"])
    assert len({each.stamp for each in (plain, one, other)}) == len({each.content() for each in (plain, one, other)}) == 3
    assert one.stamp == shard(captions=["a dog|my dog"]).stamp and one.name == plain.name
    assert [captions(sample) for sample in one.read()] == [[(0, "a dog"), (0, "my dog")]] * 3
    assert shard(captions=[""]).stamp == plain.stamp
    short = shard(captions=["a cat"], caption_key=["short", "txt"])
    assert [captions(sample, ("short", "txt")) for sample in short.read()] == [[(0, "a cat")]] * 3


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("words, said", [
    (["--finetune", "lorra", "--model", "MODEL", "--data", "DATA"], "did you mean 'lora'"),
    (["--finetune", "lora", "--data", "DATA"], "needs the model to train: --model"),
    (["--finetune", "lora", "--model", "MODEL"], "needs pictures: --data"),
    (["--model", "MODEL"], "say how, with --finetune"),
    ([*LORA, "--preset", "tiny", "--model", "MODEL", "--data", "DATA"], "leave one out"),
    ([*LORA, "--rank", "0", "--model", "MODEL", "--data", "DATA"], "--rank 0 of an adapter must be 1 or more"),
    ([*LORA, "--rank", "999", "--model", "MODEL", "--data", "DATA"], "rank 999 is above the width"),
    ([*LORA, "--targets", "atention", "--model", "MODEL", "--data", "DATA"], "did you mean 'attention'"),
    ([*LORA, "--model", "nowhere", "--data", "DATA"], "nowhere does not exist"),
    ([*LORA, "--model", "MODEL", "--data", "nowhere"], "nowhere"),
    ([*LORA, "--model", "MODEL", "--data", "BARE"], "no caption"),
    ([*LORA, "--model", "MODEL", "--data", "DATA", "--resolution", "17"], "is not a multiple of"),
    ([*LORA, "--model", "MODEL", "--data", "DATA", "--class", "a dog"], "--class is for --finetune dreambooth"),
    (["--finetune", "dreambooth", "--model", "MODEL", "--data", "DATA"], 'needs the caption of the pictures: --instance'),
    ([*DREAMBOOTH, "--model", "MODEL", "--data", "DATA", "--batch-size", "1"], "leaves no room for pictures of the --class"),
    (["--finetune", "textual_inversion", "--model", "MODEL", "--data", "DATA"], "needs the new word: --token"),
    ([*INVERSION, "--token", "square", "--model", "MODEL", "--data", "DATA"], "square"),
    ([*INVERSION, "--vectors", "1", "--initial", "a square", "--model", "MODEL", "--data", "DATA"], "is 2 tokens, for 1 vector"),
    ([*INVERSION, "--instance", "a dog", "--model", "MODEL", "--data", "DATA"], "does not contain the token <me>"),
    ([*LORA, "--model", "DAMAGED", "--data", "DATA"], "DAMAGED"),
])
def test_mistakes_are_one_line_and_leave_no_run_behind(base, data, tmp_path, words, said, capsys):
    bare, damaged = tmp_path / "bare", tmp_path / "damaged"
    bare.mkdir(), shutil.copytree(base, damaged)
    shutil.copy(data / "0000.png", bare)
    file = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    names = {"MODEL": base, "DATA": data, "BARE": bare, "DAMAGED": damaged}
    line = mistake("train", [*[names.get(word, word) for word in words], "--out", tmp_path / "run", "--sample-every", "0"], capsys)
    assert names.get(said, said) if said in names else said in line, line
    assert "BARE" in words or not (tmp_path / "run").exists()


@pytest.mark.parametrize("shapes", thinned(2, [[(20, 30), (64, 16), (17, 17)], [(SIDE, SIDE)]]), ids=["three sizes", "one"])
def test_one_picture_is_enough_and_pictures_may_have_any_sizes(base, tmp_path, shapes, monkeypatch):
    folder = tmp_path / "few"
    folder.mkdir()
    for i, size in enumerate(shapes):
        Image.new("RGB", size, (40 * i, 90, 200)).save(folder / f"{i}.png")
    words = [*LORA, "--instance", "a square", "--model", str(base), "--data", str(folder), "--out", str(tmp_path / "run"), *SHORT]
    train_here(load_script("train"), words, monkeypatch)
    assert last(tmp_path / "run").name == "step-000004"
