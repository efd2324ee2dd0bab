"""Every sampler's error against its number of network calls: makes docs/samplers.md and docs/samplers.png.

    python docs/sampler_errors.py            under a minute on one CPU thread

The denoiser is exact (a mixture of three Gaussians in the plane, whose E[x0 | x] has a closed form), so the measured error is
the sampler's alone. Calls of the denoiser are counted, not steps. Needs matplotlib, like the other scripts in docs/.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from tinyldm.cli import need

need("matplotlib")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
import torch
from torch import Tensor

from tinyldm.diffusion.grids import Levels, curve, grid
from tinyldm.diffusion.noise import make_generators
from tinyldm.diffusion.process import Level, Process, make_process
from tinyldm.diffusion.samplers import SAMPLERS, adaptive, final

HERE = Path(__file__).parent
MEAN = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
STD = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
PROCESSES = {"Stable Diffusion's curve, Karras grid": ("scaled_linear", "karras"), "flow, even times": ("flow", "normal")}
CALLS = (5, 10, 20, 40, 80)
DETERMINISTIC = ("ddim", "heun", "lms", "pndm", "dpmpp_2m", "unipc")
STOCHASTIC = ("ddpm", "dpmpp_2m_sde", "dpmpp_sde", "edm")
TOLERANCES = (0.3, 0.1, 0.03, 0.01, 0.003, 1e-3, 3e-4, 1e-4)
N_ODE, N_SDE = 500, 15_000


class Counted:
    """The exact denoiser of the mixture over x [1, 1, n, 2], n points as one image (arXiv:2206.00364, Eq. 57)."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        self.calls += 1
        variance = (level.alpha * STD) ** 2 + level.sigma**2  # [k]
        away = x.view(-1, 1, 2) - level.alpha * MEAN  # [n, k, 2]
        log_p = WEIGHT.log() - away.square().sum(2) / (2 * variance) - variance.log()
        guess = MEAN + (level.alpha * STD**2 / variance).view(-1, 1) * away
        return (log_p.softmax(1)[..., None] * guess).sum(1).view_as(x)


