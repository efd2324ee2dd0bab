"""What a stage trains, as opposed to what it minimises: which parameters are trained and what a checkpoint holds.

    modules     part name -> network whose parameters are trained and averaged
    write       writes the files of a checkpoint from tensors on the CPU: the weights and their averages
    read        reads those files

Some of the classes train whole networks, others small modules beside a model that stays as it is: their checkpoints do not hold it.
"""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from safetensors.torch import load_file
from torch import Tensor, nn

from tinyldm.adapters.embedding import Embeddings, save_embedding
from tinyldm.adapters.embedding_files import STANDARD
from tinyldm.adapters.files import OWN as ADAPTER
from tinyldm.adapters.files import save_adapter
from tinyldm.adapters.lora import LoRA
from tinyldm.adapters.low_rank import LowRank
from tinyldm.folders.build import load_weights
from tinyldm.folders.load import load_model
from tinyldm.folders.save import save_model, save_part, weights_name
from tinyldm.model import NON_EMA, Model, architecture
from tinyldm.models.clip import CLIP
from tinyldm.text.base_tokenizer import BaseTokenizer
from tinyldm.training.checkpoint import save_tensors
from tinyldm.training.frozen import Frozen
from tinyldm.vendor_loaders.clip_model import preprocessor_config
from tinyldm.version import version

StateDict = Mapping[str, Tensor]
STATE = "trained.safetensors"           # raw and averaged numbers of an adapter or embedding, to continue from


class Stored(NamedTuple):
    """The state dicts of all trained parts: raw weights as the optimizers left them, and averaged ones."""

    raw: dict[str, StateDict]
    averaged: dict[str, StateDict]      # {}: there are no averages

    def with_averages(self, part: str) -> StateDict:
        """All tensors of a part: averages of its parameters, and its buffers, which are not averaged."""
        return {**self.raw[part], **self.averaged.get(part, {})}


class Trained(Protocol):
    modules: dict[str, nn.Module]

    def write(self, folder: Path, stored: Stored, step: int) -> None: ...

    def read(self, folder: Path) -> Stored: ...

    def frozen_bytes(self) -> int:
        """The bytes that `write` takes on the disk for frozen networks, in addition to the trained parts."""


class TrainedModel:
    """Trains the network of a model, its text encoders unless they are frozen, and its autoencoder if the objective does. FOLDER/model/
    is a complete model folder with averaged weights, and the raw ones beside them as its non_ema variant."""

    def __init__(self, model: Callable[[], Model], parts: tuple[str, ...], frozen: Frozen, plain: nn.Module | None = None):
        """model: returns the model of the current phase. frozen: the written folders of its other parts, which checkpoints link to.
        plain: for a sharded network, an unsharded copy on the meta device, which gives the shapes."""
        self.model, self.frozen, self.plain = model, frozen, plain
        modules = model().modules
        self.modules = {part: modules[part] for part in parts}

    def write(self, folder: Path, stored: Stored, step: int) -> None:
        model = self.model()
        shapes = model.modules | ({"net": self.plain} if self.plain is not None else {})
        texts = [((shapes[part], stored.with_averages(part)), tokenizer) if part in self.modules else self.frozen.text(i)
                 for i, (part, tokenizer) in enumerate(zip(model.text.modules, model.text.tokenizers, strict=True))]
        encoders, tokenizers = zip(*texts)
        vae = (shapes["vae"], stored.with_averages("vae")) if "vae" in self.modules else self.frozen.vae
        save_model(folder / "model", net=(shapes["net"], stored.with_averages("net")), vae=vae, texts=encoders,
                   tokenizers=tokenizers, non_ema=stored.raw, scheduler=model.scheduler,
                   defaults=model.defaults | {"step": step, "version": version()})

    def read(self, folder: Path) -> Stored:
        raw, averaged = (load_model(folder / "model", ema=wanted).modules for wanted in (False, True))
        return Stored(*({part: found[part].state_dict() for part in self.modules} for found in (raw, averaged)))

    def frozen_bytes(self) -> int:
        return self.frozen.bytes_in_checkpoint()


