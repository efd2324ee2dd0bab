"""Weights that are copied on one CUDA stream and read on another, which are pretended here: copies arrive as late as they may."""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pretend_gpu
import pytest
import torch
from pretend_gpu import GPU, PretendGpu
from small_models import MODELS, drawn

from tinyldm.model import Model, repeated_blocks
from tinyldm.offload import Loan, offload, tensors_of


class Stream:
    """A stream whose copies arrive only when another one waits for it: until then, what was copied is not a number."""

    def __init__(self, gpu: "GpuWithStreams"):
        self.gpu, self.pending = gpu, []

    @torch.inference_mode()
    def wait_stream(self, other: "Stream") -> None:
        for copy, source in other.pending:
            copy.copy_(source)
        other.pending.clear()
        if other is self.gpu.main:
            self.gpu.unread.clear()             # what comes on this stream comes after all kernels that were queued


class GpuWithStreams(PretendGpu):
    """unread: weights that kernels in the queue have still to read; lost: those that were dropped nevertheless; late: how many copies
    were late."""

    def __init__(self, model: Model):
        super().__init__()
        self.main = self.current = Stream(self)
        self.unread, self.lost, self.late = set(), [], 0
        for block in repeated_blocks(model.net):
            block.register_forward_hook(lambda block, inputs, out: self.unread.update(map(id, tensors_of(block))))

    def __enter__(self) -> "GpuWithStreams":
        super().__enter__()
        move, give_back = pretend_gpu.move, Loan.give_back

        @contextmanager
        def choose(stream):
            before, self.current = self.current, stream or self.current
            yield
            self.current = before

        def move_late(tensor: torch.Tensor) -> torch.Tensor:
            copy = move(tensor)
            if self.current is not self.main:
                self.current.pending.append((copy, tensor.clone()))
                self.late += 1
                copy.fill_(float("nan"))
            return copy

        def watched(loan: Loan) -> None:
            self.lost += self.unread & {*map(id, loan.tensors)}
            give_back(loan)

        for owner, name, function in (
                (torch.cuda, "Stream", lambda device=None: Stream(self)), (torch.cuda, "stream", choose),
                (torch.cuda, "current_stream", lambda device=None: self.current),
                (pretend_gpu, "move", move_late), (Loan, "give_back", watched)):
            self.patches.enter_context(patch.object(owner, name, function))
        return self


@pytest.mark.parametrize("name", MODELS)
def test_no_kernel_reads_a_weight_before_its_copy_is_there_and_none_is_dropped_before_it_was_read(name):
    model = MODELS[name]()
    resident = drawn(model)
    with GpuWithStreams(model) as gpu:
        assert np.array_equal(drawn(offload(model, GPU, "blocks")), resident)
        assert gpu.late > 20 and not gpu.lost


def test_a_copy_that_the_kernels_do_not_wait_for_is_seen(monkeypatch):
    model, wait = MODELS["mmdit"](), Stream.wait_stream
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None if self is self.gpu.main else wait(self, other))
    with GpuWithStreams(model), pytest.raises(ValueError, match="not finite"):
        drawn(offload(model, GPU, "blocks"))


def test_memory_that_is_given_back_before_the_kernels_have_read_it_is_seen(monkeypatch):
    model, wait = MODELS["mmdit"](), Stream.wait_stream
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: wait(self, other) if self is self.gpu.main else None)
    with GpuWithStreams(model) as gpu:
        drawn(offload(model, GPU, "blocks"))
        assert gpu.lost
