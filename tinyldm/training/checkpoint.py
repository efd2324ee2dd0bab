"""Checkpoints: folders that are written atomically, and hold nothing but safetensors and JSON.

RUN/checkpoints/vae-000300/    vae/, optimizer.safetensors, state.json         first stage
RUN/checkpoints/step-001000/   model/, optimizer.safetensors, state.json       second stage

A run that trains beside a model (--finetune) has trained.safetensors and the published file of what is trained in place of model/.

`model/` is a model folder as the whole library reads it: averaged weights, and the raw ones as its non_ema variant. state.json
holds the size and SHA-256 of every other file and a checksum of itself: a file that changes later is noticed, and the run
resumes from the checkpoint before. A name that ends in ~ is the backup of a complete checkpoint: the process died while it was
replacing it by another one of the same step. Names that begin with a dot are incomplete and removed by the next write.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tinyldm.config import RunConfig
from tinyldm.files import Claims, read_json, replace_folder, sha256
from tinyldm.folders.weights import write_weights
from tinyldm.pinned_memory import PinnedMemory
from tinyldm.training import distributed

STAGES = ("vae", "step")                                   # in the order a run goes through them
NAME = re.compile(rf"({'|'.join(STAGES)})-(\d+)~?")
_digests: dict[tuple[int, ...], str] = {}                  # (device, inode, size, time of change) -> SHA-256
_locks: list[Claims] = []                                  # keeps a reference: a garbage-collected lock would be released


def names(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first, undamaged or not."""
    return [folder for folder in _folders(run) if (folder / "state.json").exists()]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that was passed to write(), with stage and step. ValueError where state.json is damaged."""
    return {key: value for key, value in _read(checkpoint).items() if key not in ("files", "checksum")}


def find_damage(checkpoint: Path, contents: bool = True) -> str:
    """What is wrong with a checkpoint; "" where every file is as it was written. contents: compare checksums, which reads all
    files; otherwise only names and sizes. Checkpoints of versions without checksums pass if their state.json can be read."""
    try:
        files = _read(checkpoint).get("files", {})
    except FileNotFoundError:
        return "state.json is missing"
    except (OSError, ValueError) as error:
        return str(error)
    for name, (size, digest) in files.items():
        try:
            if (found := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if contents and sha256(checkpoint / name) != digest:
                return f"{name} has changed since it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return ""


def newest_undamaged(run: Path, until: int | None = None) -> Path | None:
    """The newest undamaged checkpoint; until: none after this step of the second stage. Prints a line about every damaged one
    that it passes over. Reads all files of each checkpoint that it checks."""
    faults: list[tuple[str, str]] = []
    found = None
    for folder in reversed(_folders(run)):
        if until is not None and _number(folder) > (STAGES.index("step"), until):
            continue
        if not (fault := find_damage(folder)):
            found = folder
            break
        faults.append((folder.name, fault))
    for name, fault in faults:
        consequence = f"resuming from {found.name}" if found else "no older checkpoint is undamaged"
        print(f"checkpoint {name} is damaged ({fault}): {consequence}")
    return found


def write(run: Path, stage: str, step: int, fill: Callable[[Path], None], state: dict[str, Any], keep: int,
          keep_every: int = 0) -> Path:
    """Write a checkpoint atomically: `fill` writes its files into a folder, and state.json is added. Then remove old checkpoints.

    keep         number of the newest checkpoints that stay (this one always does)
    keep_every   checkpoints whose step is a multiple of this stay too; 0: none

    An older checkpoint of the same step stays until this one has its final name. Checkpoints of later steps (a run that was
    rolled back has some) stay until the run has passed them. OSError where this one cannot be written; then the older ones are
    unchanged.
    """
    folder = run / "checkpoints" / f"{stage}-{step:06d}"
    for pattern in (".writing-*", ".dropped-*"):               # left behind by a process that was killed
        for leftover in folder.parent.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)

    def fill_all(partial: Path) -> None:
        partial.mkdir()
        fill(partial)
        _write_state(partial, {"stage": stage, "step": step, **state})
        if folder.exists() and not find_damage(folder):              # free its name, but keep it until the new one is complete
            backup = folder.with_name(folder.name + "~")
            _discard(backup)
            os.replace(folder, backup)

    replace_folder(folder, fill_all)
    if fault := find_damage(folder, contents=False):                 # checksums were computed just now: names and sizes suffice
        raise OSError(f"{folder} is damaged as soon as it is written ({fault}): check this disk")
    _drop(run, folder, keep, keep_every)
    return folder


def remove_after(run: Path, step: int) -> None:
    """Remove the checkpoints of the second stage after `step`."""
    for folder in _folders(run):
        if _number(folder) > (STAGES.index("step"), step):
            _discard(folder)


class Writer:
    """Writes checkpoints in a background thread, one at a time.

    `fill` runs while training goes on, so it must not read tensors that training changes: pass it copies, from copier().
    An error in the thread (a full disk) is raised by the next wait(), save() or close().
    """

    def __init__(self, run: Path, keep: int, keep_every: int = 0):
        self.run, self.keep, self.keep_every = run, keep, keep_every
        self.pool = ThreadPoolExecutor(1, "checkpoint")        # Python waits for this thread before it exits
        self.pending: Future | None = None
        self.memory = PinnedMemory()

    def copier(self, keep: bool = True) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        """Wait for the previous write, then return host_copy() with the memory that the copies of that write used. So no copy may be
        used after the write that it was made for. keep: as in host_copy()."""
        self.wait()
        self.memory.clear()
        return partial(host_copy, keep=keep, memory=self.memory)

    def save(self, stage: str, step: int, fill: Callable[[Path], None], state: dict[str, Any]) -> None:
        """Wait for the previous write, then begin this one. Arguments as in write()."""
        self.wait()
        self.pending = self.pool.submit(write, self.run, stage, step, fill, dict(state), self.keep, self.keep_every)

    def wait(self) -> None:
        """Wait until no write is in progress."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def raise_failure(self) -> None:
        """Raise the error of a write that has failed, if one has. Called after every step, so that little training is lost."""
        if self.pending and self.pending.done():
            self.wait()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self.pool.shutdown()


