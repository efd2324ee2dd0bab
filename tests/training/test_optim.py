"""Optimizers: which parameter goes where, what Muon does to a matrix, and the learning rate's course."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinyldm.config import OptimisationConfig
from tinyldm.model import muon_matrices
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.training import optim
from tinyldm.training.optim import Muon, _newton_schulz, make_optimizers, orthogonalise, set_lr, tf32
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


def iterated(matrices: torch.Tensor) -> torch.Tensor:
    """The iteration in float64."""
    x, (a, b, c) = matrices.double(), (3.4445, -4.7750, 2.0315)
    x = x / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def conditioned(rows: int, columns: int, number: float) -> torch.Tensor:
    """Two matrices whose singular values fall from 1 to 1 / number."""
    rng = torch.Generator().manual_seed(8)
    u, v = (torch.linalg.qr(torch.randn(2, size, rows, generator=rng, dtype=torch.float64))[0] for size in (rows, columns))
    return ((u * torch.logspace(0, -torch.log10(torch.tensor(number)).item(), rows, dtype=torch.float64)) @ v.mT).float()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", [(4, 64, 64), (2, 96, 160)])
def test_the_bfloat16_iteration_rounds_once_per_product(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    found = orthogonalise(matrices)
    assert found.dtype == torch.bfloat16 and relative_error(found, iterated(matrices)) < 0.018       # 0.023 to 0.03 with separate sums


@pytest.mark.parametrize("number, error", [(10, 0.004), (1e5, 0.025)])
def test_tf32_is_exact_enough_for_long_matrices(number, error, monkeypatch):
    """TF32's products acted out: 10 bits of mantissa, here cut off, which is worse than rounded; sums in float32."""
    bmm, baddbmm = torch.bmm, torch.baddbmm
    cut = lambda x: (x.contiguous().view(torch.int32) & ~0x1fff).view(torch.float32)
    monkeypatch.setattr(torch, "bmm", lambda a, b: bmm(cut(a), cut(b)))
    monkeypatch.setattr(torch, "baddbmm", lambda x, a, b, **scales: baddbmm(x, cut(a), cut(b), **scales))
    matrices = conditioned(64, 256, number)
    found, wanted = orthogonalise(matrices), iterated(matrices)
    assert 1e-4 < relative_error(found, wanted) < error         # bfloat16: 0.012 and 0.13
    off = lambda result: (torch.linalg.svdvals(result.float()) - exact).abs().max()
    exact = torch.linalg.svdvals(wanted)
    # How far a single value is off depends on the matrices, and these on the processor's QR: so beside the same ones in bfloat16.
    monkeypatch.undo()
    customary = _newton_schulz((matrices / matrices.norm(dim=(1, 2), keepdim=True)).bfloat16(), 5)
    assert off(found) < 0.75 * off(customary) and torch.linalg.svdvals(found).max() < 1.21 and exact.median() > 0.65


def test_long_matrices_and_no_others_are_multiplied_in_tf32_on_a_gpu(monkeypatch):
    usual, used = torch.get_float32_matmul_precision(), []
    with pytest.raises(ZeroDivisionError), tf32(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == usual
    with tf32(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == usual

    @contextmanager
    def noted(device):
        used.append(device.type)
        yield

    monkeypatch.setattr(optim, "tf32", noted)
    orthogonalise(torch.ones(1, 4, 7))
    assert used == []
    assert orthogonalise(torch.ones(1, 4, 8)).dtype == orthogonalise(torch.ones(1, 8, 4)).dtype == torch.float32 and used == ["cpu"] * 2


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9 has one name for a precision")
def test_what_is_compiled_before_muon_s_first_step_is_found_in_torch_s_cache_after_it():
    key = lambda: torch.backends.cuda.matmul.fp32_precision      # a part of it, of torch._inductor.codecache.FxGraphHashDetails
    torch.backends.cuda.matmul.fp32_precision = "none"          # as in a new process
    Muon([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    before = key()
    with tf32(torch.device("cuda")):
        assert key() == "tf32"
    assert key() == before and torch.get_float32_matmul_precision() == "highest"


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
    assert "net.down.0.resnets.0.conv1.weight" in taken and "net.middle.attentions.0.blocks.0.cross_attention.to_k.weight" in taken
    assert not any(name.startswith(("net.conv_in", "net.conv_out", "net.time_embedding")) or name.endswith("bias") for name in taken)


def test_muon_moves_a_matrix_by_the_size_it_promises():
    p = nn.Parameter(torch.zeros(32, 32))
    optimizer = Muon([p], lr=0.1)
    p.grad = torch.randn(32, 32, generator=torch.Generator().manual_seed(3)) * 1e-6      # the gradient's size is irrelevant
    optimizer.step()
    assert 0.5 < p.detach().square().mean().sqrt() / (0.2 * 0.1) < 1.3


class Operations(TorchDispatchMode):
    """Counts the calls of torch's operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_muon_s_operations_do_not_grow_with_the_number_of_matrices():
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((6, 6), (6, 24), (24, 6), (6, 6, 3, 3)) for _ in range(40)]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(2):                                         # the first step makes the momentum buffers
        for p in parameters:
            p.grad = torch.ones_like(p)
        with Operations() as operations:
            optimizer.step()
    assert operations.count <= 200


def test_muon_orthogonalises_a_bounded_number_of_matrices_at_a_time(monkeypatch):
    def step() -> tuple[list[torch.Tensor], list[int]]:
        rng, sizes = torch.Generator().manual_seed(10), []
        real = optim.orthogonalise
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(8, 16)] * 5 + [(8, 8)] * 9 + [(40, 40)]]
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=rng)
        with monkeypatch.context() as patch:
            patch.setattr(optim, "orthogonalise", lambda matrices: sizes.append(matrices.nbytes) or real(matrices))
            Muon(parameters, lr=0.1).step()
        return [p.detach() for p in parameters], sizes

    whole, sizes = step()
    assert sizes == [9 * 256, 5 * 512, 6400]                   # by shape
    monkeypatch.setattr(optim, "BYTES_AT_ONCE", 1024)
    parts, sizes = step()
    assert max(sizes[:-1]) <= 1024 and sizes[-1] == 6400 and sum(sizes) == 9 * 256 + 5 * 512 + 6400
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(whole, parts))


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


def test_text_encoders_may_have_learning_rates_of_their_own():
    parameters = {f"{part}.{name}": p for part in ("net", "text_2") for name, p in nn.Linear(2, 2).named_parameters()}
    settings = OptimisationConfig(optimizer="muon", lr=1e-3, muon_lr=1e-2, text_lr=5e-4)
    optimizers = make_optimizers(parameters, {"net.weight", "text_2.weight"}, settings)
    names = {id(p): name for name, p in parameters.items()}
    found = {names[id(p)]: group["lr"] for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert found == {"net.weight": 1e-2, "net.bias": 1e-3, "text_2.weight": pytest.approx(5e-3), "text_2.bias": 5e-4}


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
