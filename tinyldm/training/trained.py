"""What a stage trains, as opposed to what it minimises: which parameters are trained and what a checkpoint holds.

    modules     part name -> network whose parameters are trained and averaged
    write       writes the files of a checkpoint from tensors on the CPU: the weights and their averages
    read        reads those files

The classes here train whole networks. Adapters or embeddings are other classes with the members of Trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from tinyldm.folders.build import load_weights
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model, save_vae
from tinyldm.model import Model

StateDict = Mapping[str, Tensor]


class Stored(NamedTuple):
    """The state dicts of all trained parts: raw weights as the optimizers left them, and averaged ones."""

    raw: dict[str, StateDict]
    averaged: dict[str, StateDict]      # {}: there are no averages

    def with_averages(self, part: str) -> StateDict:
        """All tensors of a part: averages of its parameters, and its buffers, which are not averaged."""
        return {**self.raw[part], **self.averaged[part]}


class Trained(Protocol):
    modules: dict[str, nn.Module]

    def write(self, folder: Path, stored: Stored, step: int) -> None: ...

    def read(self, folder: Path) -> Stored: ...

    def frozen_bytes(self) -> int:
        """The bytes of frozen networks that `write` stores in addition to the trained parts."""


class TrainedModel:
    """Trains the network of a model, and its text encoders unless they are frozen. FOLDER/model/ is a complete model folder with
    averaged weights, and the raw ones beside them as its non_ema variant."""

    def __init__(self, model: Callable[[], Model], parts: tuple[str, ...], vae: Path, plain: nn.Module | None = None):
        """model: returns the model of the current phase. vae: the written folder of its VAE, which checkpoints link to.
        plain: for a sharded network, an unsharded copy on the meta device, which gives the shapes."""
        self.model, self.vae, self.plain = model, vae, plain
        modules = model().modules
        self.modules = {part: modules[part] for part in parts}

    def write(self, folder: Path, stored: Stored, step: int) -> None:
        model = self.model()
        shapes = model.modules | ({"net": self.plain} if self.plain is not None else {})
        texts = [(shapes[part], stored.with_averages(part)) if part in self.modules else module
                 for part, module in model.text.modules.items()]
        save_model(folder / "model", net=(shapes["net"], stored.with_averages("net")), vae=self.vae, texts=texts,
                   tokenizers=model.text.tokenizers, non_ema=stored.raw, scheduler=model.scheduler,
                   defaults=model.defaults | {"step": step})

    def read(self, folder: Path) -> Stored:
        raw, averaged = (load_model(folder / "model", ema=wanted).modules for wanted in (False, True))
        return Stored(*({part: found[part].state_dict() for part in self.modules} for found in (raw, averaged)))

    def frozen_bytes(self) -> int:
        frozen = [module for part, module in self.model().text.modules.items() if part not in self.modules]
        return sum(tensor.nbytes for module in frozen for tensor in module.state_dict().values())


class TrainedAutoencoder:
    """Trains an autoencoder. FOLDER/vae/ is its part folder."""

    def __init__(self, vae: nn.Module):
        self.modules = {"vae": vae}

    def write(self, folder: Path, stored: Stored, step: int) -> None:
        save_vae(folder / "vae", self.modules["vae"], stored.raw["vae"])

    def read(self, folder: Path) -> Stored:
        found = copy.deepcopy(self.modules["vae"])
        load_weights(found, folder / "vae" / "diffusion_pytorch_model.safetensors")
        return Stored({"vae": found.state_dict()}, {})

    def frozen_bytes(self) -> int:
        return 0
