"""The average of the weights: it moves, it is early useful, and applying it is undone."""

import torch
from torch import nn

from tinyldm.training.ema import EMA


def test_the_average_follows_the_closed_form():
    module = nn.Linear(1, 1, bias=False)
    ema = EMA({"net": module}, decay=0.9)
    expected = module.weight.item()
    for n in range(1, 200):
        with torch.no_grad():
            module.weight.fill_(n)
        ema.update(n)
        decay = min(0.9, n / (n + 9))
        expected = decay * expected + (1 - decay) * n
    assert abs(ema.state_dict("net")["weight"].item() - expected) < 1e-3
    assert 180 < expected < 199


def test_early_averages_forget_the_initial_weights():
    module = nn.Linear(4, 4)
    ema = EMA({"net": module}, decay=0.9999)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    for n in range(1, 21):
        ema.update(n)
    share_left = ((module.weight - ema.state_dict("net")["weight"]) / (module.weight - start)).mean()
    assert share_left < 0.01                                   # a plain average at 0.9999 would keep 99.8 %


def test_applying_swaps_in_the_average_and_out_again():
    module = nn.Linear(3, 3)
    ema = EMA({"net": module}, decay=0.5)
    with torch.no_grad():
        module.weight.add_(1.0)
    raw, averaged = module.weight.detach().clone(), ema.state_dict("net")["weight"].clone()
    with ema.applied():
        assert torch.equal(module.weight, averaged)
    assert torch.equal(module.weight, raw) and torch.equal(ema.state_dict("net")["weight"], averaged)


def test_state_goes_out_and_in_by_part():
    modules = {"net": nn.Linear(2, 2), "text": nn.Linear(2, 2)}
    ema, other = EMA(modules, 0.9), EMA(modules, 0.9)
    with torch.no_grad():
        modules["net"].weight.add_(1.0)
    ema.update(5)
    for part in modules:
        other.load_state_dict(part, ema.state_dict(part))
    assert all(torch.equal(other.shadow[name], tensor) for name, tensor in ema.shadow.items())
    assert set(ema.state_dict("text")) == {"weight", "bias"}
