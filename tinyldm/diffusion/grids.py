"""Grids: the noise levels at which a sampler calls the network. Every quirk of a published scheduler is a list of Levels.

`grid(process, steps)` gives steps + 1 levels of Python floats, from noise to data. You can slice it or build one by hand,
since most samplers only use two neighbouring levels at a time. To start part-way, from an image, pass `strength` and add
noise up to the first level:

    levels = grid(process, 30, strength=0.6)
    x = levels[0].alpha * x0 + levels[0].sigma * eps

Schedules that reproduce the published schedulers (vendor_loaders/scheduler.py finds them from a scheduler's config):
  DDIM, DDPM, PNDM           leading (offset=1 for Stable Diffusion), trailing, linspace
  Euler, Euler a, Heun, LMS  leading, trailing, linspace_unrounded; karras, exponential, beta with ends= one of these
  LCM                        skipping
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

from tinyldm.diffusion.process import CLEAN, Discrete, Flow, Level, Process, at_size, check_options, find_t
from tinyldm.lookup import lookup


class Levels(list):
    """Levels, and the curve on which they lie, sigma / alpha -> Level, for samplers that need levels between them."""

    def __init__(self, levels: Iterable[Level], curve: Callable[[float], Level]) -> None:
        super().__init__(levels)
        self.curve = curve

    def __getitem__(self, key):
        item = super().__getitem__(key)
        return Levels(item, self.curve) if isinstance(key, slice) else item


def grid(
    process: Process, steps: int, schedule: str | Sequence[float] = "normal", *, strength: float = 1.0,
    drop_last: bool = False, set_alpha_to_one: bool = True, alpha_floor: float = 0.0, **options,
) -> Levels:
    """The levels of `steps` sampling steps: steps + 1 of them, with decreasing noise, the last of them clean data.

    schedule          a name in SCHEDULES ("normal" is trailing), or the times before clean data, as numbers or as the string
                      "999,800,500,200,50": entries of a table, or 1000 t before a flow's shift; `steps` is then ignored
    strength          in (0, 1]: keep only the last int(steps * strength) steps, for image-to-image
    drop_last         make steps + 1 levels and leave out the least noisy one, as DPM-Solver++ does in diffusers
    set_alpha_to_one  False: end at the first entry of a discrete table instead of at clean data
    alpha_floor       replaces an alpha of 0; 2**-12 in those schedulers of diffusers that divide by alpha
    options           offset (leading); original (skipping); from_noise (flow_sigmas); twice (flow_match); those of _by_noise
                      (karras, exponential, beta)

    A table with zero terminal SNR must be sampled from its last entry (arXiv:2305.08891, Section 3.3): at any other the
    network expects a trace of signal, above all the mean brightness, which the initial noise does not contain. "trailing"
    and "linspace" start at the last entry, "leading" does not.

    ValueError for unknown names and for counts and strengths out of range; it says which are valid.
    """
    make_levels, process = find_schedule(schedule), at_size(process)
    options = check_options(make_levels, options, f"{schedule} option")
    max_steps = len(process) - drop_last if isinstance(process, Discrete) else math.inf
    if not 1 <= steps <= max_steps:
        raise ValueError(f"{steps} sampling steps: use {'1 or more' if max_steps == math.inf else f'1 to {max_steps}'}")
    last = _at(process, 0.0) if isinstance(process, Discrete) and not set_alpha_to_one else CLEAN
    if alpha_floor and isinstance(process, Discrete):
        process = Discrete.from_alpha(process.alpha.masked_fill(process.alpha == 0, alpha_floor))
    make = lambda count: make_levels(process, count + drop_last, **options)[: -1 if drop_last else None]
    levels = make(steps)
    if not falling(levels):  # most samplers divide by the length of a step
        most = next((count for count in range(steps - 1, 0, -1) if falling(make(count))), 1)
        raise ValueError(f"{steps} sampling steps with schedule '{schedule}' would meet a noise level twice: use {most} or fewer")
    levels = levels + [last]
    if alpha_floor and levels[0].alpha == 0:
        levels[0] = Level(levels[0].t, alpha_floor, 1 - alpha_floor)  # a flow, since the table's own zero was replaced above
    steps = len(levels) - 1
    kept = int(steps * strength + 1e-9)  # 50 * 0.58 is 28.999..., which int() alone would round to 28
    if not 1 <= kept <= steps:
        raise ValueError(f"strength {strength} keeps {kept} of {steps} steps: use {1 / steps:.2g} to 1")
    return Levels(levels[steps - kept :], curve(process))


def falling(levels: Sequence[Level]) -> bool:
    """Whether no two neighbouring levels are the same, whatever their times."""
    return all(now[1:] != nxt[1:] for now, nxt in pairwise(levels))


def find_schedule(schedule: str | Sequence[float]) -> Callable[..., list[Level]]:
    """A schedule by name, or one with the given times. ValueError for unknown names, and for times that are no numbers."""
    if isinstance(schedule, str) and not schedule.strip()[:1].isdigit():
        return lookup(SCHEDULES, schedule, "schedule")
    try:
        times = [float(time) for time in (schedule.split(",") if isinstance(schedule, str) else schedule)]
    except ValueError:
        raise ValueError(f"schedule '{schedule}' is not a list of times: write them as 999,800,500,200,50") from None

    def listed(process: Process, steps: int) -> list[Level]:
        lowest, highest = (0, len(process) - 1) if isinstance(process, Discrete) else (0.001, 1000)
        if not times or not highest >= times[0] >= times[-1] >= lowest or any(a <= b for a, b in pairwise(times)):
            raise ValueError(f"schedule {schedule}: give falling times, {highest} at most and {lowest} at least")
        return [_at(process, t) if isinstance(process, Discrete) else _evaluate(process, t / 1000) for t in times]

    return listed


def _trailing(process: Process, steps: int) -> list[Level]:
    """Starts at the noisiest level. In a table of T entries the times are T - 1, T - T/n - 1, ..., T/n - 1, rounded; on a
    continuous curve t = i / n."""
    if isinstance(process, Discrete):
        return [_at(process, round(len(process) * i / steps) - 1) for i in range(steps, 0, -1)]
    return [_evaluate(process, i / steps) for i in range(steps, 0, -1)]


def _leading(process: Process, steps: int, offset: int = 0) -> list[Level]:
    """Ends at the cleanest level and leaves out the noisiest: DDIM's, and with `offset` added Stable Diffusion 1's."""
    stride, top = len(_only(process, Discrete, "leading")) // steps, len(process) - 1
    return [_at(process, min(stride * i + offset, top)) for i in range(steps - 1, -1, -1)]


def _skipping(process: Process, steps: int, original: int = 50) -> list[Level]:
    """LCM's: of the `original` evenly spaced times of its training, the noisiest among them, every (original / n)-th
    (arXiv:2310.04378, Sec. 4.3, and diffusers)."""
    original = min(original, len(_only(process, Discrete, "skipping")))
    if not 1 <= steps <= original:
        raise ValueError(f"{steps} sampling steps with schedule 'skipping' of {original} times: use {original} or fewer")
    stride = len(process) // original
    return [_at(process, stride * (original - original * i // steps) - 1) for i in range(steps)]


def _linspace(process: Process, steps: int, rounding: Callable[[float], float] = round) -> list[Level]:
    """Evenly spaced times from the last entry to the first, rounded to integers (halves to even). Unrounded, with
    sigma / alpha interpolated between entries, it is k-diffusion's own grid. A single step starts from the noisiest level."""
    top = len(_only(process, Discrete, "linspace")) - 1
    stride = top / max(steps - 1, 1)
    return [_at(process, rounding(t)) for t in [top] + [i * stride for i in range(steps - 2, -1, -1)]]