def host_copy(tensors: dict[str, Tensor], keep: bool = True, memory: PinnedMemory | None = None) -> dict[str, Tensor]:
    """Contiguous copies in host memory, which share no memory with the originals. Copies from CUDA go to pinned memory, all at
    the same time. Sharded tensors are gathered: every process must call this, with the same names in the same order; processes
    that write nothing pass keep=False, which only takes part in the gathering and returns {}.

    memory: where copies from CUDA go, until it is cleared; None: to memory of their own."""
    copies, devices, memory = {}, set(), memory or PinnedMemory()
    for name, tensor in tensors.items():
        tensor = distributed.whole(tensor.detach())
        if not keep:
            continue
        if tensor.is_cuda:
            copies[name] = memory.empty_like(tensor).copy_(tensor.contiguous(), non_blocking=True)
            devices.add(tensor.device)
        else:
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copies


def check_room(run: Path, needed: int, checkpoints: int = 2) -> None:
    """OSError where the disk has no room for this number of further checkpoints, of `needed` bytes each. RUN/checkpoints may be a link
    to another disk."""
    folder = run.absolute() / "checkpoints"
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free, total = shutil.disk_usage(existing).free, checkpoints * needed
    if free < total:
        raise OSError(f"{free / 1e9:.1f} GB are free for {run / 'checkpoints'}, and the next {checkpoints} checkpoints need "
                      f"{total / 1e9:.1f} GB: make room, or copy the run to a larger disk and continue there with --out")


def lock(run: Path) -> Claims:
    """Keep other processes from training in this folder until this process ends or closes the lock. ValueError where another
    process holds it."""
    claims = Claims(run / "lock")
    if not claims.take("train"):
        claims.close()
        raise ValueError(f"another process trains in {run}: wait until it ends, stop it, or name another folder with --out")
    _locks.append(claims)
    return claims


