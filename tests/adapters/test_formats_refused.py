"""Files that are no adapter, or one for another model, are refused with what they are."""

from functools import partial

import pytest
import torch
from helpers import thinned
from safetensors.torch import save_file
from small_adapters import tensors_of, trained

from tinyldm.adapters.files import read_adapter, save_adapter
from tinyldm.adapters.formats import family
from tinyldm.folders.load import load_model

lora = partial(trained, rank=3)


@pytest.mark.parametrize("theirs, ours, message", thinned(2, [
    ("flux", "sd1", r"of the \d+ layers that the adapter changes, the model has no \d+ "
                    r"\(transformer.single_transformer_blocks.0.attn.to_k, .*\)\. It seems to be for FLUX.1, "
                    r"and the model is Stable Diffusion 1"),
    ("sd3", "flux", "It seems to be for Stable Diffusion 3, and the model is FLUX.1"),
    ("sdxl", "sd3", "It seems to be for Stable Diffusion (XL|1 or 2), and the model is Stable Diffusion 3"),
    ("sd1", "sdxl", "It seems to be for Stable Diffusion 1 or 2, and the model is Stable Diffusion XL"),
]))
def test_an_adapter_for_another_family_is_refused_with_its_guess(theirs, ours, message, published, tmp_path):
    model = load_model(published(theirs)[0])
    save_adapter(tmp_path / "other.safetensors", lora(model, net=("attention",)), model, {})
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / "other.safetensors", load_model(published(ours)[0]))


def test_the_width_of_the_text_tells_which_stable_diffusion_an_adapter_is_for():
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    for width, expected in ((768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (2048, "Stable Diffusion XL")):
        assert family({name: {"down": torch.zeros(4, width)}}) == expected
    for name, expected in (("lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q", "Stable Diffusion XL"),
                           ("diffusion_model.blocks.0.self_attn.q", "Wan, a video model"),
                           ("transformer.transformer_blocks.0.img_mlp.net.0.proj", "Qwen-Image"), ("something.else", None)):
        assert family({name: {}}) == expected


def test_an_adapter_for_another_width_is_refused_by_its_first_layer(published, tmp_path):
    model = load_model(published("sd1")[0])
    save_adapter(tmp_path / "a.safetensors", lora(model, net=("attention",)), model, {})
    tensors = tensors_of(tmp_path / "a.safetensors")
    wide = {name: torch.zeros(3, 768) if "attn2.to_k.lora_A" in name else tensor for name, tensor in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"wide.safetensors: unet\.\S+attn2.to_k changes a weight of \[\d+, 768\], and the model's is "
                                         r"\[\d+, 64\]\. It is for Stable Diffusion 1, as the model is, but of another size or version"):
        read_adapter(tmp_path / "wide.safetensors", model)


def test_files_that_are_no_adapter_are_refused_by_what_they_are(published, tmp_path):
    folder, _ = published("sd1")
    model = load_model(folder)
    save_adapter(tmp_path / "a.safetensors", lora(model, net=("attention",)), model, {})
    tensors = tensors_of(tmp_path / "a.safetensors")
    first = min(tensors)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    files = {
        "half": tensors | {"unet.conv_in.lora_A.weight": torch.zeros(2, 4, 3, 3)},
        "strange": tensors | {"unet.conv_in.strange": torch.zeros(2)},
        "unknown": tensors | {f"unet.down_blocks.7.proj.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"},
        "ia3": {"unet.conv_in.weight": torch.zeros(2), "unet.conv_in.on_input": torch.zeros(1)},
        "full": {"lora_unet_conv_in.diff": torch.zeros(2, 4, 3, 3)},
        "twice": tensors | {first.replace(".lora_A.", ".lora.down."): tensors[first].clone()},
        "network": {"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2), "img_in.weight": torch.zeros(2, 2)},
        "word": {"emb_params": torch.zeros(1, 64)},
        "nan": tensors | {first: torch.full_like(tensors[first], torch.nan)},
    }
    for name, content in files.items():
        save_file(content, tmp_path / f"{name}.safetensors")
    for name, message in {
        "half": "unet.conv_in: it is LoRA without up",
        "strange": r"1 \(unet.conv_in.strange\) of its \d+ tensors are none of an adapter's",
        "unknown": r"the model has no 1 \(unet.down_blocks.7.proj\)",
        "ia3": r"holds \(IA\)\^3 \(unet.conv_in.on_input\), which is not read: LoRA, LoHa, LoKr and DoRA are",
        "full": "holds whole differences of weights",
        "twice": "holds down of unet.* twice",
        "network": "is a whole model, FLUX.1, no adapter: name it as the model",
        "word": "is a word of textual inversion, no adapter: name it as an embedding",
        "nan": r"\.lora_A\.weight holds numbers that are not finite",
        "cut": "is damaged",
        "absent": "absent.safetensors does not exist: name an adapter's .safetensors file",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_adapter(tmp_path / f"{name}.safetensors", model)
    with pytest.raises(ValueError, match="is a whole model, no adapter: name it as the model"):
        read_adapter(folder, model)
    with pytest.raises(ValueError, match="holds no adapter"):
        read_adapter(tmp_path / "empty", model)
