"""What several test files share."""

import torch


@torch.no_grad()
def randomise(module, seed=0):
    """Weights of unit gain, biases and norms away from 0 and 1: nothing that a wrong name could hide behind."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.copy_(noise * p[0].numel() ** -0.5 if p.dim() > 1 else gain + 0.2 * noise)
    return module.eval()