def optimizer_tensors(optimizers: list[torch.optim.Optimizer], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of all optimizers, under the names PARAMETER/KEY: the tensors themselves, not copies."""
    by_id = {id(p): name for name, p in parameters.items()}
    return {f"{by_id[id(p)]}/{key}": value.detach()
            for optimizer in optimizers for p, state in optimizer.state.items() for key, value in state.items()}


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file. OSError where the disk is full."""
    write_weights(file, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def current_name(name: str) -> str:
    """The present name of a parameter in a checkpoint. In older ones every transformer of a U-Net has one `block`."""
    return re.sub(r"(\.attentions\.\d+)\.block\.", r"\1.blocks.0.", name)


def load_optimizers(file: Path, optimizers: list[torch.optim.Optimizer], parameters: dict[str, nn.Parameter]) -> None:
    """Restore a file of optimizer_tensors(). Moments get the memory layout of their parameter: fused AdamW silently corrupts
    contiguous moments beside channels_last weights."""
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                name, _, part = current_name(key).rpartition("/")
                if name not in parameters:                     # older checkpoints of the first stage leave the part out
                    name = f"vae.{name}"
                p, value = parameters[name], tensors.get_tensor(key)
                restored = torch.empty_like(p, requires_grad=False) if value.shape == p.shape else value.to(p.device)
                if value.shape == p.shape:
                    distributed.fill(restored, value)
                owner[id(p)].state[p][part] = restored
    except (KeyError, SafetensorError) as error:
        raise ValueError(f"{file} does not fit this run: {error}. Is it a checkpoint of another configuration?") from None


# ---------------------------------------------------------------- folders and their state.json


def _number(folder: Path) -> tuple[int, int]:
    """(stage, step) of a checkpoint's name."""
    stage, step = NAME.fullmatch(folder.name).groups()
    return STAGES.index(stage), int(step)


def _folders(run: Path) -> list[Path]:
    """All folders that are named like a checkpoint, oldest first; of the same step, the backup (~) comes first."""
    found = [path for path in run.glob("checkpoints/*-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (*_number(path), not path.name.endswith("~")))


def _read(checkpoint: Path) -> dict[str, Any]:
    """All of state.json. FileNotFoundError where there is none, ValueError where it has changed since it was written."""
    file = checkpoint / "state.json"
    state = read_json(file, None, "remove this checkpoint, and the one before it is used")
    if ("files" in state or "checksum" in state) and state.get("checksum") != _checksum(state):
        raise ValueError(f"{file} has changed since it was written")
    return state


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write state.json, with the sizes and checksums of all other files in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state = state | {"files": {path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in files}}
    state = json.loads(json.dumps(state))                      # the checksum is of what a reader gets: keys as text, tuples as lists
    (folder / "state.json").write_text(json.dumps(state | {"checksum": _checksum(state)}, indent=1), encoding="utf-8")


def _digest(file: Path) -> str:
    """The SHA-256 of a file. One with several names, such as a frozen text encoder of 19 GB, is read for the first checkpoint only. If
    the disk damages it later, its digest says so."""
    found = file.stat()
    if found.st_nlink < 2:
        return sha256(file)
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if key not in _digests:
        _digests[key] = sha256(file)
    return _digests[key]


def _checksum(state: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in state.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _drop(run: Path, newest: Path, keep: int, keep_every: int) -> None:
    """Remove the checkpoints that are no longer kept now that `newest` is written. Damaged ones (by their names and sizes) are
    removed and not counted."""
    reached = [folder for folder in names(run) if _number(folder) <= _number(newest)]
    # Of one step, the new folder wins over its ~ backup, which is listed first.
    undamaged = {_number(folder): folder for folder in reached if not find_damage(folder, contents=False)}
    kept = [*undamaged.values()][-max(keep, 1):]
    kept += [folder for (_, step), folder in undamaged.items() if keep_every and step % keep_every == 0]
    for folder in reached:
        if folder not in kept:
            _discard(folder)


def _discard(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that a half-removed one does not look like a checkpoint. Where another program has
    it open (Windows), it stays until the next write."""
    hidden = folder.with_name(f".dropped-{folder.name}")
    try:
        os.replace(folder, hidden)
    except OSError:
        return
    shutil.rmtree(hidden, ignore_errors=True)


def to_resume(config: RunConfig, run: Path) -> Path | None:
    """The newest undamaged checkpoint; None for a run that begins. ValueError where all are damaged."""
    if config.resume != "auto":
        return None
    last = newest_undamaged(run)
    if last is None and names(run):
        raise ValueError(f"every checkpoint in {run} is damaged: start another run with --out (its latents can be used again "
                         "with --cache)")
    return last
