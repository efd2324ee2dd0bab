"""Grids: at which noise levels a sampler stops. A scheduler's habits are a list of Levels, nothing else.

`grid(process, steps)` gives steps + 1 levels of Python floats, from noise to data. Slice it, concatenate it
or build it by hand: samplers only look at neighbours. To start part-way, from an image, pass `strength`, then
mix at the first level:

    levels = grid(process, 30, strength=0.6)
    x = levels[0].alpha * x0 + levels[0].sigma * eps

How published schedulers map onto it (T = 1000 training steps; vendor_loaders/scheduler.py reads it from a config):
  DDIM, DDPM, PNDM           leading (offset=1 for Stable Diffusion), trailing, linspace
  Euler, Euler a, Heun, LMS  leading, trailing, linspace_unrounded, karras with ends= one of these
  DPM-Solver++, UniPC        trailing; leading and linspace with drop_last=True; karras with rounded=True; flow_sigmas
  FlowMatchEuler             flow_match

References
  Leading, trailing, linspace: arXiv:2305.08891, Table 2.  Karras: arXiv:2206.00364, Eq. 5.
"""

import math
from bisect import bisect_right

import numpy as np
import torch

from tinyldm.diffusion.process import CLEAN, Discrete, Flow, Level, Process, check_options
from tinyldm.lookup import lookup


def grid(
    process: Process,
    steps: int,
    schedule: str = "normal",
    *,
    strength: float = 1.0,
    drop_last: bool = False,
    set_alpha_to_one: bool = True,
    alpha_floor: float = 0.0,
    **options,
) -> list[Level]:
    """The levels of `steps` sampling steps: steps + 1 of them, falling in noise, ending at clean data.

    schedule          a name in SCHEDULES; "normal" is trailing, for every process
    strength          in (0, 1]: keep only the last int(steps * strength) steps, for image to image
    drop_last         spread steps + 1 levels and skip the least noisy, as DPM-Solver++ does in diffusers
    set_alpha_to_one  False: end at the first entry of a discrete table instead of at clean data
    alpha_floor       stands for alpha where it is 0: 2**-12 in diffusers' schedulers that divide by it
    options           offset (leading); rho, sigma_min, sigma_max, ends, offset, rounded (karras);
                      from_noise (flow_sigmas)

    ValueError for names, counts and strengths that do not fit, with what would.
    """
    spread = lookup(SCHEDULES, schedule, "schedule")
    check_options(spread, options, f"{schedule} option")
    most = len(process) - drop_last if isinstance(process, Discrete) else math.inf
    if not 1 <= steps <= most:
        raise ValueError(f"{steps} sampling steps: use {'1 or more' if most == math.inf else f'1 to {most}'}")
    last = _at(process, 0.0) if isinstance(process, Discrete) and not set_alpha_to_one else CLEAN
    if alpha_floor and isinstance(process, Discrete):
        process = Discrete.from_alpha(process.alpha.masked_fill(process.alpha == 0, alpha_floor))
    levels = spread(process, steps + drop_last, **options)[:steps] + [last]
    if alpha_floor and levels[0].alpha == 0:
        levels[0] = Level(levels[0].t, alpha_floor, 1 - alpha_floor)  # only a flow is still at 0
    keep = int(steps * strength + 1e-9)  # 50 * 0.58 is 28.999...: without the nudge it would lose a step
    if not 1 <= keep <= steps:
        raise ValueError(f"strength {strength} keeps {keep} of {steps} steps: use {1 / steps:.2g} to 1")
    return levels[steps - keep :]


def _trailing(process: Process, steps: int) -> list[Level]:
    """Starts at the noisiest level: T, T - T/n, ..., T/n, each less one. On a continuous curve t = i / n."""
    if isinstance(process, Discrete):
        return [_at(process, round(len(process) * i / steps) - 1) for i in range(steps, 0, -1)]
    return [_evaluate(process, i / steps) for i in range(steps, 0, -1)]


def _leading(process: Process, steps: int, offset: int = 0) -> list[Level]:
    """Ends at the cleanest level and never sees the noisiest: the grid of DDIM and, with `offset` added to every
    time, of Stable Diffusion 1."""
    stride, top = len(_table(process, "leading")) // steps, len(process) - 1
    return [_at(process, min(stride * i + offset, top)) for i in range(steps - 1, -1, -1)]


def _linspace(process: Process, steps: int) -> list[Level]:
    """Both ends, rounded to whole times (halves to even)."""
    return [_at(process, round(t)) for t in _even_times(process, steps)]


def _linspace_unrounded(process: Process, steps: int) -> list[Level]:
    """Both ends, with sigma / alpha interpolated between the table's entries: k-diffusion's own grid."""
    return [_at(process, t) for t in _even_times(process, steps)]


