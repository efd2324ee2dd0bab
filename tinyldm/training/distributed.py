"""Several processes that train one network together, as torchrun starts them.

    torchrun --nproc-per-node 4 train.py ...               on every host its GPUs, one process each

Every process holds the same weights and takes its share of the global batch; the gradients are summed (World.sum), and
the optimizers take the same step everywhere. Networks too large for one GPU are spread over all of them (shard: FSDP2,
arXiv:2304.11277, is ZeRO-3, arXiv:1910.02054). Small things (who was asked to stop, which checkpoint to take) go over
gloo on the CPU, so that no GPU is waited for, and as JSON.

Every method of World, whole() of a sharded tensor and what calls it are collective: all processes must come by, in the
same order. World() is a process on its own, for which all of them do nothing.
"""

from __future__ import annotations

import atexit
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from tinyldm.model import repeated_blocks

TIMEOUT = timedelta(hours=1)                               # rank 0 may draw and write for minutes while the others wait
BUCKET = 64 * 2**20                                        # bytes that are summed as one
LOST = re.compile(r"gloo[/\\]|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


class World:
    """The processes that train together: this one is `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    @contextmanager
    def peer_errors(self) -> Iterator[None]:
        """What torch raises inside where another process is gone becomes a ValueError. Every method here has it; networks
        that are sharded wait for each other elsewhere too, and want it around the whole loop."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or LOST.search(str(error))):
                raise
            raise ValueError(f"another of the {self.size} processes has ended (its own message says why): start them again "
                             "with --resume auto") from error

    def all_reduce_max(self, *values: float) -> list[float]:
        """The element-wise maximum over all processes, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        largest = torch.tensor(values, dtype=torch.float64)                    # in host memory: gloo's
        with self.peer_errors():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over all processes, the same to the last bit everywhere. The processes must give the
        same shapes in the same order. Sharded tensors are left alone: their gradients are summed as they arise.

        Needs memory for one copy of them: all are packed into buckets, which travel at the same time."""
        if self.size == 1:
            return
        with self.peer_errors():
            under_way = []
            for bucket in buckets([tensor for tensor in tensors if not sharded(tensor)]):
                flat = bucket[0].new_empty(sum(tensor.numel() for tensor in bucket))
                parts = [part.view(tensor.shape) for part, tensor in zip(flat.split([tensor.numel() for tensor in bucket]), bucket)]
                torch._foreach_copy_(parts, bucket)
                under_way.append((dist.all_reduce(flat, async_op=True), bucket, parts))
            for work, bucket, parts in under_way:
                work.wait()
                torch._foreach_copy_(bucket, parts)

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's value, as it comes back from JSON. What the others give does not matter."""
        if self.size == 1:
            return value
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if self.main else torch.empty(0)
        length = torch.tensor(len(text))
        with self.peer_errors():
            dist.broadcast(length, 0)
            text = text if self.main else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(text, 0)
        return json.loads(text.numpy().tobytes())

    def barrier(self) -> None:
        """Until all processes have come here."""
        self.all_reduce_max(0)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype and device together, in their order, up to BUCKET bytes; larger ones by themselves."""
    full: list[list[Tensor]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        bucket, held = filling.get(kind, ([], 0))
        if bucket and held + size > BUCKET:
            full.append(bucket)
            bucket, held = [], 0
        filling[kind] = (bucket + [tensor], held + size)
    return full + [bucket for bucket, _ in filling.values()]


# ---------------------------------------------------------------- from the beginning


def launched() -> tuple[int, int]:
    """(rank, size) as torchrun tells them in the environment; (0, 1) where it did not start this."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def launch() -> str:
    """What torchrun's processes have in common over all restarts, and with no other launch (of its process 0; "" without)."""
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else ""


def started_again(run: Path) -> bool:
    """Whether torchrun has started this once more, and RUN was begun by the launch it belongs to. On hosts other than process
    0's the id alone must do."""
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return False
    try:
        known = (run / "launch").read_text()
    except OSError:
        return False
    return known == launch() or launched()[0] > 0 and known.split(" ")[0] == os.environ.get("TORCHELASTIC_RUN_ID")


def connect(device: torch.device) -> World:
    """Meet the others, each with its own GPU, or all on the CPU. ValueError where that cannot be."""
    rank, size = launched()
    if size == 1:
        return World()
    if device.type not in ("cpu", "cuda") or not dist.is_available():
        raise ValueError(f"{size} processes cannot train together on {device.type} with torch {torch.__version__} here: start "
                         "one, without torchrun, or use --device cpu")
    backend = "gloo"
    if device.type == "cuda":
        place, here = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if here > torch.cuda.device_count():
            raise ValueError(f"{here} processes for {torch.cuda.device_count()} GPUs: torchrun --nproc-per-node "
                             f"{torch.cuda.device_count()}, or --device cpu")
        if device.index not in (None, place):
            raise ValueError(f"--device {device} for all of {here} processes: leave it out, and each takes a GPU of its own")
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "cpu:gloo,cuda:gloo"        # Windows has no NCCL
    try:
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")             # or they find addresses of those that died (torch 2.13)
        dist.init_process_group(backend, store=dist.PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=size, timeout=TIMEOUT)
    except RuntimeError as error:
        raise ValueError(f"process {rank} cannot reach the {size - 1} others at {os.environ.get('MASTER_ADDR')}:"
                         f"{os.environ.get('MASTER_PORT')}: {str(error).splitlines()[0]}") from error
    world = World(rank, size)
    if device.type == "cpu":                                   # gloo's threads, left running, may end a program with SIGABRT;
        atexit.register(world.close)                           # NCCL would wait here for others that are gone
    return world


# ---------------------------------------------------------------- sharded networks


def shard(net: nn.Module, world: World) -> None:
    """Leave each process a part of every parameter (along its first axis), gradient and optimizer state, before the
    optimizers are made. Gradients arrive summed. The processes must hold the same weights, and from now on call net at
    the same times: they gather its blocks together. float32 throughout: autocast as ever.

    The parameters are DTensors then: whole(), local(), fill() and clip() work on both kinds."""
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh  # half a second that one process can save
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(next(net.parameters()).device.type, (world.size,))
    for module in (*repeated_blocks(net), net):                # a block is gathered whole while it computes, one after the other;
        fully_shard(module, mesh=mesh, reshard_after_forward=True)              # net's own weights too, or they would outlive an update
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            if hasattr(module, "set_force_sum_reduction_for_comms"):            # else gloo is asked for scaled sums, which it lacks
                module.set_force_sum_reduction_for_comms(True)


def sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. (Asking torch.distributed.tensor costs its import.)"""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's full tensor, for which all processes must call; any other as it is."""
    return tensor.detach().full_tensor() if sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, or all of another tensor: detached, in the same memory."""
    return tensor.detach().to_local() if sharded(tensor) else tensor.detach()


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """What of a whole tensor belongs to this process, if it is split as `like`, which has the same shape."""
    if not sharded(like):
        return value
    axis, mesh = like.placements[0].dim, like.device_mesh
    parts = value.chunk(mesh.size(), axis)                     # fewer than processes where the axis is short
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else value.narrow(axis, 0, 0)


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one of either kind, without any word between the processes."""
    if tensor.shape != value.shape:
        raise ValueError(f"a tensor of shape {list(value.shape)} for one of {list(tensor.shape)}")
    local(tensor).copy_(part_of(value, tensor))


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """module.load_state_dict(tensors) for modules of either kind. ValueError where names or shapes differ."""
    own = module.state_dict()
    if own.keys() != tensors.keys():
        raise ValueError(f"these weights are of another network: {sorted(own.keys() ^ tensors.keys())[:3]} and so on are only in "
                         "one of the two")
    for name, tensor in own.items():
        try:
            fill(tensor, tensors[name])
        except ValueError as error:
            raise ValueError(f"these weights are of another network: {name} is {error}") from None


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """torch.nn.utils.clip_grad_norm_ for parameters of either kind, or both. -> the norm before, the same on all ranks."""
    grads = [p.grad for p in parameters if p.grad is not None]
    split = [grad for grad in grads if sharded(grad)]
    if not split:
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True))
    rest = [grad for grad in grads if not sharded(grad)]
    norms = [whole(torch.nn.utils.get_total_norm(kind)) for kind in (split, rest) if kind]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch._foreach_mul_([local(grad) for grad in grads], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)