def _by_noise(
    process: Process, steps: int, rho: float = 7.0, shape: float = 1.0, sigma_min: float | None = None,
    sigma_max: float | None = None, ends: str | None = None, offset: int = 0, rounded: bool = False,
) -> list[Level]:
    """Evenly spaced in (sigma / alpha)^(1 / rho). Karras: rho = 7, with short steps near the data (arXiv:2206.00364, Eq. 5).
    Exponential: rho = inf, evenly spaced in log-SNR. Beta: rho = 1, spaced like the quantiles of Beta(shape, shape), which
    lie close together at both ends (diffusers' reading of arXiv:2407.12173, where it is the times that are so spaced).

    sigma_min and sigma_max are in units of sigma / alpha. By default they are the ends of the curve (that of `cosine` is
    2e4, so pass 80), or those of another schedule (`ends`, with its `offset`). The network's times are not integers unless
    `rounded`.
    """
    if ends is not None:
        first, *_, last = 2 * lookup(SCHEDULES, ends, "schedule")(process, steps, **({"offset": offset} if offset else {}))
    else:  # where the curve ends at pure noise or clean data, sigma / alpha is infinite or 0: stop 0.001 before
        first, last = (end if end.alpha * end.sigma > 0 else _evaluate(process, t)
                       for end, t in ((_evaluate(process, 1.0), 0.999), (_evaluate(process, 0.0), 0.001)))
    high = sigma_max if sigma_max is not None else first.sigma / first.alpha if first.alpha else math.inf
    low = last.sigma / last.alpha if sigma_min is None else sigma_min
    if not 0 < low <= high < math.inf:
        raise ValueError(f"sigma / alpha cannot fall from {high:g} to {low:g}: pass sigma_max, for example 80")
    fractions = [1 - i / max(steps - 1, 1) for i in range(steps)]
    if shape != 1:
        from scipy.stats import beta  # slow to import, and needed here only

        fractions = beta.ppf(fractions, shape, shape).tolist()
    warp, unwarp = (math.log, math.exp) if rho == math.inf else (lambda x: x ** (1 / rho), lambda x: x**rho)
    at = curve(process)
    levels = [at(unwarp(warp(low) + fraction * (warp(high) - warp(low)))) for fraction in fractions]
    return [level._replace(t=float(round(level.t))) for level in levels] if rounded else levels


