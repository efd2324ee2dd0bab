"""Grids: at which noise levels a sampler stops. A scheduler's habits are a list of Levels, nothing else.

`grid(process, steps)` gives steps + 1 levels of Python floats, from noise to data. Slice it or build it by hand: most
samplers only look at neighbours. To start part-way, from an image, pass `strength`, then mix at the first level:

    levels = grid(process, 30, strength=0.6)
    x = levels[0].alpha * x0 + levels[0].sigma * eps

How published schedulers map onto it (T = 1000 training steps; vendor_loaders/scheduler.py reads it from a config):
  DDIM, DDPM, PNDM           leading (offset=1 for Stable Diffusion), trailing, linspace
  Euler, Euler a, Heun, LMS  leading, trailing, linspace_unrounded; karras, exponential, beta with ends= one of these
  DPM-Solver++, UniPC        trailing; leading, linspace with drop_last; karras with rounded, exponential, beta; flow_sigmas
  FlowMatchEuler             flow_match

Leading, trailing, linspace: arXiv:2305.08891, Table 2.  Karras: arXiv:2206.00364, Eq. 5.  Beta: arXiv:2407.12173.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from tinyldm.diffusion.process import CLEAN, Discrete, Flow, Level, Process, check_options, find_t
from tinyldm.lookup import lookup


class Levels(list):
    """Levels, and the curve that they lie on, sigma / alpha -> Level: for samplers that look between them."""

    def __init__(self, levels: Iterable[Level], curve: Callable[[float], Level]) -> None:
        super().__init__(levels)
        self.curve = curve

    def __getitem__(self, key):
        found = super().__getitem__(key)
        return Levels(found, self.curve) if isinstance(key, slice) else found


def grid(
    process: Process, steps: int, schedule: str | Sequence[float] = "normal", *, strength: float = 1.0,
    drop_last: bool = False, set_alpha_to_one: bool = True, alpha_floor: float = 0.0, **options,
) -> Levels:
    """The levels of `steps` sampling steps: steps + 1 of them, falling in noise, ending at clean data.

    schedule          a name in SCHEDULES, "normal" is trailing; or the times to stop at before the end, as numbers or as
                      "999,800,500,200,50": entries of a table or 1000 t (before a flow's shift); `steps` is then unused
    strength          in (0, 1]: keep only the last int(steps * strength) steps, for image to image
    drop_last         spread steps + 1 levels and skip the least noisy, as DPM-Solver++ does in diffusers
    set_alpha_to_one  False: end at the first entry of a discrete table instead of at clean data
    alpha_floor       stands for alpha where it is 0: 2**-12 in diffusers' schedulers that divide by it
    options           offset (leading); from_noise (flow_sigmas); those of _by_noise (karras, exponential, beta)

    ValueError for names, counts and strengths that do not fit, with what would.
    """
    spread = find_schedule(schedule)
    check_options(spread, options, f"{schedule} option")
    most = len(process) - drop_last if isinstance(process, Discrete) else math.inf
    if not 1 <= steps <= most:
        raise ValueError(f"{steps} sampling steps: use {'1 or more' if most == math.inf else f'1 to {most}'}")
    last = _at(process, 0.0) if isinstance(process, Discrete) and not set_alpha_to_one else CLEAN
    if alpha_floor and isinstance(process, Discrete):
        process = Discrete.from_alpha(process.alpha.masked_fill(process.alpha == 0, alpha_floor))
    levels = spread(process, steps + drop_last, **options)
    levels = levels[: len(levels) - drop_last] + [last]
    if alpha_floor and levels[0].alpha == 0:
        levels[0] = Level(levels[0].t, alpha_floor, 1 - alpha_floor)  # only a flow is still at 0
    steps = len(levels) - 1
    keep = int(steps * strength + 1e-9)  # 50 * 0.58 is 28.999...: without the nudge it would lose a step
    if not 1 <= keep <= steps:
        raise ValueError(f"strength {strength} keeps {keep} of {steps} steps: use {1 / steps:.2g} to 1")
    return Levels(levels[steps - keep :], curve(process))


def find_schedule(schedule: str | Sequence[float]) -> Callable[..., list[Level]]:
    """A schedule by name, or one that stops at the given times. ValueError for unknown names and what is no number."""
    if isinstance(schedule, str) and not schedule.strip()[:1].isdigit():
        return lookup(SCHEDULES, schedule, "schedule")
    try:
        times = [float(time) for time in (schedule.split(",") if isinstance(schedule, str) else schedule)]
    except ValueError:
        raise ValueError(f"schedule '{schedule}' is not a list of times: write them as 999,800,500,200,50") from None

    def listed(process: Process, steps: int) -> list[Level]:
        low, top = (0, len(process) - 1) if isinstance(process, Discrete) else (0.001, 1000)
        if not times or not top >= times[0] >= times[-1] >= low or any(a <= b for a, b in pairwise(times)):
            raise ValueError(f"schedule {schedule}: give falling times, {top} at most and {low} at least")
        return [_at(process, t) if isinstance(process, Discrete) else _evaluate(process, t / 1000) for t in times]

    return listed


def _trailing(process: Process, steps: int) -> list[Level]:
    """Starts at the noisiest level: T, T - T/n, ..., T/n, each less one. On a continuous curve t = i / n."""
    if isinstance(process, Discrete):
        return [_at(process, round(len(process) * i / steps) - 1) for i in range(steps, 0, -1)]
    return [_evaluate(process, i / steps) for i in range(steps, 0, -1)]


def _leading(process: Process, steps: int, offset: int = 0) -> list[Level]:
    """Ends at the cleanest level and never sees the noisiest: DDIM's and, with `offset` added, Stable Diffusion 1's."""
    stride, top = len(_only(process, Discrete, "leading")) // steps, len(process) - 1
    return [_at(process, min(stride * i + offset, top)) for i in range(steps - 1, -1, -1)]


def _linspace(process: Process, steps: int, whole: Callable[[float], float] = round) -> list[Level]:
    """Both ends, rounded to whole times (halves to even); unrounded, with sigma / alpha interpolated between entries, it is
    k-diffusion's own grid. A single step starts from the noisiest level."""
    top = len(_only(process, Discrete, "linspace")) - 1
    stride = top / max(steps - 1, 1)
    return [_at(process, whole(t)) for t in [top] + [i * stride for i in range(steps - 2, -1, -1)]]


def _by_noise(
    process: Process, steps: int, rho: float = 7.0, shape: float = 1.0, sigma_min: float | None = None,
    sigma_max: float | None = None, ends: str | None = None, offset: int = 0, rounded: bool = False,
) -> list[Level]:
    """Even in (sigma / alpha)^(1 / rho). Karras: rho = 7, short steps near the data (arXiv:2206.00364, Eq. 5).
    Exponential: rho = inf, even in log-SNR. Beta: rho = 1, spread like the quantiles of Beta(shape, shape), close at both
    ends (diffusers' reading of arXiv:2407.12173, which spreads times so).

    sigma_min and sigma_max are in sigma / alpha too; the curve's own ends by default (`cosine` ends at 2e4: give it 80), or
    those of another schedule (`ends`, with its `offset`). The network's time is no whole number unless `rounded`.
    """
    if ends is not None:
        first, *_, last = 2 * lookup(SCHEDULES, ends, "schedule")(process, steps, **({"offset": offset} if offset else {}))
    else:  # a thousandth short of pure noise and of clean data
        first, last = (at if at.alpha * at.sigma > 0 else _evaluate(process, short)
                       for at, short in ((_evaluate(process, 1.0), 0.999), (_evaluate(process, 0.0), 0.001)))
    high = sigma_max if sigma_max is not None else first.sigma / first.alpha if first.alpha else math.inf
    low = last.sigma / last.alpha if sigma_min is None else sigma_min
    if not 0 < low <= high < math.inf:
        raise ValueError(f"sigma / alpha cannot fall from {high:g} to {low:g}: pass sigma_max, for example 80")
    places = [1 - i / max(steps - 1, 1) for i in range(steps)]
    if shape != 1:
        from scipy.stats import beta  # slow to import, and needed here only

        places = beta.ppf(places, shape, shape).tolist()
    into, back = (math.log, math.exp) if rho == math.inf else (lambda x: x ** (1 / rho), lambda x: x**rho)
    at = curve(process)
    levels = [at(back(into(low) + place * (into(high) - into(low)))) for place in places]
    return [level._replace(t=float(round(level.t))) for level in levels] if rounded else levels


def _flow_match(process: Process, steps: int) -> list[Level]:
    """diffusers' FlowMatchEuler: linspace from 1 to the time of 1 in 1000, which it shifts once more."""
    low = _evaluate(_only(process, Flow, "flow_match"), 1 / 1000).sigma
    return [_evaluate(process, 1 + i / max(steps - 1, 1) * (low - 1)) for i in range(steps)]


def _flow_sigmas(process: Process, steps: int, from_noise: bool = False) -> list[Level]:
    """diffusers' DPM-Solver++ and, from_noise, UniPC on a flow: 0.999 i / n, or the same from the other end, where the
    first is 1. The network is told whole times, cut off, 999 at most: in numpy, as there, for the cut feels the last bit."""
    even = np.linspace(1, 1 / 1000, steps + 1)
    even = (even[:-1] if from_noise else (1 - even)[:0:-1]).tolist()
    levels = [_evaluate(_only(process, Flow, "flow_sigmas"), t) for t in even]
    return [level._replace(t=float(min(int(level.t), 999))) for level in levels]


SCHEDULES = {
    "normal": _trailing, "trailing": _trailing, "leading": _leading,
    "linspace": _linspace, "linspace_unrounded": partial(_linspace, whole=float),
    "karras": _by_noise, "exponential": partial(_by_noise, rho=math.inf), "beta": partial(_by_noise, rho=1.0, shape=0.6),
    "log_snr": partial(_by_noise, rho=math.inf),  # exponential by its other name: log(sigma / alpha) is half of it
    "flow_match": _flow_match, "flow_sigmas": _flow_sigmas,
}


def _only(process: Process, kind: type, schedule: str) -> Process:
    if not isinstance(process, kind):
        why = "needs a discrete table" if kind is Discrete else "is for process 'flow'"
        raise ValueError(f"schedule '{schedule}' {why}: use 'normal' or 'trailing' with this process")
    return process


def curve(process: Process) -> Callable[[float], Level]:
    """The process by sigma / alpha instead of by time. Beyond the ends of a table the network is told the last time."""
    if not isinstance(process, Discrete):
        return lambda ratio: _evaluate(process, find_t(process, torch.tensor([ratio], dtype=torch.float64)).item())
    logs = (process.sigma / process.alpha).log().tolist()
    return lambda ratio: _from_ratio(_find(math.log(ratio), logs), ratio)


def _evaluate(process: Process, t: float) -> Level:
    """The process at t in [0, 1], as Python floats."""
    return Level(*(value.item() for value in process(torch.tensor([t], dtype=torch.float64))))


def _at(table: Discrete, t: float) -> Level:
    """The level at time t of the table, sigma / alpha interpolated where t lies between two entries."""
    low = int(t)
    if t == low:
        return Level(float(t), table.alpha[low].item(), table.sigma[low].item())
    return _from_ratio(t, torch.lerp(*(table.sigma / table.alpha)[low : low + 2], t - low).item())


def _from_ratio(t: float, ratio: float) -> Level:
    """The variance-preserving level (alpha^2 + sigma^2 = 1) with this sigma / alpha."""
    alpha = (1 + ratio**2) ** -0.5
    return Level(t, alpha, alpha * ratio)


def _find(x: float, table: list[float]) -> float:
    """The fractional index where the rising table reaches x, clamped to its ends."""
    low = min(max(bisect_right(table, x) - 1, 0), len(table) - 2)
    return low + min(max((x - table[low]) / (table[low + 1] - table[low]), 0.0), 1.0)
