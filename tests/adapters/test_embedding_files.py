"""Files of textual inversion: what diffusers, AUTOMATIC1111 and kohya write is read exactly, and all else is refused in one line."""

import base64
import json
import pickle
import zlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from helpers import mistake, small_text, thinned
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import mmdit_model, unet_model

from tinyldm.adapters.embedding_files import read_embedding, save_embedding, split_token
from tinyldm.adapters.embedding_pictures import random_numbers
from tinyldm.folders.save import save_loaded
from tinyldm.model import Model
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.text.encoders import TextEncoder, TextEncoders

DOG = "<my-dog>"


def numbers(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


VECTORS = numbers(2, 32)


def chunk(content) -> str:
    """What AUTOMATIC1111 writes into a PNG: tensors as lists of numbers under TORCHTENSOR."""
    listed = lambda tensor: {"TORCHTENSOR": tensor.tolist()}
    return base64.b64encode(json.dumps(content, default=listed).encode()).decode()


def write_png(file, text: str | None) -> None:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("sd-ti-embedding", text)
    Image.new("RGB", (8, 8), (9, 200, 30)).save(file, pnginfo=info)


def write_hidden(file, content, **options) -> None:
    """A picture with the content in its pixels, in blocks of 3 columns to the right and left of it, each behind a black column."""
    packed = zlib.compress(json.dumps(content, default=lambda tensor: {"TORCHTENSOR": tensor.tolist()}).encode())
    state, mask, height = 0, [], 16
    size = -(-len(packed) // (3 * height)) * 3 * height
    for _ in range(size):
        state = (1664525 * state + 1013904223) % 2**32
        mask.append(state % 255 % 16)
    data = np.resize(np.frombuffer(packed, np.uint8), size)
    low, high = ((half ^ np.array(mask, np.uint8) | 0x50).astype(np.uint8).reshape(height, -1, 3) for half in (data & 15, data >> 4))
    black = np.zeros((height, 1, 3), np.uint8)
    inner = np.full((height, 8, 3), (9, 200, 30), np.uint8)
    wide = np.pad(np.concatenate([low, black, inner, black, high], axis=1), ((2, 1), (3, 2), (0, 0)))     # with a black frame
    Image.fromarray(wide).save(file, **options)


def of_automatic1111(tensor) -> dict:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": "my-dog", "step": 500,
            "sd_checkpoint": "cc6cb27103", "sd_checkpoint_name": "v1-5"}


def older(tensor) -> dict:
    """The file of the first implementations (rinongal/textual_inversion): a ParameterDict, an id as a tensor, no name."""
    params = torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor)})
    del vars(params)["_keys"]                       # torch 1.11 had none
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": params}


