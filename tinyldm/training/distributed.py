"""Several processes that train one network together, as torchrun starts them.

    torchrun --nproc-per-node 4 train.py ...               one process for each of a host's four GPUs

Every process holds the same weights and trains on its part of the global batch; the gradients are summed (World.sum), and the
optimizers take the same step everywhere. Networks too large for one GPU are sharded over all of them (shard: FSDP2,
arXiv:2304.11277, is ZeRO-3, arXiv:1910.02054). Small values (whether a process received a signal, which checkpoint to resume
from) travel as JSON through gloo on the CPU, so that no process waits for its GPU.

Every method of World, whole() of a sharded tensor and whatever calls it are collective operations: all processes must call
them, in the same order. World() is a single process, for which all of them do nothing.
"""

from __future__ import annotations

import atexit
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from tinyldm.model import repeated_blocks
from tinyldm.training.packing import buckets, checksum, copy_all, pack, slices

TIMEOUT = timedelta(hours=1)                               # the other processes wait while rank 0 draws and writes, for minutes
# All such waits are gloo's. NCCL's operations begin at the same time everywhere, and one that waits for a process on another host that
# has died blocks Python too, so that only this limit ends it.
NCCL_TIMEOUT = timedelta(minutes=10)
BUCKET = 64 * 2**20                                        # bytes of gradients that are reduced in one operation
AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)     # layers whose weights autocast casts
PEER_LOST = re.compile(r"gloo[/\\]|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


class World:
    """The processes that train together: this one is `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and prints, rank 0."""
        return self.rank == 0

    @contextmanager
    def peer_errors(self) -> Iterator[None]:
        """Inside, torch's errors about a process that has ended become a ValueError. Every method of World uses this; a sharded
        network also communicates in its forward and backward passes, so it needs this around the whole training loop."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or PEER_LOST.search(str(error))):
                raise
            raise ValueError(f"another of the {self.size} processes has ended (its own message says why): start them again "
                             "with --resume yes") from error

    def all_reduce_max(self, *values: float) -> list[float]:
        """The element-wise maximum over all processes, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        largest = torch.tensor(values, dtype=torch.float64)                    # a CPU tensor, so gloo reduces it
        with self.peer_errors():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
        """Replace each tensor by its sum over all processes, the same to the last bit everywhere. The processes must pass the
        same shapes in the same order. Sharded tensors are skipped: FSDP sums their gradients during the backward pass.

        dtype: that in which the numbers are sent and added; None: the tensors' own.

        Needs memory for one more copy of the tensors: they are packed into buckets, which are all reduced at the same time."""
        if self.size == 1:
            return
        with self.peer_errors():
            reductions = []
            for bucket in buckets((tensor for tensor in tensors if not sharded(tensor)), BUCKET):
                flat, parts = pack(bucket, dtype)
                reductions.append((dist.all_reduce(flat, async_op=True), bucket, parts))
            for work, bucket, parts in reductions:
                work.wait()
                torch._foreach_copy_(bucket, parts)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes, the same everywhere."""
        total = tensor.detach().clone()
        self.sum([total])
        return total / self.size

    @torch.no_grad()
    def all_gather(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensor i by that of process i % size, in all processes. All must pass contiguous tensors of the same shapes and
        dtypes in the same order, all on one device.

        Needs memory for two more copies of the tensors (of which NCCL makes one)."""
        if self.size == 1 or not tensors:
            return
        owned = [[tensor.view(-1).view(torch.uint8) for tensor in tensors[rank::self.size]] for rank in range(self.size)]
        longest = max(sum(part.numel() for part in parts) for parts in owned)
        own = owned[0][0].new_empty(longest)                   # as NCCL wants it, all send equally much: some pad
        found = list(own.new_empty(self.size, longest))
        copy_all(slices(own, owned[self.rank]), owned[self.rank])
        with self.peer_errors():
            dist.all_gather(found, own)
        for flat, parts in zip(found, owned):
            copy_all(parts, slices(flat, parts))

    @torch.no_grad()
    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors of all processes by those of rank 0, bit for bit. Sharded ones are skipped."""
        if self.size == 1:
            return
        self.barrier()                                         # some may still be reading files, for longer than NCCL waits
        with self.peer_errors():
            for bucket in buckets((tensor for tensor in tensors if not sharded(tensor)), BUCKET):
                flat, parts = pack(bucket)
                dist.broadcast(flat, 0)
                torch._foreach_copy_(bucket, parts)

    def all_equal(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all processes hold the same bits in these tensors, by a checksum. Sharded ones are skipped."""
        if self.size == 1:
            return True
        number = checksum([tensor for tensor in tensors if not sharded(tensor)])
        largest, smallest = self.all_reduce_max(number, -number)
        return largest == -smallest

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's value in every process, converted to JSON and back. The other processes' values are ignored."""
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
        """Wait until all processes have reached this call."""
        self.all_reduce_max(0)

    def close(self) -> None:
        """Leave the group, after success only: NCCL would wait for processes that have ended."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------- starting


def launched() -> tuple[int, int]:
    """(rank, world size) from torchrun's environment variables; (0, 1) where torchrun did not start this process."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def launch() -> str:
    """An identifier of this torchrun launch on this host, the same for its processes and over its restarts; "" without torchrun."""
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else ""


def started_again(run: Path) -> bool:
    """Whether this process is one of torchrun's restarts, and the same torchrun launch began the run in this folder. RUN/launch
    was written on rank 0's host; on other hosts only the run id in it is compared."""
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return False
    try:
        known = (run / "launch").read_text(encoding="utf-8")
    except OSError:
        return False
    return known == launch() or launched()[0] > 0 and known.split(" ")[0] == os.environ.get("TORCHELASTIC_RUN_ID")


def connect(device: torch.device) -> World:
    """Join the process group, each process with a GPU of its own, or all on the CPU. ValueError where that is impossible."""
    rank, size = launched()
    if size == 1:
        return World()
    if device.type not in ("cpu", "cuda") or not dist.is_available():
        raise ValueError(f"{size} processes cannot train together on {device.type} with torch {torch.__version__} here: start "
                         "one, without torchrun, or use --device cpu")
    backend = "gloo"
    if device.type == "cuda":
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if local_size > torch.cuda.device_count():
            raise ValueError(f"{local_size} processes for {torch.cuda.device_count()} GPUs: use torchrun --nproc-per-node "
                             f"{torch.cuda.device_count()}, or --device cpu")
        if device.index not in (None, local_rank):
            raise ValueError(f"--device {device} for all of {local_size} processes: leave it out, and each takes a GPU of its own")
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "cpu:gloo,cuda:gloo"        # Windows has no NCCL
    try:
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        # A prefix for each restart: without it the processes find the addresses of those that died (torch 2.13).
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except RuntimeError as error:
        reason, _, _ = str(error).partition("\n")
        raise ValueError(f"process {rank} cannot reach the {size - 1} others at {os.environ.get('MASTER_ADDR')}:"
                         f"{os.environ.get('MASTER_PORT')}: {reason}") from error
    world = World(rank, size)
    if "nccl" in backend:
        limit_nccl(dist.group.WORLD)
    else:                                                      # gloo threads that still run at exit may abort the program (SIGABRT);
        atexit.register(world.close)                           # with NCCL, closing would wait for processes that have ended
    return world


def limit_nccl(group: dist.ProcessGroup) -> None:
    """Give NCCL's operations a time limit of their own: init_process_group has only one for all backends (torch 2.13)."""
    backend = group._get_backend(torch.device("cuda"))
    if hasattr(backend, "_set_default_timeout"):
        backend._set_default_timeout(NCCL_TIMEOUT)


# ---------------------------------------------------------------- sharded networks


def shard(net: nn.Module, world: World, reduce_dtype: torch.dtype | None = None) -> None:
    """Shard the parameters, gradients and optimizer state of net over the processes, each parameter along its first axis. Call it
    before the optimizers are made, and under the autocast that training uses. All processes get rank 0's weights. The backward pass
    sums the gradients, in reduce_dtype (None: float32). From now on the processes must call net in step, because they gather its
    blocks together.

    Weights, gradients and optimizer state stay float32. Where autocast would cast the weights of a layer, they are gathered in its
    dtype instead: the copies that autocast makes are kept for the backward pass, by every process, of the whole network. Parameters
    that autocast leaves in float32 (norms, embedding tables) are small and then not sharded: World.sum() sums their gradients.

    The parameters become DTensors: whole(), local(), fill() and clip() work on these and on ordinary tensors."""
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh  # imported here because it takes half a second
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    device = next(net.parameters()).device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    unsharded = set()
    if cast:
        others = [module for module in net.modules() if not isinstance(module, AUTOCAST)]
        unsharded = {p for module in others for p in module.parameters(recurse=False)}
    # Gradients are summed for every micro-batch. FSDP could do it after the last one alone (set_requires_gradient_sync), but until
    # then every process would keep the gradients of the whole network, which may not fit.
    ignored = {"ignored_params": unsharded} if unsharded else {}            # torch 2.6 does not know the argument
    policy = MixedPrecisionPolicy(cast, reduce_dtype or torch.float32, cast_forward_inputs=False)
    world.broadcast_tensors([*net.parameters(), *net.buffers()])
    mesh = init_device_mesh(device, (world.size,))
    # Each block is gathered only while it computes. net's remaining weights are resharded too: gathered copies that stayed after
    # the forward pass would still be there after the optimizer step, with the old values.
    for module in (*repeated_blocks(net), net):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, **ignored)
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            if hasattr(module, "set_force_sum_reduction_for_comms"):            # gloo has no scaled sums: request plain ones
                module.set_force_sum_reduction_for_comms(True)


def sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without the cost of importing torch.distributed.tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, a collective operation; any other tensor unchanged."""
    return tensor.detach().full_tensor() if sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, or all of an ordinary tensor: detached, sharing its memory."""
    return tensor.detach().to_local() if sharded(tensor) else tensor.detach()


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a full tensor that is to be sharded as `like`, which has the same shape."""
    if not sharded(like):
        return value
    axis, mesh = like.placements[0].dim, like.device_mesh
    parts = value.chunk(mesh.size(), axis)                     # a short axis gives fewer parts than there are processes
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else value.narrow(axis, 0, 0)


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a DTensor or an ordinary one, without communication."""
    if tensor.shape != value.shape:
        raise ValueError(f"a tensor of shape {list(value.shape)} for one of {list(tensor.shape)}")
    local(tensor).copy_(part_of(value, tensor))


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """module.load_state_dict(tensors), for sharded modules too. ValueError where names or shapes differ."""
    own = module.state_dict()
    if own.keys() != tensors.keys():
        raise ValueError(f"these weights are of another network: {sorted(own.keys() ^ tensors.keys())[:3]} and possibly more names "
                         "exist in only one of the two")
    for name, tensor in own.items():
        try:
            fill(tensor, tensors[name])
        except ValueError as error:
            raise ValueError(f"these weights are of another network: {name} is {error}") from None


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """torch.nn.utils.clip_grad_norm_ for DTensors, ordinary tensors, or both. -> the norm before clipping, the same on all ranks."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not any(map(sharded, grads)):
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True))
    norm = total_norm(grads)
    torch._foreach_mul_([local(grad) for grad in grads], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of DTensors, ordinary tensors, or both, as one vector, on the device; the same on all ranks."""
    kinds = [[tensor for tensor in tensors if sharded(tensor) == kind] for kind in (True, False)]
    return torch.linalg.vector_norm(torch.stack([whole(torch.nn.utils.get_total_norm(kind)) for kind in kinds if kind]))
