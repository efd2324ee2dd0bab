"""tinyldm: latent diffusion in plain PyTorch, small enough to read and fast enough to train."""

__version__ = "0.1.0"
