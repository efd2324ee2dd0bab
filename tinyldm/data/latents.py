"""Cached latents: every picture encoded once, its caption beside it, in an order that is a pure function.

A cache is a folder: latents.npy (float16, standardised, memory-mapped), captions.json, index.json. The index
holds a fingerprint of the VAE's weights, the source's name and the picture size; a cache that does not match is made
anew. (Pictures that change under the same name are not noticed.)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyldm.models.vae import AutoencoderKL


def fingerprint(vae: AutoencoderKL, **facts) -> str:
    """Hash of the VAE's weights and of whatever else the latents depend on."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Latents:
    """A cache on disk: `latents` [n, c, h, w] float16, `captions` n strings."""

    def __init__(self, folder: Path):
        self.latents = np.load(folder / "latents.npy", mmap_mode="r")
        self.captions: list[str] = json.loads((folder / "captions.json").read_text("utf-8"))

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: np.ndarray) -> Tensor:
        """Latents [b, c, h, w] float32."""
        return torch.from_numpy(self.latents[indices].astype(np.float32))


def valid(folder: Path, mark: str) -> bool:
    index = folder / "index.json"
    return index.exists() and json.loads(index.read_text()).get("fingerprint") == mark


def write(folder: Path, latents: np.ndarray, captions: list[str], mark: str) -> None:
    """Write a cache so that it is there whole or not at all."""
    torso = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(torso, ignore_errors=True)
    torso.mkdir(parents=True)
    np.save(torso / "latents.npy", latents.astype(np.float16))
    (torso / "captions.json").write_text(json.dumps(captions, ensure_ascii=False), "utf-8")
    (torso / "index.json").write_text(json.dumps({"fingerprint": mark, "count": len(captions)}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(torso, folder)


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def indices(n: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Which of n samples make up batch `step`: a fresh permutation per epoch, a function of its arguments alone."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([epoch_order(n, seed, int(place // n))[place % n] for place in places])
