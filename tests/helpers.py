"""What several test files share."""

import torch

from tinyldm.models.clip_text import CLIPTextConfig
from tinyldm.tokenizer import Tokenizer

PROMPT = "a red square on the left of a blue circle"


@torch.no_grad()
def randomise(module, seed=0):
    """Weights of unit gain, biases and norms away from 0 and 1: nothing that a wrong name could hide behind."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.copy_(noise * p[0].numel() ** -0.5 if p.dim() > 1 else gain + 0.2 * noise)
    return module.eval()


def small_text():
    """A tokenizer trained on two captions, PROMPT among them, and the config of a small text tower for it."""
    tokenizer = Tokenizer.train([PROMPT, "a small green triangle"] * 3, vocab_size=600, context_length=16)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return tokenizer, CLIPTextConfig(vocab_size=len(tokenizer), width=32, layers=2, heads=2, mlp_width=64, context_length=16, **ids)
