"""The hub is a small server here, which answers what huggingface_hub asks for and notes what that was."""

import json
import re
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from helpers import randomise, thinned

from tinyldm.folders import hub
from tinyldm.folders.load import load_model, load_text, load_tokenizer, load_vae
from tinyldm.folders.save import save_model
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.models.vae import AutoencoderKL, VAEConfig
from tinyldm.planning.drawing import bytes_on_disk
from tinyldm.text.tokenizer import Tokenizer
from tinyldm.vendor_loaders import clip, scheduler

ID = "someone/tiny-diffusion"
NEEDED = {"model_index.json", "tinyldm.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
          "text_encoder/model.safetensors", "tokenizer/merges.txt", "tokenizer/special_tokens_map.json",
          "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "unet/config.json",
          "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
SURPLUS = ["README.md", ".gitattributes", "tiny.ckpt", "tiny-emaonly.safetensors", "vae_encoder/model.onnx",
           "unet/diffusion_flax_model.msgpack", "safety_checker/model.safetensors", "safety_checker/config.json",
           "feature_extractor/preprocessor_config.json",
           *(f"{part}/{stem}{end}" for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                                                      ("text_encoder", "model"))
             for end in (".bin", ".fp16.safetensors", ".fp16.bin", ".non_ema.safetensors"))]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server.hub
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
        owner, name, *rest = path.split("/")
        repo = hub.repos.get(f"{owner}/{name}")
        if repo is None:
            return self.reply(404, error="RepoNotFound")
        what, revision, file = (rest + ["", "", ""])[0], (rest + ["main", "main"])[1], "/".join(rest[2:])
        if (fault := hub.fault.get(file or what or "info")) is not None:
            return self.reply(*fault)
        if revision not in repo.revisions:
            return self.reply(404, error="RevisionNotFound")
        sha = repo.revisions[revision]
        files = repo.commits[sha]
        if what == "tree":
            return self.json([{"type": "file", "path": f, "size": len(c), "oid": sha1(c).hexdigest()} for f, c in files.items()])
        if what != "resolve":
            return self.json({"id": f"{owner}/{name}", "sha": sha, "siblings": [{"rfilename": f} for f in files]})
        if self.command == "GET":
            hub.fetched.append(file)
        self.reply(200, files[file], {"ETag": f'"{sha1(files[file]).hexdigest()}"', "X-Repo-Commit": sha})

    do_HEAD = do_GET

    def json(self, content):
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(self, status, body=b"", headers=None, error=None):
        self.send_response(status)
        for key, value in (headers or ({"X-Error-Code": error} if error else {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def repository(*commits):
    shas = [sha1(repr(commit).encode()).hexdigest() for commit in commits]
    return SimpleNamespace(commits=dict(zip(shas, commits)),
                           revisions={sha: sha for sha in shas} | {"main": shas[0], "older": shas[-1]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, written as a folder."""
    path = tmp_path_factory.mktemp("hub") / "model"
    tokenizer = Tokenizer.train(["a red fox"] * 3, vocab_size=540, context_length=16)
    net = UNetConfig(widths=(16, 32), depth=1, attention=(False, True), heads=(2, 2), context_dim=32, groups=8)
    text = CLIPTextConfig(vocab_size=len(tokenizer), width=32, layers=2, heads=2, mlp_width=64, context_length=16)
    save_model(path, net=randomise(UNet(net), 1), vae=randomise(AutoencoderKL(VAEConfig(widths=(16, 32), depth=1, groups=8)), 2),
               texts=[randomise(CLIPText(text), 3)], tokenizers=[tokenizer], defaults={"steps": 20},
               scheduler=scheduler.to_config("scaled_linear", {}, "eps"))
    return path


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert files.keys() == NEEDED
    files |= dict.fromkeys(SURPLUS, b"not needed")
    older = files | {"tinyldm.json": b'{"steps": 7}'}
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.hub = SimpleNamespace(repos={ID: repository(files, older)}, fetched=[], fault={}, stop=lambda: stop(http))
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    constants = huggingface_hub.constants
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    elsewhere = {name: value.replace(constants.ENDPOINT, f"http://127.0.0.1:{http.server_port}")
                 for name, value in vars(constants).items() if isinstance(value, str) and value.startswith(constants.ENDPOINT)}
    for name, value in (elsewhere | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "token"),
                                     "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}).items():
        monkeypatch.setattr(constants, name, value)
    huggingface_hub.close_session()         # the next one heeds NO_PROXY
    yield http.hub
    stop(http)


def stop(http):
    http.shutdown()
    http.server_close()
    huggingface_hub.close_session()         # else its open connections are still answered


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refusal(action, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        action(*args, **kwargs)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


# ---- what is downloaded


def test_a_model_is_downloaded_by_its_id_and_only_what_is_needed(server, folder):
    model, local = load_model(ID), load_model(folder)
    assert all(same(model.modules[part], local.modules[part]) for part in ("net", "vae", "text"))
    assert model.defaults == {"steps": 20} and sorted(server.fetched) == sorted(NEEDED)


def test_of_a_model_as_shapes_no_weights_are_downloaded(server, folder, monkeypatch):
    model, local = load_model(ID, "meta", variant="fp16"), load_model(folder)
    shapes = lambda model: {part: [p.shape for p in module.parameters()] for part, module in model.modules.items()}
    assert shapes(model) == shapes(local) and all(p.is_meta for p in model.net.parameters())
    configs = {name for name in NEEDED if not name.endswith(".safetensors")}
    assert set(server.fetched) == configs and bytes_on_disk(ID, model) is None
    server.stop()
    assert shapes(load_model(ID, "meta")) == shapes(local)                  # from the cache
    assert "is incomplete in the cache" in refusal(load_model, ID)


@pytest.mark.parametrize("load, part", [(load_vae, "vae/"), (load_text, "text_encoder/"), (load_tokenizer, "tokenizer/")])
def test_of_a_part_only_its_own_files_are_downloaded(server, load, part):
    load(ID)
    assert set(server.fetched) == {name for name in NEEDED if name.startswith(part)}


def test_a_repository_of_one_part_serves_too(server, folder):
    files = {file.name: file.read_bytes() for file in (folder / "vae").iterdir()}
    server.repos["someone/vae"] = repository(files | {"diffusion_pytorch_model.bin": b"x", "vae.ckpt": b"x"})
    assert same(load_vae("someone/vae"), load_vae(folder)) and set(server.fetched) == files.keys()


def test_a_variant_is_downloaded_instead_of_the_usual_weights(server):
    for commit in server.repos[ID].commits.values():
        for name in [name for name in commit if name.endswith(".fp16.safetensors")]:
            commit[name] = commit[name.replace(".fp16", "")]
    load_model(ID, variant="fp16")
    assert set(server.fetched) == {re.sub(r"(?<=model)(?=\.safetensors)", ".fp16", name) for name in NEEDED}


def test_shards_are_downloaded_with_their_index(server):
    files = next(iter(server.repos[ID].commits.values()))
    stem, whole = "unet/diffusion_pytorch_model", files.pop("unet/diffusion_pytorch_model.safetensors")
    files[f"{stem}.safetensors.index.json"] = json.dumps(
        {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}}).encode()
    files[f"{stem}-00001-of-00001.safetensors"] = whole
    for other in ("-00001-of-00001.bin", "-00001-of-00002.safetensors.part", ".fp16-00001-of-00001.safetensors",
                  "-00001-of-00001.fp16.safetensors"):
        files[stem + other] = whole                                                      # of other indices
    load_model(ID)
    assert set(server.fetched) == NEEDED - {f"{stem}.safetensors"} | {
        f"{stem}.safetensors.index.json", f"{stem}-00001-of-00001.safetensors"}


@pytest.mark.parametrize("by", thinned(2, ["name", "commit"]))
def test_a_revision_is_asked_for_behind_an_at_sign(server, by):
    revision = "older" if by == "name" else server.repos[ID].revisions["older"]
    assert load_model(f"{ID}@{revision}").defaults == {"steps": 7}
    assert load_model(ID).defaults == {"steps": 20}
    assert server.fetched.count("unet/diffusion_pytorch_model.safetensors") == 1         # the same contents
    server.stop()
    assert load_model(f"{ID}@{revision}").defaults == {"steps": 7} and load_model(ID).defaults == {"steps": 20}


# ---- the cache


def test_a_second_load_downloads_nothing(server):
    load_model(ID)
    count = len(server.fetched)
    load_model(ID)
    assert len(server.fetched) == count


def offline(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def gone(server, monkeypatch):
    server.stop()


def broken(server, monkeypatch):
    server.fault.update(dict.fromkeys(("info", "tree", "resolve", "revision", *NEEDED), (501, b"<html>\n\noops", {"X": "y"})))


def captive(server, monkeypatch):
    server.fault.update(info=(200, b"<html>Please\n log in</html>", {"Content-Type": "text/html"}))


NO_HUB = pytest.mark.parametrize("no_hub", thinned(2, [offline, gone, broken, captive]))


@NO_HUB
def test_without_the_hub_the_cache_is_used(server, folder, monkeypatch, no_hub):
    load_model(ID)
    no_hub(server, monkeypatch)
    assert same(load_model(ID).net, load_model(folder).net) and same(load_vae(ID), load_vae(folder))


@NO_HUB
def test_without_hub_and_cache_the_error_says_what_to_do(server, monkeypatch, no_hub):
    no_hub(server, monkeypatch)
    text = refusal(load_model, ID)
    assert ID in text and "not in the cache" in text and "run once with a network" in text and "copy" in text


@NO_HUB
def test_a_cache_that_holds_only_another_part_is_said_to_be_partial(server, monkeypatch, no_hub):
    load_vae(ID)
    no_hub(server, monkeypatch)
    assert f"{ID} is incomplete in the cache" in refusal(load_model, ID)


def test_a_file_that_is_lost_from_the_cache_is_named_offline_and_comes_back_online(server, folder, monkeypatch):
    load_model(ID)
    lost = next((hub.Path(huggingface_hub.constants.HF_HUB_CACHE)).rglob("unet/*.safetensors"))
    lost.unlink()
    with monkeypatch.context() as patch:
        offline(server, patch)
        assert str(lost) in refusal(load_model, ID)
    assert same(load_model(ID).net, load_model(folder).net)


@pytest.mark.parametrize("lost", thinned(3, ["tinyldm.json", "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
                                  "tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "vae/config.json"]))
def test_a_small_file_that_is_lost_from_the_cache_is_never_replaced_by_a_default(server, monkeypatch, lost):
    load_model(ID)
    file = next(hub.Path(huggingface_hub.constants.HF_HUB_CACHE).rglob(f"snapshots/*/{lost}"))
    file.unlink()
    offline(server, monkeypatch)
    assert f"{ID} is incomplete in the cache ({file} is missing)" in refusal(load_model, ID)
    if lost.startswith("tokenizer"):
        assert f"{file} is missing" in refusal(load_tokenizer, ID)


@pytest.mark.parametrize("lost, kind", [("tinyldm.json", "TinyLDM"), ("tokenizer/tokenizer_config.json", "StableDiffusion")])
def test_a_cache_without_a_listing_must_have_what_every_such_model_has(server, monkeypatch, lost, kind):
    monkeypatch.setattr(hub, "_cached_listing", lambda repo_id, commit: None)              # as older versions of huggingface_hub leave it
    for commit in server.repos[ID].commits.values():
        commit["model_index.json"] = commit["model_index.json"].replace(b"StableDiffusionPipeline", f"{kind}Pipeline".encode())
    load_model(ID)
    offline(server, monkeypatch)
    assert load_model(ID).defaults == {"steps": 20}
    next(hub.Path(huggingface_hub.constants.HF_HUB_CACHE).rglob(f"snapshots/*/{lost}")).unlink()
    assert lost in refusal(load_model, ID)


def test_a_repository_without_a_tokenizer_config_is_complete_in_the_cache(server, folder, monkeypatch):
    files = {file.name: file.read_bytes() for file in (folder / "tokenizer").iterdir() if file.name != "tokenizer_config.json"}
    server.repos["someone/tokens"] = repository(files)
    online = load_tokenizer("someone/tokens").encode(["a red fox"])
    offline(server, monkeypatch)
    assert (load_tokenizer("someone/tokens").encode(["a red fox"]) == online).all()


def test_a_download_that_breaks_off_is_an_error_and_is_taken_up_again(server, folder):
    file = "unet/diffusion_pytorch_model.safetensors"
    server.fault[file] = (501, b"", {"X": "y"})
    assert "incomplete in the cache" in refusal(load_model, ID)
    server.fault.clear()
    assert same(load_model(ID).net, load_model(folder).net)
    assert server.fetched.count(file) == 1 and server.fetched.count("vae/config.json") == 1


# ---- refusals


@pytest.mark.parametrize("source, faults, expected", [
    ("someone/else", {}, "someone/else is neither a path here nor a repository"),
    (f"{ID}@nightly", {}, f"{ID} has no revision nightly: leave it out"),
    (ID, {"info": (403, b"", None, "GatedRepo")}, f"{ID} is gated: accept its licence"),
    (ID, {"unet/config.json": (403, b"", None, "GatedRepo")}, f"{ID} is gated: accept its licence"),
    ("someone/words", {}, "someone/words holds none of the files that are needed (2 files: config.json, model.safetensors"),
    ("someone/empty", {}, "someone/empty holds none of the files that are needed"),
])
def test_each_refusal_of_the_hub_has_its_own_one_line_message(server, source, faults, expected):
    server.repos |= {"someone/words": repository({"config.json": b"{}", "model.safetensors": b""}), "someone/empty": repository({})}
    server.fault.update(faults)
    assert expected in refusal(load_model, source)


def test_a_path_that_exists_is_always_a_path(server, folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    source = f"{folder.parent.name}/{folder.name}"
    assert not hub.is_hub_id(source) and hub.hub_id(source) is None and load_model(source).defaults == {"steps": 20}
    assert server.fetched == [] and hub.hub_id(f"{ID}@older") == ID


@pytest.mark.parametrize("source", ["nowhere", "./some/where", "/some/where", "a/b/c", "weights.safetensors", "../x/y"])
def test_a_missing_path_that_cannot_be_an_id_is_not_looked_for_on_the_hub(server, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{source} does not exist" in refusal(load_model, source)


@pytest.mark.parametrize("owner, wrong, right", [("laion/CLIP-ViT-H-14-x", "quick_gelu", "gelu"),
                                                 ("openai/clip-vit-large-patch14", "gelu", "quick_gelu")])
def test_a_text_encoder_s_activation_is_checked_against_its_publisher(server, folder, owner, wrong, right):
    files = {file.name: file.read_bytes() for file in (folder / "text_encoder").iterdir()}
    for activation in (wrong, right):
        files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"hidden_act": activation}).encode()
        server.repos[owner] = repository(files)
        if activation == wrong:
            text = refusal(load_text, owner)
            assert owner in text and repr(wrong) in text and repr(right) in text
    assert load_text(owner).config.activation == right


def test_padding_is_the_publisher_s_where_that_is_known(server, folder):
    files = {file.name: file.read_bytes() for file in (folder / "tokenizer").iterdir()}
    server.repos["laion/CLIP-ViT-H-14"] = server.repos["someone/tokens"] = repository(files)
    assert load_tokenizer("laion/CLIP-ViT-H-14").pad_token == "!" == clip.SOURCES[r"laion/CLIP-ViT-.*"].pad_token
    assert load_tokenizer("someone/tokens").pad_token == load_tokenizer(folder).pad_token != "!"


def test_of_another_pipeline_only_the_files_that_describe_it_are_downloaded(server):
    files = next(iter(server.repos[ID].commits.values()))
    files["model_index.json"] = json.dumps({"_class_name": "PixArtAlphaPipeline"}).encode()
    with pytest.raises(ValueError, match="holds a PixArtAlphaPipeline"):
        load_model(ID)
    assert sorted(server.fetched) == ["model_index.json", "tinyldm.json"]
