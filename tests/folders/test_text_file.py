"""A text encoder in one file is the one in the published folder, or an error says what to do."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import PROMPT, randomise, small_text
from hollow import hollow
from published import t5_text, t5_tokenizer
from safetensors.torch import save_file

from tinyldm.folders.load import load_text
from tinyldm.folders.parts import in_source
from tinyldm.folders.rename import export_renamed, published_shapes
from tinyldm.folders.texts import load_texts, tokenizer_only
from tinyldm.models.clip_text import CLIPText, CLIPTextConfig
from tinyldm.models.t5 import T5
from tinyldm.vendor_loaders import clip, t5

CLIP_L, CLIP_H = CLIPTextConfig(), CLIPTextConfig(width=1024, layers=24, heads=16, mlp_width=4096, activation="gelu")
BIG_G = CLIPTextConfig(width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu", projection_dim=1280)


def written(file, config, layout):
    """A published file of this size, without numbers."""
    with torch.device("meta"):
        hollow(file, published_shapes(CLIPText(config).state_dict(), clip.LAYOUTS[layout].rules(config)))
    return file


def refusal(action, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        action(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_of_t5_with_its_tokenizer_beside_it_is_its_folder(tmp_path):
    theirs = t5_text(48, 1)
    theirs.save_pretrained(tmp_path / "folder")
    t5_tokenizer().save_pretrained(tmp_path / "folder")
    t5_tokenizer().save_pretrained(tmp_path)
    save_file({name: tensor.clone() for name, tensor in theirs.state_dict().items() if name != "encoder.embed_tokens.weight"},
              file := tmp_path / "t5xxl_fp16.safetensors")
    lengths = lambda rule: ()
    one, folder = load_texts(file, "", lengths), load_texts(tmp_path / "folder", "", lengths)
    (module, words), (expected, their_words) = one.encoders[0], folder.encoders[0]
    assert isinstance(module, T5) and replace(module.config, eos_token_id=expected.config.eos_token_id) == expected.config
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in module.state_dict().items())
    assert (words.encode([PROMPT, ""]) == their_words.encode([PROMPT, ""])).all() and words.context_length == 512
    assert load_texts(file, "", lengths, tokenizer_only).tokenizers[0].context_length == 512


@pytest.mark.parametrize("config, layout", [(CLIP_L, "transformers"), (CLIP_H, "open_clip"), (CLIP_H, "transformers"), (BIG_G, "open_clip"),
                                            (BIG_G, "transformers")])
def test_files_of_the_published_clips_are_known_by_their_size(tmp_path, config, layout):
    stored = replace(config, projection_dim=config.projection_dim or config.width)      # which a file may hold, used or not
    assert load_text(written(tmp_path / "clip.safetensors", stored, layout), "meta").config == config


def test_what_a_file_does_not_tell_is_asked_for(tmp_path):
    file = written(tmp_path / "clip.safetensors", replace(CLIP_L, projection_dim=768), "open_clip")      # OpenAI's, or LAION's with gelu
    text = refusal(load_text, file)
    assert f"{file} holds a CLIP of width 768 with 12 layers" in text and "put its config.json beside it" in text
    _, config = small_text()
    there = randomise(CLIPText(replace(config, activation="gelu")))
    save_file(export_renamed(there.state_dict(), clip.CLIP_RULES), file := tmp_path / "small.safetensors")
    assert "width 32 with 2 layers" in refusal(load_text, file)
    (tmp_path / "config.json").write_text(json.dumps(clip.to_config(there.config)))
    loaded = load_text(file)
    assert loaded.config == there.config and all(torch.equal(t, there.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_a_file_of_no_text_encoder_or_of_two_is_refused_with_what_to_do(tmp_path):
    save_file({"decoder.conv_in.weight": torch.ones(1)}, file := tmp_path / "x.safetensors")
    assert "holds no text encoder that can be recognised: name a file of one" in refusal(load_text, file)
    state = {name: tensor.clone() for name, tensor in t5_text(48, 1).state_dict().items() if name != "encoder.embed_tokens.weight"}
    save_file({f"{prefix}.{name}": tensor.clone() for prefix in ("a", "b") for name, tensor in state.items()}, file)
    assert "holds 2 text encoders that can be recognised: name a file of one" in refusal(load_text, file)


def test_the_tokenizer_of_another_kind_beside_a_file_is_not_taken_for_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small_text()[0].save(tmp_path)
    state = {name: tensor.clone() for name, tensor in t5_text(48, 1).state_dict().items() if name != "encoder.embed_tokens.weight"}
    save_file(state, file := tmp_path / "t5.safetensors")
    monkeypatch.setattr("tinyldm.folders.hub.fetch", lambda name, *args: (_ for _ in ()).throw(ValueError(f"no {name} here")))
    assert "t5.safetensors holds no tokenizer: put its files beside it (spiece.model)" in refusal(load_texts, file, "", lambda rule: ())


def test_several_text_encoders_are_not_in_one_file_or_in_a_folder_that_lacks_one(tmp_path):
    save_file(t5_text(48, 1).state_dict() | {"encoder.embed_tokens.weight": torch.ones(1)}, file := tmp_path / "t5.safetensors")
    assert "--text-join single" in (text := refusal(load_texts, file, "sd3", lambda rule: ())) and "all 3 text encoders" in text
    for name in ("text_encoder", "text_encoder_2"):
        (tmp_path / name).mkdir()
    assert f"{tmp_path} has no text_encoder_3/" in refusal(load_texts, tmp_path, "sd3", lambda rule: ())


# ---- folders


@pytest.mark.parametrize("kind", ["t5", "clip_text_model"])
def test_a_config_that_names_no_class_is_known_by_its_model_type(tmp_path, kind):
    theirs = t5_text(48, 1) if kind == "t5" else None
    if theirs is None:
        there = randomise(CLIPText(small_text()[1]))
        config, state = clip.to_config(there.config), export_renamed(there.state_dict(), clip.CLIP_RULES)
    else:
        theirs.save_pretrained(tmp_path)
        config, there = json.loads((tmp_path / "config.json").read_text()), load_text(tmp_path)
        state = export_renamed(there.state_dict(), t5.LAYOUTS["transformers"].rules(there.config))
    assert config.pop("architectures") and config["model_type"] == kind
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors")
    for loaded in (load_text(tmp_path), in_source(tmp_path)):
        found = loaded if isinstance(loaded, torch.nn.Module) else loaded[0]
        assert found.config == there.config


@pytest.mark.parametrize("kind", ["umt5", "bert"])
def test_a_text_encoder_of_another_model_type_is_named(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "d_model": 48}))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert f"describes a {kind}: of text encoders, only CLIP's and T5's can be read" in refusal(load_text, tmp_path)
