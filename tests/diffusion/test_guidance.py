import pytest
import torch

from tinyldm.diffusion.guidance import cfg, denoiser
from tinyldm.diffusion.prediction import PREDICTIONS, to_x0
from tinyldm.diffusion.process import Level

LEVEL = Level(321.5, 0.6, 0.8)
X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
CONDITIONAL = torch.tensor([1.0, 2.0, 3.0])
BOTH = torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0, -3.0])  # conditional half first


def net(x, t, cond):
    return torch.tanh(x * cond.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_denoiser_tells_the_network_t_and_reads_x0_from_its_answer(kind):
    out = net(X, torch.full((3,), 321.5), CONDITIONAL)
    assert torch.equal(denoiser(net, CONDITIONAL, kind)(X, LEVEL), to_x0(kind, X, out, LEVEL))


def test_a_half_precision_network_gives_float32_arithmetic():
    def half(x, t, cond):
        return net(x, t, cond).bfloat16()

    x0 = denoiser(half, CONDITIONAL, "eps")(X, LEVEL)
    out = half(X, torch.full((3,), 321.5), CONDITIONAL).float()
    assert x0.dtype == torch.float32 and torch.equal(x0, (X - 0.8 * out) / 0.6)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_cfg_at_scale_one_is_the_conditional_model_to_the_last_bit(kind):
    guided = cfg(denoiser(net, BOTH, kind), 1.0)(X, LEVEL)
    assert torch.equal(guided, denoiser(net, CONDITIONAL, kind)(X, LEVEL))


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_cfg_mixes_the_answers_of_the_network_as_published(kind):
    conditional, unconditional = net(torch.cat([X, X]), torch.full((6,), 321.5), BOTH).chunk(2)
    mixed = unconditional + 7.5 * (conditional - unconditional)
    guided = cfg(denoiser(net, BOTH, kind), 7.5)(X, LEVEL)
    torch.testing.assert_close(guided, to_x0(kind, X, mixed, LEVEL), rtol=1e-5, atol=1e-5)


def test_cfg_calls_the_network_once_with_both_halves():
    sizes = []

    def counting(x, t, cond):
        sizes.append((len(x), len(t)))
        return net(x, t, cond)

    cfg(denoiser(counting, BOTH, "v"), 3.0)(X, LEVEL)
    assert sizes == [(6, 6)]


def test_unknown_predictions_are_refused_before_the_network_runs():
    with pytest.raises(ValueError, match="did you mean 'eps'"):
        denoiser(net, CONDITIONAL, "epsilon")