LAYOUTS = {                                         # name of the file -> how it is written, and the token that it has
    "learned_embeds.safetensors": (lambda file: save_file({DOG: VECTORS}, file), DOG),
    "learned_embeds.bin": (lambda file: torch.save({DOG: VECTORS}, file), DOG),
    "kohya.safetensors": (lambda file: save_file({"emb_params": VECTORS}, file), "kohya"),
    "kohya.pt": (lambda file: torch.save({"string_to_param": {"*": VECTORS}}, file), "kohya"),
    "a1111.pt": (lambda file: torch.save(of_automatic1111(VECTORS), file), "my-dog"),
    "parameter.pt": (lambda file: torch.save(of_automatic1111(torch.nn.Parameter(VECTORS)), file), "my-dog"),
    "old.pt": (lambda file: torch.save(older(VECTORS), file), "old"),
    "zip-less.pt": (lambda file: torch.save(of_automatic1111(VECTORS), file, _use_new_zipfile_serialization=False), "my-dog"),
    "ordered.bin": (lambda file: torch.save(OrderedDict({DOG: VECTORS}), file), DOG),
    "tensor.bin": (lambda file: torch.save(VECTORS, file), "tensor"),
    "a1111.png": (lambda file: write_png(file, chunk(of_automatic1111(VECTORS))), "my-dog"),
    "hidden.png": (lambda file: write_hidden(file, of_automatic1111(VECTORS)), "my-dog"),
    "hidden.webp": (lambda file: write_hidden(file, of_automatic1111(VECTORS), lossless=True, exact=True), "my-dog"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_published_layout_gives_the_same_vectors_and_its_own_token(tmp_path, name):
    write, token = LAYOUTS[name]
    write(tmp_path / name)
    found = read_embedding(tmp_path / name, unet_model())
    assert found.token == token and [*found.vectors] == ["text"] and torch.equal(found.vectors["text"], VECTORS)
    assert read_embedding(tmp_path / name, unet_model(), "<other>").token == "<other>"


def test_the_random_numbers_that_hide_an_embedding_are_those_of_automatic1111():
    assert random_numbers(8) == [253, 242, 127, 44, 157, 27, 239, 133]      # from the tests in its image_embedding.py


def test_a_picture_that_would_unpack_to_more_than_memory_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyldm.adapters.embedding_pictures.LARGEST", 1000)
    write_hidden(tmp_path / "bomb.png", {"x": "0" * 10**6})
    with pytest.raises(ValueError, match="bomb.png: the embedding that it carries is damaged"):
        read_embedding(tmp_path / "bomb.png", unet_model())


def test_a_folder_is_read_under_the_standard_name(tmp_path):
    LAYOUTS["learned_embeds.safetensors"][0](tmp_path / "learned_embeds.safetensors")
    assert read_embedding(tmp_path, unet_model()).token == DOG


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_a_single_vector_without_a_dimension_of_its_own_are_read(tmp_path, dtype):
    save_file({DOG: VECTORS[0].to(dtype)}, tmp_path / "one.safetensors")
    found = read_embedding(tmp_path / "one.safetensors", unet_model()).vectors["text"]
    assert found.dtype == torch.float32 and torch.equal(found, VECTORS[:1].to(dtype).float())


@pytest.mark.parametrize("layout, name", [("diffusers", DOG), ("kohya", "emb_params")])
def test_what_is_written_is_read_again_bit_for_bit_and_has_the_names_that_other_programs_expect(tmp_path, layout, name):
    model, file = unet_model(), tmp_path / "dog.safetensors"
    save_embedding(file, DOG, {"text": torch.nn.Parameter(VECTORS.T.contiguous().T)}, model, layout, {"step": "7"})
    tensors = load_file(file)
    assert [*tensors] == [name] and torch.equal(tensors[name], VECTORS) and [path.name for path in tmp_path.iterdir()] == [file.name]
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert about.items() >= {"format": "pt", "token": DOG, "step": "7", "modelspec.trigger_phrase": DOG}.items()
    found = read_embedding(file, model)
    assert found.token == DOG and torch.equal(found.vectors["text"], VECTORS)


def test_models_with_several_encoders_have_a_tensor_for_each_and_one_that_is_left_out_is_not_missed(tmp_path):
    model, file = mmdit_model(), tmp_path / "dog.safetensors"       # two towers of one width: the names tell them apart
    vectors = {"text": VECTORS, "text_2": numbers(3, 32, seed=1)}
    save_embedding(file, DOG, vectors, model)
    assert {name: len(tensor) for name, tensor in load_file(file).items()} == {"clip_l": 2, "clip_g": 3}
    found = read_embedding(file, model)
    assert found.token == DOG and all(torch.equal(found.vectors[part], tensor) for part, tensor in vectors.items())
    save_file({**load_file(file), "t5xxl": numbers(1, 64)}, tmp_path / "with-t5.safetensors")
    found = read_embedding(tmp_path / "with-t5.safetensors", model)
    assert found.token == "with-t5" and found.vectors.keys() == {"text", "text_2"}      # this model has no T5


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    model, file = unet_model(), tmp_path / "dog.safetensors"
    save_embedding(file, DOG, {"text": VECTORS}, model)
    before = file.read_bytes()

    def full(partial, *more):
        partial.write_bytes(b"half")
        raise OSError("no space left")
    monkeypatch.setattr("tinyldm.adapters.embedding_files.write_weights", full)
    with pytest.raises(OSError):
        save_embedding(file, DOG, {"text": -VECTORS}, model)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("typed, file, token", [
    ("{}/dog.pt", "dog.pt", None), ("{}/dog.pt:<x>", "dog.pt", "<x>"), ("{}/a:b.pt", "a:b.pt", None), ("{}/a:b.pt:c", "a:b.pt", "c"),
    ("{}/none.pt:<x>", "none.pt:<x>", None)])
def test_a_token_may_stand_behind_the_file_also_where_that_has_a_colon_in_its_name(tmp_path, typed, file, token):
    for name in ("dog.pt", "a:b.pt"):
        (tmp_path / name).touch()
    assert split_token(typed.format(tmp_path)) == (tmp_path / file, token)


# ---------------------------------------------------------------- what is refused


def model_of_width(width: int) -> Model:
    tokenizer, config = small_text()
    model = unet_model()
    with torch.device("meta"):
        model.text = TextEncoders([TextEncoder(CLIPText(CLIPTextConfig(**vars(config) | {"width": width, "heads": 1})), tokenizer)])
    return model


@pytest.mark.parametrize("tensors, width, message", [
    ({DOG: (2, 768)}, 1024, r"768 wide \(Stable Diffusion 1\).* are 1024 wide \(Stable Diffusion 2\)"),
    ({DOG: (1024,)}, 768, r"1024 wide \(Stable Diffusion 2\).* are 768 wide \(Stable Diffusion 1\)"),
    ({"clip_l": (1, 768), "clip_g": (1, 1280)}, 768,
     r"clip_l 768 and clip_g 1280 wide \(Stable Diffusion XL and 3\), and .* 768 wide \(Stable Diffusion 1\)"),
    ({"clip_l": (1, 768), "t5xxl": (1, 4096)}, 768, r"clip_l 768 and t5xxl 4096 wide \(FLUX\), .* 768 wide \(Stable Diffusion 1\)"),
])
def test_an_embedding_for_another_model_is_refused_and_both_families_are_named(tmp_path, tensors, width, message):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "dog.safetensors")
    with pytest.raises(ValueError, match=rf"dog\.safetensors: has vectors {message}: take an embedding"):
        read_embedding(tmp_path / "dog.safetensors", model_of_width(width))


def test_an_embedding_that_fits_no_encoder_or_two_of_a_model_is_refused(tmp_path):
    model = mmdit_model()
    for width in (32, 48):
        save_file({DOG: torch.zeros(1, width)}, tmp_path / "dog.safetensors")
        with pytest.raises(ValueError, match=f"vectors {width} wide, and the model's text encoders are clip_l 32 and clip_g 32 wide"):
            read_embedding(tmp_path / "dog.safetensors", model)
    save_file({"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 48)}, tmp_path / "dog.safetensors")
    with pytest.raises(ValueError, match="clip_l 32 and clip_g 48 wide"):
        read_embedding(tmp_path / "dog.safetensors", model)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def many(name: str, count: int) -> dict:
    return {name.format(i): torch.zeros(2) for i in range(count)}


def write_half(layout: str, file) -> None:
    """The first half of the bytes of a file in this layout."""
    LAYOUTS[layout][0](file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


WRONG = {
    "lora.safetensors": (lambda f: save_file(many("x.lora_{}.weight", 2), f), "it is a LoRA: give it as --lora"),
    "model.safetensors": (lambda f: save_file(many("layers.{}", 9), f), "holds 9 tensors (layers.0, layers.1 ...)"),
    "model.pt": (lambda f: torch.save(many("layers.{}", 9), f), "it is a model, or a part of one?"),
    "empty.safetensors": (lambda f: save_file({}, f), "holds 0 tensors"),
    "matrix.safetensors": (lambda f: save_file({DOG: torch.zeros(2, 2, 32)}, f), "torch.float32 of shape [2, 2, 32], where an"),
    "whole.safetensors": (lambda f: save_file({DOG: torch.zeros(2, 32, dtype=torch.int64)}, f), "torch.int64 of shape [2, 32]"),
    "none.safetensors": (lambda f: save_file({DOG: torch.zeros(0, 32)}, f), "of shape [0, 32]"),
    "nan.safetensors": (lambda f: save_file({DOG: torch.full((1, 32), torch.nan)}, f), "not finite"),
    "text.pt": (lambda f: torch.save({"a": "b"}, f), "holds str, where an embedding has"),
    "list.pt": (lambda f: torch.save([1, 2], f), "holds a list: is it an embedding?"),
    "two.pt": (lambda f: torch.save({"string_to_param": {"*": VECTORS, "#": VECTORS}}, f), "string_to_param does not hold one tensor"),
    "evil.pt": (lambda f: torch.save({DOG: Evil()}, f), "is a pickle that holds more than tensors (print)"),
    "plain.pt": (lambda f: f.write_bytes(pickle.dumps({DOG: [1.0]}, protocol=2)), "is damaged or no file of weights"),
    "absent.pt": (lambda f: None, "absent.pt does not exist"),
    "absent.png": (lambda f: None, "absent.png does not exist"),
    "absent.safetensors": (lambda f: None, "absent.safetensors does not exist"),
    "half.safetensors": (lambda f: write_half("kohya.safetensors", f), "half.safetensors is damaged"),
    "half.pt": (lambda f: write_half("a1111.pt", f), "half.pt is damaged"),
    "half.png": (lambda f: write_half("a1111.png", f), "half.png"),
    "photo.png": (lambda f: write_png(f, None), "carries no embedding, neither as a text 'sd-ti-embedding' nor in its pixels"),
    "black.webp": (lambda f: Image.new("RGB", (8, 8)).save(f), "carries no embedding"),
    "lossy.webp": (lambda f: write_hidden(f, of_automatic1111(VECTORS), quality=90), "lossy.webp"),
    "junk.png": (lambda f: write_png(f, "!!"), "the embedding that it carries is damaged"),
    "deep.png": (lambda f: write_png(f, base64.b64encode(b"[" * 99999).decode()), "the embedding that it carries is damaged"),
    "ragged.png": (lambda f: write_png(f, base64.b64encode(b'{"x": {"TORCHTENSOR": [[1, 2], [3]]}}').decode()), "is damaged"),
    "number.png": (lambda f: write_png(f, chunk(7)), "holds a int: is it an embedding?"),
    "notes.txt": (lambda f: f.write_text("x"), "notes.txt is damaged"),
}


@pytest.mark.parametrize("name", thinned(2, WRONG))
def test_what_is_no_embedding_is_refused_in_one_line_that_names_the_file(tmp_path, name, capfd):
    write, message = WRONG[name]
    write(tmp_path / name)
    with pytest.raises(ValueError) as error:
        read_embedding(tmp_path / name, unet_model())
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    assert "run" not in capfd.readouterr().out


def test_only_safetensors_and_known_parts_are_written(tmp_path):
    for file, vectors, layout, message in ((tmp_path / "x.pt", {"text": VECTORS}, "diffusers", "use that ending"),
                                           (tmp_path / "x.safetensors", {"text_2": VECTORS}, "diffusers", "no text encoder text_2"),
                                           (tmp_path / "x.safetensors", {"text": VECTORS}, "a1112", "unknown layout")):
        with pytest.raises(ValueError, match=message):
            save_embedding(file, DOG, vectors, unet_model(), layout)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("words, message", [
    (["a dog", "--embedding", "dog.safetensors"], f"dog.safetensors would change nothing: no caption has its token '{DOG}'"),
    (["a red dog", "--embedding", "dog.safetensors:red"], "the token 'red' exists already in the model's tokenizer"),
    ([f"a {DOG}", *["--embedding", "dog.safetensors"] * 2], f"the token '{DOG}' exists already"),
    ([f"a {DOG}", "--embedding", "none.safetensors:<x>"], "none.safetensors:<x> does not exist"),
    ([f"a {DOG}", "--embedding", "model"], "learned_embeds.safetensors does not exist"),
])
def test_an_embedding_that_would_not_change_the_picture_is_a_mistake_of_one_line(tmp_path, monkeypatch, capsys, words, message):
    save_loaded(tmp_path / "model", unet_model())
    save_embedding(tmp_path / "dog.safetensors", DOG, {"text": VECTORS}, unet_model())
    monkeypatch.chdir(tmp_path)
    assert message in mistake("sample", [*words, "--model", "model", "--out", "out"], capsys)
    assert not (tmp_path / "out").exists()
