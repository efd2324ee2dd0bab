"""What training changes, and a checkpoint of stage 2 holds: weights, their averages, optimizer state, what is measured."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tinyldm.config import Config
from tinyldm.training import checkpoint
from tinyldm.training.distributed import World, load_whole, shard, whole
from tinyldm.training.ema import EMA, PowerEMA
from tinyldm.training.loop import update
from tinyldm.training.meter import Meter
from tinyldm.training.optim import make_optimizers, set_lr
from tinyldm.training.setup import widths
from tinyldm.training.spikes import Course
from tinyldm.vendor_loaders.folder import save_model
from tinyldm.vendor_loaders.load import Model, load_model


class Learner:
    """The network, a text encoder if that is trained along, and all that follows their steps."""

    def __init__(self, config: Config, net: nn.Module, text: nn.Module, world: World, device: torch.device):
        self.plain = net
        if config.fsdp:                                        # its own state_dict would gather and part it again, while it trains
            self.plain = copy.deepcopy(net).to("meta")
            shard(net, world)
        self.trained = {"net": net} if config.text_weights else {"net": net, "text": text}
        self.parameters = {f"{part}.{name}": p for part, module in self.trained.items() for name, p in module.named_parameters()}
        self.optimizers = make_optimizers(self.parameters, kind=config.optimizer, lr=config.lr, muon_lr=config.muon_lr,
                                          weight_decay=config.weight_decay)
        self.ema = PowerEMA(self.trained, widths(config)) if config.ema_widths else EMA(self.trained, config.ema_decay)
        self.meter, self.course = Meter(device), Course()
        self.clip, self.world, self.device = config.grad_clip, world, device

    def forget(self) -> None:
        """Drop the gradients of a step that could not be finished, and what was measured of it."""
        for p in self.parameters.values():
            p.grad = None
        self.meter.waiting.zero_()

    def step(self, n: int, factor: float, measure: bool) -> tuple[float | None, float | None]:
        """Update n (from 1), on the gradients of all processes added up -> the loss, None where the step was left out;
        where it is to be measured, how far it moved the weights, relative to their own length."""
        self.world.sum([*(p.grad for p in self.parameters.values() if p.grad is not None), self.meter.waiting])
        weights = [p.detach() for p in self.parameters.values()]
        before = [p.clone() for p in weights] if measure else []
        set_lr(self.optimizers, factor)
        loss = update(list(self.parameters.values()), self.optimizers, self.clip, self.meter)
        self.ema.update(n)                                     # weights that stayed put count, too
        if loss is None or not measure:
            return loss, None
        return loss, norm(torch._foreach_sub(weights, before)) / max(norm(before), 1e-12)

    def save(self, writer: checkpoint.Writer, model: Model, step: int, state: dict[str, Any]) -> None:
        """Copy what changes to the host; the rest happens in the background, in the main process."""
        writer.wait()                                                           # at most one copy at a time
        ema = self.ema
        to_host = partial(checkpoint.host_copy, keep=self.world.main)
        shapes = self.trained | {"net": self.plain}
        averaged = {part: (shapes[part], to_host(ema.state_dict(part))) for part in self.trained}
        raw = {part: to_host(module.state_dict()) for part, module in self.trained.items()}
        moments = to_host(checkpoint.optimizer_tensors(self.optimizers, self.parameters))
        others = to_host({f"{width}/{part}.{name}": tensor for i, width in enumerate(other_widths(ema), 1)
                                       for part in self.trained for name, tensor in ema.state_dict(part, i).items()})

        def fill(folder: Path) -> None:
            save_model(folder / "model", net=averaged["net"], vae=writer.run / "vae", text=averaged.get("text", model.text), non_ema=raw,
                       tokenizer=model.tokenizer, scheduler=model.scheduler, defaults=model.defaults | {"step": step})
            checkpoint.save_tensors(folder / "optimizer.safetensors", moments)
            if others:
                checkpoint.save_tensors(folder / "averages.safetensors", others)

        if not self.world.main:
            return
        parts = [moments, others, *raw.values(), *(tensors for _, tensors in averaged.values())]
        frozen = {} if "text" in averaged else model.text.state_dict()
        checkpoint.check_room(writer.run, sum(tensor.nbytes for tensors in [*parts, frozen] for tensor in tensors.values()))
        writer.save("step", step, fill, state | {"meter": self.meter.state(), "course": self.course.state()})

    def load(self, last: Path) -> dict[str, Any]:
        """Go back to a checkpoint -> its state."""
        raw, averaged = (load_model(last / "model", ema=wanted) for wanted in (False, True))
        for part, module in self.trained.items():
            load_whole(module, getattr(raw, part).state_dict())
            self.ema.load_state_dict(part, getattr(averaged, part).state_dict())
        if wanted := other_widths(self.ema):
            others = load_file(last / "averages.safetensors")
            for i, width in enumerate(wanted, 1):
                for part in self.trained:
                    start = f"{width}/{part}."
                    self.ema.load_state_dict(part, {name.removeprefix(start): x for name, x in others.items() if name.startswith(start)}, i)
        checkpoint.load_optimizers(last / "optimizer.safetensors", self.optimizers, self.parameters)
        state = checkpoint.read_state(last)
        self.meter.load(state["meter"])
        self.course.load(state["course"])
        return state


def other_widths(ema: EMA | PowerEMA) -> Sequence[float]:
    """Those of the averages that are not the model's."""
    return ema.sigma_rels[1:] if isinstance(ema, PowerEMA) else ()


def norm(tensors: list[Tensor]) -> float:
    """Of all tensors as one vector."""
    return float(whole(torch.nn.utils.get_total_norm(tensors)))
