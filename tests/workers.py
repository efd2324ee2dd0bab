"""What one of several processes does in test_distributed.py, and what a single one does to compare with.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python workers.py FOLDER
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from tinyldm.config import OptimisationConfig
from tinyldm.model import muon_matrices
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.objectives import Objective, Turn
from tinyldm.training import checkpoint, distributed, optim
from tinyldm.training.ema import EMA, PowerEMA
from tinyldm.training.learner import Learner
from tinyldm.training.optim import make_optimizers

BATCH, STEPS = 8, 3
SETTINGS = OptimisationConfig(optimizer="muon", lr=1e-3, muon_lr=1e-3, weight_decay=0.1)


class Run:
    """A small training run as train.py goes about it: a network, perhaps sharded, and something trained along that is not."""

    def __init__(self, kind, world, sharded=False, seed=0, half=False):
        torch.manual_seed(seed)
        self.world, self.half = world, half
        self.net = (DiT(DiTConfig(width=24, layers=1, heads=2, mlp_width=40, context_dim=10, time_dim=16)) if kind == "dit" else
                    UNet(UNetConfig(widths=(8, 16), depth=1, attention=(True, False), heads=(2, 2), context_dim=10, groups=4)))
        self.text = nn.Linear(6, 10)
        with torch.no_grad():
            for p in self.net.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        if sharded:
            with self.autocast():
                distributed.shard(self.net, world)
        self.modules = {"net": self.net, "text": self.text}
        self.parameters = {f"{part}.{name}": p for part, module in self.modules.items() for name, p in module.named_parameters()}
        self.optimizers = make_optimizers(self.parameters, muon_matrices(self.modules), SETTINGS, world)
        self.ema, self.meter = EMA(self.modules, 0.9), torch.zeros(2)

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half)

    def step(self, n):
        batch = [torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(n)) for shape in ((4, 8, 8), (5, 6), ())]
        share = [part.tensor_split(self.world.size)[self.world.rank] for part in batch]
        meter = torch.zeros(2)
        for x, words, t in zip(*(part.tensor_split(2) for part in share)):     # two micro-batches, of unequal sizes
            with self.autocast():
                losses = (self.net(x, t.abs() * 500, Cond(self.text(words))).float() - x.flip(1)).square().mean((1, 2, 3))
            (losses.sum() / BATCH).backward()
            meter += torch.stack([losses.detach().sum() / BATCH, torch.tensor(float(len(x)))])
        with self.world.peer_errors():
            self.world.sum([p.grad for p in self.parameters.values()] + [meter])
            if n == 0:
                self.gradients = {name: distributed.whole(p.grad).clone() for name, p in self.parameters.items()}
            self.norm = distributed.clip(list(self.parameters.values()), 0.1)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        self.ema.update(n + 1)
        self.meter += meter

    def steps(self, first=0, last=STEPS):
        for n in range(first, last):
            self.step(n)
        return self

    def tensors(self, keep=True):
        """All that a checkpoint holds, whole."""
        raw = {f"raw/{part}.{name}": p for part, module in self.modules.items() for name, p in module.state_dict().items()}
        averaged = {f"ema/{part}.{name}": p for part in self.modules for name, p in self.ema.state_dict(part).items()}
        moments = {f"opt/{name}": p for name, p in checkpoint.optimizer_tensors(self.optimizers, self.parameters).items()}
        return checkpoint.host_copy(raw | averaged | moments | {"meter": self.meter}, keep)

    def load(self, tensors, folder):
        pick = lambda prefix: {name.removeprefix(prefix): p for name, p in tensors.items() if name.startswith(prefix)}
        for part, module in self.modules.items():
            distributed.load_whole(module, pick(f"raw/{part}."))
            self.ema.load_state_dict(part, pick(f"ema/{part}."))
        file = folder / f"moments-{self.world.rank}.safetensors"
        save_file(pick("opt/"), file)
        checkpoint.load_optimizers(file, self.optimizers, self.parameters)
        self.meter.copy_(tensors["meter"])
        return self

    @torch.no_grad()
    def output(self):
        with self.autocast():
            return self.net(torch.ones(1, 4, 8, 8), torch.ones(1), Cond(torch.ones(1, 5, 10)))

    def outputs(self):
        """With the raw weights, with the averages, with the raw ones again."""
        before = self.output()
        with self.ema.applied():
            averaged = self.output()
        return {"before": before, "averaged": averaged, "after": self.output()}


def digest(tensors):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in sorted(tensors.items()))).hexdigest()


def data_parallel(world, save, kind):
    """-> what must be the same on all ranks, and how many matrices this one has orthogonalised."""
    run, real, counts = Run(kind, world), optim.orthogonalise, []
    optim.orthogonalise = lambda matrices: counts.append(len(matrices)) or real(matrices)
    tensors = run.steps().tensors()
    optim.orthogonalise = real
    save(kind, tensors), save(f"{kind}-gradients", run.gradients)
    return {f"{kind}-norm": run.norm, kind: digest(tensors), f"{kind}-orthogonalised": sum(counts)}


def half_precision(world, save):
    """A sharded network under autocast -> the number of its whole bfloat16 weights that wait for the backward pass."""
    run = Run("dit", world, sharded=True, half=True)
    for kind, each in (("dit", run), ("unet", Run("unet", world, sharded=True, half=True))):
        save(f"sharded-half-{kind}-output", {"output": each.output()})
    linears = [module.weight.shape for module in run.net.modules() if isinstance(module, nn.Linear)]
    shapes, kept = {tuple(shape) for shape in linears} | {tuple(shape[::-1]) for shape in linears}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        with run.autocast():                                    # on 32 tokens, so that no activation has the shape of a weight
            output = run.net(torch.ones(1, 4, 8, 16), torch.ones(1), Cond(torch.ones(1, 5, 10)))
    found = {"whole weights": sum(tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes and tensor.untyped_storage().size() > 0
                                  for tensor in kept)}
    output.sum().backward()
    run.net.zero_grad()
    save("sharded-half", run.steps().tensors(keep=world.main))
    save("sharded-half-gradients", run.gradients)
    return found | {"dtypes": sorted({str(p.dtype) for p in run.net.parameters()} | {str(p.dtype) for p in run.gradients.values()})}


def fully_sharded(world, save, folder):
    """A sharded run; one that goes on from the single process's checkpoint, and one for that to go on from."""
    run = Run("dit", world, sharded=True).steps(last=2)
    parameters = list(run.net.parameters())
    found = {"share": [sum(distributed.local(p).numel() for p in parameters), sum(p.numel() for p in parameters)]}
    halfway = run.tensors(keep=world.main)
    save("sharded-halfway", halfway)
    save("sharded", run.steps(2).tensors(keep=world.main))
    save("sharded-gradients", run.gradients)
    save("sharded-outputs", run.outputs())
    resumed = Run("dit", world, sharded=True, seed=1).load(load_file(folder / "single.safetensors"), folder)
    save("resumed", resumed.steps(2).tensors(keep=world.main))
    snapshot = PowerEMA({"net": run.net}, (0.1,)).snapshot()[0.1]
    found["snapshot"] = all(torch.equal(snapshot[f"net.{name}"], distributed.whole(p)) for name, p in run.net.named_parameters())
    return found | {"sharded-norm": run.norm, "kept": len(halfway)}


