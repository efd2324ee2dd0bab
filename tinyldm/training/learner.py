"""The state that training changes and checkpoints hold: weights, their averages, optimizer state, and running measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tinyldm.config import OptimisationConfig
from tinyldm.device import DTYPES
from tinyldm.model import muon_matrices
from tinyldm.objectives import Objective, Turn
from tinyldm.training import checkpoint
from tinyldm.training.distributed import World, load_whole, local, total_norm
from tinyldm.training.early_stopping import EarlyStopping
from tinyldm.training.ema import EMA, PowerEMA, parse_widths
from tinyldm.training.loss_monitor import LossMonitor
from tinyldm.training.meter import Meter
from tinyldm.training.optim import make_optimizers, set_lr
from tinyldm.training.trained import Stored, Trained


class Update(NamedTuple):
    """The result of one optimizer update."""

    loss: float | None          # None: the loss or the gradient was not finite, and the update was skipped
    ratio: float | None = None  # norm of the weights' change / norm of the weights; None: not measured

    @property
    def skipped(self) -> bool:
        return self.loss is None


class Learner:
    """The trained networks of a stage and of its objective, with their optimizers, averages, meters and loss monitor.

    average: whether the weights are averaged. patience: see EarlyStopping."""

    def __init__(self, trained: Trained, objective: Objective, settings: OptimisationConfig, world: World, device: torch.device,
                 average: bool = True, patience: int = 0):
        self.trained, self.objective, self.world, self.device = trained, objective, world, device
        if all(turn.every > 1 or turn.start > 0 for turn in objective.turns):
            raise ValueError(f"{type(objective).__name__}: at least one turn must be taken in every step (every=1)")
        own = {part: module for part, module in objective.networks.items() if any(part in turn.trains for turn in objective.turns)}
        modules = trained.modules | own
        self.parameters = {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
        matrices = muon_matrices(modules)
        self.optimizers = {turn.name: make_optimizers(self.named(turn), matrices, turn.optimisation or settings, world, turn.betas)
                           for turn in objective.turns}
        self.ema: EMA | PowerEMA | None = None
        if average:
            widths = parse_widths(settings.ema_widths)
            self.ema = PowerEMA(trained.modules, widths) if widths else EMA(trained.modules, settings.ema_decay)
        self.meters = {turn.name: Meter(device) for turn in objective.turns}
        self.monitor, self.stopping = LossMonitor(), EarlyStopping(patience)

    @property
    def main_turn(self) -> str:
        """The name of the turn whose loss is logged as `loss`, shown on the progress bar and watched for divergence."""
        return self.objective.turns[0].name

    @property
    def meter(self) -> Meter:
        return self.meters[self.main_turn]

    def named(self, turn: Turn) -> dict[str, nn.Parameter]:
        """The parameters that a turn trains, keyed by "part.name"."""
        return {name: p for name, p in self.parameters.items() if name.startswith(tuple(f"{part}." for part in turn.trains))}

    def weights(self, turn: Turn) -> list[nn.Parameter]:
        return list(self.named(turn).values())

    def broadcast_state(self) -> None:
        """Overwrite all that training changes by rank 0's, in all processes. Hosts may differ in their random numbers (other CPUs
        take other vector instructions) and in their copies of a checkpoint."""
        modules = [*self.trained.modules.values(), *self.objective.networks.values()]
        weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        averages = [] if self.ema is None else [p for part in self.trained.modules for p in self.ema.state_dict(part).values()]
        moments = checkpoint.optimizer_tensors(self.all_optimizers, self.parameters)
        self.world.broadcast_tensors([*weights, *averages, *self.further_averages().values(), *(moments[name] for name in sorted(moments))])

    def check_equal_weights(self, step: int) -> None:
        """ValueError where the processes' trained parameters differ: gradients of different weights cannot be summed. (Buffers may
        differ: the statistics of a batch norm are those of a process's own part of each batch.)"""
        if not self.world.all_equal(list(self.parameters.values())):
            raise ValueError(f"after step {step:,} the {self.world.size} processes hold different weights, so no checkpoint was written: "
                             "continue from the last one with --resume yes, which gives all of them the same. If that happens again, "
                             "a GPU is faulty, or the hosts differ in their GPUs or versions of torch")

    def all_reduce(self, turn: Turn, dtype: str = "fp32") -> None:
        """After the backward pass: sum over all processes the gradients, sent in this dtype, and the measured losses."""
        self.world.sum([p.grad for p in self.weights(turn) if p.grad is not None], DTYPES[dtype])
        self.world.sum([self.meters[turn.name].pending])

    def drop_gradients(self) -> None:
        """Discard the gradients and measurements of a step that could not be finished."""
        for p in self.parameters.values():
            p.grad = None
        for meter in self.meters.values():
            meter.pending.zero_()

    def update(self, turn: Turn, norm: float, lr_factor: float, measure: bool = False) -> Update:
        """One step of a turn's optimizers on summed and clipped gradients, skipped where loss or norm is not finite. Then all
        gradients are dropped, also those that this turn's loss left on networks that it does not train.

        norm: of the gradients before clipping. measure: the update's ratio."""
        optimizers, meter, weights = self.optimizers[turn.name], self.meters[turn.name], [p.detach() for p in self.weights(turn)]
        before, size = ([p.clone() for p in weights], total_norm(weights)) if measure else ([], None)
        set_lr(optimizers, lr_factor)
        loss = float(meter.pending[0])
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            for optimizer in optimizers:
                optimizer.step()
            meter.keep(norm)
        for p in self.parameters.values():
            p.grad = None
        if not finite:
            return Update(None)
        if not measure:
            return Update(loss)
        torch._foreach_sub_(*([*map(local, tensors)] for tensors in (before, weights)))     # in place: there may be no room for more
        return Update(loss, float(total_norm(before) / size.clamp(min=1e-12)))

    def average(self, step: int) -> None:
        """Move the averages towards the weights, after update `step` (counted from 1), also where that update was skipped."""
        if self.ema is not None:
            self.ema.update(step)

    def validated(self, step: int, row: Mapping[str, Any]) -> str:
        """Early stopping: keep the weights if the loss of this validation is the smallest so far. -> "", or why training is over. row: its
        log row; of averages, if there are some. All processes take the main one's loss."""
        if not self.stopping.patience:
            return ""
        loss = self.world.broadcast(row.get("val_ema", row.get("val_raw")))
        if loss is None:                                        # the validation has failed
            return ""
        if self.stopping.better(step, loss):
            self.stopping.weights = checkpoint.host_copy({f"{part}.{name}": tensor for part in self.trained.modules
                                                          for name, tensor in self.final_weights(part).items()})
        if not self.stopping.over:
            return ""
        return (f"{self.stopping.since} validations without a smaller loss than {self.stopping.loss:.5g}, that of step "
                f"{self.stopping.step:,}: training is over")

    def final_weights(self, part: str) -> dict[str, Tensor]:
        """The state of a part with averages, if there are some, in place of its parameters."""
        return {**self.trained.modules[part].state_dict(), **(self.ema.state_dict(part) if self.ema else {})}

    def take_final_weights(self) -> str:
        """At the end: give the trained networks the weights of the best validation, if early stopping has kept them, else the averages,
        if there are some. -> which they are; "" where they stay as they are."""
        best = self.stopping
        for part, module in self.trained.modules.items():
            kept = {name.removeprefix(f"{part}."): tensor for name, tensor in best.weights.items() if name.startswith(f"{part}.")}
            load_whole(module, kept or {name: tensor.clone() for name, tensor in self.final_weights(part).items()})
        if best.weights:
            return f"the weights of step {best.step:,}, with the smallest validation loss, {best.loss:.5g}"
        return "the averaged weights" if self.ema else ""

    def log_row(self) -> dict[str, Any]:
        """The meters' means since the last row, for log.jsonl; those of turns after the first end in _NAME of the turn."""
        row = self.meter.row()
        for name in list(self.meters)[1:]:
            row |= {f"{key}_{name}": value for key, value in self.meters[name].row().items()}
        return {**row, **self.objective.log_row()}

    def save(self, writer: checkpoint.Writer, stage: str, step: int, state: dict[str, Any]) -> None:
        """Copy all that training changes to the host; the main process then writes the copy in the background. ValueError where the
        processes' weights differ."""
        to_host, modules = writer.copier(keep=self.world.main), self.trained.modules        # waits, so the host holds at most one copy
        self.check_equal_weights(step)
        averages = {} if self.ema is None else {part: to_host(self.ema.state_dict(part)) for part in modules}
        stored = Stored({part: to_host(module.state_dict()) for part, module in modules.items()}, averages)
        moments = to_host(checkpoint.optimizer_tensors(self.all_optimizers, self.parameters))
        files = {"optimizer": moments, "averages": to_host(self.further_averages()), "objective": to_host(self.objective_tensors()),
                 "best": self.stopping.weights}
        if not self.world.main:
            return

        def fill(folder: Path) -> None:
            self.trained.write(folder, stored, step)
            for name, tensors in files.items():
                if tensors:
                    checkpoint.save_tensors(folder / f"{name}.safetensors", tensors)

        parts = [*files.values(), *stored.raw.values(), *stored.averaged.values()]
        needed = sum(tensor.nbytes for tensors in parts for tensor in tensors.values()) + self.trained.frozen_bytes()
        checkpoint.check_room(writer.run, needed)
        measured = {"meter": self.meter.state(), "course": self.monitor.state(),
                    "meters": {name: meter.state() for name, meter in list(self.meters.items())[1:]}}
        if self.stopping.patience:
            measured["early_stopping"] = self.stopping.state()
        writer.save(stage, step, fill, state | measured)

    def load(self, last: Path) -> dict[str, Any]:
        """Restore everything from a checkpoint -> its state."""
        stored = self.trained.read(last)
        for part, module in self.trained.modules.items():
            load_whole(module, stored.raw[part])
            if self.ema is not None:
                own = self.ema.state_dict(part)                                 # parameters alone; buffers are not averaged
                self.ema.load_state_dict(part, {name: stored.averaged[part][name] for name in own})
        if self.further_averages():
            self.load_further_averages(load_file(last / "averages.safetensors"))
        if saved := self.objective_tensors():
            found = load_file(last / "objective.safetensors")
            for name, tensor in saved.items():
                tensor.copy_(found[name])
        checkpoint.load_optimizers(last / "optimizer.safetensors", self.all_optimizers, self.parameters)
        state = checkpoint.read_state(last)
        for name, meter in self.meters.items():
            meter.load(state["meter"] if name == self.main_turn else state["meters"][name])
        if "early_stopping" in state:
            self.stopping.load(state["early_stopping"], load_file(file) if (file := last / "best.safetensors").exists() else {})
        if "course" in state:                                                   # missing in old checkpoints of the first stage
            self.monitor.load(state["course"])
        return state

    @property
    def all_optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer for optimizers in self.optimizers.values() for optimizer in optimizers]

    def objective_tensors(self) -> dict[str, Tensor]:
        """The tensors (not copies) of those of the objective's own networks that a checkpoint holds."""
        return {f"{part}.{name}": tensor for part in self.objective.saved
                for name, tensor in self.objective.networks[part].state_dict().items()}

    def further_averages(self) -> dict[str, Tensor]:
        """The averages of further widths, keyed by "width/part.name"; the average of the first width is in the model's folder."""
        return {f"{width}/{part}.{name}": tensor for i, width in enumerate(further_widths(self.ema), 1)
                for part in self.trained.modules for name, tensor in self.ema.state_dict(part, i).items()}

    def load_further_averages(self, found: Mapping[str, Tensor]) -> None:
        found = {checkpoint.current_name(name): tensor for name, tensor in found.items()}
        for i, width in enumerate(further_widths(self.ema), 1):
            for part in self.trained.modules:
                start = f"{width}/{part}."
                own = {name.removeprefix(start): tensor for name, tensor in found.items() if name.startswith(start)}
                self.ema.load_state_dict(part, own, i)


def further_widths(ema: EMA | PowerEMA | None) -> Sequence[float]:
    """The widths of all averages but the first, which is the one that the model's folder holds."""
    return ema.sigma_rels[1:] if isinstance(ema, PowerEMA) else ()
