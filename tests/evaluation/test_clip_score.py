"""The CLIP score against transformers' CLIP with the same weights."""

import json

import numpy as np
import pytest
import torch
from helpers import load_script, pictures, randomise, small_text
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from tinyldm.cli import guard
from tinyldm.pictures.resizing import RESIZES

evaluate = load_script("evaluate")


@pytest.fixture
def clip(tmp_path):
    """A small CLIP in transformers' layout, with its tokenizer."""
    tokenizer, text = small_text()
    config = CLIPConfig(
        text_config={"vocab_size": text.vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "max_position_embeddings": text.context_length, "hidden_act": "gelu", "projection_dim": 16,
                     "bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id},
        vision_config={"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
                       "patch_size": 8, "hidden_act": "gelu", "projection_dim": 16},
        projection_dim=16)
    model = randomise(CLIPModel(config), 1).eval()
    model.save_pretrained(tmp_path / "clip")
    tokenizer.save(tmp_path / "clip")
    return tmp_path / "clip", model, tokenizer


def features(output) -> torch.Tensor:
    return getattr(output, "pooler_output", output)                         # transformers 5 returns it in an output object


@torch.no_grad()
def test_the_score_is_that_of_transformers_clip(clip, tmp_path, capsys):
    source, model, tokenizer = clip
    folder = pictures(tmp_path / "set", 9, size=(40, 24))
    evaluate.ARGS = evaluate.parse([str(folder), "--metric", "clip", "--weights", f"clip={source}", "--device", "cpu", "--batch-size", "4",
                                    "--out", str(tmp_path / "out")])
    guard(evaluate.main)
    images = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])
    captions = [file.read_text() for file in sorted(folder.glob("*.txt"))]
    pixels = RESIZES["bicubic_crop"](images, 32) / 255
    pixels = (pixels - torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    seen = features(model.get_image_features(pixel_values=pixels.float()))
    read = features(model.get_text_features(input_ids=torch.from_numpy(tokenizer.encode(captions))))
    scores = 100 * torch.cosine_similarity(seen, read).clamp(min=0)
    found = json.loads((tmp_path / "out" / "clip.json").read_text())
    assert found["results"][0]["values"]["CLIP score"]["value"] == pytest.approx(float(scores.mean()), rel=1e-4)
    assert scores.std() > 1 and (found["tower"], found["size"], found["results"][0]["count"]) == ("clip", 32, 9)
