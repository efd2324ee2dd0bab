"""What a run of train.py came to, aspect by aspect, so that two runs can be compared: what differs, and what does not."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from helpers import load_script, pictures, train_here
from PIL import Image
from safetensors.numpy import load_file

from tinyldm.config import change, check
from tinyldm.data import encoding
from tinyldm.data.cache import Cache
from tinyldm.models import layers
from tinyldm.objectives.autoencoder import AutoencoderObjective
from tinyldm.objectives.denoising import Denoising
from tinyldm.training import preflight, second_stage
from tinyldm.training.ema import EMA
from tinyldm.training.learner import Learner
from tinyldm.training.log import read
from tinyldm.training.rehearsal import wants_compile
from tinyldm.training.track import Tracker


def flags(settings: dict) -> list[str]:
    """Settings by their flat names as a command line."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(check.flag(name) if value else check.flag(name).replace("--", "--no-", 1))
        else:
            values = [f"{key}={each}".replace(" ", "") for key, each in value.items()] if isinstance(value, dict) else value
            words += [check.flag(name), *map(str, values)] if isinstance(values, list) else [f"{check.flag(name)}={value}"]
    return words


def awake(make):
    """A function that makes a network, as one whose weights are all away from 0: with zeros in its last layer, most settings make
    no difference in the first steps."""
    def made(*arguments):
        net = make(*arguments)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        return net
    return made


class Watched:
    """What passes between the parts of a run while it goes on: aspect -> list."""

    def __init__(self, train, patch):
        self.seen: dict[str, list] = {}
        self.patch = patch
        patch.setattr(os, "fsync", lambda file: None)           # half of the time of such short runs
        patch.setattr(second_stage, "new_network", awake(second_stage.new_network))
        self.after(Denoising, "draw", self.batch)
        self.after(AutoencoderObjective, "draw", lambda batch, *_: self.note(crops=batch.pixels, posterior=batch.noise))
        self.after(Denoising, "losses", lambda losses, objective, turn, networks, batch, progress: self.note(
            micro_batches=len(losses), loss=losses.detach()) if torch.is_grad_enabled() else None)
        self.after(AutoencoderObjective, "losses", lambda losses, *_: self.note(vae_loss=losses.detach()))
        self.after(train, "clip", lambda norm, weights, limit: self.note(limits=limit))
        self.after(Learner, "__init__", self.begin)
        self.after(Learner, "update", self.update)
        self.after(Learner, "all_reduce", lambda _, learner, turn, dtype: self.seen.update(sums=dtype))
        self.after(encoding, "posterior", lambda _, vae, images, device, dtype: self.note(encoded=len(images), precision=dtype))
        self.after(layers, "checkpoint", lambda *_, **options: self.note(recomputed=1))
        patch.setattr(preflight, "find_backend", lambda kind: None)         # neither package is needed
        patch.setattr(train, "Tracker", lambda kind, *more: self.note(tracked=kind) or Tracker("", *more))
        patch.setattr(train, "rehearse", lambda config, context, last: (change(config, compile=wants_compile(config, context.device)), []))
        patch.setattr(second_stage.torch, "compile", lambda net, **_: self.note(
            compiled=getattr(net, "__qualname__", type(net).__name__)) or net)
        patch.setattr(second_stage, "compile_blocks", lambda net, dynamic: self.note(compiled=f"blocks of {type(net).__name__}") or net)

    def note(self, **values) -> None:
        for aspect, value in values.items():
            self.seen.setdefault(aspect, []).append(value)

    def after(self, owner, name: str, look) -> None:
        real = getattr(owner, name)

        def called(*arguments, **options):
            result = real(*arguments, **options)
            look(result, *arguments, **options)
            return result
        self.patch.setattr(owner, name, called)

    def batch(self, batch, objective, samples, *_) -> None:
        self.note(samples=samples.samples, x0=batch.x0, eps=batch.eps, t=batch.t, perturbation=batch.noise - batch.eps, tokens=batch.tokens,
                  captions=samples.tokens)

    def begin(self, _, learner, *more) -> None:
        stage = "vae_" if "vae" in learner.trained.modules else ""
        self.note(**{f"{stage}initial": {name: p.detach().clone() for name, p in learner.parameters.items()}})

    def update(self, update, learner, turn, *more, **options) -> None:
        groups = [group for optimizer in learner.optimizers[turn.name] for group in optimizer.param_groups]
        stage = "vae_" if turn.name == "autoencoder" else ""
        self.note(**{f"{stage}rates": [group["lr"] for group in groups], f"{stage}decays": [group["weight_decay"] for group in groups],
                     f"{stage}optimizers": [type(optimizer).__name__ for optimizer in learner.optimizers[turn.name]]})
        if isinstance(learner.ema, EMA):
            self.note(ema=learner.ema.decay)


