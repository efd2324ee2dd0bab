"""What a training step changes: one update of the optimizers, or none; several turns of an objective; checkpoints of both."""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyldm.config import OptimisationConfig
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.objectives import Objective, Turn
from tinyldm.training import checkpoint
from tinyldm.training.distributed import World, clip
from tinyldm.training.ema import PowerEMA
from tinyldm.training.learner import Learner
from tinyldm.training.trained import Stored

CPU = torch.device("cpu")


class Net:
    """Trains a network, and writes what is handed to it."""

    def __init__(self):
        torch.manual_seed(0)
        net = DiT(DiTConfig(width=16, layers=1, heads=1, mlp_width=16, context_dim=4, time_dim=8))
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        self.modules = {"net": net}

    def write(self, folder: Path, stored: Stored, step: int) -> None:
        for kind, tensors in stored._asdict().items():
            if tensors:
                checkpoint.save_tensors(folder / f"{kind}.safetensors", tensors["net"])

    def read(self, folder: Path) -> Stored:
        return Stored(*({"net": load_file(folder / f"{kind}.safetensors")} for kind in Stored._fields))

    def frozen_bytes(self) -> int:
        return 0


class One(Objective):
    turns = (Turn("one", ("net",)),)


def learner(kind: str = "muon", objective: Objective | None = None) -> Learner:
    settings = OptimisationConfig(optimizer=kind, lr=0.1, muon_lr=0.1)
    return Learner(Net(), objective or One(), settings, World(), CPU)


def tensors_of(learner: Learner) -> dict[str, Tensor]:
    """Copies of weights and optimizer state, by name."""
    found = learner.parameters | checkpoint.optimizer_tensors(learner.all_optimizers, learner.parameters)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_what_is_not_finite_changes_neither_weights_nor_moments(kind, bad):
    own = learner(kind)
    turn, net = own.objective.turns[0], own.trained.modules["net"]
    assert len(own.all_optimizers) == (2 if kind == "muon" else 1)

    def step(poison: float) -> float | None:
        loss = net(torch.ones(2, 4, 4, 4), torch.ones(2), Cond(torch.ones(2, 3, 4))).square().mean((1, 2, 3))
        loss.mean().backward()
        own.meter.add(loss * (poison if bad == "loss" else 1), 0.5)
        if bad == "gradient":
            p = next(p for p in net.parameters() if p.ndim == 2)
            p.grad[0, 2] *= poison
        return own.update(turn, clip(own.weights(turn), 1.0), 1.0, measure=True)

    assert step(1.0).loss is not None
    before = tensors_of(own)
    for poison in (float("nan"), float("inf")):
        assert step(poison) == (None, None) and all(p.grad is None for p in net.parameters())
        own.meter.count_skipped(1, 0)
    assert same(before, tensors_of(own))
    update = step(1.0)
    assert update.loss is not None and update.ratio > 0 and not same(before, tensors_of(own))


class NewMemory(TorchDispatchMode):
    """Adds up the bytes of tensors that do not share their memory with an argument of the operation that made them."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known]
        self.bytes += sum(tensor.nbytes for tensor in new)
        return result


def test_measuring_an_update_takes_one_copy_of_the_weights():
    class Larger:
        param_groups = ()

        def step(self) -> None:
            torch._foreach_mul_([p.detach() for p in own.parameters.values()], 1.5)

    own = learner()
    turn, weights = own.objective.turns[0], sum(p.nbytes for p in own.parameters.values())
    own.optimizers = {turn.name: [Larger()]}
    own.meter.add(torch.ones(2), 0.5)
    with NewMemory() as memory:
        update = own.update(turn, 1.0, 1.0, measure=True)
    assert update.ratio == pytest.approx(0.5) and weights <= memory.bytes < 1.2 * weights


class Pair(NamedTuple):
    x: Tensor


class Two(Objective):
    """A network and a second one of the objective's own, by turns; a teacher that nobody trains."""

    saved = ("critic",)

    def __init__(self):
        torch.manual_seed(1)
        self.networks = {"critic": nn.Linear(4, 1), "teacher": nn.Linear(4, 1)}
        own = OptimisationConfig(optimizer="adamw", lr=0.5)
        self.turns = (Turn("student", ("net",), 2), Turn("critic", ("critic",), optimisation=own))


