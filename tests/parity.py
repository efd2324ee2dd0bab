"""Compares networks with the libraries that published them: float32 rounding, 1e-5 relative."""

import json

import torch


def projected(out, *inputs):
    """An output and the gradients, with respect to the inputs, of a random projection of it."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-5 * b.abs().max()


def error(a, exact) -> float:
    """Relative, of all numbers together."""
    assert a.shape == exact.shape
    return ((a.float() - exact).norm() / exact.norm()).item()


def assert_same_gradients(found, expected):
    """Gradients of weights by name. Sums over all tokens are rounded a little more than outputs are."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] - wanted).abs().max() <= 2e-5 * wanted.abs().max(), name


def assert_survives_json_and_diffusers(config, loader, diffusers_class):
    """A config is the same after it was written, read, and completed by diffusers. loader: has to_config and from_config."""
    in_json = lambda value: json.loads(json.dumps(value))
    written = in_json(loader.to_config(config))
    assert loader.from_config(written) == config
    with torch.device("meta"):
        completed = in_json(dict(diffusers_class.from_config(written).config))
    assert loader.from_config(completed) == config
    assert {name for name in written if name != "_class_name" and completed[name] != written[name]} == set()


def transformer_inputs(config, size=(8, 12)):
    """Latents, times, text features and pooled text features for an MMDiT or a Flux."""
    torch.manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, requires_grad=True)
    return rand(2, config.in_channels, *size), torch.tensor([999.0, 3.5]), rand(2, 7, config.context_dim), rand(2, config.pooled_dim)