def outcome(words: list[str], folder: Path, patch) -> dict:
    """Run train.py in this process -> aspect -> what it came to, comparable with `same`. An error is an outcome as well."""
    train = load_script("train")
    seen = Watched(train, patch).seen
    try:
        train_here(train, ["--out", str(folder), *words], patch)
    except ValueError as error:
        return {"error": str(error)}
    return seen | written(folder)


def written(folder: Path) -> dict:
    """What a run has left in its folder."""
    found = {"checkpoints": sorted(file.name for file in (folder / "checkpoints").iterdir()),
             "pictures": {file.name: file.read_bytes() for file in (folder / "samples").glob("step-*")},
             "vae": {file.name: file.read_bytes() for file in (folder / "vae").iterdir()}}
    rows = read(folder / "log.jsonl")
    found["log"] = [(row["stage"], row["step"]) for row in rows if "loss" in row]
    found["validation"] = [{name: row.get(name) for name in ("step", "val_raw", "val_ema", "val_bins")} for row in rows if "val_ema" in row]
    found["events"] = [(row["event"], row["step"]) for row in rows if "event" in row]
    last = folder / "checkpoints" / found["checkpoints"][-1]
    found["moments"] = load_file(last / "optimizer.safetensors")
    found["further averages"] = load_file(last / "averages.safetensors") if (last / "averages.safetensors").exists() else {}
    parts = [file for file in (last / "model").glob("*/*.safetensors") if file.parent.name != "vae"]
    for aspect, raw in (("weights", True), ("averages", False)):
        found[aspect] = {f"{file.parent.name}.{name}": tensor for file in parts if ("non_ema" in file.name) == raw
                         for name, tensor in load_file(file).items()}
    configs = {str(file.relative_to(last)): json.loads(file.read_text()) for file in (last / "model").rglob("*.json")
               if file.parent.name != "vae"}
    words = {name for name in configs if "tokenizer/" in name}
    found["vocabulary"] = {name: configs[name] for name in words}
    found["defaults"] = {name: configs[name] for name in configs.keys() - words}
    if (folder / "latents").exists():
        caches = [Cache(file.parent) for file in sorted(folder.rglob("latents/**/index.json"))]
        found["latents"] = [cache.latents([i]) for cache in caches for i in range(len(cache))]
        found["stored pictures"] = [cache.pictures for cache in caches]
        found["stored captions"] = [cache.captions(i) for cache in caches for i in range(len(cache))]
    return found


def same(one, two) -> bool:
    """Whether two values are equal to the bit, tensors inside lists and dicts included."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, (np.ndarray, torch.Tensor)):
        return np.array_equal(np.asarray(one), np.asarray(two))
    return one == two


def differing(one: dict, two: dict) -> set[str]:
    """The aspects in which two outcomes differ. One of them may be an error alone."""
    if "error" in one.keys() ^ two.keys():
        return {"error"}
    return {aspect for aspect in one.keys() | two.keys() if not same(one.get(aspect), two.get(aspect))}


class Row(NamedTuple):
    """A setting or a flag: what differs between two runs that differ in it alone."""

    value: Any                                      # its other value, or the words of a command line that give it
    differs: set[str]                               # the aspects in which the two runs differ; they agree in all others
    over: Any = ()                                  # settings or words of both runs
    which_way: Callable[[Any, Any], bool] = lambda without, with_it: True       # of the aspects of the two runs
    rounding: Collection[str] = ()                  # aspects that may differ too, because sums are taken in another order

    def check(self, without: Mapping[str, Any], with_it: Mapping[str, Any]) -> None:
        found = differing(without, with_it)
        assert self.differs <= found <= self.differs | {*self.rounding}, f"not expected: {found ^ self.differs}"
        one, two = (SimpleNamespace(**{aspect.replace(" ", "_"): value for aspect, value in found.items()}) for found in (without, with_it))
        assert self.which_way(one, two)


def several_shapes(path: Path, shade: int) -> str:
    """Pictures of several shapes, with captions short and long; one of them is broken."""
    pictures(path, 14, (12, 12))
    for i in range(14, 22):
        Image.new("RGB", (24, 12) if i < 20 else (8, 8), (11 * i, 200 - 9 * i, shade)).save(path / f"{i:04d}.png")
        (path / f"{i:04d}.txt").write_text({14: "a caption " * 12, 20: "x"}.get(i, f"a wide picture, number {i}"))
        (path / f"{i:04d}.json").write_text(json.dumps({"short": [f"wide {i}"]}))
    (path / "9999.png").write_bytes(b"not a picture"), (path / "9999.txt").write_text("broken")
    return str(path)
