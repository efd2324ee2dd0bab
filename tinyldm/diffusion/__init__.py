"""Diffusion without networks: processes, predictions, grids, guidance, samplers and the loss."""