def blocks(world, save):
    """A sharded U-Net takes a step, and draws."""
    run = Run("unet", world, sharded=True).steps(last=1)
    save("sharded-unet-gradients", run.gradients), save("sharded-unet-outputs", run.outputs())
    names = [name for name, module in run.net.named_modules() if hasattr(module, "set_gradient_divide_factor")]
    return {"blocks": names, "sharded-unet-norm": run.norm}


class One(Objective):
    turns = (Turn("one", ("net",)),)


def learner(world, folder):
    """Weights that differ are made equal, gradients are summed in bfloat16, and weights that differ are noticed."""
    torch.manual_seed(world.rank)                              # as on hosts that draw other random numbers
    own = Learner(SimpleNamespace(modules={"net": nn.Linear(30, 20)}), One(), SETTINGS, world, torch.device("cpu"))
    own.optimizers["one"][0].state[own.parameters["net.bias"]]["exp_avg"] = torch.randn(20)
    own.trained.modules["net"].register_buffer("table", torch.randn(4))
    found = {"at first": attempt(lambda: own.check_equal_weights(0))}
    own.broadcast_state()
    equal = {**own.parameters, "table": own.trained.modules["net"].table.clone(), "ema": own.ema.shadow["net.weight"], "moments": checkpoint.optimizer_tensors(
        own.all_optimizers, own.parameters)["net.bias/exp_avg"]}
    own.trained.modules["net"].table.fill_(world.rank)         # statistics of a batch norm
    found |= {"made equal": attempt(lambda: own.check_equal_weights(0)), "equal": digest({name: p.detach() for name, p in equal.items()})}

    sent, real, weights = [], dist.all_reduce, list(own.parameters.values())
    dist.all_reduce = lambda tensor, *more, **options: sent.append(tensor.nbytes) or real(tensor, *more, **options)
    for rank in range(world.size):                             # the rounding errors of terms as large as their sum
        own.parameters["net.weight"].grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(rank))
        own.parameters["net.bias"].grad = torch.full((20,), 1.0 + rank)
        if rank == world.rank:
            break
    own.meter.pending.fill_(1 / 3)
    own.all_reduce(own.objective.turns[0], "bf16")
    dist.all_reduce = real
    found |= {"sent": sent, "pending": own.meter.pending.tolist(), "summed": [p.grad.flatten().tolist() for p in weights]}

    if world.rank == world.size - 1:                           # a single bit of a single process
        own.parameters["net.weight"].detach().view(torch.int32)[3, 4] ^= 1
    writer = checkpoint.Writer(folder / "unequal", 1)
    found["unequal"] = attempt(lambda: own.save(writer, "step", 7, {}))
    writer.close()
    return found | {"written": [str(path) for path in (folder / "unequal").rglob("*")]}