def _flow_match(process: Process, steps: int, twice: bool = True) -> list[Level]:
    """diffusers' FlowMatchEuler: linspace from 1 to the shifted time of 1/1000; the process then shifts each once more. With dynamic
    shifting (twice=False), that time is 1/1000 itself."""
    low = _evaluate(_only(process, Flow, "flow_match"), 1 / 1000).sigma if twice else 1 / 1000
    return [_evaluate(process, 1 + i / max(steps - 1, 1) * (low - 1)) for i in range(steps)]


def _flow_sigmas(process: Process, steps: int, from_noise: bool = False) -> list[Level]:
    """The grids of diffusers on a flow: 0.999 i / n for DPM-Solver++, and with from_noise that of UniPC, 1 - 0.999 i / n,
    which starts at 1. The network's times are truncated to integers, 999 at most. They are computed in numpy, as diffusers
    does, because truncation depends on the last bit."""
    times = np.linspace(1, 1 / 1000, steps + 1)
    times = (times[:-1] if from_noise else (1 - times)[:0:-1]).tolist()
    levels = [_evaluate(_only(process, Flow, "flow_sigmas"), t) for t in times]
    return [level._replace(t=float(min(int(level.t), 999))) for level in levels]


SCHEDULES = {
    "normal": _trailing, "trailing": _trailing, "leading": _leading, "skipping": _skipping,
    "linspace": _linspace, "linspace_unrounded": partial(_linspace, rounding=float),
    "karras": _by_noise, "exponential": partial(_by_noise, rho=math.inf), "beta": partial(_by_noise, rho=1.0, shape=0.6),
    "log_snr": partial(_by_noise, rho=math.inf),  # the same as exponential: log_snr is -2 log(sigma / alpha)
    "flow_match": _flow_match, "flow_sigmas": _flow_sigmas,
}


def _only(process: Process, kind: type, schedule: str) -> Process:
    if not isinstance(process, kind):
        why = "needs a discrete table" if kind is Discrete else "is for process 'flow'"
        raise ValueError(f"schedule '{schedule}' {why}: use 'normal' or 'trailing' with this process")
    return process


def curve(process: Process) -> Callable[[float], Level]:
    """The process as a function of sigma / alpha instead of time. Beyond the ends of a table, t is that of the nearest end."""
    if not isinstance(process, Discrete):
        return lambda ratio: _evaluate(process, find_t(process, torch.tensor([ratio], dtype=torch.float64)).item())
    logs = (process.sigma / process.alpha).log().tolist()
    return lambda ratio: _from_ratio(_fractional_index(math.log(ratio), logs), ratio)


def _evaluate(process: Process, t: float) -> Level:
    """The process at t in [0, 1], as Python floats."""
    return Level(*(value.item() for value in process(torch.tensor([t], dtype=torch.float64))))


def _at(table: Discrete, t: float) -> Level:
    """The level at time t of the table. Between two entries, sigma / alpha is interpolated."""
    low = int(t)
    if t == low:
        return Level(float(t), table.alpha[low].item(), table.sigma[low].item())
    return _from_ratio(t, torch.lerp(*(table.sigma / table.alpha)[low : low + 2], t - low).item())


def _from_ratio(t: float, ratio: float) -> Level:
    """The variance-preserving level (alpha^2 + sigma^2 = 1) with this sigma / alpha."""
    alpha = (1 + ratio**2) ** -0.5
    return Level(t, alpha, alpha * ratio)


def _fractional_index(x: float, table: list[float]) -> float:
    """The fractional index at which the increasing table reaches x, clamped to its ends."""
    low = min(max(bisect_right(table, x) - 1, 0), len(table) - 2)
    return low + min(max((x - table[low]) / (table[low + 1] - table[low]), 0.0), 1.0)
