"""Optimizers: which parameter goes where, what Muon does to a matrix, and the learning rate's course."""

import pytest
import torch
from torch import nn

from tinyldm.config import OptimisationConfig
from tinyldm.model import muon_matrices
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.training.optim import Muon, make_optimizers, orthogonalise, set_lr
from tinyldm.training.schedule import LearningRateSchedule


def tiny_unet() -> UNet:
    torch.manual_seed(0)
    return UNet(UNetConfig(widths=(16, 32), depth=1, attention=(False, True), heads=(1, 2), context_dim=8, groups=8))


def optimizers_of(net: UNet, kind: str) -> tuple[dict[str, nn.Parameter], list[torch.optim.Optimizer]]:
    """The parameters by "net.name", and what optimizes them."""
    parameters = {f"net.{name}": p for name, p in net.named_parameters()}
    settings = OptimisationConfig(optimizer=kind, lr=1e-3, muon_lr=1e-2)
    return parameters, make_optimizers(parameters, muon_matrices({"net": net}), settings)


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert values.min() > 0.3 and values.max() < 1.4


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_long_and_square_matrices_are_treated_alike(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    plain = matrices.double() / matrices.norm(dim=(1, 2), keepdim=True)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = plain @ plain.transpose(1, 2)
        plain = a * plain + (b * gram + c * gram @ gram) @ plain
    assert (orthogonalise(matrices) - plain).abs().max() < (1e-4 if shape[1] != shape[2] else 0.03)


def test_orthogonalising_keeps_the_singular_vectors():
    u, _, vh = torch.linalg.svd(torch.randn(1, 12, 20, generator=torch.Generator().manual_seed(2)), full_matrices=False)
    matrix = u @ torch.diag_embed(torch.linspace(1, 3, 12)[None]) @ vh
    rotated = u.transpose(1, 2) @ orthogonalise(matrix).float() @ vh.transpose(1, 2)
    off = rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 0.05                             # bfloat16


def test_every_parameter_has_exactly_one_optimizer():
    for kind, count in (("muon", 2), ("adamw", 1)):
        parameters, optimizers = optimizers_of(tiny_unet(), kind)
        owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
        assert len(optimizers) == count
        assert sorted(owned) == sorted(map(id, parameters.values()))


def test_muon_takes_the_inner_matrices_and_nothing_else():
    parameters, (adamw, muon) = optimizers_of(tiny_unet(), "muon")
    names = {id(p): name for name, p in parameters.items()}
    taken = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert "net.down.0.resnets.0.conv1.weight" in taken and "net.middle.attentions.0.block.cross_attention.to_k.weight" in taken
    assert not any(name.startswith(("net.conv_in", "net.conv_out", "net.time_embedding")) or name.endswith("bias") for name in taken)


def test_muon_moves_a_matrix_by_the_size_it_promises():
    p = nn.Parameter(torch.zeros(32, 32))
    optimizer = Muon([p], lr=0.1)
    p.grad = torch.randn(32, 32, generator=torch.Generator().manual_seed(3)) * 1e-6      # the gradient's size is irrelevant
    optimizer.step()
    assert 0.5 < p.detach().square().mean().sqrt() / (0.2 * 0.1) < 1.3


def test_the_learning_rate_warms_up_stays_and_ends_near_zero():
    _, optimizers = optimizers_of(tiny_unet(), "muon")
    schedule = LearningRateSchedule(warmup=10, decay=0.2, max_steps=100)
    factors = [schedule.factor(step) for step in range(100)]
    set_lr(optimizers, factors[-1])
    assert factors[0] == pytest.approx(0.1) and factors[9:80] == [1.0] * 71
    assert factors[-1] == pytest.approx(1 / 20) and factors == sorted(factors[:10]) + factors[10:80] + sorted(factors[80:], reverse=True)
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(1e-2 / 20)


def gradients(shape: tuple[int, ...], steps: int) -> list[torch.Tensor]:
    """Of different sizes, so that the momentum does not drown in the last one."""
    rng = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=rng) * size for size in torch.linspace(1, 0.2, steps)]


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12), (6, 4, 3, 3)])
def test_several_steps_of_muon_are_those_of_the_formula_for_square_wide_tall_and_convolution_matrices(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    p = nn.Parameter(start.clone())
    optimizer = Muon([p], lr=0.1, momentum=0.8, weight_decay=0.5)
    weights, buffer, (a, b, c) = start.double().flatten(1), 0.0, (3.4445, -4.7750, 2.0315)
    rows, columns = weights.shape
    for gradient in gradients(shape, 3):
        p.grad = gradient.clone()
        optimizer.step()
        g = gradient.double().flatten(1)
        buffer = 0.8 * buffer + 0.2 * g
        x = 0.2 * g + 0.8 * buffer                              # Nesterov: what the momentum would be after the same gradient again
        x = (x.T if rows > columns else x) / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        x = x.T if rows > columns else x
        weights = weights * (1 - 0.1 * 0.5) - 0.1 * 0.2 * max(rows, columns) ** 0.5 * x
    update = weights - start.double().flatten(1)
    error = (p.detach().flatten(1) - weights).norm() / update.norm()
    assert error < (0.02 if rows < 2 * columns and columns < 2 * rows else 1e-5)       # near-square matrices run in bfloat16


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of torch has no Muon")
@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12), (30, 20)])
def test_muon_is_torch_s_own_with_adamw_s_size_of_updates(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [Muon([ours], lr=0.1, weight_decay=0.3),
                  torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")]
    for gradient in gradients(shape, 4):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() / (theirs - start).norm() < 0.02                      # theirs runs in bfloat16


def test_both_optimizers_have_the_settings_learning_rates_and_decay_all_of_their_parameters():
    parameters = {f"net.{name}": p for name, p in tiny_unet().named_parameters()}
    settings = OptimisationConfig(optimizer="muon", lr=1e-3, muon_lr=1e-2, weight_decay=0.25)
    adamw, muon = make_optimizers(parameters, muon_matrices({"net": tiny_unet()}), settings)
    for optimizer, lr in ((adamw, 1e-3), (muon, 1e-2)):
        assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(lr, 0.25)]
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95) and muon.param_groups[0]["momentum"] == 0.95


def test_adamw_takes_the_steps_of_its_formula():
    """arXiv:1711.05101, Alg. 2, with betas of 0.9 and 0.95: they show from the second step on."""
    start = torch.linspace(-1, 1, 5)
    p = nn.Parameter(start.clone())
    optimizer, = make_optimizers({"p": p}, (), OptimisationConfig(optimizer="adamw", lr=0.1, weight_decay=0.5))
    expected, m, v = start.double(), 0.0, 0.0
    for n, gradient in enumerate(gradients((5,), 3), 1):
        p.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient.double(), 0.95 * v + 0.05 * gradient.double() ** 2
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * (m / (1 - 0.9**n)) / ((v / (1 - 0.95**n)).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach(), expected.float())
