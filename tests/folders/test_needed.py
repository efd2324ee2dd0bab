"""Which files of a repository are downloaded, by the names in those of Stable Diffusion 3, FLUX.1 and T5."""

import pytest

from tinyldm.folders import needed
from tinyldm.model import TEXT_ENCODERS


def shards(stem, count, middle=""):
    return [f"{stem}{middle}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


WORDS = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
T5_WORDS = ["spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
SD3 = {
    "text_encoder": ["config.json", "model.safetensors", "model.fp16.safetensors"],
    "text_encoder_2": ["config.json", "model.safetensors", "model.fp16.safetensors"],
    "text_encoder_3": ["config.json", "model.safetensors.index.json", *shards("model", 2), "model.safetensors.index.fp16.json",
                       *shards("model", 2, ".fp16")],
    "tokenizer": WORDS, "tokenizer_2": WORDS, "tokenizer_3": T5_WORDS,
    "transformer": ["config.json", "diffusion_pytorch_model.safetensors"],
    "vae": ["config.json", "diffusion_pytorch_model.safetensors"],
    "scheduler": ["scheduler_config.json"],
}
NAMES = {f"{folder}/{file}" for folder, files in SD3.items() for file in files} | {
    "model_index.json", "README.md", "sd3_medium.safetensors", "text_encoders/t5xxl_fp16.safetensors"}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_three_text_encoders_the_shards_of_one_variant_and_all_their_tokenizers_are_downloaded(variant):
    found = needed.of_model(NAMES, variant)
    assert len(found) == len(set(found)) and set(found) <= NAMES
    left = {name.split("/", 1)[1] for name in NAMES - set(found) if name.startswith("text_encoder_3/")}
    fp16 = {"model.safetensors.index.fp16.json", *shards("model", 2, ".fp16")}
    full = {"model.safetensors.index.json", *shards("model", 2)}
    assert left == (full if variant else fp16)
    assert all(f"tokenizer_3/{file}" in found for file in T5_WORDS) and all(f"tokenizer_2/{file}" in found for file in WORDS)
    assert not {"README.md", "sd3_medium.safetensors", "text_encoders/t5xxl_fp16.safetensors"} & set(found)


def test_a_repository_of_t5_alone_serves_its_weights_and_its_one_tokenizer_file():
    names = {"config.json", "spiece.model", "special_tokens_map.json", "tokenizer_config.json", "pytorch_model.bin", "tf_model.h5"}
    assert set(needed.of_tokenizer(names)) == {"spiece.model", "special_tokens_map.json", "tokenizer_config.json"}
    assert set(needed.of_part(names, TEXT_ENCODERS.values())) == {"config.json", "pytorch_model.bin"}
