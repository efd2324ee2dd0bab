"""Exponential moving averages of weights: of a fixed decay with warm-up, or power functions of the step.

A power function's average forgets in proportion to the run's length: its width, sigma_rel, is the standard deviation
of its weighting of past steps over their number. Averages of other widths than those kept, and of other steps, can be
had afterwards from snapshots (post-hoc EMA). Reference: Karras et al. 2023 (EDM2), arXiv:2312.02696, Sec. 3, Eq. 1 to 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from tinyldm.training.distributed import fill, local, sharded, whole


class EMA:
    """Averages of the parameters of several named modules, in float32 on their devices.

    After update n (from 1) the decay is min(decay, n / (n + 9)): early averages forget the initial weights,
    so they are usable from the first sample grid on.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float):
        self.decay = decay
        self.parameters = {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    def decay_at(self, n: int) -> float:
        """The weight of the old average in update n."""
        return min(self.decay, n / (n + 9))

    @torch.no_grad()
    def update(self, n: int) -> None:
        averages, values = ([local(tensor) for tensor in tensors.values()] for tensors in (self.shadow, self.parameters))
        torch._foreach_lerp_(averages, values, 1 - self.decay_at(n))

    def state_dict(self, part: str) -> dict[str, Tensor]:
        """The averages of one module, under its own names: the tensors themselves, sharded like their parameters."""
        return {name.removeprefix(part + "."): tensor for name, tensor in self.shadow.items() if name.startswith(part + ".")}

    @torch.no_grad()
    def load_state_dict(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Restore what state_dict() gave, from full tensors."""
        for name, tensor in tensors.items():
            fill(self.shadow[f"{part}.{name}"], tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the modules carry the averages; afterwards their own weights again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            if sharded(p):                                     # FSDP gathers from a fixed buffer: swap the values inside it
                own, other = local(p), local(self.shadow[name])
                saved = own.clone()
                own.copy_(other), other.copy_(saved)
            else:
                p.data, self.shadow[name] = self.shadow[name], p.data


# ---------------------------------------------------------------- power functions


class PowerAverage(EMA):
    """One average of width sigma_rel: after update t, the weights of step s (1 to t) count s^(gamma + 1) - (s - 1)^(gamma + 1)
    parts of t^(gamma + 1) (derived from Eq. 2; it is Eq. 1 for weights that stay put within a step). The first update
    takes the weights as they are: the initial ones do not count."""

    def __init__(self, modules: Mapping[str, nn.Module], sigma_rel: float):
        super().__init__(modules, decay=1.0)
        self.gamma = to_gamma(sigma_rel)

    def decay_at(self, n: int) -> float:
        return (1 - 1 / n) ** (self.gamma + 1)                                 # (Eq. 2)


class PowerEMA:
    """Averages of several widths side by side; `which` is the index of a width in sigma_rels.

    Memory: one float32 copy of the parameters per width. Updates must count every step from 1; to go on after an
    interruption, load every width and continue with the next number.
    """

    def __init__(self, modules: Mapping[str, nn.Module], sigma_rels: Sequence[float] = (0.05, 0.10)):
        self.sigma_rels = tuple(sigma_rels)
        self.averages = [PowerAverage(modules, sigma_rel) for sigma_rel in self.sigma_rels]

    def update(self, n: int) -> None:
        for average in self.averages:
            average.update(n)

    def state_dict(self, part: str, which: int = 0) -> dict[str, Tensor]:
        return self.averages[which].state_dict(part)

    def load_state_dict(self, part: str, tensors: Mapping[str, Tensor], which: int = 0) -> None:
        self.averages[which].load_state_dict(part, tensors)

    def applied(self, which: int = 0) -> AbstractContextManager[None]:
        return self.averages[which].applied()

    def snapshot(self, dtype: torch.dtype = torch.float32) -> dict[float, dict[str, Tensor]]:
        """sigma_rel -> {"part.name": average}, copies in CPU memory: the input of reconstruct().

        float16 halves the files; its rounding, up to 2^-11 of a weight, grows by the sum of the coefficients' sizes."""
        return {sigma_rel: {name: whole(tensor).to("cpu", dtype, copy=True) for name, tensor in average.shadow.items()}
                for sigma_rel, average in zip(self.sigma_rels, self.averages)}


def parse_widths(words: Sequence[str | float]) -> list[float]:
    """--ema-widths as numbers. ValueError for words that are no numbers, and for widths that no power function has."""
    try:
        widths = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"--ema-widths {' '.join(map(str, words))}: use numbers between 0 and 0.288, as in 0.05 0.1") from None
    for width in widths:
        to_gamma(width)
    return widths


def to_sigma_rel(gamma: float) -> float:
    """The standard deviation of the density (gamma + 1) x^gamma on [0, 1] (Eq. 3)."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def to_gamma(sigma_rel: float) -> float:
    """The inverse: with u = gamma + 2 the root u > 2 of s^2 u^3 + s^2 u^2 - u + 1 = 0 (derived). ValueError above
    12^(-1/2) = 0.289, the plain mean of all steps."""
    if not 0 < sigma_rel < 12 ** -0.5:
        raise ValueError(f"the width of an average, sigma_rel {sigma_rel}, must lie between 0 and 0.288: 0.05 or 0.1, say")
    square = sigma_rel ** 2
    return float(np.roots([square, square, -1, 1]).real.max()) - 2


def overlap(steps: np.ndarray, gammas: np.ndarray, step: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """Integrals of products of two weightings, p(x) = (gamma + 1) x^gamma / step^(gamma + 1) on [0, step] (derived).

    Up to the earlier of the two steps, m: (g + 1) (h + 1) / (g + h + 1) m^(g + h + 1) / (step_g^(g + 1) step_h^(h + 1)).
    Of the powers only the later one's, (m / later)^gamma / later, remains, which cannot overflow."""
    later, its_gamma = np.maximum(steps, step), np.where(steps > step, gammas, gamma)
    return (gammas + 1) * (gamma + 1) / (gammas + gamma + 1) * (np.minimum(steps, step) / later) ** its_gamma / later


def coefficients(snapshots: Sequence[tuple[int, float]], sigma_rel: float, step: int) -> np.ndarray:
    """[(step, sigma_rel)] -> how much of each snapshot makes the average of this width at this step, float64 [n].

    The sum of the weightings comes as near as possible to the wanted one, in least squares (post-hoc EMA, Sec. 3.2).
    Other than there the coefficients must add up to 1 (one more row, a Lagrange multiplier): weights that do not move
    then come out as they are, and networks here keep their initial weights' scale, which a sum of 0.99 would shrink.
    """
    if not snapshots:
        raise ValueError("nothing to reconstruct an average from: no snapshots")
    steps, gammas = (np.array(values, dtype=np.float64) for values in zip(*((at, to_gamma(width)) for at, width in snapshots)))
    if min(steps.min(), step) < 1:
        raise ValueError("averages begin at step 1")
    n = len(steps)
    system, wanted = np.zeros((n + 1, n + 1)), np.ones(n + 1)
    system[:n, :n] = overlap(steps[:, None], gammas[:, None], steps, gammas) * step           # dimensionless
    system[n, :n] = system[:n, n] = 1
    wanted[:n] = overlap(steps, gammas, np.float64(step), np.float64(to_gamma(sigma_rel))) * step
    return np.linalg.lstsq(system, wanted, rcond=None)[0][:n]                  # least squares, so repeated snapshots are harmless


def reconstruct(snapshots: Sequence[tuple[int, float, Mapping[str, Tensor]]], sigma_rel: float,
                step: int) -> dict[str, Tensor]:
    """[(step, sigma_rel, tensors)] -> the average of any width at any step, as good as the snapshots allow: best between
    their widths, and at or before the last of their steps. Adds up in float64, returns the snapshots' dtype.

    tensors: read one name at a time, so a mapping that reads a file when asked needs memory for one tensor only."""
    weights = coefficients([(at, width) for at, width, _ in snapshots], sigma_rel, step)
    first = snapshots[0][2]
    for at, width, tensors in snapshots:
        if tensors.keys() != first.keys():
            raise ValueError(f"the snapshot of step {at}, sigma_rel {width}, holds other tensors than the first one: leave "
                             "out snapshots of another model")
    return {name: sum(tensors[name].double() * weight for weight, (_, _, tensors) in zip(weights.tolist(), snapshots))
            .to(first[name].dtype) for name in first}
