"""A denoiser that is exact, of a Gaussian mixture, and the curves on which samplers are measured."""

import math

import pytest
import torch
from mixtures import Mixture
from torch import Tensor

from tinyldm.diffusion.grids import Levels
from tinyldm.diffusion.process import Level


@pytest.fixture(scope="session")
def pixel_mixture() -> Mixture:
    """Two unequal modes of a single pixel, [b, 1, 1, 1]."""
    mean = torch.tensor([-1.0, 1.2], dtype=torch.float64).view(2, 1, 1, 1)
    return Mixture(mean, torch.tensor([0.3, 0.4]).double(), torch.tensor([0.4, 0.6]).double())


@pytest.fixture(scope="session")
def image_mixture() -> Mixture:
    """Three unequal modes in the space of 1 x 1 x 2 images: [b, 1, 1, 2]."""
    mean = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [1.0, -1.0]], dtype=torch.float64).view(3, 1, 1, 2)
    return Mixture(mean, torch.tensor([0.2, 0.3, 0.4]).double(), torch.tensor([0.5, 0.3, 0.2]).double())


def _on_a_line(direction: Tensor) -> Mixture:
    direction = direction.double() / direction.double().norm()
    mean = torch.tensor([-1.0, 0.5, 1.2], dtype=torch.float64).view(3, 1, 1, 1) * direction
    return Mixture(mean, torch.full((3,), 0.35).double(), torch.tensor([0.4, 0.35, 0.25]).double())


@pytest.fixture(scope="session")
def solved_mixtures(pixel_mixture) -> dict[str, Mixture]:
    """The mixtures whose probability-flow ODE has a closed solution, by name."""
    image = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(3))
    return {"1-D": pixel_mixture, "2-D": _on_a_line(torch.tensor([[[0.6, -0.8]]])), "image": _on_a_line(image)}


def _vp(t: float) -> tuple[float, float]:
    """The continuous limit of scaled_linear: beta(t) = 1000 (sqrt(beta_0) + t (sqrt(beta_1) - sqrt(beta_0)))^2."""
    low, high = math.sqrt(0.85), math.sqrt(12.0)
    integral = ((low + (high - low) * t) ** 3 - low**3) / (3 * (high - low))
    return math.exp(-integral / 2), math.sqrt(-math.expm1(-integral))


CURVES = {
    "vp": _vp,
    "cosine": lambda t: (math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)),
    "flow": lambda t: (1 - t, t),
    "ve": lambda t: (1.0, 0.01 * 5000**t),
}


@pytest.fixture(scope="session")
def curve_levels():
    """levels(curve, steps, top, bottom): an evenly spaced grid on a smooth curve (a table would round the times)."""

    def levels(curve: str, steps: int, top: float, bottom: float) -> Levels:
        def at(t: float) -> Level:
            return Level(1000 * t, *CURVES[curve](t))

        def between(ratio: float) -> Level:
            low, high = 0.0, 1.0
            for _ in range(52):
                t = (low + high) / 2
                low, high = (t, high) if at(t).sigma < ratio * at(t).alpha else (low, t)
            return at(high)

        return Levels([at(top + (bottom - top) * i / steps) for i in range(steps + 1)], between)

    return levels


@pytest.fixture(scope="session")
def toy_network():
    """A small nonlinear network, computing in x's dtype, whose output is well scaled and depends on x and, smoothly, on t."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(4, 4, 3, 3, generator=generator) / 6
    bias = torch.randn(2, 4, generator=generator)

    def net(x: Tensor, t: Tensor, cond=None) -> Tensor:
        angle = t.to(x.dtype).view(-1, 1) / 300
        shift = angle.cos() * bias[0].to(x.dtype) + angle.sin() * bias[1].to(x.dtype)  # [b, c]
        hidden = torch.nn.functional.conv2d(x, weight.to(x.dtype), padding=1)
        return 0.7 * x + torch.tanh(hidden + shift[:, :, None, None])

    return net