def _even_times(process: Process, steps: int) -> list[float]:
    top = len(_table(process, "linspace")) - 1
    stride = top / max(steps - 1, 1)
    return [top] + [i * stride for i in range(steps - 2, -1, -1)]  # a single step starts from the noisiest level


def _karras(
    process: Process,
    steps: int,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    ends: str | None = None,
    offset: int = 0,
    rounded: bool = False,
) -> list[Level]:
    """Even in (sigma / alpha)^(1 / rho): short steps near the data (arXiv:2206.00364, Eq. 5).

    sigma_min and sigma_max are in sigma / alpha too; the table's own ends by default (`cosine` ends at 2e4: give
    it 80), or those of another schedule (`ends`, with its `offset` if it is "leading"). The network's time is
    interpolated in log(sigma / alpha), so it is not a whole number unless `rounded`.
    """
    table = _table(process, "karras")
    ratios = (table.sigma / table.alpha).tolist()
    noisiest, cleanest = ratios[-1], ratios[0]
    if ends is not None:
        spaced = lookup(SCHEDULES, ends, "schedule")(table, steps, **({"offset": offset} if offset else {}))
        first, last = spaced[0], spaced[-1]
        noisiest, cleanest = first.sigma / first.alpha if first.alpha else math.inf, last.sigma / last.alpha
    low = (cleanest if sigma_min is None else sigma_min) ** (1 / rho)
    high = (noisiest if sigma_max is None else sigma_max) ** (1 / rho)
    if math.isinf(high):
        raise ValueError("schedule 'karras' cannot start from pure noise (alpha = 0): pass sigma_max, for example 80")
    logs = [math.log(ratio) for ratio in ratios]
    wanted = [(high + i / max(steps - 1, 1) * (low - high)) ** rho for i in range(steps)]
    levels = [_from_ratio(_find(math.log(ratio), logs), ratio) for ratio in wanted]
    return [level._replace(t=float(round(level.t))) for level in levels] if rounded else levels


def _flow_match(process: Process, steps: int) -> list[Level]:
    """diffusers' FlowMatchEuler: linspace from 1 to the time of 1 in 1000, which it shifts once more."""
    if not isinstance(process, Flow):
        raise ValueError("schedule 'flow_match' is for process 'flow': use 'normal' or 'trailing' here")
    low = _evaluate(process, 1 / 1000).sigma
    return [_evaluate(process, 1 + i / max(steps - 1, 1) * (low - 1)) for i in range(steps)]


def _flow_sigmas(process: Process, steps: int, from_noise: bool = False) -> list[Level]:
    """diffusers' DPM-Solver++ and, from_noise, UniPC on a flow: 0.999 i / n, or the same from the other end, where
    the first is 1. The network is told whole times, cut off, 999 at most.

    In numpy, as there: 1000 t is often a whole number but for the last bit, which the cut feels.
    """
    if not isinstance(process, Flow):
        raise ValueError("schedule 'flow_sigmas' is for process 'flow': use 'normal' or 'trailing' here")
    even = np.linspace(1, 1 / 1000, steps + 1)
    levels = [_evaluate(process, t) for t in (even[:-1] if from_noise else (1 - even)[:0:-1]).tolist()]
    return [level._replace(t=float(min(int(level.t), 999))) for level in levels]


SCHEDULES = {
    "normal": _trailing,
    "trailing": _trailing,
    "leading": _leading,
    "linspace": _linspace,
    "linspace_unrounded": _linspace_unrounded,
    "karras": _karras,
    "flow_match": _flow_match,
    "flow_sigmas": _flow_sigmas,
}


def _table(process: Process, schedule: str) -> Discrete:
    if not isinstance(process, Discrete):
        raise ValueError(f"schedule '{schedule}' needs a discrete table: use 'normal' or 'trailing' with this process")
    return process


def _evaluate(process: Process, t: float) -> Level:
    """The process at t in [0, 1], as Python floats."""
    return Level(*(value.item() for value in process(torch.tensor([t], dtype=torch.float64))))


def _at(table: Discrete, t: float) -> Level:
    """The level at time t of the table, sigma / alpha interpolated where t lies between two entries."""
    low = int(t)
    if t == low:
        return Level(float(t), table.alpha[low].item(), table.sigma[low].item())
    ratio = torch.lerp(*(table.sigma / table.alpha)[low : low + 2], t - low).item()
    return _from_ratio(t, ratio)


def _from_ratio(t: float, ratio: float) -> Level:
    """The variance-preserving level (alpha^2 + sigma^2 = 1) with this sigma / alpha."""
    alpha = (1 + ratio**2) ** -0.5
    return Level(t, alpha, alpha * ratio)


def _find(x: float, table: list[float]) -> float:
    """The fractional index where the rising table reaches x, clamped to its ends."""
    low = min(max(bisect_right(table, x) - 1, 0), len(table) - 2)
    weight = (x - table[low]) / (table[low + 1] - table[low])
    return low + min(max(weight, 0.0), 1.0)