class TrainedAutoencoder:
    """Trains an autoencoder. FOLDER/vae/ is its part folder, with averaged weights, if there are some, and the raw ones beside them as its
    non_ema variant."""

    part = "vae"                        # the name of the module and of the folder

    def __init__(self, module: nn.Module):
        self.modules = {self.part: module}

    def write(self, folder: Path, stored: Stored, step: int) -> None:
        part = self.part
        save_part(folder / part, self.modules[part], stored.with_averages(part), stored.raw[part] if stored.averaged else None)

    def read(self, folder: Path) -> Stored:
        """Averages are read where the checkpoint has some, wanted or not."""
        row, found = architecture(self.modules[self.part]), []
        files = [folder / self.part / weights_name(row, variant) for variant in (NON_EMA, None)]
        for file in filter(Path.exists, files):
            network = copy.deepcopy(self.modules[self.part])
            load_weights(network, file)
            found.append({self.part: network.state_dict()})
        return Stored(found[0], found[1] if len(found) > 1 else {})

    def frozen_bytes(self) -> int:
        return 0


class TrainedCLIP(TrainedAutoencoder):
    """Trains a CLIP. FOLDER/clip/ is the same of it, with its tokenizer and with what transformers' CLIPProcessor reads."""

    part = "clip"

    def __init__(self, clip: CLIP, tokenizer: BaseTokenizer):
        super().__init__(clip)
        self.tokenizer = tokenizer

    def write(self, folder: Path, stored: Stored, step: int) -> None:
        super().write(folder, stored, step)
        self.tokenizer.save(folder / self.part)
        about = preprocessor_config(self.modules[self.part].config)
        (folder / self.part / "preprocessor_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


class TrainedBeside:
    """Trains modules beside a model that stays as it is, one for a part each. FOLDER/trained.safetensors is what a run continues from; the
    averaged numbers are in a second file, in a published layout."""

    def __init__(self, modules: Mapping[str, nn.Module], model: Callable[[], Model], about: Mapping[str, str]):
        """model: returns the model. about: facts for the metadata of the published file."""
        self.modules, self.model, self.about = dict(modules), model, about

    def write(self, folder: Path, stored: Stored, step: int) -> None:
        save_tensors(folder / STATE, {f"{kind}/{part}/{name}": tensor for kind, parts in stored._asdict().items()
                                      for part, tensors in parts.items() for name, tensor in tensors.items()})
        self.publish(folder, {part: stored.with_averages(part) for part in self.modules}, self.about | {"steps": str(step)})

    def read(self, folder: Path) -> Stored:
        found: dict[str, dict[str, dict[str, Tensor]]] = {kind: {part: {} for part in self.modules} for kind in Stored._fields}
        for key, tensor in load_file(folder / STATE).items():
            kind, part, name = key.split("/", 2)
            found[kind].setdefault(part, {})[name] = tensor
        return Stored(**found)

    def frozen_bytes(self) -> int:
        return 0

    @abstractmethod
    def publish(self, folder: Path, parts: Mapping[str, StateDict], about: Mapping[str, str]) -> None:
        """Write the file for others. parts: the averaged state dict of every module."""


class TrainedAdapter(TrainedBeside):
    """Trains low-rank adapters. FOLDER/adapter.safetensors is diffusers' layout, which sample.py --lora and load_lora_weights() read."""

    modules: dict[str, LoRA]

    def publish(self, folder: Path, parts: Mapping[str, StateDict], about: Mapping[str, str]) -> None:
        def changes(part: str) -> dict[str, LowRank]:
            stored = {end: {name: parts[part][f"branches.{name}.{end}"] for name in self.modules[part].branches} for end in ("down", "up")}
            return {f"{name.replace('/', '.')}.weight": LowRank(stored["down"][name], stored["up"][name], branch.scale)
                    for name, branch in self.modules[part].branches.items()}

        save_adapter(folder / ADAPTER, {part: changes(part) for part in self.modules}, self.model(), about)


class TrainedEmbeddings(TrainedBeside):
    """Trains the vectors of a new token. FOLDER/learned_embeds.safetensors is diffusers' layout, which sample.py --embedding reads."""

    modules: dict[str, Embeddings]

    def publish(self, folder: Path, parts: Mapping[str, StateDict], about: Mapping[str, str]) -> None:
        token = next(iter(self.modules.values())).token
        save_embedding(folder / STANDARD, token, {part: state["vectors"] for part, state in parts.items()}, self.model(), metadata=about)
