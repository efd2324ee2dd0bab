"""The pretended GPU of the tests sees what a real one would refuse, and where a host would wait for it."""

import pytest
import torch
from pretend_gpu import GPU, PretendGpu
from torch import nn


def test_a_module_and_all_that_comes_of_it_lie_on_the_gpu():
    with PretendGpu() as gpu:
        net = nn.Linear(3, 2).to(GPU)
        x = torch.ones(4, 3, device=GPU)
        net(x).sum().backward()
        views = [x[1:], x.split(2)[0], net.weight.detach(), net.weight.data]
        others = [net.weight.grad, torch.zeros_like(x), x.new_zeros(1), x.double()]
        assert all(tensor.device == GPU and tensor.is_cuda for tensor in (*views, *others))
        assert torch.zeros(3).device.type == "cpu" and x.cpu().device.type == "cpu"
    assert not gpu.mixed and x.device.type == "cpu"             # afterwards it is an ordinary tensor


@pytest.mark.parametrize("operation", [
    lambda here, there: here + there, lambda here, there: torch.cat([there, here]), lambda here, there: here[there.long()],
    lambda here, there: there @ here, lambda here, there: there.add_(here), lambda here, there: torch._foreach_mul_([there], [here]),
    lambda here, there: torch.randn(2, device=GPU, generator=torch.Generator())])
def test_operations_on_tensors_of_both_devices_are_refused(operation):
    with PretendGpu() as gpu, pytest.raises(RuntimeError, match="pretended GPU"):
        operation(torch.ones(3), torch.ones(3, device=GPU))
    assert len(gpu.mixed) == 1


def test_numbers_and_tensors_of_one_number_may_be_of_the_cpu():
    with PretendGpu() as gpu:
        there = torch.ones(3, device=GPU)
        there = there * torch.tensor(2.0) + 1
        there[:2] = 5
        there.fill_(3.0)
    assert not gpu.events


@pytest.mark.parametrize("operation, kinds", [
    (lambda x: x.sum().item(), ["wait"]), (lambda x: float(x[0]), ["wait"]), (lambda x: bool((x > 0).all()), ["wait"]),
    (lambda x: x.tolist(), ["wait"]), (lambda x: x.cpu(), ["wait"]), (lambda x: x.to("cpu"), ["wait"]), (lambda x: x[x > 0], ["wait"]),
    (lambda x: x.nonzero(), ["wait"]), (lambda x: x.unique(), ["wait"]), (lambda x: torch.ones(3).to(x), ["wait"]),
    (lambda x: x.copy_(torch.zeros(3)), ["wait"]), (lambda x: x.__setitem__(slice(0, 2), torch.zeros(2)), ["wait"]),
    (lambda x: x.__setitem__(0, 1.0), ["wait"]), (lambda x: torch.tensor([1.0], device=GPU), ["wait"]),
    (lambda x: x[torch.tensor([1])], ["wait"]), (lambda x: torch.cuda.synchronize(), ["wait"]),
    (lambda x: torch.ones(3).to(GPU, non_blocking=True), ["pageable"]),
    (lambda x: torch.ones(3).pin_memory().to(GPU, non_blocking=True), ["pin", "upload"]),
    (lambda x: torch.ones(3).pin_memory().to(GPU), ["pin", "wait"]), (lambda x: x.to("cpu", non_blocking=True), ["download"]),
    (lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True), ["download"]),
    (lambda x: torch.empty(3).copy_(x, non_blocking=True), ["wait"]),
    (lambda x: x.to(GPU), []), (lambda x: x.to(torch.float64), []), (lambda x: x.to(x), []), (lambda x: x[1:].norm() * 2, [])])
def test_the_host_waits_where_it_reads_and_where_copies_block(operation, kinds):
    with PretendGpu() as gpu:
        x = torch.ones(3, device=GPU)
        operation(x)
    assert [event.kind for event in gpu.events] == kinds