def data(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = torch.multinomial(WEIGHT, n, replacement=True, generator=generator)
    return MEAN[k] + STD[k, None] * torch.randn(n, 2, generator=generator, dtype=torch.float64)


def start(level: Level, n: int) -> Tensor:
    """Exact draws at this level, [1, 1, n, 2], so that the start of the samplers adds no error."""
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (level.alpha * data(n, 2) + level.sigma * noise).view(1, 1, n, 2)


def steps_for(name: str, calls: int) -> int:
    """The number of steps that makes `calls` calls, or one less. No grid here ends at clean data, so samplers with two calls
    per step make two in the last one as well."""
    return calls // 2 if name in ("heun", "edm", "dpmpp_sde") else calls - 1 if name == "pndm" else calls


def levels_for(process: Process, schedule: str, steps: int) -> Levels:
    """A grid of `steps` steps. Its ends are the same for every step count, and the last one is at sigma / alpha = 0.05."""
    if schedule == "karras":
        return grid(process, steps + 1, "karras", sigma_min=0.05)[:-1]
    at, top, bottom = curve(process), 0.999, 0.05 / 1.05
    return Levels([at((u := top + (bottom - top) * i / steps) / (1 - u)) for i in range(steps + 1)], at)


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """The mean 1-Wasserstein distance between projections on 50 directions. x, y: [n, 2]."""
    angle = torch.arange(50, dtype=torch.float64) * math.pi / 50
    directions = torch.stack([angle.cos(), angle.sin()])
    return ((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean().item()


def ode_errors(process: Process, schedule: str) -> dict[str, list[tuple[int, float]]]:
    """{sampler: [(calls, root mean square distance to the ODE's solution), ...]}"""
    first = levels_for(process, schedule, 5)
    x = start(first[0], N_ODE)
    exact = final(adaptive(Counted(), x, first, rtol=1e-8, atol=1e-8))
    found: dict[str, list[tuple[int, float]]] = {}
    for name in DETERMINISTIC:
        for calls in CALLS:
            denoise = Counted()
            ended = final(SAMPLERS[name](denoise, x, levels_for(process, schedule, steps_for(name, calls))))
            found.setdefault(name, []).append((denoise.calls, (ended - exact).square().sum(-1).mean().sqrt().item()))
    for tolerance in TOLERANCES:
        denoise = Counted()
        ended = final(adaptive(denoise, x, first, rtol=tolerance, atol=tolerance))
        found.setdefault("adaptive", []).append((denoise.calls, (ended - exact).square().sum(-1).mean().sqrt().item()))
    return found


def distances(process: Process, schedule: str) -> tuple[dict[str, list[tuple[int, float]]], float]:
    """{sampler: [(calls, sliced Wasserstein distance of N_SDE draws to N_SDE exact ones), ...]}, and the mean distance
    between two exact sets."""
    first = levels_for(process, schedule, 5)
    last = first[-1]
    noise = torch.randn(N_SDE, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = last.alpha * data(N_SDE, 4) + last.sigma * noise
    others = [last.alpha * data(N_SDE, seed) + last.sigma * noise.roll(seed, 0) for seed in range(10, 15)]
    x, found = start(first[0], N_SDE), {}
    for name in (*STOCHASTIC, "dpmpp_2m"):
        for calls in CALLS:
            denoise = Counted()
            levels = levels_for(process, schedule, steps_for(name, calls))
            ended = final(SAMPLERS[name](denoise, x, levels, generators=make_generators([7])))
            found.setdefault(name, []).append((denoise.calls, sliced_wasserstein(ended.view(-1, 2), exact)))
    return found, sum(sliced_wasserstein(other, exact) for other in others) / len(others)


def table(found: dict[str, list[tuple[int, float]]], names: tuple[str, ...]) -> list[str]:
    lines = ["| calls | " + " | ".join(map(str, CALLS)) + " |", "|---|" + "---:|" * len(CALLS)]
    for name in names:
        cells = [f"{error:.2g}" + ("" if calls == wanted else f" ({calls})") for wanted, (calls, error) in zip(CALLS, found[name])]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def write(odes: dict, sdes: dict, floors: dict) -> None:
    lines = ["# Error against network evaluations", "",
             "Made by `python docs/sampler_errors.py`; every figure here is printed by it. The denoiser is exact, that of a mixture "
             "of three Gaussians in the plane, so all of the error is the sampler's. All samplers start from the same exact "
             "draws at the noisy end and end at sigma / alpha = 0.05, short of the last step to clean data, which is the same "
             "for all. "
             "`euler` is `ddim`, `euler_a` is `ddpm`.", "", "![errors and paths](samplers.png)", ""]
    for label in odes:
        lines += [f"## {label}", "",
                  f"Deterministic samplers: root mean square distance to the exact solution, {N_ODE} points.", "",
                  *table(odes[label], DETERMINISTIC), "",
                  "`adaptive` chooses its steps by its tolerance (rtol = atol):", "",
                  "| tolerance | " + " | ".join(f"{t:g}" for t in TOLERANCES) + " |", "|---|" + "---:|" * len(TOLERANCES),
                  "| calls | " + " | ".join(str(calls) for calls, _ in odes[label]["adaptive"]) + " |",
                  "| error | " + " | ".join(f"{error:.2g}" for _, error in odes[label]["adaptive"]) + " |", "",
                  f"Stochastic samplers: sliced Wasserstein distance of {N_SDE} draws to as many exact ones. Two exact sets are "
                  f"{floors[label]:.2g} apart: differences below about that are noise. `dpmpp_2m`, which is deterministic, is "
                  "there for comparison.", "",
                  *table(sdes[label], (*STOCHASTIC, "dpmpp_2m")), ""]
    lines += ["Of these figures `lms` and `pndm` profit from a start at a finite level. On a flow, and with zero terminal SNR, where the "
              "first level is pure noise, they need about 50 steps, and draw garbage with 20: sample.py warns then.", ""]
    lines += ["A figure in brackets is the number of calls where it is not the column's. `pndm` takes its first step twice; "
              "`heun`, `edm` and `dpmpp_sde` call the denoiser twice a step.", ""]
    (HERE / "samplers.md").write_text("\n".join(lines), "utf-8")


def draw(odes: dict, sdes: dict, floors: dict) -> None:
    """One row per process: errors against calls, to the ODE's solution and to the distribution, and paths of few steps."""
    plt.rcParams.update({"font.size": 16, "legend.fontsize": 13, "lines.linewidth": 2.4, "lines.markersize": 8})
    figure, axes = plt.subplots(2, 3, figsize=(20, 13.5), gridspec_kw={"width_ratios": (1.15, 1, 1)})
    for row, (label, errors) in enumerate(odes.items()):
        ode, sde, paths = axes[row]
        for i, (name, mark) in enumerate(zip((*DETERMINISTIC, "adaptive"), "osD^vXP")):
            ode.loglog(*zip(*errors[name]), marker=mark, color=f"C{i}", label=name)
        for order, high in ((1, 0.9), (2, 0.4)):
            ode.loglog((20, 80), (high, high * 4.0**-order), color="0.5", linestyle=":")
            ode.annotate(f"order {order}", (85, high * 4.0**-order), color="0.4", fontsize=13, va="center")
        ode.set(title=label, xlabel="calls of the denoiser", ylabel="distance to the ODE's solution", xlim=(3.6, 150))
        for i, (name, mark) in enumerate(zip((*STOCHASTIC, "dpmpp_2m"), "osD^v")):
            sde.loglog(*zip(*sdes[label][name]), marker=mark, color=("C7", "C8", "C9", "k", "C4")[i], label=name)
        sde.axhline(floors[label], color="0.5", linestyle=":", label="two exact sets")
        sde.set(title=f"stochastic, {N_SDE} draws", xlabel="calls of the denoiser", ylabel="sliced Wasserstein distance")
        for axis in (ode, sde):
            axis.set_xticks(CALLS, [str(calls) for calls in CALLS])
            axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axis.grid(alpha=0.3)
            axis.legend(loc="lower left" if axis is ode else "upper right")
        process, schedule = make_process(PROCESSES[label][0]), PROCESSES[label][1]
        paths.plot(*data(1500, 9).T, ".", color="0.85", markersize=4, zorder=0)
        for name, steps, color, style, points in (("ddpm", 40, "C7", "-", [0]), ("dpmpp_2m", 200, "k", "-", range(4)),
                                                  ("ddim", 5, "C0", "o--", range(4)), ("dpmpp_2m", 5, "C4", "v--", range(4))):
            levels = levels_for(process, schedule, steps)
            x = start(levels[0], 400)
            chosen = [(x[0, 0] - torch.tensor(point)).norm(dim=1).argmin().item()
                      for point in ((-0.9, 1.6), (0.4, 1.9), (1.9, -0.2), (0.1, -1.8))]
            scale = lambda level: math.hypot(level.alpha, level.sigma)  # x / scale has about one size at all levels
            states = [x, *(state for state, _ in SAMPLERS[name](Counted(), x, levels, generators=make_generators([4])))]
            path = torch.stack([state[0, 0, chosen] / scale(level) for state, level in zip(states, levels)])  # [steps + 1, 4, 2]
            for i in points:
                paths.plot(*path[:, i].T, style, color=color, linewidth=1.2 if name == "ddpm" else 2, markersize=6,
                           zorder=1 if name == "ddpm" else 2, label=f"{name}, {steps} steps" if i == points[0] else None)
        paths.set(title="paths from noise (outside) to data", aspect="equal", xlim=(-2.8, 2.8), ylim=(-4.3, 2.3))
        paths.legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(HERE / "samplers.png", dpi=75)


def main() -> None:
    torch.set_num_threads(1)
    began, odes, sdes, floors = time.perf_counter(), {}, {}, {}
    for label, (name, schedule) in PROCESSES.items():
        process = make_process(name)
        odes[label] = ode_errors(process, schedule)
        sdes[label], floors[label] = distances(process, schedule)
    write(odes, sdes, floors)
    draw(odes, sdes, floors)
    print(f"{HERE / 'samplers.md'}, {HERE / 'samplers.png'} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