def test_each_turn_moves_its_own_networks_with_its_own_learning_rate():
    own = learner(objective=Two())
    student, critic = own.objective.turns
    assert {name.partition(".")[0] for name in own.parameters} == {"net", "critic"}           # the teacher stays as it is
    assert set(own.named(critic)) == {"critic.weight", "critic.bias"}
    assert set(own.named(student)) == set(own.parameters) - set(own.named(critic))
    assert [group["peak_lr"] for optimizer in own.optimizers["critic"] for group in optimizer.param_groups] == [0.5]
    before = {name: p.detach().clone() for name, p in own.parameters.items()}
    for p in own.weights(critic):
        p.grad = torch.ones_like(p)
    own.meters["critic"].add(torch.ones(2), 0.5)
    own.meters["student"].add(torch.full((2,), 3.0), 0.5)
    assert own.update(critic, 1.0, 1.0).loss == 1
    moved = {name for name, p in own.parameters.items() if not torch.equal(p, before[name])}
    assert moved == set(own.named(critic))
    assert own.main_turn == "student" and own.log_row() == {"loss": None, "loss_critic": 1.0, "grad_norm_critic": 1.0}
    assert own.update(student, 1.0, 1.0).loss == 3


def test_gradients_that_a_turn_s_loss_leaves_on_other_networks_do_not_reach_their_own_turn():
    own = learner(objective=Two())
    student, critic = own.objective.turns
    for p in own.parameters.values():                          # as of a student whose loss passes through the critic
        p.grad = torch.ones_like(p)
    own.meters["student"].add(torch.ones(2), 0.5)
    own.update(student, 1.0, 1.0)
    assert all(p.grad is None for p in own.weights(critic))


def test_an_objective_without_a_turn_in_every_step_is_refused():
    class Never(Objective):
        turns = (Turn("one", ("net",), every=2), Turn("two", ("net",), every=3))

    with pytest.raises(ValueError, match="at least one turn must be taken in every step"):
        learner(objective=Never())


def test_a_checkpoint_brings_back_networks_moments_and_meters_of_every_turn(tmp_path):
    def step(own: Learner, value: float) -> None:
        for turn in own.objective.turns:
            for i, p in enumerate(own.weights(turn)):
                p.grad = torch.full_like(p, value + i)
            own.meters[turn.name].add(torch.full((2,), value), 0.5)
            own.update(turn, 1.0, 1.0)
        own.average(1)

    one, two = learner(objective=Two()), learner(objective=Two())
    with torch.no_grad():
        for p in two.parameters.values():
            p.zero_()
    step(one, 1.0)
    writer = checkpoint.Writer(tmp_path, keep=1)
    one.save(writer, "step", 1, {"more": [1]})
    writer.close()
    state = two.load(checkpoint.newest_undamaged(tmp_path))
    assert state["step"] == 1 and state["more"] == [1]
    for value in (2.0, -3.0):
        step(one, value), step(two, value)
    assert same(tensors_of(one), tensors_of(two)) and one.log_row() == two.log_row() and one.monitor.state() == two.monitor.state()
    assert same(one.ema.shadow, two.ema.shadow)
    assert not (tmp_path / "checkpoints" / "step-000001" / "averages.safetensors").exists()


def test_averages_of_older_runs_name_the_one_block_of_a_u_net_s_transformer_without_a_number():
    build = lambda: {"net": UNet(UNetConfig(widths=(8,), depth=1, attention=(True,), heads=(2,), context_dim=4, groups=4))}
    one, two = (SimpleNamespace(ema=PowerEMA(modules), trained=SimpleNamespace(modules=modules)) for modules in (build(), build()))
    saved = {name: torch.rand_like(tensor) for name, tensor in Learner.further_averages(one).items()}
    old = {name.replace(".blocks.0.", ".block."): tensor for name, tensor in saved.items()}
    assert sum(".block.norm1." in name for name in old) == 8       # weight and bias in each of 4 transformers
    Learner.load_further_averages(two, old)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in Learner.further_averages(two).items())