def messages(world, folder):
    """Everything that goes over World."""
    found = {"maxima": world.all_reduce_max(world.rank, -world.rank, 2**53 - 1), "maxima of nothing": world.all_reduce_max(),
             "broadcast": world.broadcast({"é": [1, None], "rank": world.rank})}
    if world.rank:
        time.sleep(0.3)
        (folder / f"here-{world.rank}").touch()
    world.barrier()
    found["waited"] = all((folder / f"here-{rank}").exists() for rank in range(1, world.size))
    usual, distributed.BUCKET = distributed.BUCKET, 64
    mixed = [torch.full((5, 3), 1.0 + world.rank).t(), torch.tensor(1.0, dtype=torch.float64), torch.zeros(0),
             torch.full((3,), 2**40, dtype=torch.int64), torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
             torch.ones(40, dtype=torch.bfloat16), torch.ones(2, requires_grad=True)]
    world.sum(mixed)
    distributed.BUCKET = usual
    shared = [torch.full(shape, world.rank + 0.5, dtype=dtype) for shape, dtype in (
        ((3, 5), torch.bfloat16), ((2, 3), torch.float32), ((4,), torch.float64), ((0,), torch.float32), ((7,), torch.bfloat16))]
    one = torch.full((2,), world.rank + 0.5)                    # of which the last process has none
    world.all_gather(shared), world.all_gather([]), world.all_gather([one])
    first = [torch.full((3, 4), 1.0 + world.rank).t(), torch.full((), world.main), torch.full((5,), float("nan") if world.main else 1.0)]
    world.broadcast_tensors(first)
    found |= {"shared": [tensor.tolist() for tensor in [*shared, one]],
              "first": [first[0].tolist(), first[1].tolist(), bool(first[2].isnan().all())]}
    return found | {"sums": [tensor.tolist() for tensor in mixed], "strides": [list(tensor.stride()) for tensor in mixed]}


def attempt(work):
    try:
        return work() and "no error"
    except ValueError as error:
        return str(error)


def main(folder):
    world = distributed.connect(torch.device("cpu"))

    def save(name, tensors):
        if world.main:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")

    found = messages(world, folder) | data_parallel(world, save, "dit") | data_parallel(world, save, "unet")
    found |= fully_sharded(world, save, folder) | blocks(world, save) | half_precision(world, save) | learner(world, folder)
    sharded = Run("dit", world, sharded=True)
    if world.rank == world.size - 1:
        (folder / f"{world.rank}.json").write_text(json.dumps(found))
        os._exit(1)                                            # as if killed

    def forward():
        with world.peer_errors():
            sharded.output()

    ways = {"sum": lambda: world.sum([torch.ones(3)]), "all_reduce_max": lambda: world.all_reduce_max(1),
            "broadcast": lambda: world.broadcast(1), "barrier": world.barrier, "forward": forward}
    for name in ways if world.size == 2 else ("sum",):         # two that live on would wait for each other
        found[f"{name} alone"] = attempt(ways[name])
    (folder / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
